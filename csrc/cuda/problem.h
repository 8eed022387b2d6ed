// Arguments of the CUDA kernels: plain pointers and sizes, no torch. Included by the kernels and by operators.cpp.
//
// Both operators are one computation: an item is one (image, row, head), a row being a query or an output pixel and a
// head an attention head or a group; it sums its points' bilinear samples of the head's channels, times their weights.
#pragma once
#include <cstdint>

namespace the_mask {
namespace cuda {

enum class Storage { f32, f64, bf16, f16 };

// Tensors are contiguous. value, output and grad_output have the storage type; everything else has the working type
// (float, or double for double).
struct Problem {
  Storage storage;
  int64_t images, positions, rows;  // positions: pixels of one image, all levels
  int heads, channels, points;      // channels and points are those of one item
  const void* value;                // [images, positions, heads, channels]
  const void* places;               // [images, rows, heads, points, 2]: locations or offsets, (x, y)
  const void* weights;              // [images, rows, heads, points]
  const void* share;                // [images, rows, heads] or null: share of value at the item's own row in the output
  void* output;                     // [images, rows, heads, channels]; forward only
  const void* grad_output;          // the rest: backward only
  void* grad_value;                 // starts as zeros
  void* grad_places;
  void* grad_weights;
  void* grad_share;
  bool deterministic;
};

struct Level {
  int height, width, start;
};
constexpr int kMaxLevels = 64;

// Multi-scale deformable attention: places are normalised locations, points are ordered (level, point).
struct MsdaGeometry {
  int levels, points_per_level;
  int64_t positions;
  const int64_t* device_sizes;  // [levels, 2] (H, W) on the device, or null: then table is filled in
  Level table[kMaxLevels];
};

// DCNv3: places are offsets in pixels; points go down the columns of the kernel grid.
struct DcnGeometry {
  int height, width, output_width;
  int kernel_height;
  int removed;             // tap that is left out, or -1
  int stride_y, stride_x;
  int dilation_y, dilation_x;
  int center_y, center_x;  // of the kernel grid, from its first tap
  int base_y, base_x;      // centre of the kernel at output (0, 0)
  double offset_scale;
};

// Labels of a score map [K, h, w] that is enlarged to [H, W]; a pixel is a weighted sum of taps x taps (2 or 3) cells.
struct LabelProblem {
  int K, h, w, H, W, taps;
  const float* scores;
  const int32_t* row_start;  // [H]: first map row
  const float* row_weights;  // [H, taps]
  const int32_t* column_start;
  const float* column_weights;
  void* labels;  // uint8 with `bytes`, else int32
  bool bytes;
};

// stream is a cudaStream_t. Throw c10::Error when a launch fails.
void forward(const Problem& problem, const MsdaGeometry& geometry, void* stream);
void backward(const Problem& problem, const MsdaGeometry& geometry, void* stream);
void forward(const Problem& problem, const DcnGeometry& geometry, void* stream);
void backward(const Problem& problem, const DcnGeometry& geometry, void* stream);
void labels(const LabelProblem& problem, void* stream);

}  // namespace cuda
}  // namespace the_mask
