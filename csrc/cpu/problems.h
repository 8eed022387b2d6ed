// Arguments of the kernels: plain pointers and sizes, no torch. Included by the kernels and by ops.cpp.
#pragma once
#include <cstdint>

#include "../work_type.h"

namespace the_mask {

enum class Storage { f32, f64, bf16, f16 };

// Multi-scale deformable attention. Tensors are contiguous; value, output and their gradients have the storage type,
// the others the working type (float, or double for double).
struct MsdaProblem {
  Storage storage;
  int64_t N, S, M, D, Q, L, P;
  const int64_t* sizes;  // L pairs (H, W)
  const void* value;     // [N, S, M, D]
  const void* locations;  // [N, Q, M, L, P, 2]
  const void* weights;    // [N, Q, M, L, P]
  void* output;           // [N, Q, M, D]; forward only
  const void* grad_output;  // the rest: backward only
  void* grad_value;
  void* grad_locations;
  void* grad_weights;
};

// DCNv3. Tensors are contiguous; x, output and grad_output have the storage type, everything else (grad_x too, which is
// added to and starts as zeros) the working type.
struct DcnProblem {
  Storage storage;
  int64_t N, H, W, G, D, Ho, Wo, P;
  int64_t stride_x, stride_y;
  int64_t base_x, base_y;  // centre of the kernel at output (0, 0)
  double offset_scale;
  const double* taps;  // P pairs (x, y) relative to the centre, scaled
  const void* x;       // [N, H, W, G, D]
  const void* offset;  // [N, Ho, Wo, G, P, 2]
  const void* mask;    // [N, Ho, Wo, G, P]
  const void* scale;   // [N, H, W, G] or null
  void* output;        // [N, Ho, Wo, G, D]; forward only
  const void* grad_output;  // the rest: backward only
  void* grad_x;
  void* grad_offset;
  void* grad_mask;
  void* grad_scale;
};

// Output pixels: rows and columns from first to before last.
struct DcnTile {
  int64_t first_row, last_row, first_column, last_column;
};

// Output rows of a backward pass that run apart from the others, and what they may add to grad_x: rows of their own.
// What falls on other rows goes to a spill, which is added afterwards, so that no sum depends on which band is faster.
struct DcnBand {
  int64_t first_row, last_row;  // of the output
  int64_t own_first, own_last;  // of x
  void* spill;                  // [H, W, G, D], working type; rows are zeroed when first used
  int64_t* spilled;             // 2: first row in use, and the one after the last; null where all rows are the band's own
};

// Labels of a score map that is enlarged by linear interpolation along both axes; a pixel is a weighted sum of `taps` (2
// or 3) neighbouring cells per axis. A cell beyond the map may have a weight of zero.
struct LabelProblem {
  int64_t K, h, w, H, W, taps;
  const float* scores;         // [K, h, w]
  const int32_t* row_start;    // [H]: first map row
  const float* row_weights;    // [H, taps]
  const int32_t* column_start;  // [W]
  const float* column_weights;  // [W, taps]
  void* labels;                 // [H, W] uint8 with `bytes`, else int32
  bool bytes;
};

// One instruction set's kernels. Calls for different heads, tiles, groups or bands write to different memory.
struct Kernels {
  const char* name;
  // Bytes of scratch (64-byte aligned) that a call needs.
  int64_t (*msda_scratch)(const MsdaProblem&, bool backward);
  void (*msda_forward)(const MsdaProblem&, int64_t n, int64_t m, int64_t first, int64_t last, void* scratch);
  void (*msda_backward)(const MsdaProblem&, int64_t n, int64_t m, void* scratch);
  // Queries begin..end-1 of all images, counted together, with all their heads, without packing.
  int64_t (*msda_direct_scratch)(const MsdaProblem&);
  void (*msda_direct)(const MsdaProblem&, int64_t begin, int64_t end, void* scratch);
  int64_t (*dcn_scratch)(const DcnProblem&);
  void (*dcn_forward)(const DcnProblem&, int64_t n, const DcnTile&, void* scratch);
  // Groups group..group+groups-1 of a band of image n, in column strips of that width; then the rows that it added to another band's.
  void (*dcn_backward)(const DcnProblem&, int64_t n, int64_t group, int64_t groups, const DcnBand&, int64_t strip,
                       void* scratch);
  void (*dcn_add_spill)(const DcnProblem&, int64_t n, int64_t group, int64_t groups, const DcnBand&);
  int64_t (*labels_scratch)(const LabelProblem&);
  void (*labels)(const LabelProblem&, int64_t first_row, int64_t last_row, void* scratch);
};

const Kernels& kernels_baseline();
#if defined(__x86_64__) || defined(_M_X64)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace the_mask
