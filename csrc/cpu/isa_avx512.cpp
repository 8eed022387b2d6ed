// The kernels for AVX-512 (F, BW, DQ, VL) with FMA and F16C.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstdint>

#include "problems.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, from the compiler's own header
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define TM_VECTOR_BYTES 64
#define TM_HALF_INSTRUCTIONS
namespace the_mask {
namespace avx512 {
#include "kernels.inc"
}  // namespace avx512
const Kernels& kernels_avx512() { return avx512::table("AVX-512"); }
}  // namespace the_mask

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
