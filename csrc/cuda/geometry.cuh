// Where points lie, which pixels they touch with which weights, and the gradients of that; no memory access.
#pragma once
#include "problem.h"

namespace the_mask {
namespace cuda {

// Rounded one by one, never fused: a location that PyTorch's float32 operators put on an integer lies on it here too,
// and there the derivative depends on the side.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
#else
__device__ __forceinline__ float times(float a, float b) { return a * b; }
__device__ __forceinline__ float plus(float a, float b) { return a + b; }
__device__ __forceinline__ double times(double a, double b) { return a * b; }
__device__ __forceinline__ double plus(double a, double b) { return a + b; }
#endif

// A point in pixels of its level, and the derivatives of that position by what was given.
template <class A>
struct Place {
  A x, y, by_x, by_y;
  Level level;
};

// a / b and the remainder; 64-bit division is slow and seldom needed.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t* rest) {
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = uint32_t(a) / uint32_t(b);
    *rest = uint32_t(a) - quotient * uint32_t(b);
    return quotient;
  }
  *rest = a % b;
  return a / b;
}

// Sizes of the levels, in shared memory. All threads of a block call this, then synchronise.
__device__ __forceinline__ void prepare(const MsdaGeometry& geometry, Level* table) {
  if (geometry.device_sizes == nullptr) {
    for (int l = threadIdx.x; l < geometry.levels; l += blockDim.x) table[l] = geometry.table[l];
  } else if (threadIdx.x == 0) {
    int64_t start = 0;
    for (int l = 0; l < geometry.levels; ++l) {
      const int64_t height = geometry.device_sizes[2 * l], width = geometry.device_sizes[2 * l + 1];
      // These sizes were never seen by the host: this keeps wrong ones from reading other memory.
      CUDA_KERNEL_ASSERT(height > 0 && width > 0 && height <= geometry.positions && width <= geometry.positions &&
                         start + height * width <= geometry.positions &&
                         "ms_deform_attn: spatial_shapes do not add up to the positions of value");
      table[l] = Level{int(height), int(width), int(start)};
      start += height * width;
    }
  }
}
__device__ __forceinline__ void prepare(const DcnGeometry&, Level*) {}

template <class A>
__device__ __forceinline__ Place<A> place(const MsdaGeometry& geometry, const Level* table, int64_t, int point, A x, A y) {
  const Level level = table[point / geometry.points_per_level];
  const A width = A(level.width), height = A(level.height);
  return Place<A>{plus(times(x, width), A(-0.5)), plus(times(y, height), A(-0.5)), width, height, level};
}

template <class A>
__device__ __forceinline__ Place<A> place(const DcnGeometry& geometry, const Level*, int64_t row, int point, A x, A y) {
  const int tap = point + int(geometry.removed >= 0 && point >= geometry.removed);
  const int column = tap / geometry.kernel_height, line = tap - column * geometry.kernel_height;
  int64_t across;
  const int64_t down = divide(row, geometry.output_width, &across);
  const A scale = A(geometry.offset_scale);
  const A tap_x = A(column * geometry.dilation_x - geometry.center_x);
  const A tap_y = A(line * geometry.dilation_y - geometry.center_y);
  const A base_x = A(across * geometry.stride_x + geometry.base_x), base_y = A(down * geometry.stride_y + geometry.base_y);
  return Place<A>{plus(base_x, times(scale, plus(tap_x, x))), plus(base_y, times(scale, plus(tap_y, y))), scale, scale,
                  Level{geometry.height, geometry.width, 0}};
}

// The pixels around a point, in the order (top left, top right, bottom left, bottom right): index within the image or
// -1 for none, and bilinear weight.
template <class A>
struct Corners {
  int index[4];
  A weight[4];
  A right, below;  // distances from the top left corner
};

// A point takes part only if it lies strictly inside (-1, size). The comparisons are false for NaN, and what passes them
// fits an int.
template <class A>
__device__ __forceinline__ Corners<A> find_corners(const Place<A>& at) {
  Corners<A> found = {{-1, -1, -1, -1}, {0, 0, 0, 0}, 0, 0};
  const Level& level = at.level;
  if (at.x > A(-1) && at.x < A(level.width) && at.y > A(-1) && at.y < A(level.height)) {
    const A left = floor(at.x), top = floor(at.y);
    const int column = int(left), line = int(top);
    const A right = at.x - left, below = at.y - top;
    const bool has_left = column >= 0, has_right = column + 1 < level.width;
    const bool has_top = line >= 0, has_bottom = line + 1 < level.height;
    const int first = level.start + line * level.width + column;
    found.index[0] = has_top && has_left ? first : -1;
    found.index[1] = has_top && has_right ? first + 1 : -1;
    found.index[2] = has_bottom && has_left ? first + level.width : -1;
    found.index[3] = has_bottom && has_right ? first + level.width + 1 : -1;
    found.weight[0] = (1 - below) * (1 - right);
    found.weight[1] = (1 - below) * right;
    found.weight[2] = below * (1 - right);
    found.weight[3] = below * right;
    found.right = right;
    found.below = below;
  }
  return found;
}

// Scalar product of the gradient with the sample, and its derivatives by the position, from the scalar products with
// the corners (zero where there is none). At integer positions: the derivative to the right, or downwards.
template <class A>
__device__ __forceinline__ void differentiate(const Corners<A>& at, const A* dots, A* sample, A* by_x, A* by_y) {
  const A above = dots[0] + at.right * (dots[1] - dots[0]), under = dots[2] + at.right * (dots[3] - dots[2]);
  *sample = above + at.below * (under - above);
  *by_x = (1 - at.below) * (dots[1] - dots[0]) + at.below * (dots[3] - dots[2]);
  *by_y = under - above;
}

}  // namespace cuda
}  // namespace the_mask
