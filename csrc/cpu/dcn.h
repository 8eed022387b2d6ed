// DCNv3: the entry points, which choose vectors by the channels of a group. Included after dcn_forward.h and
// dcn_backward.h, inside a namespace per instruction set.

// Call f with the widest vectors, and as many of them at once, as divide the channels of a group.
template <class A, class F>
TM_INLINE void dcn_with_lanes(int64_t D, F f) {
  constexpr int widest = Lanes<A>::value > 4 ? Lanes<A>::value : 4;
  constexpr int together = widest >= 16 ? 2 : 4;
  if (D % (widest * together) == 0) return f.template run<widest, together>();
  if (D % widest == 0) return f.template run<widest, 1>();
  if constexpr (widest > 8) {
    if (D % 8 == 0) return f.template run<8, 1>();
  }
  if constexpr (widest > 4) {
    if (D % 4 == 0) return f.template run<4, 1>();
  }
  f.template run<1, 1>();
}

template <class T>
struct DcnForward {
  const DcnProblem& problem;
  int64_t n;
  const DcnTile& tile;
  void* scratch;
  template <int V, int B>
  TM_INLINE void run() const {
    dcn_forward_lanes<T, V, B>(problem, n, tile, scratch);
  }
};
template <class T>
struct DcnBackward {
  const DcnProblem& problem;
  int64_t n, group, groups;
  const DcnBand& band;
  int64_t strip;
  void* scratch;
  template <int V, int B>
  TM_INLINE void run() const {
    dcn_backward_lanes<T, V, B>(problem, n, group, groups, band, strip, scratch);
  }
};

int64_t dcn_scratch(const DcnProblem& problem) {
  if (problem.storage == Storage::f64) return dcn_layout<double>(problem, nullptr).bytes;
  return dcn_layout<float>(problem, nullptr).bytes;
}

void dcn_forward(const DcnProblem& problem, int64_t n, const DcnTile& tile, void* scratch) {
  switch (problem.storage) {
    case Storage::f32: return dcn_with_lanes<float>(problem.D, DcnForward<float>{problem, n, tile, scratch});
    case Storage::f64: return dcn_with_lanes<double>(problem.D, DcnForward<double>{problem, n, tile, scratch});
    case Storage::bf16: return dcn_with_lanes<float>(problem.D, DcnForward<Bf16>{problem, n, tile, scratch});
    case Storage::f16: return dcn_with_lanes<float>(problem.D, DcnForward<Fp16>{problem, n, tile, scratch});
  }
}

void dcn_backward(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, const DcnBand& band,
                  int64_t strip, void* scratch) {
  switch (problem.storage) {
    case Storage::f32:
      return dcn_with_lanes<float>(problem.D, DcnBackward<float>{problem, n, group, groups, band, strip, scratch});
    case Storage::f64:
      return dcn_with_lanes<double>(problem.D, DcnBackward<double>{problem, n, group, groups, band, strip, scratch});
    case Storage::bf16:
      return dcn_with_lanes<float>(problem.D, DcnBackward<Bf16>{problem, n, group, groups, band, strip, scratch});
    case Storage::f16:
      return dcn_with_lanes<float>(problem.D, DcnBackward<Fp16>{problem, n, group, groups, band, strip, scratch});
  }
}

void dcn_add_spill(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, const DcnBand& band) {
  if (problem.storage == Storage::f64) return dcn_add_rows<double>(problem, n, group, groups, band);
  dcn_add_rows<float>(problem, n, group, groups, band);
}
