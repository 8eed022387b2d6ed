// Sizes of the operators' arguments, and the checks needed for memory safety; shared by CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace the_mask {

using at::Tensor;

inline at::ScalarType work_type(const Tensor& storage) {
  return storage.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_tensor(const char* name, const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
                         const Tensor& lead) {
  TORCH_CHECK(tensor.sizes() == sizes, name, " has shape ", tensor.sizes(), ", expected ", sizes);
  TORCH_CHECK(tensor.scalar_type() == type, name, " has dtype ", tensor.scalar_type(), ", expected ", type);
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  TORCH_CHECK(tensor.device() == lead.device(), name, " is on ", tensor.device(), ", expected ", lead.device());
}

// Numbers within one image are counted in 32 bits; images start at 64-bit addresses.
inline void check_count(const char* name, int64_t count) {
  TORCH_CHECK(count < std::numeric_limits<int32_t>::max(), "one image of ", name, " has ", count,
              " numbers, the kernels take less than 2^31; use THE_MASK_OPS=portable");
}

struct MsdaSizes {
  int64_t N, S, M, D, Q, L, P;

  MsdaSizes(const Tensor& value, at::IntArrayRef sizes, const std::optional<Tensor>& device_shapes,
            const Tensor& locations, const Tensor& weights) {
    TORCH_CHECK(value.dim() == 4, "value has ", value.dim(), " axes, expected 4");
    TORCH_CHECK(locations.dim() == 6, "sampling_locations has ", locations.dim(), " axes, expected 6");
    N = value.size(0), S = value.size(1), M = value.size(2), D = value.size(3);
    Q = locations.size(1), L = locations.size(3), P = locations.size(4);
    check_tensor("value", value, value.sizes(), value.scalar_type(), value);
    check_tensor("sampling_locations", locations, {N, Q, M, L, P, 2}, work_type(value), value);
    check_tensor("attention_weights", weights, {N, Q, M, L, P}, work_type(value), value);
    check_count("value", S * M * D);
    if (device_shapes.has_value()) {
      check_tensor("spatial_shapes", *device_shapes, {L, 2}, at::kLong, value);
      return;
    }
    TORCH_CHECK(int64_t(sizes.size()) == 2 * L && L > 0, "spatial_shapes has ", sizes.size(), " numbers for ", L,
                " levels");
    int64_t positions = 0;
    for (int64_t l = 0; l < L; ++l) {
      TORCH_CHECK(sizes[2 * l] > 0 && sizes[2 * l + 1] > 0, "spatial_shapes: sizes must be positive, got ", sizes);
      positions += sizes[2 * l] * sizes[2 * l + 1];
    }
    TORCH_CHECK(positions == S, "value has ", S, " positions, spatial_shapes ", sizes, " make ", positions);
  }
};

struct DcnSizes {
  int64_t N, H, W, C, G, D, Ho, Wo, P;
  int64_t stride_y, stride_x, base_y, base_x;
  std::vector<double> taps;  // P pairs (x, y) from the kernel's centre, scaled; x is the outer loop

  DcnSizes(const Tensor& x, const Tensor& offset, const Tensor& mask, const std::optional<Tensor>& scale,
           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
           int64_t groups, double offset_scale, bool remove_center) {
    TORCH_CHECK(x.dim() == 4 && offset.dim() == 4, "x and offset must have 4 axes");
    TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                "kernel_size, stride, padding and dilation must be pairs");
    TORCH_CHECK(groups > 0 && x.size(3) % groups == 0, "groups=", groups, " does not divide ", x.size(3), " channels");
    for (int axis = 0; axis < 2; ++axis) {
      TORCH_CHECK(kernel[axis] > 0 && stride[axis] > 0 && padding[axis] >= 0 && dilation[axis] > 0,
                  "kernel_size, stride and dilation must be positive, padding not negative");
    }
    N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), G = groups, D = C / G;
    Ho = (H + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1;
    Wo = (W + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1;
    TORCH_CHECK(H > 0 && W > 0 && D > 0 && Ho > 0 && Wo > 0, "x of shape ", x.sizes(), " is too small for the kernel");
    const int64_t center_y = dilation[0] * (kernel[0] - 1) / 2, center_x = dilation[1] * (kernel[1] - 1) / 2;
    const int64_t count = kernel[0] * kernel[1];
    for (int64_t tap = 0; tap < count; ++tap) {
      if (remove_center && tap == count / 2) continue;
      taps.push_back(offset_scale * double(tap / kernel[0] * dilation[1] - center_x));
      taps.push_back(offset_scale * double(tap % kernel[0] * dilation[0] - center_y));
    }
    P = int64_t(taps.size()) / 2;
    TORCH_CHECK(P > 0, "the kernel has no point");
    stride_y = stride[0], stride_x = stride[1];
    base_y = center_y - padding[0], base_x = center_x - padding[1];
    check_tensor("x", x, x.sizes(), x.scalar_type(), x);
    check_tensor("offset", offset, {N, Ho, Wo, G * P * 2}, work_type(x), x);
    check_tensor("mask", mask, {N, Ho, Wo, G * P}, work_type(x), x);
    if (scale.has_value()) {
      check_tensor("center_feature_scale", *scale, {N, H, W, G}, work_type(x), x);
      TORCH_CHECK(Ho == H && Wo == W, "center_feature_scale needs an output of the input's size");
    }
    check_count("x", H * W * C);
    check_count("x", (Wo * stride_x + W) * 2 + (Ho * stride_y + H) * 2);
  }
};

struct LabelSizes {
  int64_t K, h, w, H, W, taps;
  bool bytes;

  LabelSizes(const Tensor& scores, const Tensor& row_start, const Tensor& row_weights, const Tensor& column_start,
             const Tensor& column_weights) {
    TORCH_CHECK(scores.dim() == 3, "scores has ", scores.dim(), " axes, expected 3");
    TORCH_CHECK(row_start.dim() == 1 && column_start.dim() == 1 && row_weights.dim() == 2,
                "starts must have 1 axis and weights 2");
    K = scores.size(0), h = scores.size(1), w = scores.size(2);
    H = row_start.size(0), W = column_start.size(0), taps = row_weights.size(1);
    TORCH_CHECK(K > 0 && h > 0 && w > 0, "scores of shape ", scores.sizes(), " are empty");
    TORCH_CHECK(taps == 2 || taps == 3, "weights have ", taps, " taps, expected 2 or 3");
    check_tensor("scores", scores, scores.sizes(), at::kFloat, scores);
    check_tensor("row_start", row_start, {H}, at::kInt, scores);
    check_tensor("row_weights", row_weights, {H, taps}, at::kFloat, scores);
    check_tensor("column_start", column_start, {W}, at::kInt, scores);
    check_tensor("column_weights", column_weights, {W, taps}, at::kFloat, scores);
    check_count("scores", h * w);
    check_count("labels", H * W);
    bytes = K <= 255;
  }
};

// The pointers of a problem that takes the labels of a score map, on any device.
template <class Problem>
void set_tensors(Problem* problem, const Tensor& scores, const Tensor& row_start, const Tensor& row_weights,
                 const Tensor& column_start, const Tensor& column_weights, const Tensor& labels) {
  problem->scores = scores.const_data_ptr<float>();
  problem->row_start = row_start.const_data_ptr<int32_t>();
  problem->row_weights = row_weights.const_data_ptr<float>();
  problem->column_start = column_start.const_data_ptr<int32_t>();
  problem->column_weights = column_weights.const_data_ptr<float>();
  problem->labels = labels.mutable_data_ptr();
  problem->bytes = labels.element_size() == 1;
}

}  // namespace the_mask
