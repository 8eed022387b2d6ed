// The kernels, for both operators (the geometry is a template argument), and their launches.
//
// A sub-warp of `lanes` threads works on one item, each thread on V channels that one instruction loads. Points are
// taken in rounds of `lanes`: every thread works out one point's corners and leaves them in shared memory, then all
// threads walk over the round's points. Loops that synchronise have the same trip count in all threads of a block.
#pragma once
#include "geometry.cuh"
#include "storage.cuh"

namespace the_mask {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kOrderedThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

template <class A>
struct alignas(16) Four {
  A at[4];
};

// Arguments of all kernels, with types. Alignment of channels: V divides it.
template <class T>
struct Arguments {
  typedef Work<T> A;
  int64_t items, images, positions, rows;
  int heads, channels, points, lanes;
  const T* value;
  const A* places;
  const A* weights;
  const A* share;
  T* output;
  const T* grad_output;
  A* grad_value;
  A* grad_places;
  A* grad_weights;
  A* grad_share;
};

struct Item {
  int64_t image, row;
  int head;
};

__device__ __forceinline__ Item split(int64_t item, int64_t rows, int heads) {
  int64_t head, row;
  const int64_t image = divide(divide(item, heads, &head), rows, &row);
  return Item{image, row, int(head)};
}

// What a block shares: every thread's point of the round, as corners and their weights.
template <class A, int threads>
struct Shared {
  Four<int> where[threads];
  Four<A> weight[threads];

  __device__ __forceinline__ void put(int thread, const Corners<A>& corners, A factor) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      where[thread].at[r] = corners.index[r];
      weight[thread].at[r] = factor * corners.weight[r];
    }
  }
};

// A thread's number in its block and in its sub-warp, the sub-warp's first thread, and the block's number of sub-warps.
struct Lane {
  int thread, lane, first, together;
};

__device__ __forceinline__ Lane find_lane(int lanes, int threads) {
  const int thread = threadIdx.x, lane = thread & (lanes - 1);
  return Lane{thread, lane, thread - lane, threads / lanes};
}

template <class T, class Geometry>
__device__ __forceinline__ Corners<Work<T>> read_point(const Arguments<T>& a, const Geometry& geometry,
                                                       const Level* table, int64_t item, int64_t row, int point,
                                                       Place<Work<T>>* at) {
  typedef Work<T> A;
  const Pack<A, 2> given = load_pack<A, 2>(a.places + 2 * (item * a.points + point));
  *at = place<A>(geometry, table, row, point, given.at[0], given.at[1]);
  return find_corners(*at);
}

template <class T, int V, class Geometry>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Geometry geometry) {
  typedef Work<T> A;
  __shared__ Level table[kMaxLevels];
  __shared__ Shared<A, kThreads> shared;
  prepare(geometry, table);
  __syncthreads();

  const auto [thread, lane, first, together] = find_lane(a.lanes, kThreads);
  const int pixel = a.heads * a.channels;
  for (int64_t base = int64_t(blockIdx.x) * together; base < a.items; base += int64_t(gridDim.x) * together) {
    const int64_t item = base + thread / a.lanes;
    const bool active = item < a.items;
    const Item at = split(active ? item : 0, a.rows, a.heads);
    const T* image = a.value + at.image * a.positions * pixel + int64_t(at.head) * a.channels;
    for (int begin = 0; begin < a.channels; begin += a.lanes * V) {
      const int c = begin + lane * V;
      const bool mine = active && c < a.channels;
      A sum[V] = {};
      for (int round = 0; round < a.points; round += a.lanes) {
        const int point = round + lane;
        if (active && point < a.points) {
          Place<A> here;
          const Corners<A> corners = read_point(a, geometry, table, item, at.row, point, &here);
          const A factor = a.weights[item * a.points + point];
          shared.put(thread, corners, factor);
        }
        __syncwarp();
        if (mine) {
          const int count = min(a.lanes, a.points - round);
#pragma unroll 2
          for (int i = 0; i < count; ++i) {
            const Four<int> index = shared.where[first + i];
            const Four<A> factor = shared.weight[first + i];
            A corner[4][V];
            // A corner outside is not read: a zero weight times infinity would not be zero.
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
              for (int v = 0; v < V; ++v) corner[r][v] = 0;
              if (index.at[r] >= 0) load<T, V>(image + int64_t(index.at[r]) * pixel + c, corner[r]);
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
              for (int v = 0; v < V; ++v) sum[v] += factor.at[r] * corner[r][v];
            }
          }
        }
        __syncwarp();
      }
      if (mine) {
        if (a.share != nullptr) {
          const A share = a.share[item];
          A own[V];
          load<T, V>(image + at.row * pixel + c, own);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] = sum[v] * (1 - share) + own[v] * share;
        }
        store<T, V>(sum, a.output + item * a.channels + c);
      }
    }
  }
}

