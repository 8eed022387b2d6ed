// Positions of DCNv3's points: scratch, tables, places and corner weights of a pixel's block of groups; shared by forward
// and backward. Included after storage.h, inside a namespace per instruction set.
//
// Positions are stored as whole pixel plus fraction, which is exact for any image size. A pixel whose corners are all
// inside the image (nearly every pixel) takes a path without tests; other pixels clamp addresses and give zero weight to
// corners outside.

constexpr int64_t dcn_far = 100000000;  // pixels; farther offsets are outside any image and become this

template <class A>
struct DcnScratch {
  typedef typename IntOf<A>::type I;
  static constexpr int lanes = Lanes<A>::value;
  int64_t points, padded;  // of all groups of one pixel
  A *tap_x, *tap_y;        // scaled taps of the kernel, repeated for every group
  I* channel;              // per point: first channel of its group, counted from the block
  A* share;                // per point: 1 - centre share of its group
  I* place[4];             // first number of the corners, relative to the block; [0] alone in the path without tests
  A* corner[4];            // folded weights of the corners
  A* known[4];             // 1 where the corner counts
  A *right, *below, *factor, *sample, *dots;
  A *offset, *mask;  // room for one padded copy
  int64_t bytes;
};

template <class A>
DcnScratch<A> dcn_layout(const DcnProblem& problem, char* memory) {
  DcnScratch<A> s;
  s.points = problem.G * problem.P;
  s.padded = (s.points + s.lanes - 1) / s.lanes * s.lanes;
  Taker take{memory};
  take(s.tap_x, s.padded);
  take(s.tap_y, s.padded);
  take(s.channel, s.padded);
  take(s.share, s.padded);
  for (auto& place : s.place) take(place, s.padded);
  for (auto& corner : s.corner) take(corner, s.padded);
  for (auto& known : s.known) take(known, s.padded);
  take(s.right, s.padded);
  take(s.below, s.padded);
  take(s.factor, s.padded);
  take(s.sample, s.padded);
  take(s.dots, s.padded * 4 + s.lanes);
  take(s.offset, s.padded * 2);
  take(s.mask, s.padded);
  s.bytes = take.next - memory;
  return s;
}

template <class A>
void dcn_tables(const DcnProblem& problem, const DcnScratch<A>& s) {
  // Lanes beyond the last point are computed, too; uninitialised memory may be subnormal, which is very slow.
  for (int64_t i = 0; i < s.padded * 4 + s.lanes; ++i) s.dots[i] = 0;
  for (int64_t i = 0; i < s.padded; ++i) {
    s.tap_x[i] = A(problem.taps[2 * (i % problem.P)]);
    s.tap_y[i] = A(problem.taps[2 * (i % problem.P) + 1]);
    s.channel[i] = (i < s.points ? i : 0) / problem.P * problem.D;
    s.share[i] = 1;
  }
}

// A pixel's block of groups: what one step of the loops below works on.
template <class A>
struct DcnPixel {
  int64_t points;    // of the block
  int64_t base_x, base_y;  // centre of the kernel
  const A *offset, *mask;  // readable in whole vectors
};

template <class A>
TM_INLINE DcnPixel<A> dcn_pixel(const DcnProblem& problem, const DcnScratch<A>& s, int64_t n, int64_t row, int64_t column,
                                int64_t group, int64_t groups) {
  DcnPixel<A> pixel;
  pixel.points = groups * problem.P;
  pixel.base_x = column * problem.stride_x + problem.base_x;
  pixel.base_y = row * problem.stride_y + problem.base_y;
  const int64_t first = ((n * problem.Ho + row) * problem.Wo + column) * s.points + group * problem.P;
  pixel.offset = static_cast<const A*>(problem.offset) + 2 * first;
  pixel.mask = static_cast<const A*>(problem.mask) + first;
  const int64_t padded = (pixel.points + s.lanes - 1) / s.lanes * s.lanes;
  if (first + padded > problem.N * problem.Ho * problem.Wo * s.points) {
    for (int64_t i = 0; i < 2 * pixel.points; ++i) s.offset[i] = pixel.offset[i];
    for (int64_t i = 0; i < pixel.points; ++i) s.mask[i] = pixel.mask[i];
    for (int64_t i = pixel.points; i < padded; ++i) s.offset[2 * i] = s.offset[2 * i + 1] = s.mask[i] = 0;
    pixel.offset = s.offset;
    pixel.mask = s.mask;
  }
  return pixel;
}

// Whole pixel and fraction of V points.
template <class A, int V>
struct DcnPlaces {
  IntVec<A, V> column, row;
  Vec<A, V> right, below;
};
template <class A>
TM_INLINE DcnPlaces<A, Lanes<A>::value> dcn_places(const DcnProblem& problem, const DcnScratch<A>& s,
                                                   const DcnPixel<A>& pixel, int64_t i) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  typedef typename IntOf<A>::type I;
  const F low = load<A, V>(pixel.offset + 2 * i), high = load<A, V>(pixel.offset + 2 * i + V);
  const A scale = A(problem.offset_scale), far = A(dcn_far);
  F x = load<A, V>(s.tap_x + i) + scale * shuffle<EvenLanes, A, V>(low, high);
  F y = load<A, V>(s.tap_y + i) + scale * shuffle<OddLanes, A, V>(low, high);
  // False for NaN.
  x = (x > -far) & (x < far) ? x : F{} - far;
  y = (y > -far) & (y < far) ? y : F{} - far;
  DcnPlaces<A, V> places;
  places.right = x - floor_to<A, V>(x, places.column);
  places.below = y - floor_to<A, V>(y, places.row);
  places.column += I(pixel.base_x);
  places.row += I(pixel.base_y);
  return places;
}

