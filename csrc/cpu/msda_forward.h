// Multi-scale deformable attention, forward, for one (image, head). Included after msda_pack.h.

// Weighted sum over all points for V*B channels, in registers.
template <class T, int V, int B>
TM_INLINE void msda_gather(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t channel, T* output) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  // Independent sums hide the latency of multiply-add.
  constexpr int chains = B >= 4 ? 2 : 4;
  F sum[chains][B];
  TM_UNROLL for (int chain = 0; chain < chains; ++chain) {
    TM_UNROLL for (int b = 0; b < B; ++b) sum[chain][b] = F{};
  }
  const auto* place = s.place;
  const A *weight0 = s.corner[0], *weight1 = s.corner[1], *weight2 = s.corner[2], *weight3 = s.corner[3];
  const A* const packed = s.packed + channel;
  const int64_t levels = problem.L, points = problem.P, across = s.stride;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t down = s.levels[l].pitch * across;
    for (int64_t p = 0; p < points; ++p, ++place, ++weight0, ++weight1, ++weight2, ++weight3) {
      const A* above = packed + *place;
      const A* under = above + down;
      TM_UNROLL for (int b = 0; b < B; ++b) {
        sum[0][b] += *weight0 * load<A, V>(above + b * V);
        sum[1][b] += *weight1 * load<A, V>(above + across + b * V);
        sum[2 % chains][b] += *weight2 * load<A, V>(under + b * V);
        sum[3 % chains][b] += *weight3 * load<A, V>(under + across + b * V);
      }
    }
  }
  TM_UNROLL for (int b = 0; b < B; ++b) {
    F total = sum[0][b] + sum[1][b];
    if (chains == 4) total += sum[2 % chains][b] + sum[3 % chains][b];
    const int64_t c = channel + b * V;
    store_part<T, V>(output + c, total, problem.D - c);
  }
}

template <class T, int V>
void msda_forward_lanes(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t n, int64_t m, int64_t first,
                        int64_t last) {
  typedef Work<T> A;
  msda_pack<T, V>(problem, s, n, m);
  for (int64_t q = first; q < last; ++q) {
    const int64_t item = (n * problem.Q + q) * problem.M + m;
    const MsdaParameters<A> parameters(problem, s, item);
    if (q + ahead < last) {
      prefetch_row(parameters.locations + 2 * s.points * ahead * problem.M, 2 * s.points, false);
      prefetch_row(parameters.weights + s.points * ahead * problem.M, s.points, false);
      prefetch_row(static_cast<T*>(problem.output) + (item + ahead * problem.M) * problem.D, problem.D, true);
    }
    msda_place<A, false>(s, parameters.locations, parameters.weights);
    T* output = static_cast<T*>(problem.output) + item * problem.D;
    int64_t c = 0;
    for (; c + 4 * V <= s.channels; c += 4 * V) msda_gather<T, V, 4>(problem, s, c, output);
    for (; c + 2 * V <= s.channels; c += 2 * V) msda_gather<T, V, 2>(problem, s, c, output);
    for (; c < s.channels; c += V) msda_gather<T, V, 1>(problem, s, c, output);
  }
}
