// Multi-scale deformable attention for one (image, head). Included after storage.h, inside a namespace per
// instruction set.
//
// The head's channels are first packed into scratch: neighbouring positions become neighbouring cache lines (in the
// tensor they lie M*D numbers apart, which leaves most cache sets unused), and every level gets a border of zeros, so
// that corners outside need no test. Points that take no part are sent to a region of zeros at the start.

// A level in scratch. Position (y, x), y in -1..H, x in -1..W, is number `origin + y * pitch + x`; the right border of a
// row is the left border of the next.
struct PackedLevel {
  int64_t height, width, pitch, origin;
};

template <class A>
struct MsdaScratch {
  typedef typename IntOf<A>::type I;
  static constexpr int lanes = Lanes<A>::value;
  int64_t points;    // L*P
  int64_t padded;    // the same, rounded up to whole vectors
  int64_t channels;  // D rounded up to whole vectors
  int64_t stride;    // numbers per position: channels, twice that in backward (value, then its gradient)
  int64_t positions;
  PackedLevel* levels;
  A *width, *height;     // per point: those of its level, -1 beyond the last point, where nothing is inside
  I *pitch, *origin;     // per point, times stride
  I* place;              // per point: first number of the upper left corner
  A* corner[4];          // per point: folded weights of the corners
  A *right, *below, *factor, *known;  // per point: fractions, weight (0 if outside), 1 if inside
  A* dots;                     // per point and corner: <gradient, corner>
  A *locations, *weights;      // room for one padded copy
  A* packed;
  int64_t bytes;
};

// Lanes of the vectors over channels.
template <class A>
TM_INLINE int channel_lanes(int64_t D) {
  int lanes = Lanes<A>::value > 4 ? Lanes<A>::value : 4;
  while (lanes > 4 && D <= lanes / 2) lanes /= 2;
  return lanes;
}

template <class A>
MsdaScratch<A> msda_layout(const MsdaProblem& problem, bool backward, char* memory) {
  MsdaScratch<A> s;
  const int lanes = channel_lanes<A>(problem.D);
  s.points = problem.L * problem.P;
  s.padded = (s.points + s.lanes - 1) / s.lanes * s.lanes;
  s.channels = (problem.D + lanes - 1) / lanes * lanes;
  s.stride = s.channels * (backward ? 2 : 1);
  char* next = memory;
  auto take = [&](auto*& pointer, int64_t count) {
    typedef typename RemovePointer<decltype(pointer)>::type Element;
    pointer = reinterpret_cast<Element*>(next);
    next += (count * int64_t(sizeof(Element)) + 63) / 64 * 64;
  };
  take(s.levels, problem.L);
  take(s.width, s.padded);
  take(s.height, s.padded);
  take(s.pitch, s.padded);
  take(s.origin, s.padded);
  take(s.place, s.padded);
  for (auto& corner : s.corner) take(corner, s.padded);
  take(s.right, s.padded);
  take(s.below, s.padded);
  take(s.factor, s.padded);
  take(s.known, s.padded);
  take(s.dots, s.padded * 4);
  take(s.locations, s.padded * 2);
  take(s.weights, s.padded);
  int64_t widest = 0;
  for (int64_t l = 0; l < problem.L; ++l) widest = problem.sizes[2 * l + 1] > widest ? problem.sizes[2 * l + 1] : widest;
  s.positions = widest + 3;  // the region of zeros: an upper left corner at 0 reaches pitch + 1
  for (int64_t l = 0; l < problem.L; ++l) {
    const int64_t height = problem.sizes[2 * l], width = problem.sizes[2 * l + 1];
    s.positions += (height + 2) * (width + 1) + 1;
  }
  take(s.packed, s.positions * s.stride);
  s.bytes = next - memory;
  return s;
}

template <class A>
void msda_tables(const MsdaProblem& problem, const MsdaScratch<A>& s) {
  // Lanes beyond the last point are computed with; what malloc left there may be subnormal, which is very slow.
  for (int64_t i = 0; i < s.padded * 4; ++i) s.dots[i] = 0;
  int64_t origin = s.positions;
  for (int64_t l = problem.L - 1; l >= 0; --l) {
    const int64_t height = problem.sizes[2 * l], width = problem.sizes[2 * l + 1];
    origin -= (height + 2) * (width + 1) + 1;
    s.levels[l] = PackedLevel{height, width, width + 1, origin + (width + 1) + 1};
  }
  for (int64_t i = 0; i < s.padded; ++i) {
    const bool real = i < s.points;
    const PackedLevel& level = s.levels[real ? i / problem.P : 0];
    s.width[i] = real ? A(level.width) : A(-1);
    s.height[i] = real ? A(level.height) : A(-1);
    s.pitch[i] = level.pitch * s.stride;
    s.origin[i] = level.origin * s.stride;
  }
}

constexpr int ahead = 8;
// Rows of one head lie a long way apart, which hardware prefetchers do not follow.
template <class A>
TM_INLINE void prefetch_row(const A* row, int64_t count, bool write) {
  const char* from = reinterpret_cast<const char*>(row);
  const int64_t bytes = count * int64_t(sizeof(A));
  for (int64_t i = 0; i < bytes + 63; i += 64) {
    if (write) {
      __builtin_prefetch(from + (i < bytes ? i : bytes - 1), 1, 3);
    } else {
      __builtin_prefetch(from + (i < bytes ? i : bytes - 1), 0, 3);
    }
  }
}

