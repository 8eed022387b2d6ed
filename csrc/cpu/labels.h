// The best class of every pixel of an enlarged score map. Included after storage.h, inside a namespace per instruction
// set.
//
// Processes one row of labels at a time. For a few classes, the map is interpolated between two map rows, then along the
// row, and compared with the best score so far, which stays in the first-level cache with its class. No enlarged score
// map is stored. Vectors run along the row: the pixels of a vector lie between a few neighbouring cells, which are read by
// one load and shuffled into place. If a vector spans more cells than it has lanes (a map that is shrunk), cells are read
// one by one.

// What does not depend on the class or the row, per pixel of a row (padded to whole vectors), and the row's state.
struct LabelScratch {
  int64_t blocks, pitch;  // vectors of a row; numbers from one class's interpolated row to the next
  int64_t* base;          // per vector: first cell
  int32_t* wide;          // per vector: whether it spans more cells than lanes
  int32_t* cell;          // per tap and pixel: cell from base on
  float* weight;          // per tap and pixel
  float* best;
  int32_t* label;
  float* rows;
  int64_t bytes;
};

constexpr int label_classes = 4;  // that are compared while best and label are in registers

LabelScratch label_layout(const LabelProblem& problem, char* memory) {
  constexpr int V = Lanes<float>::value;
  LabelScratch s;
  s.blocks = (problem.W + V - 1) / V;
  s.pitch = (problem.w + 2 * V - 1) / V * V;
  Taker take{memory};
  take(s.base, s.blocks);
  take(s.wide, s.blocks);
  take(s.cell, problem.taps * s.blocks * V);
  take(s.weight, problem.taps * s.blocks * V);
  take(s.best, s.blocks * V);
  take(s.label, s.blocks * V);
  take(s.rows, label_classes * s.pitch);
  s.bytes = take.next - memory;
  return s;
}

void label_tables(const LabelProblem& problem, const LabelScratch& s) {
  constexpr int V = Lanes<float>::value;
  const int64_t padded = s.blocks * V, taps = problem.taps;
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int64_t end = (b + 1) * V < problem.W ? (b + 1) * V : problem.W;
    int32_t least = problem.column_start[b * V], most = least;
    for (int64_t x = b * V; x < end; ++x) {
      const int32_t start = problem.column_start[x];
      least = start < least ? start : least;
      most = start > most ? start : most;
    }
    s.base[b] = least;
    s.wide[b] = most - least + taps > V;
    for (int64_t x = b * V; x < (b + 1) * V; ++x) {
      for (int64_t t = 0; t < taps; ++t) {
        const float weight = x < end ? problem.column_weights[x * taps + t] : 0;
        // There may be a weight of zero beyond the last cell.
        s.cell[t * padded + x] = weight == 0 ? 0 : problem.column_start[x] - least + int32_t(t);
        s.weight[t * padded + x] = weight;
      }
    }
  }
  for (int64_t i = 0; i < label_classes * s.pitch; ++i) s.rows[i] = 0;
}

TM_INLINE Vec<float, Lanes<float>::value> label_pick(Vec<float, Lanes<float>::value> cells,
                                                     IntVec<float, Lanes<float>::value> which) {
#if defined(__clang__)
  Vec<float, Lanes<float>::value> picked = {};
  for (int i = 0; i < Lanes<float>::value; ++i) picked[i] = cells[which[i]];
  return picked;
#else
  return __builtin_shuffle(cells, which);
#endif
}

// Compare `Count` classes, from `first` on, whose interpolated rows are in scratch from `rows` on.
template <int Taps, int Count>
TM_INLINE void label_compare(const LabelScratch& s, const float* rows, int32_t first) {
  constexpr int V = Lanes<float>::value;
  typedef Vec<float, V> F;
  typedef IntVec<float, V> J;
  const int64_t blocks = s.blocks, pitch = s.pitch, padded = blocks * V;
  for (int64_t b = 0; b < blocks; ++b) {
    F best = load<float, V>(s.best + b * V);
    J label = load<int32_t, V>(s.label + b * V);
    F weight[Taps];
    J cell[Taps];
    TM_UNROLL for (int t = 0; t < Taps; ++t) {
      weight[t] = load<float, V>(s.weight + t * padded + b * V);
      cell[t] = load<int32_t, V>(s.cell + t * padded + b * V);
    }
    const float* from = rows + s.base[b];
    const bool wide = s.wide[b];
    TM_UNROLL for (int k = 0; k < Count; ++k) {
      const float* cells = from + k * pitch;
      F score = {};
      if (!wide) {
        const F near = load<float, V>(cells);
        TM_UNROLL for (int t = 0; t < Taps; ++t) score += weight[t] * label_pick(near, cell[t]);
      } else {
        for (int t = 0; t < Taps; ++t) {
          F far = {};
          for (int i = 0; i < V; ++i) far[i] = cells[cell[t][i]];
          score += weight[t] * far;
        }
      }
      const J more = score > best;  // of equal ones the first class stays
      best = more ? score : best;
      label = more ? J{} + (first + k) : label;
    }
    store<float, V>(s.best + b * V, best);
    store<int32_t, V>(s.label + b * V, label);
  }
}

template <int Taps>
void label_rows(const LabelProblem& problem, int64_t first, int64_t last, const LabelScratch& s) {
  constexpr int V = Lanes<float>::value;
  typedef Vec<float, V> F;
  const int64_t w = problem.w, map = problem.h * w;
  for (int64_t y = first; y < last; ++y) {
    for (int64_t i = 0; i < s.blocks * V; ++i) {
      s.best[i] = -__builtin_inff();
      s.label[i] = 0;
    }
    const int64_t start = problem.row_start[y];
    const float* weights = problem.row_weights + y * Taps;
    for (int64_t k = 0; k < problem.K; k += label_classes) {
      const int64_t count = problem.K - k < label_classes ? problem.K - k : label_classes;
      for (int64_t c = 0; c < count; ++c) {
        const float* from = problem.scores + (k + c) * map + start * w;
        float* to = s.rows + c * s.pitch;
        for (int64_t x = 0; x < w; x += V) {
          F sum = weights[0] * load_part<float, V>(from + x, w - x);
          for (int t = 1; t < Taps; ++t) {
            if (weights[t] != 0) sum += weights[t] * load_part<float, V>(from + t * w + x, w - x);
          }
          store<float, V>(to + x, sum);
        }
      }
      if (count == label_classes) {
        label_compare<Taps, label_classes>(s, s.rows, int32_t(k));
      } else {
        for (int64_t c = 0; c < count; ++c) label_compare<Taps, 1>(s, s.rows + c * s.pitch, int32_t(k + c));
      }
    }
    if (problem.bytes) {
      uint8_t* to = static_cast<uint8_t*>(problem.labels) + y * problem.W;
      for (int64_t x = 0; x < problem.W; ++x) to[x] = uint8_t(s.label[x]);
    } else {
      int32_t* to = static_cast<int32_t*>(problem.labels) + y * problem.W;
      for (int64_t x = 0; x < problem.W; ++x) to[x] = s.label[x];
    }
  }
}

int64_t labels_scratch(const LabelProblem& problem) { return label_layout(problem, nullptr).bytes; }

void labels(const LabelProblem& problem, int64_t first, int64_t last, void* scratch) {
  const LabelScratch s = label_layout(problem, static_cast<char*>(scratch));
  label_tables(problem, s);
  if (problem.taps == 2) return label_rows<2>(problem, first, last, s);
  label_rows<3>(problem, first, last, s);
}
