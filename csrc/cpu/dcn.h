// DCNv3 for a block of pixels (forward) or of groups (backward). Included after storage.h, inside a namespace per
// instruction set.
//
// Positions are kept as whole pixel plus fraction, which loses nothing however large the image is. A pixel all of whose
// corners are inside the image (nearly every one) takes a path without any test; the others clamp addresses and give
// zero weight to what is outside.

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
  char* next = memory;
  auto take = [&](auto*& pointer, int64_t count) {
    typedef typename RemovePointer<decltype(pointer)>::type Element;
    pointer = reinterpret_cast<Element*>(next);
    next += (count * int64_t(sizeof(Element)) + 63) / 64 * 64;
  };
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
  s.bytes = next - memory;
  return s;
}

template <class A>
void dcn_tables(const DcnProblem& problem, const DcnScratch<A>& s) {
  // Lanes beyond the last point are computed with; what malloc left there may be subnormal, which is very slow.
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

// Places and weights on the supposition that every corner is inside; false if one is not. Always runs, so that weights
// do not depend on which path follows.
template <class A, bool Backward>
TM_INLINE bool dcn_place_inside(const DcnProblem& problem, const DcnScratch<A>& s, const DcnPixel<A>& pixel) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  typedef IntVec<A, V> J;
  typedef typename IntOf<A>::type I;
  const I last_column = I(problem.W - 2), last_row = I(problem.H - 2);
  const I step = I(problem.G * problem.D), pitch = I(problem.W * problem.G * problem.D);
  J outside = {};
  for (int64_t i = 0; i < pixel.points; i += V) {
    const auto places = dcn_places<A>(problem, s, pixel, i);
    J bad = (places.column < 0) | (places.column > last_column) | (places.row < 0) | (places.row > last_row);
    if (i + V > pixel.points) bad &= lane_numbers<A, V>() < I(pixel.points - i);  // the others are no points
    outside |= bad;
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
  return !any<A, V>(outside);
}

// Correct what dcn_place_inside left for corners that are outside: weight zero, an address inside. The weights of the
// others stay as they are, to the last bit: which pixels come here depends on how groups are divided among threads.
template <class A, bool Backward>
__attribute__((noinline)) void dcn_place_clamped(const DcnProblem& problem, const DcnScratch<A>& s,
                                                 const DcnPixel<A>& pixel) {
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
      store<I, V>(s.place[r] + i, (known ? row * pitch + column * step : J{}) + load<I, V>(s.channel + i));
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

// Weighted sum over one group's points for V*B channels, in registers. `first` is the group's first point in the block.
template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_gather(const DcnProblem& problem, const DcnScratch<Work<T>>& s, int64_t first, const T* image,
                          Vec<Work<T>, V>* total) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  constexpr int chains = B >= 4 ? 2 : 4;
  F sum[chains][B];
  TM_UNROLL for (int chain = 0; chain < chains; ++chain) {
    TM_UNROLL for (int b = 0; b < B; ++b) sum[chain][b] = F{};
  }
  const int64_t across = problem.G * problem.D, down = across * problem.W, points = problem.P;
  const auto *place0 = s.place[0] + first, *place1 = Inside ? place0 : s.place[1] + first,
             *place2 = Inside ? place0 : s.place[2] + first, *place3 = Inside ? place0 : s.place[3] + first;
  const T *image1 = Inside ? image + across : image, *image2 = Inside ? image + down : image,
          *image3 = Inside ? image + down + across : image;
  const A *weight0 = s.corner[0] + first, *weight1 = s.corner[1] + first, *weight2 = s.corner[2] + first,
          *weight3 = s.corner[3] + first;
  const auto add = [&](int64_t p) __attribute__((always_inline)) {
    const T *corner0 = image + place0[p], *corner1 = image1 + place1[p], *corner2 = image2 + place2[p],
            *corner3 = image3 + place3[p];
    TM_UNROLL for (int b = 0; b < B; ++b) {
      sum[0][b] += weight0[p] * Convert<T, V>::in(corner0 + b * V);
      sum[1][b] += weight1[p] * Convert<T, V>::in(corner1 + b * V);
      sum[2 % chains][b] += weight2[p] * Convert<T, V>::in(corner2 + b * V);
      sum[3 % chains][b] += weight3[p] * Convert<T, V>::in(corner3 + b * V);
    }
  };
  if (Inside && points == 9) {  // the 3x3 kernel of every published model
    TM_UNROLL for (int p = 0; p < 9; ++p) add(p);
  } else {
    for (int64_t p = 0; p < points; ++p) add(p);
  }
  TM_UNROLL for (int b = 0; b < B; ++b) {
    total[b] = sum[0][b] + sum[1][b];
    if (chains == 4) total[b] += sum[2 % chains][b] + sum[3 % chains][b];
  }
}

template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_output(const DcnProblem& problem, const DcnScratch<Work<T>>& s, const T* image, int64_t pixel) {
  typedef Work<T> A;
  const int64_t D = problem.D, points = problem.P, groups = problem.G, first = pixel * groups * D;
  T* output = static_cast<T*>(problem.output) + first;
  const T* center = static_cast<const T*>(problem.x) + first;  // used with an output of the input's size
  const A* scale = problem.scale == nullptr ? nullptr : static_cast<const A*>(problem.scale) + pixel * groups;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t within = 0; within < D; within += V * B) {
      Vec<A, V> total[B];
      dcn_gather<T, V, B, Inside>(problem, s, g * points, image + within, total);
      TM_UNROLL for (int b = 0; b < B; ++b) {
        const int64_t c = g * D + within + b * V;
        if (scale != nullptr) total[b] += scale[g] * Convert<T, V>::in(center + c);  // total has the factor 1 - scale
        Convert<T, V>::out(output + c, total[b]);
      }
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

template <class T, int V, int B>
void dcn_forward_lanes(const DcnProblem& problem, int64_t n, const DcnTile& tile, void* scratch) {
  typedef Work<T> A;
  const auto s = dcn_layout<A>(problem, static_cast<char*>(scratch));
  dcn_tables<A>(problem, s);
  const T* image = static_cast<const T*>(problem.x) + n * problem.H * problem.W * problem.G * problem.D;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    for (int64_t column = tile.first_column; column < tile.last_column; ++column) {
      const int64_t index = (n * problem.Ho + row) * problem.Wo + column;
      const DcnPixel<A> pixel = dcn_pixel<A>(problem, s, n, row, column, 0, problem.G);
      dcn_share<A>(problem, s, index, 0, problem.G);
      if (dcn_place_inside<A, false>(problem, s, pixel)) {
        dcn_output<T, V, B, true>(problem, s, image, index);
      } else {
        dcn_place_clamped<A, false>(problem, s, pixel);
        dcn_output<T, V, B, false>(problem, s, image, index);
      }
    }
  }
}

// Pointers of the scratch that the loops over points keep in registers; a store through a vector could change the
// members of the struct, as far as a compiler knows.
template <class A, bool Inside>
struct DcnCorners {
  typedef typename IntOf<A>::type I;
  const I *place0, *place1, *place2, *place3;
  int64_t across, down;
  TM_INLINE DcnCorners(const DcnProblem& problem, const DcnScratch<A>& s)
      : place0(s.place[0]),
        place1(s.place[1]),
        place2(s.place[2]),
        place3(s.place[3]),
        across(problem.G * problem.D),
        down(across * problem.W) {}
  TM_INLINE void find(int64_t point, int64_t* where) const {
    where[0] = place0[point];
    where[1] = Inside ? where[0] + across : int64_t(place1[point]);
    where[2] = Inside ? where[0] + down : int64_t(place2[point]);
    where[3] = Inside ? where[2] + across : int64_t(place3[point]);
  }
};

// The four scalar products <gradient, corner> of every point, over V*B channels of each group; added to what earlier
// channels gave if `more`.
template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_products(const DcnProblem& problem, const DcnScratch<Work<T>>& s, int64_t points, const T* image,
                            const T* grad, bool more) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  constexpr int together = V >= 4 ? V / 4 : 1;  // points whose 4 products fill one vector
  const DcnCorners<A, Inside> corners(problem, s);
  const auto* channel = s.channel;
  A* dots = s.dots;
  for (int64_t i = 0; i < points; i += together, dots += 4 * together) {
    F product[4 * together];
    TM_UNROLL for (int k = 0; k < together; ++k) {
      const int64_t point = i + k < points ? i + k : points - 1;
      int64_t where[4];
      corners.find(point, where);
      const T* g = grad + channel[point];
      TM_UNROLL for (int r = 0; r < 4; ++r) {
        const T* from = image + where[r];
        F sum = Convert<T, V>::in(g) * Convert<T, V>::in(from);
        TM_UNROLL for (int b = 1; b < B; ++b) sum += Convert<T, V>::in(g + b * V) * Convert<T, V>::in(from + b * V);
        product[4 * k + r] = sum;
      }
    }
    if constexpr (V >= 4) {
      const F sums = transposed_sum<A, V>(product);
      store<A, V>(dots, more ? load<A, V>(dots) + sums : sums);
    } else {
      for (int r = 0; r < 4; ++r) dots[r] = more ? dots[r] + product[r][0] : product[r][0];
    }
  }
}

