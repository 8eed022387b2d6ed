// The kernels of csrc/cuda (with SCALAR_BASELINE those of benchmarks/cuda_baseline) on the emulator, for float and
// double; called through ctypes.
#include "cuda_emulator.h"
#if defined(SCALAR_BASELINE)
#include "scalar.cuh"
#define run_forward run_scalar_forward
#define run_backward run_scalar_backward
#else
#include "kernels.cuh"
#include "labels.cuh"
#endif

using namespace the_mask::cuda;

namespace {

template <class Geometry>
const char* run(const Problem* problem, const Geometry* geometry, int backward, int blocks) {
  emulator::failure = nullptr;
  most_blocks = blocks;
  if (problem->storage == Storage::f64) {
    backward ? run_backward<double>(*problem, *geometry, nullptr) : run_forward<double>(*problem, *geometry, nullptr);
  } else {
    backward ? run_backward<float>(*problem, *geometry, nullptr) : run_forward<float>(*problem, *geometry, nullptr);
  }
  return emulator::failure;
}

}  // namespace

extern "C" const char* run_msda(const Problem* problem, const MsdaGeometry* geometry, int backward, int blocks) {
  return run(problem, geometry, backward, blocks);
}
extern "C" const char* run_dcn(const Problem* problem, const DcnGeometry* geometry, int backward, int blocks) {
  return run(problem, geometry, backward, blocks);
}
#if !defined(SCALAR_BASELINE)
extern "C" const char* run_labels_here(const LabelProblem* problem, int blocks) {
  emulator::failure = nullptr;
  most_blocks = blocks;
  run_labels(*problem, nullptr);
  return emulator::failure;
}
#endif
