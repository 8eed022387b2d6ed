// Storage types and their conversion to and from vectors of the working type.
// Included after vec.h, inside a namespace per instruction set.

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Fp16 <-> float for one number, on integers alone: for machines without a conversion instruction.
TM_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | ((rest & 0x3ff) << 13);
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {  // subnormal: an integer times 2^-24
    float number = float(rest) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &number, 4);
  }
  bits |= sign;
  float number;
  __builtin_memcpy(&number, &bits, 4);
  return number;
}
TM_INLINE uint16_t float_to_half(float number) {
  uint32_t bits;
  __builtin_memcpy(&bits, &number, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {                                 // subnormal: adding 0.5 aligns the last place
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  const uint32_t odd = (bits >> 13) & 1;
  return uint16_t(sign | ((bits - (112u << 23) + 0xfff + odd) >> 13));
}

template <class T, int V>
struct Convert;

template <int V>
struct Convert<float, V> {
  static TM_INLINE Vec<float, V> in(const float* from) { return load<float, V>(from); }
  static TM_INLINE void out(float* to, Vec<float, V> v) { store<float, V>(to, v); }
};
template <int V>
struct Convert<double, V> {
  static TM_INLINE Vec<double, V> in(const double* from) { return load<double, V>(from); }
  static TM_INLINE void out(double* to, Vec<double, V> v) { store<double, V>(to, v); }
};

template <int V>
struct Convert<Bf16, V> {
  static TM_INLINE Vec<float, V> in(const Bf16* from) {
    const Vec<uint16_t, V> bits = load<uint16_t, V>(reinterpret_cast<const uint16_t*>(from));
    return reinterpret_cast<Vec<float, V>>(__builtin_convertvector(bits, Vec<uint32_t, V>) << 16);
  }
  static TM_INLINE void out(Bf16* to, Vec<float, V> v) {
    Vec<uint32_t, V> bits = reinterpret_cast<Vec<uint32_t, V>>(v);
    const Vec<uint32_t, V> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    bits = v == v ? rounded : Vec<uint32_t, V>{} + 0x7fc0;
    store<uint16_t, V>(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(bits, Vec<uint16_t, V>));
  }
};

template <int V>
struct Convert<Fp16, V> {
  static TM_INLINE Vec<float, V> in(const Fp16* from) {
    Vec<float, V> v;
#if defined(TM_HALF_INSTRUCTIONS)
    if constexpr (V == 16) {
#if TM_VECTOR_BYTES == 64
      v = reinterpret_cast<Vec<float, V>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#endif
    } else if constexpr (V == 8) {
      v = reinterpret_cast<Vec<float, V>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    } else if constexpr (V == 4) {
      v = reinterpret_cast<Vec<float, V>>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    } else {
      for (int i = 0; i < V; ++i) v[i] = half_to_float(from[i].bits);
    }
#else
    for (int i = 0; i < V; ++i) v[i] = half_to_float(from[i].bits);
#endif
    return v;
  }
  static TM_INLINE void out(Fp16* to, Vec<float, V> v) {
#if defined(TM_HALF_INSTRUCTIONS)
    if constexpr (V == 16) {
#if TM_VECTOR_BYTES == 64
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#endif
    } else if constexpr (V == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
    } else if constexpr (V == 4) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(reinterpret_cast<__m128>(v), 0));
    } else {
      for (int i = 0; i < V; ++i) to[i].bits = float_to_half(v[i]);
    }
#else
    for (int i = 0; i < V; ++i) to[i].bits = float_to_half(v[i]);
#endif
  }
};

// Copy `count` elements, in blocks of four.
template <class T>
TM_INLINE void copy_part(T* to, const T* from, int64_t count) {
  typedef typename VecOf<unsigned char, 4 * sizeof(T)>::loose Block;
  for (; count >= 4; count -= 4, to += 4, from += 4) *reinterpret_cast<Block*>(to) = *reinterpret_cast<const Block*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// The first `count` lanes only; the others read as zero and are not written.
template <class T, int V>
TM_INLINE Vec<Work<T>, V> load_part(const T* from, int64_t count) {
  if (count >= V) return Convert<T, V>::in(from);
  alignas(64) T padded[V] = {};
  copy_part(padded, from, count);
  return Convert<T, V>::in(padded);
}
template <class T, int V>
TM_INLINE void store_part(T* to, Vec<Work<T>, V> v, int64_t count) {
  if (count >= V) {
    Convert<T, V>::out(to, v);
    return;
  }
  alignas(64) T padded[V];
  Convert<T, V>::out(padded, v);
  copy_part(to, padded, count);
}
