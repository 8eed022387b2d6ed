// Multi-scale deformable attention without packing: for few queries, which read little of the value tensor.
// Included after storage.h, inside a namespace per instruction set.

template <class A>
struct MsdaCorner {
  int64_t place;  // of its first channel
  A weight;
};

// The corners of one (query, head) that are inside their image; returns how many.
template <class A>
int64_t msda_corners(const MsdaProblem& problem, int64_t item, int64_t image, MsdaCorner<A>* corners) {
  const A* location = static_cast<const A*>(problem.locations) + item * problem.L * problem.P * 2;
  const A* weight = static_cast<const A*>(problem.weights) + item * problem.L * problem.P;
  const int64_t step = problem.M * problem.D;
  MsdaCorner<A>* next = corners;
  for (int64_t l = 0; l < problem.L; ++l) {
    const int64_t height = problem.sizes[2 * l], width = problem.sizes[2 * l + 1];
    for (int64_t p = 0; p < problem.P; ++p, location += 2, ++weight) {
      const A x = location[0] * A(width) - A(0.5), y = location[1] * A(height) - A(0.5);
      if (!(x > A(-1) && x < A(width) && y > A(-1) && y < A(height))) continue;
      // The conversion cuts towards zero, and x is above -1.
      const int64_t column = int64_t(x) - (x < A(0)), row = int64_t(y) - (y < A(0));
      const A right = x - A(column), below = y - A(row);
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t cx = column + (r & 1), cy = row + (r >> 1);
        if (cx < 0 || cx >= width || cy < 0 || cy >= height) continue;
        next->place = image + (cy * width + cx) * step;
        next->weight = *weight * ((r & 1) ? right : A(1) - right) * ((r >> 1) ? below : A(1) - below);
        ++next;
      }
    }
    image += height * width * step;
  }
  return next - corners;
}

template <class T, int V>
void msda_direct_lanes(const MsdaProblem& problem, int64_t begin, int64_t end, void* scratch) {
  typedef Work<T> A;
  auto* corners = static_cast<MsdaCorner<A>*>(scratch);
  const T* value = static_cast<const T*>(problem.value);
  T* output = static_cast<T*>(problem.output);
  for (int64_t item = begin * problem.M; item < end * problem.M; ++item) {
    const int64_t n = item / problem.M / problem.Q, m = item % problem.M;
    const int64_t image = (n * problem.S * problem.M + m) * problem.D;
    const int64_t count = msda_corners<A>(problem, item, image, corners);
    for (int64_t c = 0; c < problem.D; c += V) {
      Vec<A, V> sum = {};
      for (int64_t i = 0; i < count; ++i) {
        sum += corners[i].weight * load_part<T, V>(value + corners[i].place + c, problem.D - c);
      }
      store_part<T, V>(output + item * problem.D + c, sum, problem.D - c);
    }
  }
}

template <class T>
void msda_direct_as(const MsdaProblem& problem, int64_t begin, int64_t end, void* scratch) {
  constexpr int widest = Lanes<Work<T>>::value > 4 ? Lanes<Work<T>>::value : 4;
  if (widest > 4 && problem.D >= widest) return msda_direct_lanes<T, widest>(problem, begin, end, scratch);
  msda_direct_lanes<T, 4>(problem, begin, end, scratch);
}

int64_t msda_direct_scratch(const MsdaProblem& problem) {
  return problem.L * problem.P * 4 * int64_t(sizeof(MsdaCorner<double>));
}

void msda_direct(const MsdaProblem& problem, int64_t begin, int64_t end, void* scratch) {
  switch (problem.storage) {
    case Storage::f32:
      return msda_direct_as<float>(problem, begin, end, scratch);
    case Storage::f64:
      return msda_direct_as<double>(problem, begin, end, scratch);
    case Storage::bf16:
      return msda_direct_as<Bf16>(problem, begin, end, scratch);
    case Storage::f16:
      return msda_direct_as<Fp16>(problem, begin, end, scratch);
  }
}