// How far the corners of a pixel reach: rows first..last-1 only, other rows of the image too, or outside.
enum class DcnReach { own, image, outside };

// Places and weights, assuming that every corner is inside the image; returns whether that is so. Always runs, so that
// weights do not depend on which path follows. `first` and `last` matter in backward only.
template <class A, bool Backward>
TM_INLINE DcnReach dcn_place_inside(const DcnProblem& problem, const DcnScratch<A>& s, const DcnPixel<A>& pixel,
                                int64_t first, int64_t last) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  typedef IntVec<A, V> J;
  typedef typename IntOf<A>::type I;
  const I last_column = I(problem.W - 2), last_row = I(problem.H - 2), own_first = I(first), own_last = I(last - 2);
  const I step = I(problem.G * problem.D), pitch = I(problem.W * problem.G * problem.D);
  J outside = {}, foreign = {};
  for (int64_t i = 0; i < pixel.points; i += V) {
    const auto places = dcn_places<A>(problem, s, pixel, i);
    J bad = (places.column < 0) | (places.column > last_column) | (places.row < 0) | (places.row > last_row);
    J other = (places.row < own_first) | (places.row > own_last);
    if (i + V > pixel.points) {  // the others are no points
      bad &= lane_numbers<A, V>() < I(pixel.points - i);
      if (Backward) other &= lane_numbers<A, V>() < I(pixel.points - i);
    }
    outside |= bad;
    if (Backward) foreign |= other;
    store<I, V>(s.place[1] + i, bad);  // for dcn_place_clamped
    const F factor = load<A, V>(pixel.mask + i) * load<A, V>(s.share + i);
    store<I, V>(s.place[0] + i, places.row * pitch + places.column * step + load<I, V>(s.channel + i));
    const F lower = factor * places.below, upper = factor - lower;
    const F lower_right = lower * places.right, upper_right = upper * places.right;
    store<A, V>(s.corner[0] + i, upper - upper_right);
    store<A, V>(s.corner[1] + i, upper_right);
    store<A, V>(s.corner[2] + i, lower - lower_right);
    store<A, V>(s.corner[3] + i, lower_right);
    if (Backward) {
      store<A, V>(s.right + i, places.right);
      store<A, V>(s.below + i, places.below);
      store<A, V>(s.factor + i, factor);
    }
  }
  if (any<A, V>(outside)) return DcnReach::outside;
  return Backward && any<A, V>(foreign) ? DcnReach::image : DcnReach::own;
}

// Correct the result of dcn_place_inside for corners outside the image: weight zero, an address on row `home`. The other
// weights must stay bit-identical, because the division of groups among threads decides which pixels come here.
template <class A, bool Backward>
__attribute__((noinline)) void dcn_place_clamped(const DcnProblem& problem, const DcnScratch<A>& s,
                                                 const DcnPixel<A>& pixel, int64_t home) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  typedef IntVec<A, V> J;
  typedef typename IntOf<A>::type I;
  const I width = I(problem.W), height = I(problem.H);
  const I step = I(problem.G * problem.D), pitch = I(problem.W * problem.G * problem.D);
  for (int64_t i = 0; i < pixel.points; i += V) {
    if (!any<A, V>(load<I, V>(s.place[1] + i))) {
      const J first = load<I, V>(s.place[0] + i);
      store<I, V>(s.place[1] + i, first + step);
      store<I, V>(s.place[2] + i, first + pitch);
      store<I, V>(s.place[3] + i, first + pitch + step);
      for (int r = 0; Backward && r < 4; ++r) store<A, V>(s.known[r] + i, F{} + A(1));
      continue;
    }
    const auto places = dcn_places<A>(problem, s, pixel, i);
    // -1 < position < size, of which -1 itself is not part.
    const J inside = (places.column < width) & ((places.column >= 0) | ((places.column == -1) & (places.right > 0))) &
                     (places.row < height) & ((places.row >= 0) | ((places.row == -1) & (places.below > 0)));
    for (int r = 0; r < 4; ++r) {
      const J column = places.column + (r & 1), row = places.row + (r >> 1);
      const J known = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height);
      store<I, V>(s.place[r] + i, (known ? row * pitch + column * step : J{} + I(home) * pitch) + load<I, V>(s.channel + i));
      store<A, V>(s.corner[r] + i, known ? load<A, V>(s.corner[r] + i) : F{});
      if (Backward) store<A, V>(s.known[r] + i, known ? F{} + A(1) : F{});
    }
    if (Backward) {
      store<A, V>(s.right + i, inside ? places.right : F{});
      store<A, V>(s.below + i, inside ? places.below : F{});
      store<A, V>(s.factor + i, inside ? load<A, V>(s.factor + i) : F{});
    }
  }
}

// 1 - centre share of every point's group.
template <class A>
TM_INLINE void dcn_share(const DcnProblem& problem, const DcnScratch<A>& s, int64_t pixel, int64_t group, int64_t groups) {
  if (problem.scale == nullptr) return;
  const A* scale = static_cast<const A*>(problem.scale) + pixel * problem.G + group;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t p = 0; p < problem.P; ++p) s.share[g * problem.P + p] = A(1) - scale[g];
  }
}