// Scatter of one pixel's gradient into V*B channels of every point's corners. A pass of its own, after the products:
// x and its gradient often lie at the same offset within a memory page, and a processor that compares only these bits
// of an address makes a read wait for an earlier write.
template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_scatter(const DcnProblem& problem, const DcnScratch<Work<T>>& s, int64_t points, Work<T>* grad_image,
                           const T* grad) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  const DcnCorners<A, Inside> corners(problem, s);
  const auto* channel = s.channel;
  const A *weight0 = s.corner[0], *weight1 = s.corner[1], *weight2 = s.corner[2], *weight3 = s.corner[3];
  for (int64_t point = 0; point < points; ++point) {
    int64_t where[4];
    corners.find(point, where);
    const A weights[4] = {weight0[point], weight1[point], weight2[point], weight3[point]};
    const T* from = grad + channel[point];
    F g[B];
    TM_UNROLL for (int b = 0; b < B; ++b) g[b] = Convert<T, V>::in(from + b * V);
    TM_UNROLL for (int r = 0; r < 4; ++r) {
      A* to = grad_image + where[r];
      TM_UNROLL for (int b = 0; b < B; ++b) store<A, V>(to + b * V, load<A, V>(to + b * V) + weights[r] * g[b]);
    }
  }
}

// Gradients of offset and mask from the scalar products, vectorised over points.
template <class A, bool Inside>
TM_INLINE void dcn_finish(const DcnProblem& problem, const DcnScratch<A>& s, int64_t points, A* grad_offset, A* grad_mask) {
  constexpr int V = Lanes<A>::value;
  typedef Vec<A, V> F;
  const A scale = A(problem.offset_scale);
  for (int64_t i = 0; i < points; i += V) {
    const A* dots = s.dots + 4 * i;
    const F a = load<A, V>(dots), b = load<A, V>(dots + V), c = load<A, V>(dots + 2 * V), d = load<A, V>(dots + 3 * V);
    const F even_low = shuffle<EvenLanes, A, V>(a, b), even_high = shuffle<EvenLanes, A, V>(c, d);
    const F odd_low = shuffle<OddLanes, A, V>(a, b), odd_high = shuffle<OddLanes, A, V>(c, d);
    F d0 = shuffle<EvenLanes, A, V>(even_low, even_high), d2 = shuffle<OddLanes, A, V>(even_low, even_high);
    F d1 = shuffle<EvenLanes, A, V>(odd_low, odd_high), d3 = shuffle<OddLanes, A, V>(odd_low, odd_high);
    if (!Inside) {
      d0 = load<A, V>(s.known[0] + i) != F{} ? d0 : F{};
      d1 = load<A, V>(s.known[1] + i) != F{} ? d1 : F{};
      d2 = load<A, V>(s.known[2] + i) != F{} ? d2 : F{};
      d3 = load<A, V>(s.known[3] + i) != F{} ? d3 : F{};
    }
    const F right = load<A, V>(s.right + i), below = load<A, V>(s.below + i), factor = load<A, V>(s.factor + i) * scale;
    const F above = d0 + right * (d1 - d0), under = d2 + right * (d3 - d2);
    const F sample = above + below * (under - above);
    const F x = factor * ((d1 - d0) + below * ((d3 - d2) - (d1 - d0)));
    const F y = factor * (under - above);
    store<A, V>(s.sample + i, sample);
    store_part<A, V>(grad_mask + i, sample * load<A, V>(s.share + i), points - i);
    store_part<A, V>(grad_offset + 2 * i, shuffle<LowHalves, A, V>(x, y), 2 * (points - i));
    if (2 * (points - i) > V) {
      store_part<A, V>(grad_offset + 2 * i + V, shuffle<HighHalves, A, V>(x, y), 2 * (points - i) - V);
    }
  }
}

