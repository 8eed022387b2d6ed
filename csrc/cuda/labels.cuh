// The best class of every pixel of an enlarged score map: a thread per pixel, which walks over the classes. Neighbouring
// threads read the same few cells, so that almost all reads come from caches; no enlarged score is stored.
#pragma once
#include <cstdint>

#include "problem.h"

namespace the_mask {
namespace cuda {

constexpr int kLabelThreads = 256;

template <int Taps, class Label>
__global__ void __launch_bounds__(kLabelThreads) label_kernel(const __grid_constant__ LabelProblem p) {
  const int64_t pixels = int64_t(p.H) * p.W, step = int64_t(gridDim.x) * kLabelThreads;
  for (int64_t pixel = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x; pixel < pixels; pixel += step) {
    const int y = int(pixel / p.W), x = int(pixel % p.W);
    int cell[Taps * Taps];
    float weight[Taps * Taps];
#pragma unroll
    for (int i = 0; i < Taps; ++i) {
      // A weight of zero may stand beyond the last cell.
      const int row = min(p.row_start[y] + i, p.h - 1);
      const float down = p.row_weights[y * Taps + i];
#pragma unroll
      for (int j = 0; j < Taps; ++j) {
        cell[i * Taps + j] = row * p.w + min(p.column_start[x] + j, p.w - 1);
        weight[i * Taps + j] = down * p.column_weights[x * Taps + j];
      }
    }
    float best = 0;
    int label = 0;
    const float* map = p.scores;
    for (int k = 0; k < p.K; ++k, map += int64_t(p.h) * p.w) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < Taps * Taps; ++i) score += weight[i] * map[cell[i]];
      if (k == 0 || score > best) {  // of equal ones the first class stays
        best = score;
        label = k;
      }
    }
    static_cast<Label*>(p.labels)[pixel] = Label(label);
  }
}

template <int Taps>
void run_labels_of(const LabelProblem& problem, void* stream) {
  const int64_t blocks = (int64_t(problem.H) * problem.W + kLabelThreads - 1) / kLabelThreads;
  const int limited = int(min(blocks, int64_t(1) << 20));
  if (problem.bytes) {
    launch(label_kernel<Taps, uint8_t>, limited, kLabelThreads, stream, problem);
  } else {
    launch(label_kernel<Taps, int32_t>, limited, kLabelThreads, stream, problem);
  }
}

inline void run_labels(const LabelProblem& problem, void* stream) {
  if (problem.taps == 2) return run_labels_of<2>(problem, stream);
  run_labels_of<3>(problem, stream);
}

}  // namespace cuda
}  // namespace the_mask
