// DCNv3, backward, for a block of groups. Included after dcn_place.h.

// Local copies of scratch pointers, to keep them in registers: the compiler must assume that a store through a vector
// changes the members of the struct.
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

// Where a band's gradients go: its own rows of the image's grad_x, others into its spill. Pointers are those of the
// image's first group of the block, numbers are counted from there.
template <class A>
struct DcnTarget {
  A *own, *spill;
  int64_t first, last;            // own numbers
  int64_t used_first, used_last;  // numbers of the spill in use
  int64_t* spilled;               // the same in rows, for the next pixel
  int64_t pixel, pitch, channels;  // numbers of a pixel, of a row, of the block
  TM_INLINE A* find(int64_t where, int64_t channel) {
    if (where >= first && where < last) return own + where;
    if (where < used_first || where >= used_last) begin_rows(where / pitch, channel);
    return spill + where;
  }
  __attribute__((noinline)) void begin_rows(int64_t row, int64_t channel) {
    const int64_t from = row < spilled[0] ? row : spilled[1], to = row < spilled[0] ? spilled[0] : row + 1;
    for (A *at = spill - channel + from * pitch, *end = spill - channel + to * pitch; at < end; at += pixel) {
      for (int64_t c = 0; c < channels; ++c) at[c] = 0;
    }
    if (row < spilled[0]) spilled[0] = row;
    if (row >= spilled[1]) spilled[1] = row + 1;
    used_first = spilled[0] * pitch, used_last = spilled[1] * pitch;
  }
};

// Scatter one pixel's gradient into V*B channels of every point's corners. This is a separate pass after the products,
// because x and its gradient are often at the same offset within a memory page, and processors that compare only these
// bits of an address delay a read after such a write.
template <class T, int V, int B, bool Inside>
TM_INLINE void dcn_scatter(const DcnProblem& problem, const DcnScratch<Work<T>>& s, int64_t points,
                           DcnTarget<Work<T>> target, int64_t within, bool crosses, const T* grad) {
  typedef Work<T> A;
  typedef Vec<A, V> F;
  const DcnCorners<A, Inside> corners(problem, s);
  const auto* channel = s.channel;
  const A *weight0 = s.corner[0], *weight1 = s.corner[1], *weight2 = s.corner[2], *weight3 = s.corner[3];
  A* const own = target.own;
  const auto add = [&](const auto& place) __attribute__((always_inline)) {
    for (int64_t point = 0; point < points; ++point) {
      int64_t where[4];
      corners.find(point, where);
      const A weights[4] = {weight0[point], weight1[point], weight2[point], weight3[point]};
      const T* from = grad + channel[point];
      F g[B];
      TM_UNROLL for (int b = 0; b < B; ++b) g[b] = Convert<T, V>::in(from + b * V);
      // Found first: a branch between product and sum would keep them from becoming one instruction, which rounds once.
      A* to[4];
      TM_UNROLL for (int r = 0; r < 4; ++r) to[r] = place(where[r]);
      TM_UNROLL for (int r = 0; r < 4; ++r) {
        TM_UNROLL for (int b = 0; b < B; ++b) store<A, V>(to[r] + b * V, load<A, V>(to[r] + b * V) + weights[r] * g[b]);
      }
    }
  };
  if (crosses) {
    add([&](int64_t where) __attribute__((always_inline)) { return target.find(where, within); });
  } else {
    add([&](int64_t where) __attribute__((always_inline)) { return own + where; });
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
                                  const DcnBand& band, bool crosses, int64_t n, int64_t index, int64_t group,
                                  int64_t groups) {
  typedef Work<T> A;
  const int64_t channels = problem.G * problem.D, image = n * problem.H * problem.W * channels;
  const T* grad = static_cast<const T*>(problem.grad_output) + index * channels;
  for (int64_t within = 0; within < problem.D; within += V * B) {
    const int64_t c = group * problem.D + within;
    dcn_products<T, V, B, Inside>(problem, s, pixel.points, static_cast<const T*>(problem.x) + image + c, grad + c,
                                  within > 0);
    const int64_t pitch = problem.W * channels;
    DcnTarget<A> target{};
    target.own = static_cast<A*>(problem.grad_x) + image + c;
    if (crosses) {
      target.spill = static_cast<A*>(band.spill) + c;
      target.first = band.own_first * pitch, target.last = band.own_last * pitch;
      target.spilled = band.spilled;
      target.used_first = band.spilled[0] * pitch, target.used_last = band.spilled[1] * pitch;
      target.pixel = channels, target.pitch = pitch, target.channels = groups * problem.D;
    }
    dcn_scatter<T, V, B, Inside>(problem, s, pixel.points, target, within, crosses, grad + c);
  }
  const int64_t first = index * s.points + group * problem.P;
  dcn_finish<A, Inside>(problem, s, pixel.points, static_cast<A*>(problem.grad_offset) + 2 * first,
                        static_cast<A*>(problem.grad_mask) + first);
  if (problem.scale != nullptr) dcn_center<T, V>(problem, s, pixel, index, group, groups);
}

template <class T, int V, int B>
void dcn_backward_lanes(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, const DcnBand& band,
                        int64_t strip, void* scratch) {
  typedef Work<T> A;
  const auto s = dcn_layout<A>(problem, static_cast<char*>(scratch));
  dcn_tables<A>(problem, s);
  const int64_t home = band.own_first < problem.H ? band.own_first : problem.H - 1;
  for (int64_t left = 0; left < problem.Wo; left += strip) {
    const int64_t end = left + strip < problem.Wo ? left + strip : problem.Wo;
    for (int64_t row = band.first_row; row < band.last_row; ++row) {
      for (int64_t column = left; column < end; ++column) {
        const int64_t index = (n * problem.Ho + row) * problem.Wo + column;
        const DcnPixel<A> pixel = dcn_pixel<A>(problem, s, n, row, column, group, groups);
        dcn_share<A>(problem, s, index, group, groups);
        const DcnReach reach = dcn_place_inside<A, true>(problem, s, pixel, band.own_first, band.own_last);
        if (reach == DcnReach::own) {
          dcn_pixel_backward<T, V, B, true>(problem, s, pixel, band, false, n, index, group, groups);
        } else if (reach == DcnReach::image) {
          dcn_pixel_backward<T, V, B, true>(problem, s, pixel, band, true, n, index, group, groups);
        } else {
          dcn_place_clamped<A, true>(problem, s, pixel, home);
          dcn_pixel_backward<T, V, B, false>(problem, s, pixel, band, band.spilled != nullptr, n, index, group, groups);
        }
      }
    }
  }
}

// Add what a band has spilled to the rows of the other band.
template <class A>
void dcn_add_rows(const DcnProblem& problem, int64_t n, int64_t group, int64_t groups, const DcnBand& band) {
  const int64_t pixel = problem.G * problem.D, pitch = problem.W * pixel, first = group * problem.D;
  A* image = static_cast<A*>(problem.grad_x) + n * problem.H * pitch;
  for (int64_t row = band.spilled[0]; row < band.spilled[1]; ++row) {
    for (int64_t at = row * pitch + first; at < (row + 1) * pitch; at += pixel) {
      const A* from = static_cast<const A*>(band.spill) + at;
      for (int64_t c = 0; c < groups * problem.D; ++c) image[at + c] += from[c];
    }
  }
}
