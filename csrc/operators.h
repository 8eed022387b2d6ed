// The private operators behind the_mask::ms_deform_attn and the_mask::dcnv3: one set of signatures for CPU and CUDA.
// Arguments are checked and made contiguous in Python; checks needed for memory safety are repeated here.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace the_mask {

using at::Tensor;

using MsdaForward = Tensor(const Tensor& value, at::IntArrayRef sizes, const std::optional<Tensor>& device_shapes,
                           const Tensor& locations, const Tensor& weights);
using MsdaBackward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef sizes, const std::optional<Tensor>& device_shapes,
    const Tensor& locations, const Tensor& weights, bool deterministic);
using DcnForward = Tensor(const Tensor& x, const Tensor& offset, const Tensor& mask, const std::optional<Tensor>& scale,
                          at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center);
// Gradients of x (in the working type), offset, mask, and scale (empty without one).
using DcnBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const Tensor& x, const Tensor& offset, const Tensor& mask,
    const std::optional<Tensor>& scale, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center, bool deterministic);
// Best class of every pixel of a score map [K, h, w] enlarged to [H, W], H and W being the lengths of the starts.
using UpsampleArgmax = Tensor(const Tensor& scores, const Tensor& row_start, const Tensor& row_weights,
                              const Tensor& column_start, const Tensor& column_weights);

MsdaForward msda_forward_cpu;
MsdaBackward msda_backward_cpu;
DcnForward dcn_forward_cpu;
DcnBackward dcn_backward_cpu;
UpsampleArgmax upsample_argmax_cpu;
#if defined(THE_MASK_WITH_CUDA)
MsdaForward msda_forward_cuda;
MsdaBackward msda_backward_cuda;
DcnForward dcn_forward_cuda;
DcnBackward dcn_backward_cuda;
UpsampleArgmax upsample_argmax_cuda;
#endif

// The instruction set of the CPU kernels; the second function forces one by name, "auto" takes the best.
std::string cpu_capability();
void force_cpu_capability(std::string name);

}  // namespace the_mask
