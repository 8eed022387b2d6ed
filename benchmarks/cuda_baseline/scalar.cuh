// A peer for benchmarks, of the design that the published CUDA kernels of both operators have: one thread per output
// channel, which works out every point for itself and reads one number at a time. Backward: a block per item, a thread
// per channel, a tree in shared memory for what is summed over channels, scalar atomics for the value.
//
// Written for this project, on its own description of problems; never part of the installed extension.
#pragma once
#include "geometry.cuh"
#include "storage.cuh"

namespace the_mask {
namespace cuda {

constexpr int kScalarThreads = 256;
constexpr int kMostChannels = 1024;  // one block's threads

template <class T, class Geometry>
__device__ __forceinline__ Corners<Work<T>> scalar_point(const Problem& p, const Geometry& geometry, const Level* table,
                                                         int64_t item, int64_t row, int point, Place<Work<T>>* at) {
  const Work<T>* given = static_cast<const Work<T>*>(p.places) + 2 * (item * p.points + point);
  *at = place<Work<T>>(geometry, table, row, point, given[0], given[1]);
  return find_corners(*at);
}

template <class T, class Geometry>
__global__ void scalar_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Geometry geometry) {
  typedef Work<T> A;
  __shared__ Level table[kMaxLevels];
  prepare(geometry, table);
  __syncthreads();
  const int64_t pixel = int64_t(p.heads) * p.channels, count = p.images * p.rows * pixel;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < count; index += step) {
    int64_t channel, head, row;
    const int64_t item = divide(index, p.channels, &channel);
    const int64_t image = divide(divide(item, p.heads, &head), p.rows, &row);
    const T* from = static_cast<const T*>(p.value) + image * p.positions * pixel + head * p.channels + channel;
    A sum = 0;
    for (int point = 0; point < p.points; ++point) {
      Place<A> at;
      const Corners<A> corners = scalar_point<T>(p, geometry, table, item, row, point, &at);
      A sample = 0;
      for (int r = 0; r < 4; ++r) {
        if (corners.index[r] >= 0) sample += corners.weight[r] * widen(from[corners.index[r] * pixel]);
      }
      sum += static_cast<const A*>(p.weights)[item * p.points + point] * sample;
    }
    if (p.share != nullptr) {
      const A share = static_cast<const A*>(p.share)[item];
      sum = sum * (1 - share) + widen(from[row * pixel]) * share;
    }
    narrow(sum, static_cast<T*>(p.output) + index);
  }
}

// Sum over the threads of a block, a power of two, of `count` numbers each; thread 0 finds the sums at [k][0].
template <class A>
__device__ __forceinline__ void sum_over_block(A (*partial)[kMostChannels], int count) {
  const int thread = threadIdx.x;
  for (int half = int(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int k = 0; thread < half && k < count; ++k) partial[k][thread] += partial[k][thread + half];
  }
}

template <class T, class Geometry>
__global__ void scalar_backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Geometry geometry) {
  typedef Work<T> A;
  __shared__ Level table[kMaxLevels];
  __shared__ A partial[3][kMostChannels];
  prepare(geometry, table);
  __syncthreads();
  const int channel = threadIdx.x;
  const bool mine = channel < p.channels;
  const int64_t pixel = int64_t(p.heads) * p.channels, items = p.images * p.rows * p.heads;
  A* grad_places = static_cast<A*>(p.grad_places);
  A* grad_weights = static_cast<A*>(p.grad_weights);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t head, row;
    const int64_t image = divide(divide(item, p.heads, &head), p.rows, &row);
    const int64_t start = image * p.positions * pixel + head * p.channels + channel;
    const T* from = static_cast<const T*>(p.value) + start;
    A* to = static_cast<A*>(p.grad_value) + start;
    const A grad = mine ? widen(static_cast<const T*>(p.grad_output)[item * p.channels + channel]) : A(0);
    const A share = p.share != nullptr ? static_cast<const A*>(p.share)[item] : A(0);
    A plain = 0;  // thread 0: scalar product of the gradient with the output without the share
    for (int point = 0; point < p.points; ++point) {
      const int64_t index = item * p.points + point;
      const A factor = static_cast<const A*>(p.weights)[index];
      Place<A> at;
      const Corners<A> corners = scalar_point<T>(p, geometry, table, item, row, point, &at);
      A dots[4] = {0, 0, 0, 0};
      for (int r = 0; r < 4; ++r) {
        if (!mine || corners.index[r] < 0) continue;
        dots[r] = grad * widen(from[corners.index[r] * pixel]);
        atomicAdd(to + corners.index[r] * pixel, factor * (1 - share) * corners.weight[r] * grad);
      }
      differentiate(corners, dots, &partial[0][channel], &partial[1][channel], &partial[2][channel]);
      sum_over_block(partial, 3);
      if (channel == 0) {
        const A rest = 1 - share;
        grad_weights[index] = rest * partial[0][0];
        grad_places[2 * index] = rest * factor * at.by_x * partial[1][0];
        grad_places[2 * index + 1] = rest * factor * at.by_y * partial[2][0];
        plain += factor * partial[0][0];
      }
      __syncthreads();
    }
    if (p.share != nullptr) {
      partial[0][channel] = mine ? grad * widen(from[row * pixel]) : A(0);
      if (mine) atomicAdd(to + row * pixel, share * grad);
      sum_over_block(partial, 1);
      if (channel == 0) static_cast<A*>(p.grad_share)[item] = partial[0][0] - plain;
      __syncthreads();
    }
  }
}

inline int scalar_blocks(int64_t units) { return int(units < (int64_t(1) << 24) ? units : int64_t(1) << 24); }

template <class T, class Geometry>
void run_scalar_forward(const Problem& p, const Geometry& geometry, void* stream) {
  const int64_t count = p.images * p.rows * p.heads * p.channels;
  launch(scalar_forward_kernel<T, Geometry>, scalar_blocks((count + kScalarThreads - 1) / kScalarThreads),
         kScalarThreads, stream, p, geometry);
}

// At most kMostChannels channels; the caller checks.
template <class T, class Geometry>
void run_scalar_backward(const Problem& p, const Geometry& geometry, void* stream) {
  int threads = 1;
  while (threads < p.channels) threads *= 2;
  launch(scalar_backward_kernel<T, Geometry>, scalar_blocks(p.images * p.rows * p.heads), threads, stream, p, geometry);
}

}  // namespace cuda
}  // namespace the_mask