// Sums of four numbers over a sub-warp. With at least four lanes, lane i < 4 gets the sum number `*which`; with fewer,
// lane 0 gets them all. Exchanging halves instead of adding everything everywhere takes 4 shuffles, not 12, for 8 lanes.
template <class A>
__device__ __forceinline__ A add_up(A* four, int lane, int lanes, int* which) {
  if (lanes < 4) {
    for (int step = 1; step < lanes; step <<= 1) {
#pragma unroll
      for (int r = 0; r < 4; ++r) four[r] += __shfl_xor_sync(kAll, four[r], step);
    }
    *which = 0;
    return four[0];
  }
  const bool odd = lane & 1, upper = lane & 2;
  const A low = (odd ? four[2] : four[0]) + __shfl_xor_sync(kAll, odd ? four[0] : four[2], 1);
  const A high = (odd ? four[3] : four[1]) + __shfl_xor_sync(kAll, odd ? four[1] : four[3], 1);
  A sum = (upper ? high : low) + __shfl_xor_sync(kAll, upper ? low : high, 2);
  for (int step = 4; step < lanes; step <<= 1) sum += __shfl_xor_sync(kAll, sum, step);
  *which = 2 * int(odd) + int(upper);
  return sum;
}

// Gradients of places, weights and share; of value too, with atomics, unless grad_value is null.
template <class T, int V, class Geometry>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Geometry geometry) {
  typedef Work<T> A;
  __shared__ Level table[kMaxLevels];
  __shared__ Shared<A, kThreads> shared;
  __shared__ Four<A> dots[kThreads];
  prepare(geometry, table);
  __syncthreads();

  const auto [thread, lane, first, together] = find_lane(a.lanes, kThreads);
  const int pixel = a.heads * a.channels;
  for (int64_t base = int64_t(blockIdx.x) * together; base < a.items; base += int64_t(gridDim.x) * together) {
    const int64_t item = base + thread / a.lanes;
    const bool active = item < a.items;
    const Item at = split(active ? item : 0, a.rows, a.heads);
    const int64_t start = at.image * a.positions * pixel + int64_t(at.head) * a.channels;
    const T* image = a.value + start;
    A* grad_image = a.grad_value == nullptr ? nullptr : a.grad_value + start;
    const T* grad = a.grad_output + item * a.channels;
    const A share = active && a.share != nullptr ? a.share[item] : A(0);
    A plain = 0;  // scalar product of the gradient with the output without the share: this thread's points
    for (int round = 0; round < a.points; round += a.lanes) {
      const int point = round + lane, count = min(a.lanes, a.points - round);
      const bool owner = active && point < a.points;
      Place<A> here = {};
      Corners<A> corners = {{-1, -1, -1, -1}, {0, 0, 0, 0}, 0, 0};
      A factor = 0;
      if (owner) {
        corners = read_point(a, geometry, table, item, at.row, point, &here);
        factor = a.weights[item * a.points + point];
      }
      shared.put(thread, corners, factor * (1 - share));
      dots[thread] = Four<A>{};
      __syncwarp();
      for (int begin = 0; begin < a.channels; begin += a.lanes * V) {
        const int c = begin + lane * V;
        const bool mine = active && c < a.channels;
        A g[V] = {};
        if (mine) load<T, V>(grad + c, g);
        for (int i = 0; i < count; ++i) {
          A product[4] = {0, 0, 0, 0};
          if (mine) {
            const Four<int> index = shared.where[first + i];
            const Four<A> folded = shared.weight[first + i];
            A corner[4][V];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              if (index.at[r] >= 0) load<T, V>(image + int64_t(index.at[r]) * pixel + c, corner[r]);
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              if (index.at[r] >= 0) {
#pragma unroll
                for (int v = 0; v < V; ++v) product[r] += g[v] * corner[r][v];
                if (grad_image != nullptr) {
                  add_atomically<V>(grad_image + int64_t(index.at[r]) * pixel + c, folded.at[r], g);
                }
              }
            }
          }
          int which;
          const A sum = add_up(product, lane, a.lanes, &which);
          if (a.lanes >= 4) {
            if (lane < 4) dots[first + i].at[which] += sum;
          } else if (lane == 0) {
#pragma unroll
            for (int r = 0; r < 4; ++r) dots[first + i].at[r] += product[r];
          }
        }
      }
      __syncwarp();
      if (owner) {
        A sample, by_x, by_y;
        differentiate(corners, dots[thread].at, &sample, &by_x, &by_y);
        const int64_t index = item * a.points + point;
        const A rest = 1 - share;
        a.grad_weights[index] = rest * sample;
        Pack<A, 2> moved;
        moved.at[0] = rest * factor * here.by_x * by_x;
        moved.at[1] = rest * factor * here.by_y * by_y;
        store_pack<A, 2>(moved, a.grad_places + 2 * index);
        plain += factor * sample;
      }
    }
    if (a.share != nullptr) {
      A total = -plain;
      for (int begin = 0; begin < a.channels; begin += a.lanes * V) {
        const int c = begin + lane * V;
        if (active && c < a.channels) {
          A g[V], own[V];
          load<T, V>(grad + c, g);
          load<T, V>(image + at.row * pixel + c, own);
#pragma unroll
          for (int v = 0; v < V; ++v) total += g[v] * own[v];
          if (grad_image != nullptr) add_atomically<V>(grad_image + at.row * pixel + c, share, g);
        }
      }
      for (int step = 1; step < a.lanes; step <<= 1) total += __shfl_xor_sync(kAll, total, step);
      if (active && lane == 0) a.grad_share[item] = total;
    }
  }
}

