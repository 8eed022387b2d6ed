// Stands in for csrc/cuda/{msda,dcn}.cu in the benchmark's own library.
#include "launch.cuh"
#include "scalar.cuh"

namespace the_mask {
namespace cuda {
namespace {

template <class Geometry>
void scalar_forward(const Problem& problem, const Geometry& geometry, void* stream) {
  switch (problem.storage) {
    case Storage::f32: return run_scalar_forward<float>(problem, geometry, stream);
    case Storage::f64: return run_scalar_forward<double>(problem, geometry, stream);
    case Storage::bf16: return run_scalar_forward<__nv_bfloat16>(problem, geometry, stream);
    case Storage::f16: return run_scalar_forward<__half>(problem, geometry, stream);
  }
}

template <class Geometry>
void scalar_backward(const Problem& problem, const Geometry& geometry, void* stream) {
  TORCH_CHECK(problem.channels <= kMostChannels, "the baseline takes at most ", kMostChannels, " channels");
  TORCH_CHECK(!problem.deterministic, "the baseline has no deterministic mode");
  switch (problem.storage) {
    case Storage::f32: return run_scalar_backward<float>(problem, geometry, stream);
    case Storage::f64: return run_scalar_backward<double>(problem, geometry, stream);
    case Storage::bf16: return run_scalar_backward<__nv_bfloat16>(problem, geometry, stream);
    case Storage::f16: return run_scalar_backward<__half>(problem, geometry, stream);
  }
}

}  // namespace

void forward(const Problem& problem, const MsdaGeometry& geometry, void* stream) {
  scalar_forward(problem, geometry, stream);
}
void backward(const Problem& problem, const MsdaGeometry& geometry, void* stream) {
  scalar_backward(problem, geometry, stream);
}
void forward(const Problem& problem, const DcnGeometry& geometry, void* stream) {
  scalar_forward(problem, geometry, stream);
}
void backward(const Problem& problem, const DcnGeometry& geometry, void* stream) {
  scalar_backward(problem, geometry, stream);
}

}  // namespace cuda
}  // namespace the_mask
