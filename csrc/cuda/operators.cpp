// The CUDA side of the private operators (csrc/operators.h); csrc/bindings.cpp registers them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <tuple>

#include "../operators.h"
#include "../shapes.h"
#include "problem.h"

namespace the_mask {
namespace cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

Storage storage_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return Storage::f32;
    case at::kDouble: return Storage::f64;
    case at::kBFloat16: return Storage::bf16;
    case at::kHalf: return Storage::f16;
    default: TORCH_CHECK(false, "dtype ", value.scalar_type(), ": expected float32, float64, bfloat16 or float16");
  }
}

int to_int(int64_t number, const char* what) {
  TORCH_CHECK(number <= std::numeric_limits<int>::max() && number >= std::numeric_limits<int>::min(), what, " = ",
              number, " does not fit the 32 bits that the CUDA kernels have for it");
  return static_cast<int>(number);
}

// Offsets and locations are read in pairs; a tensor that begins in the middle of one in its storage is copied.
Tensor in_pairs(const Tensor& places) {
  const auto address = reinterpret_cast<uintptr_t>(places.const_data_ptr());
  return address % (2 * places.element_size()) == 0 ? places : places.clone();
}

bool is_empty(const Problem& p) { return p.images * p.rows * p.heads * p.channels == 0; }

void* stream_of(const Tensor& value) { return c10::cuda::getCurrentCUDAStream(value.device().index()).stream(); }

template <class Geometry>
Tensor run_forward(Problem problem, const Geometry& geometry, const Tensor& value, at::IntArrayRef sizes) {
  Tensor output = at::empty(sizes, value.options());
  problem.output = output.mutable_data_ptr();
  if (!is_empty(problem)) forward(problem, geometry, stream_of(value));
  return output;
}

struct Grads {
  Tensor value, places, weights, share;
};

template <class Geometry>
Grads run_backward(Problem problem, const Geometry& geometry, const Tensor& grad_output, const Tensor& value,
                   const Tensor& places, const Tensor& weights, const OptionalTensor& share, bool deterministic) {
  const auto options = value.options().dtype(work_type(value));
  // Fresh memory of this dtype is aligned for vector atomics.
  Grads grads{at::zeros(value.sizes(), options), at::empty(places.sizes(), options), at::empty(weights.sizes(), options),
              share.has_value() ? at::empty(share->sizes(), options) : at::empty({0}, options)};
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_value = grads.value.mutable_data_ptr();
  problem.grad_places = grads.places.mutable_data_ptr();
  problem.grad_weights = grads.weights.mutable_data_ptr();
  problem.grad_share = share.has_value() ? grads.share.mutable_data_ptr() : nullptr;
  problem.deterministic = deterministic;
  if (is_empty(problem)) {
    grads.places.zero_();
    grads.weights.zero_();
    grads.share.zero_();
  } else {
    backward(problem, geometry, stream_of(value));
  }
  return grads;
}

// One call of an operator, read from its arguments. `places` keeps a copy alive.
template <class Geometry>
struct Call {
  Problem problem = {};
  Geometry geometry = {};
  Tensor places;
};

Call<MsdaGeometry> read(const MsdaSizes& size, const Tensor& value, at::IntArrayRef sizes,
                        const OptionalTensor& device_shapes, const Tensor& locations, const Tensor& weights) {
  TORCH_CHECK(size.L <= kMaxLevels, "spatial_shapes has ", size.L, " levels, the CUDA kernels take at most ", kMaxLevels);
  Call<MsdaGeometry> call;
  MsdaGeometry& geometry = call.geometry;
  geometry.levels = to_int(size.L, "levels");
  geometry.points_per_level = to_int(size.P, "points");
  geometry.positions = size.S;
  if (device_shapes.has_value()) {
    geometry.device_sizes = device_shapes->const_data_ptr<int64_t>();
  } else {
    int64_t start = 0;
    for (int64_t l = 0; l < size.L; ++l) {
      const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
      geometry.table[l] = Level{to_int(height, "height"), to_int(width, "width"), to_int(start, "positions")};
      start += height * width;
    }
  }
  call.places = in_pairs(locations);
  Problem& problem = call.problem;
  problem.storage = storage_of(value);
  problem.images = size.N;
  problem.positions = size.S;
  problem.rows = size.Q;
  problem.heads = to_int(size.M, "heads");
  problem.channels = to_int(size.D, "channels");
  problem.points = to_int(size.L * size.P, "points");
  problem.value = value.const_data_ptr();
  problem.places = call.places.const_data_ptr();
  problem.weights = weights.const_data_ptr();
  return call;
}