// Gradient of value in a fixed order, without atomics: one thread owns one channel of one image's head and walks over
// all rows. Much slower than atomics; for torch.use_deterministic_algorithms.
template <class T, class Geometry>
__global__ void __launch_bounds__(kOrderedThreads)
    ordered_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Geometry geometry) {
  typedef Work<T> A;
  __shared__ Level table[kMaxLevels];
  __shared__ Shared<A, kOrderedThreads> shared;
  prepare(geometry, table);
  __syncthreads();

  const auto [thread, lane, first, together] = find_lane(a.lanes, kOrderedThreads);
  const int pixel = a.heads * a.channels;
  const int parts = (a.channels + a.lanes - 1) / a.lanes;
  const int64_t units = a.images * a.heads * parts;
  for (int64_t base = int64_t(blockIdx.x) * together; base < units; base += int64_t(gridDim.x) * together) {
    const int64_t unit = base + thread / a.lanes;
    const bool active = unit < units;
    const Item at = split(active ? unit : 0, a.heads, parts);  // row stands for the head, head for the part
    const int c = at.head * a.lanes + lane;
    const bool mine = active && c < a.channels;
    A* to = a.grad_value + at.image * a.positions * pixel + at.row * a.channels + c;
    for (int64_t row = 0; row < a.rows; ++row) {
      const int64_t item = (at.image * a.rows + row) * a.heads + at.row;
      const A g = mine ? widen(a.grad_output[item * a.channels + c]) : A(0);
      const A share = a.share != nullptr && active ? a.share[item] : A(0);
      for (int round = 0; round < a.points; round += a.lanes) {
        const int point = round + lane;
        if (active && point < a.points) {
          Place<A> here;
          const Corners<A> corners = read_point(a, geometry, table, item, row, point, &here);
          const A factor = a.weights[item * a.points + point] * (1 - share);
          shared.put(thread, corners, factor);
        }
        __syncwarp();
        if (mine) {
          const int count = min(a.lanes, a.points - round);
          for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int index = shared.where[first + i].at[r];
              if (index >= 0) to[int64_t(index) * pixel] += shared.weight[first + i].at[r] * g;
            }
          }
        }
        __syncwarp();
      }
      if (mine && a.share != nullptr) to[row * pixel] += share * g;
    }
  }
}

