// How kernels are started on a GPU, and the dispatch over storage types. First include of every .cu file.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/macros/Macros.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace the_mask {
namespace cuda {

template <class... Parameters, class... Values>
void launch(void (*kernel)(Parameters...), int blocks, int threads, void* stream, const Values&... values) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(values...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace cuda
}  // namespace the_mask

#include "kernels.cuh"

namespace the_mask {
namespace cuda {

template <class Geometry>
void forward_any(const Problem& problem, const Geometry& geometry, void* stream) {
  switch (problem.storage) {
    case Storage::f32: return run_forward<float>(problem, geometry, stream);
    case Storage::f64: return run_forward<double>(problem, geometry, stream);
    case Storage::bf16: return run_forward<__nv_bfloat16>(problem, geometry, stream);
    case Storage::f16: return run_forward<__half>(problem, geometry, stream);
  }
}

template <class Geometry>
void backward_any(const Problem& problem, const Geometry& geometry, void* stream) {
  switch (problem.storage) {
    case Storage::f32: return run_backward<float>(problem, geometry, stream);
    case Storage::f64: return run_backward<double>(problem, geometry, stream);
    case Storage::bf16: return run_backward<__nv_bfloat16>(problem, geometry, stream);
    case Storage::f16: return run_backward<__half>(problem, geometry, stream);
  }
}

}  // namespace cuda
}  // namespace the_mask
