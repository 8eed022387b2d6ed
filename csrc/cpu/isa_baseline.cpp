// The kernels for what the compiler targets by default: SSE2 on x86-64, NEON on 64-bit Arm, scalars elsewhere.
#include <cstdint>

#include "problems.h"

#define TM_VECTOR_BYTES 16
namespace the_mask {
namespace baseline {
#include "kernels.inc"
}  // namespace baseline
const Kernels& kernels_baseline() { return baseline::table("baseline"); }
}  // namespace the_mask
