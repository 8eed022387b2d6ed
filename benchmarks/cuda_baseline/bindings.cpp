// The operators of csrc/cuda/operators.cpp with the scalar kernels, in a separate namespace.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY(the_mask_baseline, m) {
  m.def("ms_deform_attn_forward", &the_mask::msda_forward_cuda);
  m.def("ms_deform_attn_backward", &the_mask::msda_backward_cuda);
  m.def("dcnv3_forward", &the_mask::dcn_forward_cuda);
  m.def("dcnv3_backward", &the_mask::dcn_backward_cuda);
}