// Gradients of the centre share, and what it hands to the centre pixel.
template <class T, int V>
TM_INLINE void dcn_center(const DcnProblem& problem, const DcnScratch<Work<T>>& s, const DcnPixel<Work<T>>& pixel,
                          int64_t index, int64_t group, int64_t groups) {
  typedef Work<T> A;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = index * problem.G * problem.D + (group + g) * problem.D;
    const A a = static_cast<const A*>(problem.scale)[index * problem.G + group + g];
    Vec<A, V> along = {};
    for (int64_t c = first; c < first + problem.D; c += V) {
      const Vec<A, V> grad = Convert<T, V>::in(static_cast<const T*>(problem.grad_output) + c);
      along += grad * Convert<T, V>::in(static_cast<const T*>(problem.x) + c);
      A* to = static_cast<A*>(problem.grad_x) + c;
      store<A, V>(to, load<A, V>(to) + a * grad);
    }
    A total = 0;
    for (int lane = 0; lane < V; ++lane) total += along[lane];
    for (int64_t p = 0; p < problem.P; ++p) total -= pixel.mask[g * problem.P + p] * s.sample[g * problem.P + p];
    static_cast<A*>(problem.grad_scale)[index * problem.G + group + g] = total;
  }
}

template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_pixel_backward(const DcnProblem& problem, const DcnScratch<Work<T>>& s, const DcnPixel<Work<T>>& pixel,
                                  int64_t n, int64_t index, int64_t group, int64_t groups) {
  typedef Work<T> A;
  const int64_t channels = problem.G * problem.D, image = n * problem.H * problem.W * channels;
  const T* grad = static_cast<const T*>(problem.grad_output) + index * channels;
  for (int64_t within = 0; within < problem.D; within += V * B) {
    const int64_t c = group * problem.D + within;
    dcn_products<T, V, B, Inside>(problem, s, pixel.points, static_cast<const T*>(problem.x) + image + c, grad + c,
                                  within > 0);
    dcn_scatter<T, V, B, Inside>(problem, s, pixel.points, static_cast<A*>(problem.grad_x) + image + c, grad + c);
  }
  const int64_t first = index * s.points + group * problem.P;
  dcn_finish<A, Inside>(problem, s, pixel.points, static_cast<A*>(problem.grad_offset) + 2 * first,
                        static_cast<A*>(problem.grad_mask) + first);
  if (problem.scale != nullptr) dcn_center<T, V>(problem, s, pixel, index, group, groups);
}

