// Storage types and vectors of them: loads, stores, conversion to the working type, vector atomics.
#pragma once
#include <cstdint>

#include "../work_type.h"

namespace the_mask {
namespace cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
#if defined(__CUDACC__)
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
#endif

// V elements that one instruction moves: at most 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <class T>
struct Widest {
  static constexpr int value = 16 / sizeof(T);
};

// An integer type of that many bytes: moving one of these is one instruction, whatever it holds.
template <int bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  typedef unsigned short type;
};
template <>
struct BitsOf<4> {
  typedef unsigned int type;
};
template <>
struct BitsOf<8> {
  typedef uint2 type;
};
template <>
struct BitsOf<16> {
  typedef uint4 type;
};
template <class T, int V>
union Bits {
  typename BitsOf<sizeof(T) * V>::type whole;
  Pack<T, V> parts;
  __device__ __forceinline__ Bits() : whole() {}
};

// Reads what no thread of the kernel writes.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  Bits<T, V> bits;
  bits.whole = __ldg(reinterpret_cast<const typename BitsOf<sizeof(T) * V>::type*>(from));
  return bits.parts;
}

template <class T, int V>
__device__ __forceinline__ void store_pack(const Pack<T, V>& pack, T* to) {
  Bits<T, V> bits;
  bits.parts = pack;
  *reinterpret_cast<typename BitsOf<sizeof(T) * V>::type*>(to) = bits.whole;
}

template <class T, int V>
__device__ __forceinline__ void load(const T* from, Work<T>* to) {
  const Pack<T, V> pack = load_pack<T, V>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = widen(pack.at[v]);
}

template <class T, int V>
__device__ __forceinline__ void store(const Work<T>* from, T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(from[v], &pack.at[v]);
  store_pack<T, V>(pack, to);
}

// to[v] += factor * grad[v], atomically. `to` is aligned to V numbers, or 16 bytes if that is less.
template <int V, class A>
__device__ __forceinline__ void add_atomically(A* to, A factor, const A* grad) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool by_four = sizeof(A) == 4 && V % 4 == 0;
#else
  constexpr bool by_four = false;
#endif
  if constexpr (by_four) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + v),
                make_float4(factor * grad[v], factor * grad[v + 1], factor * grad[v + 2], factor * grad[v + 3]));
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(to + v, factor * grad[v]);
  }
}

}  // namespace cuda
}  // namespace the_mask