// Copy the head's channels into scratch; borders, padding channels and (backward) gradients become zero.
template <class T, int V>
void msda_pack(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t n, int64_t m) {
  typedef Work<T> A;
  const int64_t step = problem.M * problem.D;
  const T* from = static_cast<const T*>(problem.value) + n * problem.S * step + m * problem.D;
  A* to = s.packed;
  A* end = s.packed + s.positions * s.stride;
  const auto clear = [&](A* until) {
    for (; to < until; to += V) store<A, V>(to, Vec<A, V>{});
  };
  for (int64_t l = 0; l < problem.L; ++l) {
    const PackedLevel& level = s.levels[l];
    for (int64_t y = 0; y < level.height; ++y) {
      clear(s.packed + (level.origin + y * level.pitch) * s.stride);
      for (int64_t x = 0; x < level.width; ++x, from += step) {
        prefetch_row(from + 2 * ahead * step, problem.D, false);
        for (int64_t c = 0; c < s.channels; c += V, to += V) store<A, V>(to, load_part<T, V>(from + c, problem.D - c));
        for (int64_t c = s.channels; c < s.stride; c += V, to += V) store<A, V>(to, Vec<A, V>{});
      }
    }
  }
  clear(end);
}

// Copy the gradients out of scratch.
template <class T, int V>
void msda_unpack(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t n, int64_t m) {
  typedef Work<T> A;
  const int64_t step = problem.M * problem.D;
  T* to = static_cast<T*>(problem.grad_value) + n * problem.S * step + m * problem.D;
  for (int64_t l = 0; l < problem.L; ++l) {
    const PackedLevel& level = s.levels[l];
    for (int64_t y = 0; y < level.height; ++y) {
      const A* from = s.packed + (level.origin + y * level.pitch) * s.stride + s.channels;
      for (int64_t x = 0; x < level.width; ++x, to += step, from += s.stride) {
        prefetch_row(to + 2 * ahead * step, problem.D, true);
        for (int64_t c = 0; c < s.channels; c += V) store_part<T, V>(to + c, load<A, V>(from + c), problem.D - c);
      }
    }
  }
}

// Places and folded weights of all points of one (query, head), vectorised over points.
template <class A, bool Backward>
TM_INLINE void msda_place(const MsdaScratch<A>& s, const A* locations, const A* weights) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  typedef IntVec<A, V> J;
  typedef typename IntOf<A>::type I;
  for (int64_t i = 0; i < s.padded; i += V) {
    const F low = load<A, V>(locations + 2 * i), high = load<A, V>(locations + 2 * i + V);
    const F width = load<A, V>(s.width + i), height = load<A, V>(s.height + i);
    F x = shuffle<EvenLanes, A, V>(low, high) * width - A(0.5);
    F y = shuffle<OddLanes, A, V>(low, high) * height - A(0.5);
    const J inside = (x > A(-1)) & (x < width) & (y > A(-1)) & (y < height);
    x = inside ? x : F{};
    y = inside ? y : F{};
    J column, row;
    const F right = x - floor_to<A, V>(x, column);
    const F below = y - floor_to<A, V>(y, row);
    const J place = load<I, V>(s.origin + i) + row * load<I, V>(s.pitch + i) + column * I(s.stride);
    const F factor = inside ? load<A, V>(weights + i) : F{};
    store<I, V>(s.place + i, inside ? place : J{});
    const F lower = factor * below, upper = factor - lower;
    const F lower_right = lower * right, upper_right = upper * right;
    store<A, V>(s.corner[0] + i, upper - upper_right);
    store<A, V>(s.corner[1] + i, upper_right);
    store<A, V>(s.corner[2] + i, lower - lower_right);
    store<A, V>(s.corner[3] + i, lower_right);
    if (Backward) {
      store<A, V>(s.right + i, right);
      store<A, V>(s.below + i, below);
      store<A, V>(s.factor + i, factor);
      store<A, V>(s.known + i, inside ? F{} + A(1) : F{});
    }
  }
}

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

// Pointers to the parameters of one (query, head), with room to read whole vectors behind them.
template <class A>
struct MsdaParameters {
  const A *locations, *weights;
  TM_INLINE MsdaParameters(const MsdaProblem& problem, const MsdaScratch<A>& s, int64_t item) {
    const int64_t first = item * s.points, total = problem.N * problem.Q * problem.M * s.points;
    locations = static_cast<const A*>(problem.locations) + 2 * first;
    weights = static_cast<const A*>(problem.weights) + first;
    if (first + s.padded <= total) return;
    for (int64_t i = 0; i < 2 * s.points; ++i) s.locations[i] = locations[i];
    for (int64_t i = 0; i < s.points; ++i) s.weights[i] = weights[i];
    locations = s.locations;
    weights = s.weights;
  }
};

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

// Scatter of one query's gradient into V*B channels of the corners, and the part of the four scalar products
// <gradient, corner> of every point that these channels hold; both in one pass over the corners.
template <class T, int V, int B>
TM_INLINE void msda_scatter(const MsdaProblem& problem, const MsdaScratch<Work<T>>& s, int64_t channel, const T* grad) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  constexpr int group = V / 4;  // points whose 4 products fill one vector
  F g[B];
  TM_UNROLL for (int b = 0; b < B; ++b) g[b] = load_part<T, V>(grad + channel + b * V, problem.D - channel - b * V);
  // In registers: a store through a vector could change members of the struct, as far as a compiler knows.
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
