// Multi-scale deformable attention: the entry points, which choose vectors by the channels of a head. Included after
// msda_forward.h and msda_backward.h, inside a namespace per instruction set.

template <class T>
void msda_forward_as(const MsdaProblem& problem, int64_t n, int64_t m, int64_t first, int64_t last, void* scratch) {
  typedef Work<T> A;
  const auto s = msda_layout<A>(problem, false, static_cast<char*>(scratch));
  msda_tables<A>(problem, s);
  const int lanes = channel_lanes<A>(problem.D);
  if constexpr (Lanes<A>::value >= 16) {
    if (lanes == 16) return msda_forward_lanes<T, 16>(problem, s, n, m, first, last);
  }
  if constexpr (Lanes<A>::value >= 8) {
    if (lanes == 8) return msda_forward_lanes<T, 8>(problem, s, n, m, first, last);
  }
  msda_forward_lanes<T, 4>(problem, s, n, m, first, last);
}

template <class T>
void msda_backward_as(const MsdaProblem& problem, int64_t n, int64_t m, void* scratch) {
  typedef Work<T> A;
  const auto s = msda_layout<A>(problem, true, static_cast<char*>(scratch));
  msda_tables<A>(problem, s);
  const int lanes = channel_lanes<A>(problem.D);
  if constexpr (Lanes<A>::value >= 16) {
    if (lanes == 16) return msda_backward_lanes<T, 16>(problem, s, n, m);
  }
  if constexpr (Lanes<A>::value >= 8) {
    if (lanes == 8) return msda_backward_lanes<T, 8>(problem, s, n, m);
  }
  msda_backward_lanes<T, 4>(problem, s, n, m);
}

int64_t msda_scratch(const MsdaProblem& problem, bool backward) {
  if (problem.storage == Storage::f64) return msda_layout<double>(problem, backward, nullptr).bytes;
  return msda_layout<float>(problem, backward, nullptr).bytes;
}

void msda_forward(const MsdaProblem& problem, int64_t n, int64_t m, int64_t first, int64_t last, void* scratch) {
  switch (problem.storage) {
    case Storage::f32: return msda_forward_as<float>(problem, n, m, first, last, scratch);
    case Storage::f64: return msda_forward_as<double>(problem, n, m, first, last, scratch);
    case Storage::bf16: return msda_forward_as<Bf16>(problem, n, m, first, last, scratch);
    case Storage::f16: return msda_forward_as<Fp16>(problem, n, m, first, last, scratch);
  }
}

void msda_backward(const MsdaProblem& problem, int64_t n, int64_t m, void* scratch) {
  switch (problem.storage) {
    case Storage::f32: return msda_backward_as<float>(problem, n, m, scratch);
    case Storage::f64: return msda_backward_as<double>(problem, n, m, scratch);
    case Storage::bf16: return msda_backward_as<Bf16>(problem, n, m, scratch);
    case Storage::f16: return msda_backward_as<Fp16>(problem, n, m, scratch);
  }
}