// Threads for `parts` channel vectors: the next power of two, within a warp.
inline int lanes_for(int parts) {
  int lanes = 1;
  while (lanes < parts && lanes < 32) lanes *= 2;
  return lanes;
}

// Any more blocks than this take several turns.
inline int blocks_for(int64_t units, int together) {
  const int64_t blocks = (units + together - 1) / together;
  return int(blocks < (int64_t(1) << 24) ? blocks : int64_t(1) << 24);
}

template <class T>
Arguments<T> typed(const Problem& p) {
  typedef Work<T> A;
  Arguments<T> a;
  a.items = p.images * p.rows * p.heads;
  a.images = p.images;
  a.positions = p.positions;
  a.rows = p.rows;
  a.heads = p.heads;
  a.channels = p.channels;
  a.points = p.points;
  a.lanes = 1;
  a.value = static_cast<const T*>(p.value);
  a.places = static_cast<const A*>(p.places);
  a.weights = static_cast<const A*>(p.weights);
  a.share = static_cast<const A*>(p.share);
  a.output = static_cast<T*>(p.output);
  a.grad_output = static_cast<const T*>(p.grad_output);
  a.grad_value = static_cast<A*>(p.grad_value);
  a.grad_places = static_cast<A*>(p.grad_places);
  a.grad_weights = static_cast<A*>(p.grad_weights);
  a.grad_share = static_cast<A*>(p.grad_share);
  return a;
}

// Whether rows of channels can be moved 16 bytes at a time: a tensor may begin anywhere in its storage.
template <class T>
bool is_wide(const Problem& p) {
  const uintptr_t together = reinterpret_cast<uintptr_t>(p.value) | reinterpret_cast<uintptr_t>(p.output) |
                             reinterpret_cast<uintptr_t>(p.grad_output);
  return p.channels % Widest<T>::value == 0 && together % 16 == 0;
}

template <class T, int V, class Geometry>
void launch_forward(Arguments<T> a, const Geometry& geometry, void* stream) {
  a.lanes = lanes_for((a.channels + V - 1) / V);
  launch(forward_kernel<T, V, Geometry>, blocks_for(a.items, kThreads / a.lanes), kThreads, stream, a, geometry);
}

template <class T, int V, class Geometry>
void launch_backward(Arguments<T> a, const Geometry& geometry, void* stream) {
  a.lanes = lanes_for((a.channels + V - 1) / V);
  launch(backward_kernel<T, V, Geometry>, blocks_for(a.items, kThreads / a.lanes), kThreads, stream, a, geometry);
}

template <class T, class Geometry>
void run_forward(const Problem& problem, const Geometry& geometry, void* stream) {
  if (is_wide<T>(problem)) {
    launch_forward<T, Widest<T>::value>(typed<T>(problem), geometry, stream);
  } else {
    launch_forward<T, 1>(typed<T>(problem), geometry, stream);
  }
}

template <class T, class Geometry>
void run_backward(const Problem& problem, const Geometry& geometry, void* stream) {
  Arguments<T> a = typed<T>(problem);
  if (problem.deterministic) {
    a.lanes = lanes_for(a.channels);
    const int64_t units = a.images * a.heads * ((a.channels + a.lanes - 1) / a.lanes);
    launch(ordered_kernel<T, Geometry>, blocks_for(units, kOrderedThreads / a.lanes), kOrderedThreads, stream, a,
           geometry);
    a.grad_value = nullptr;
  }
  if (is_wide<T>(problem)) {
    launch_backward<T, Widest<T>::value>(a, geometry, stream);
  } else {
    launch_backward<T, 1>(a, geometry, stream);
  }
}

}  // namespace cuda
}  // namespace the_mask
