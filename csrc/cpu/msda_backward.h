// Multi-scale deformable attention, backward, for one (image, head). Included after msda_pack.h.

// Scatter of one query's gradient into V*B channels of the corners, and the part of the four scalar products
// <gradient, corner> of every point that these channels hold; both in one pass over the corners.
template <class T, int V, int B>
TM_INLINE void msda_scatter(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t channel, const T* grad) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  constexpr int group = V / 4;  // points whose 4 products fill one vector
  F g[B];
  TM_UNROLL for (int b = 0; b < B; ++b) g[b] = load_part<T, V>(grad + channel + b * V, problem.D - channel - b * V);
  // Local copies, because the compiler must assume that a store through a vector changes members of the struct.
  const auto *places = s.place, *pitch = s.pitch;
  const A *weight0 = s.corner[0], *weight1 = s.corner[1], *weight2 = s.corner[2], *weight3 = s.corner[3];
  A* const packed = s.packed + channel;
  A* dots = s.dots;
  const int64_t points = s.points, across = s.stride, to_gradient = s.channels;
  for (int64_t i = 0; i < points; i += group, dots += V) {
    F product[V];
    TM_UNROLL for (int k = 0; k < group; ++k) {
      A* const above = packed + places[i + k];
      A* const under = above + pitch[i + k];
      A* const corners[4] = {above, above + across, under, under + across};
      const A weights[4] = {weight0[i + k], weight1[i + k], weight2[i + k], weight3[i + k]};
      TM_UNROLL for (int r = 0; r < 4; ++r) {
        F sum = g[0] * load<A, V>(corners[r]);
        TM_UNROLL for (int b = 1; b < B; ++b) sum += g[b] * load<A, V>(corners[r] + b * V);
        product[4 * k + r] = sum;
        TM_UNROLL for (int b = 0; b < B; ++b) {
          A* to = corners[r] + to_gradient + b * V;
          store<A, V>(to, load<A, V>(to) + weights[r] * g[b]);
        }
      }
    }
    const F sums = transposed_sum<A, V>(product);
    store<A, V>(dots, channel == 0 ? sums : load<A, V>(dots) + sums);
  }
}

// Gradients of locations and weights from the scalar products, vectorised over points.
template <class A>
TM_INLINE void msda_finish(const MsdaScratch<A>& s, A* grad_locations, A* grad_weights) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  for (int64_t i = 0; i < s.points; i += V) {
    const A* dots = s.dots + 4 * i;
    const F a = load<A, V>(dots), b = load<A, V>(dots + V), c = load<A, V>(dots + 2 * V), d = load<A, V>(dots + 3 * V);
    const F even_low = shuffle<EvenLanes, A, V>(a, b), even_high = shuffle<EvenLanes, A, V>(c, d);
    const F odd_low = shuffle<OddLanes, A, V>(a, b), odd_high = shuffle<OddLanes, A, V>(c, d);
    const F d0 = shuffle<EvenLanes, A, V>(even_low, even_high), d2 = shuffle<OddLanes, A, V>(even_low, even_high);
    const F d1 = shuffle<EvenLanes, A, V>(odd_low, odd_high), d3 = shuffle<OddLanes, A, V>(odd_low, odd_high);
    const F right = load<A, V>(s.right + i), below = load<A, V>(s.below + i), factor = load<A, V>(s.factor + i);
    const auto inside = load<A, V>(s.known + i) != F{};
    const F above = d0 + right * (d1 - d0), under = d2 + right * (d3 - d2);
    const F sample = above + below * (under - above);
    F x = load<A, V>(s.width + i) * factor * ((d1 - d0) + below * ((d3 - d2) - (d1 - d0)));
    F y = load<A, V>(s.height + i) * factor * (under - above);
    x = inside ? x : F{};
    y = inside ? y : F{};
    store_part<A, V>(grad_weights + i, inside ? sample : F{}, s.points - i);
    store_part<A, V>(grad_locations + 2 * i, shuffle<LowHalves, A, V>(x, y), 2 * (s.points - i));
    if (2 * (s.points - i) > V) {
      store_part<A, V>(grad_locations + 2 * i + V, shuffle<HighHalves, A, V>(x, y), 2 * (s.points - i) - V);
    }
  }
}

template <class T, int V>
void msda_backward_lanes(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t n, int64_t m) {
  typedef Work<T> A;
  msda_pack<T, V>(problem, s, n, m);
  for (int64_t q = 0; q < problem.Q; ++q) {
    const int64_t item = (n * problem.Q + q) * problem.M + m;
    const MsdaParameters<A> parameters(problem, s, item);
    if (q + ahead < problem.Q) {
      prefetch_row(parameters.locations + 2 * s.points * ahead * problem.M, 2 * s.points, false);
      prefetch_row(parameters.weights + s.points * ahead * problem.M, s.points, false);
      prefetch_row(static_cast<const T*>(problem.grad_output) + (item + ahead * problem.M) * problem.D, problem.D, false);
      prefetch_row(static_cast<A*>(problem.grad_locations) + (item + ahead * problem.M) * s.points * 2, 2 * s.points, true);
      prefetch_row(static_cast<A*>(problem.grad_weights) + (item + ahead * problem.M) * s.points, s.points, true);
    }
    msda_place<A, true>(s, parameters.locations, parameters.weights);
    const T* grad = static_cast<const T*>(problem.grad_output) + item * problem.D;
    int64_t c = 0;
    for (; c + 2 * V <= s.channels; c += 2 * V) msda_scatter<T, V, 2>(problem, s, c, grad);
    for (; c < s.channels; c += V) msda_scatter<T, V, 1>(problem, s, c, grad);
    msda_finish<A>(s, static_cast<A*>(problem.grad_locations) + item * s.points * 2,
                   static_cast<A*>(problem.grad_weights) + item * s.points);
  }
  msda_unpack<T, V>(problem, s, n, m);
}