Call<DcnGeometry> read(const DcnSizes& size, const Tensor& x, const Tensor& offset, const Tensor& mask,
                       const OptionalTensor& scale, at::IntArrayRef kernel, at::IntArrayRef dilation,
                       double offset_scale, bool remove_center) {
  Call<DcnGeometry> call;
  DcnGeometry& geometry = call.geometry;
  geometry.height = to_int(size.H, "height");
  geometry.width = to_int(size.W, "width");
  geometry.output_width = to_int(size.Wo, "output width");
  geometry.kernel_height = to_int(kernel[0], "kernel_size");
  geometry.removed = remove_center ? to_int(kernel[0] * kernel[1] / 2, "kernel_size") : -1;
  geometry.stride_y = to_int(size.stride_y, "stride");
  geometry.stride_x = to_int(size.stride_x, "stride");
  geometry.dilation_y = to_int(dilation[0], "dilation");
  geometry.dilation_x = to_int(dilation[1], "dilation");
  geometry.center_y = to_int(dilation[0] * (kernel[0] - 1) / 2, "dilation");
  geometry.center_x = to_int(dilation[1] * (kernel[1] - 1) / 2, "dilation");
  to_int(dilation[0] * (kernel[0] - 1), "dilation times kernel_size");
  to_int(dilation[1] * (kernel[1] - 1), "dilation times kernel_size");
  geometry.base_y = to_int(size.base_y, "padding");
  geometry.base_x = to_int(size.base_x, "padding");
  geometry.offset_scale = offset_scale;
  call.places = in_pairs(offset);
  Problem& problem = call.problem;
  problem.storage = storage_of(x);
  problem.images = size.N;
  problem.positions = size.H * size.W;
  problem.rows = size.Ho * size.Wo;
  problem.heads = to_int(size.G, "groups");
  problem.channels = to_int(size.D, "channels");
  problem.points = to_int(size.P, "points");
  problem.value = x.const_data_ptr();
  problem.places = call.places.const_data_ptr();
  problem.weights = mask.const_data_ptr();
  problem.share = scale.has_value() ? scale->const_data_ptr() : nullptr;
  return call;
}

}  // namespace
}  // namespace cuda

Tensor msda_forward_cuda(const Tensor& value, at::IntArrayRef sizes, const std::optional<Tensor>& device_shapes,
                         const Tensor& locations, const Tensor& weights) {
  const c10::cuda::CUDAGuard guard(value.device());
  const MsdaSizes size(value, sizes, device_shapes, locations, weights);
  const auto call = cuda::read(size, value, sizes, device_shapes, locations, weights);
  return cuda::run_forward(call.problem, call.geometry, value, {size.N, size.Q, size.M * size.D});
}

std::tuple<Tensor, Tensor, Tensor> msda_backward_cuda(const Tensor& grad_output, const Tensor& value,
                                                      at::IntArrayRef sizes, const std::optional<Tensor>& device_shapes,
                                                      const Tensor& locations, const Tensor& weights,
                                                      bool deterministic) {
  const c10::cuda::CUDAGuard guard(value.device());
  const MsdaSizes size(value, sizes, device_shapes, locations, weights);
  check_tensor("grad_output", grad_output, {size.N, size.Q, size.M * size.D}, value.scalar_type(), value);
  const auto call = cuda::read(size, value, sizes, device_shapes, locations, weights);
  const auto grads = cuda::run_backward(call.problem, call.geometry, grad_output, value, locations, weights,
                                        std::nullopt, deterministic);
  return {grads.value, grads.places, grads.weights};
}

Tensor dcn_forward_cuda(const Tensor& x, const Tensor& offset, const Tensor& mask, const std::optional<Tensor>& scale,
                        at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const c10::cuda::CUDAGuard guard(x.device());
  const DcnSizes size(x, offset, mask, scale, kernel, stride, padding, dilation, groups, offset_scale, remove_center);
  const auto call = cuda::read(size, x, offset, mask, scale, kernel, dilation, offset_scale, remove_center);
  return cuda::run_forward(call.problem, call.geometry, x, {size.N, size.Ho, size.Wo, size.C});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dcn_backward_cuda(
    const Tensor& grad_output, const Tensor& x, const Tensor& offset, const Tensor& mask,
    const std::optional<Tensor>& scale, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center, bool deterministic) {
  const c10::cuda::CUDAGuard guard(x.device());
  const DcnSizes size(x, offset, mask, scale, kernel, stride, padding, dilation, groups, offset_scale, remove_center);
  check_tensor("grad_output", grad_output, {size.N, size.Ho, size.Wo, size.C}, x.scalar_type(), x);
  const auto call = cuda::read(size, x, offset, mask, scale, kernel, dilation, offset_scale, remove_center);
  const auto grads =
      cuda::run_backward(call.problem, call.geometry, grad_output, x, offset, mask, scale, deterministic);
  return {grads.value, grads.places, grads.weights, grads.share};
}

Tensor upsample_argmax_cuda(const Tensor& scores, const Tensor& row_start, const Tensor& row_weights,
                            const Tensor& column_start, const Tensor& column_weights) {
  const c10::cuda::CUDAGuard guard(scores.device());
  const LabelSizes size(scores, row_start, row_weights, column_start, column_weights);
  Tensor labels = at::empty({size.H, size.W}, scores.options().dtype(size.bytes ? at::kByte : at::kInt));
  if (labels.numel() == 0) return labels;
  cuda::LabelProblem problem{};
  problem.K = cuda::to_int(size.K, "classes"), problem.taps = int(size.taps);
  problem.h = int(size.h), problem.w = int(size.w), problem.H = int(size.H), problem.W = int(size.W);
  set_tensors(&problem, scores, row_start, row_weights, column_start, column_weights, labels);
  cuda::labels(problem, cuda::stream_of(scores));
  return labels;
}

}  // namespace the_mask
