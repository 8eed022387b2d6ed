// Registration of the private operators. Python (the_mask/ops) holds the public schemas, gradients and fake kernels.
#include <torch/library.h>
#include <torch/version.h>

#include "operators.h"

#define THE_MASK_TEXT_(x) #x
#define THE_MASK_TEXT(x) THE_MASK_TEXT_(x)
#if !defined(THE_MASK_CUDA_VERSION)
#define THE_MASK_CUDA_VERSION
#endif

namespace the_mask {
// Read by the_mask/ops/extension.py from the file, before it is loaded.
extern const char built_for[];
__attribute__((used)) const char built_for[] =
    "THE_MASK_BUILT_FOR torch=" TORCH_VERSION ";cuda=" THE_MASK_TEXT(THE_MASK_CUDA_VERSION) ";";

bool built_with_cuda() {
#if defined(THE_MASK_WITH_CUDA)
  return true;
#else
  return false;
#endif
}
}  // namespace the_mask

TORCH_LIBRARY(the_mask_kernels, m) {
  m.def(
      "ms_deform_attn_forward(Tensor value, int[] sizes, Tensor? device_shapes, Tensor locations, Tensor weights) "
      "-> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] sizes, Tensor? device_shapes, Tensor locations, "
      "Tensor weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dcnv3_forward(Tensor x, Tensor offset, Tensor mask, Tensor? scale, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, int groups, float offset_scale, bool remove_center) -> Tensor");
  m.def(
      "dcnv3_backward(Tensor grad_output, Tensor x, Tensor offset, Tensor mask, Tensor? scale, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int groups, float offset_scale, bool remove_center, "
      "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "upsample_argmax(Tensor scores, Tensor row_start, Tensor row_weights, Tensor column_start, Tensor column_weights) "
      "-> Tensor");
  m.def("built_with_cuda() -> bool", &the_mask::built_with_cuda);
  m.def("cpu_capability() -> str", &the_mask::cpu_capability);
  m.def("force_cpu_capability(str name) -> ()", &the_mask::force_cpu_capability);
}

TORCH_LIBRARY_IMPL(the_mask_kernels, CPU, m) {
  m.impl("ms_deform_attn_forward", &the_mask::msda_forward_cpu);
  m.impl("ms_deform_attn_backward", &the_mask::msda_backward_cpu);
  m.impl("dcnv3_forward", &the_mask::dcn_forward_cpu);
  m.impl("dcnv3_backward", &the_mask::dcn_backward_cpu);
  m.impl("upsample_argmax", &the_mask::upsample_argmax_cpu);
}

#if defined(THE_MASK_WITH_CUDA)
TORCH_LIBRARY_IMPL(the_mask_kernels, CUDA, m) {
  m.impl("ms_deform_attn_forward", &the_mask::msda_forward_cuda);
  m.impl("ms_deform_attn_backward", &the_mask::msda_backward_cuda);
  m.impl("dcnv3_forward", &the_mask::dcn_forward_cuda);
  m.impl("dcnv3_backward", &the_mask::dcn_backward_cuda);
  m.impl("upsample_argmax", &the_mask::upsample_argmax_cuda);
}
#endif
