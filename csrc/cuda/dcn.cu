// Kernels of DCNv3.
#include "launch.cuh"

namespace the_mask {
namespace cuda {

void forward(const Problem& problem, const DcnGeometry& geometry, void* stream) {
  forward_any(problem, geometry, stream);
}

void backward(const Problem& problem, const DcnGeometry& geometry, void* stream) {
  backward_any(problem, geometry, stream);
}

}  // namespace cuda
}  // namespace the_mask
