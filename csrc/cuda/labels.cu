// Kernel of labels.
#include "launch.cuh"
//
#include "labels.cuh"

namespace the_mask {
namespace cuda {

void labels(const LabelProblem& problem, void* stream) { run_labels(problem, stream); }

}  // namespace cuda
}  // namespace the_mask
