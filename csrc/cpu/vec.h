// Compiler vector types: one source for every instruction set. Included inside a namespace per instruction set, under
// that set's target pragma. So nothing here may be shared with another set, and no header with functions is included.
//
// Axes in this folder: N batch, S positions of all levels, M heads, G groups, D channels per head or group, Q queries,
// L levels, P points, V lanes of a vector.

#define TM_INLINE inline __attribute__((always_inline))

#if defined(__clang__)
#define TM_UNROLL _Pragma("unroll")
#else
#define TM_UNROLL _Pragma("GCC unroll 16")
#endif

// Lanes of S per vector; TM_VECTOR_BYTES comes from the file that includes this one.
template <class S>
struct Lanes {
  static constexpr int value = TM_VECTOR_BYTES / int(sizeof(S));
};

template <class S, int V>
struct VecOf {
  typedef S type __attribute__((vector_size(sizeof(S) * V)));
  // The same with the alignment of one element: for loads and stores of tensors.
  typedef S loose __attribute__((vector_size(sizeof(S) * V), aligned(sizeof(S)), may_alias));
};
template <class S, int V>
using Vec = typename VecOf<S, V>::type;

template <class S>
struct IntOf;
template <>
struct IntOf<float> {
  typedef int32_t type;
};
template <>
struct IntOf<double> {
  typedef int64_t type;
};
// Integer vector with the lanes of a vector of A; also what comparisons give.
template <class A, int V>
using IntVec = Vec<typename IntOf<A>::type, V>;

template <class S, int V>
TM_INLINE Vec<S, V> load(const S* from) {
  return *reinterpret_cast<const typename VecOf<S, V>::loose*>(from);
}
template <class S, int V>
TM_INLINE void store(S* to, Vec<S, V> v) {
  *reinterpret_cast<typename VecOf<S, V>::loose*>(to) = v;
}

// Gives out parts of a call's scratch, 64-byte aligned. With a null start it only counts.
struct Taker {
  char* next;

  template <class S>
  void operator()(S*& pointer, int64_t count) {
    pointer = reinterpret_cast<S*>(next);
    next += (count * int64_t(sizeof(S)) + 63) / 64 * 64;
  }
};

// Shuffles by compile-time lane numbers: lane i of the result is lane Pattern::at(i) of the concatenation (a, b).
template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  typedef Sequence<I...> type;
};
template <class Pattern, class A, int V, int... I>
TM_INLINE Vec<A, V> shuffle_lanes(Vec<A, V> a, Vec<A, V> b, Sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::at(I, V)...);
#else
  const IntVec<A, V> lanes = {Pattern::at(I, V)...};
  return __builtin_shuffle(a, b, lanes);
#endif
}
template <class Pattern, class A, int V>
TM_INLINE Vec<A, V> shuffle(Vec<A, V> a, Vec<A, V> b) {
  return shuffle_lanes<Pattern, A, V>(a, b, typename MakeSequence<V>::type());
}

struct EvenLanes {
  static constexpr int at(int i, int) { return 2 * i; }
};
struct OddLanes {
  static constexpr int at(int i, int) { return 2 * i + 1; }
};
struct LowHalves {  // a0 b0 a1 b1 ...
  static constexpr int at(int i, int v) { return i / 2 + (i % 2) * v; }
};
struct HighHalves {
  static constexpr int at(int i, int v) { return v / 2 + i / 2 + (i % 2) * v; }
};
// A merge with step s: lanes whose bit s is clear sum pairs of a, the others pairs of b. Keep takes the half that stays
// in its lane, Cross the half that comes from the lane at distance s.
template <int Step>
struct Keep {
  static constexpr int at(int i, int v) { return (i & Step) ? i + v : i; }
};
template <int Step>
struct Cross {
  static constexpr int at(int i, int v) { return (i & Step) ? (i ^ Step) + v : (i ^ Step); }
};
template <int Step, class A, int V>
TM_INLINE Vec<A, V> merge(Vec<A, V> a, Vec<A, V> b) {
  return shuffle<Keep<Step>, A, V>(a, b) + shuffle<Cross<Step>, A, V>(a, b);
}

// Horizontal sums of V vectors at once: lane i of the result is the sum of the lanes of d[i].
template <class A, int V, int Step>
struct Transposed {
  static TM_INLINE Vec<A, V> sum(const Vec<A, V>* d) {
    return merge<Step, A, V>(Transposed<A, V, Step / 2>::sum(d), Transposed<A, V, Step / 2>::sum(d + Step));
  }
};
template <class A, int V>
struct Transposed<A, V, 0> {
  static TM_INLINE Vec<A, V> sum(const Vec<A, V>* d) { return *d; }
};
template <class A, int V>
TM_INLINE Vec<A, V> transposed_sum(const Vec<A, V>* d) {
  return Transposed<A, V, V / 2>::sum(d);
}

// Whether a mask has a true lane.
template <class A, int V>
TM_INLINE bool any(IntVec<A, V> mask) {
#if TM_VECTOR_BYTES == 64
  if constexpr (sizeof(mask) == 64) {
    const __m512i bits = reinterpret_cast<__m512i>(mask);
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
#elif TM_VECTOR_BYTES == 32
  if constexpr (sizeof(mask) == 32) {
    const __m256i bits = reinterpret_cast<__m256i>(mask);
    return !_mm256_testz_si256(bits, bits);
  }
#endif
  typedef Vec<uint64_t, int(sizeof(mask) / 8)> Words;
  const Words words = reinterpret_cast<Words>(mask);
  uint64_t all = 0;
  for (int i = 0; i < int(sizeof(mask) / 8); ++i) all |= words[i];
  return all != 0;
}

// 0, 1, 2, ...
template <class A, int V, int... I>
TM_INLINE IntVec<A, V> lane_numbers(Sequence<I...>) {
  return IntVec<A, V>{I...};
}
template <class A, int V>
TM_INLINE IntVec<A, V> lane_numbers() {
  return lane_numbers<A, V>(typename MakeSequence<V>::type());
}

// Largest integer not above x, as a number; |x| must be below 2^31. The integer itself goes to whole.
template <class A, int V>
TM_INLINE Vec<A, V> floor_to(Vec<A, V> x, IntVec<A, V>& whole) {
#if TM_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4 && V == 16) {
    const __m512 floored = _mm512_roundscale_ps(reinterpret_cast<__m512>(x), 9);  // down, no exception
    whole = reinterpret_cast<IntVec<A, V>>(_mm512_cvttps_epi32(floored));
    return reinterpret_cast<Vec<A, V>>(floored);
  }
#elif TM_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4 && V == 8) {
    const __m256 floored = _mm256_floor_ps(reinterpret_cast<__m256>(x));
    whole = reinterpret_cast<IntVec<A, V>>(_mm256_cvttps_epi32(floored));
    return reinterpret_cast<Vec<A, V>>(floored);
  }
#endif
  whole = __builtin_convertvector(x, IntVec<A, V>);
  whole += __builtin_convertvector(whole, Vec<A, V>) > x;  // true is -1
  return __builtin_convertvector(whole, Vec<A, V>);
}
