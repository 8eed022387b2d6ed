// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstdint>

#include "problems.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, from the compiler's own header
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define TM_VECTOR_BYTES 32
#define TM_HALF_INSTRUCTIONS
namespace the_mask {
namespace avx2 {
#include "kernels.inc"
}  // namespace avx2
const Kernels& kernels_avx2() { return avx2::table("AVX2"); }
}  // namespace the_mask

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
