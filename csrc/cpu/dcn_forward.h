// DCNv3, forward, for a block of pixels. Included after dcn_place.h.

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
      if (dcn_place_inside<A, false>(problem, s, pixel, 0, problem.H) != DcnReach::outside) {
        dcn_output<T, V, B, true>(problem, s, image, index);
      } else {
        dcn_place_clamped<A, false>(problem, s, pixel, 0);
        dcn_output<T, V, B, false>(problem, s, image, index);
      }
    }
  }
}
