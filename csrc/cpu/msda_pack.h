// Packing and places of multi-scale deformable attention for one (image, head); shared by both directions. Included after
// storage.h, inside a namespace per instruction set.
//
// The head's channels are first packed into scratch: neighbouring positions become neighbouring cache lines (in the
// tensor they are M*D numbers apart, which leaves most cache sets unused), and every level gets a border of zeros, so
// that corners outside need no test. Points that are not used read a region of zeros at the start.

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
  Taker take{memory};
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
  s.bytes = take.next - memory;
  return s;
}

template <class A>
void msda_tables(const MsdaProblem& problem, const MsdaScratch<A>& s) {
  // Lanes beyond the last point are computed, too; uninitialised memory may be subnormal, which is very slow.
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
// Rows of one head are far apart, so hardware prefetchers do not help.
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