template <class T, int V, int B>
void dcn_backward_lanes(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, int64_t strip, void* scratch) {
  typedef Work<T> A;
  const auto s = dcn_layout<A>(problem, static_cast<char*>(scratch));
  dcn_tables<A>(problem, s);
  for (int64_t left = 0; left < problem.Wo; left += strip) {
    const int64_t end = left + strip < problem.Wo ? left + strip : problem.Wo;
    for (int64_t row = 0; row < problem.Ho; ++row) {
      for (int64_t column = left; column < end; ++column) {
        const int64_t index = (n * problem.Ho + row) * problem.Wo + column;
        const DcnPixel<A> pixel = dcn_pixel<A>(problem, s, n, row, column, group, groups);
        dcn_share<A>(problem, s, index, group, groups);
        if (dcn_place_inside<A, true>(problem, s, pixel)) {
          dcn_pixel_backward<T, V, B, true>(problem, s, pixel, n, index, group, groups);
        } else {
          dcn_place_clamped<A, true>(problem, s, pixel);
          dcn_pixel_backward<T, V, B, false>(problem, s, pixel, n, index, group, groups);
        }
      }
    }
  }
}

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
  int64_t n, group, groups, strip;
  void* scratch;
  template <int V, int B>
  TM_INLINE void run() const {
    dcn_backward_lanes<T, V, B>(problem, n, group, groups, strip, scratch);
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

void dcn_backward(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, int64_t strip, void* scratch) {
  switch (problem.storage) {
    case Storage::f32:
      return dcn_with_lanes<float>(problem.D, DcnBackward<float>{problem, n, group, groups, strip, scratch});
    case Storage::f64:
      return dcn_with_lanes<double>(problem.D, DcnBackward<double>{problem, n, group, groups, strip, scratch});
    case Storage::bf16:
      return dcn_with_lanes<float>(problem.D, DcnBackward<Bf16>{problem, n, group, groups, strip, scratch});
    case Storage::f16:
      return dcn_with_lanes<float>(problem.D, DcnBackward<Fp16>{problem, n, group, groups, strip, scratch});
  }
}
