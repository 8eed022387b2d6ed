// The CPU operators: sizes, output tensors, the division of work over threads, the choice of an instruction set.
// No result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "../operators.h"
#include "../shapes.h"
#include "problems.h"

namespace the_mask {
namespace {

const Kernels& best_kernels() {
#if defined(__x86_64__) || defined(_M_X64)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kernels_avx512();
  if (avx2) return kernels_avx2();
#endif
  return kernels_baseline();
}

const Kernels*& chosen_kernels() {
  static const Kernels* chosen = &best_kernels();
  return chosen;
}

const Kernels& kernels() { return *chosen_kernels(); }

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Storage::f32;
    case at::kDouble:
      return Storage::f64;
    case at::kBFloat16:
      return Storage::bf16;
    case at::kHalf:
      return Storage::f16;
    default:
      TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " is not supported");
  }
}

Tensor scratch_of(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

int64_t packed_bytes(const Kernels& run, const MsdaProblem& problem, bool backward) {
  const int64_t bytes = run.msda_scratch(problem, backward);
  // float64 counts in 64 bits.
  if (problem.storage != Storage::f64) check_count("value, packed with borders,", bytes / int64_t(sizeof(float)));
  return bytes;
}

MsdaProblem make_problem(const MsdaSizes& sizes, at::IntArrayRef shapes, const Tensor& value, const Tensor& locations,
                         const Tensor& weights) {
  MsdaProblem problem{};
  problem.storage = storage_of(value);
  problem.N = sizes.N, problem.S = sizes.S, problem.M = sizes.M, problem.D = sizes.D;
  problem.Q = sizes.Q, problem.L = sizes.L, problem.P = sizes.P;
  problem.sizes = shapes.data();
  problem.value = value.const_data_ptr();
  problem.locations = locations.const_data_ptr();
  problem.weights = weights.const_data_ptr();
  return problem;
}

DcnProblem make_problem(const DcnSizes& sizes, const Tensor& x, const Tensor& offset, const Tensor& mask,
                        const std::optional<Tensor>& scale, double offset_scale) {
  DcnProblem problem{};
  problem.storage = storage_of(x);
  problem.N = sizes.N, problem.H = sizes.H, problem.W = sizes.W, problem.G = sizes.G, problem.D = sizes.D;
  problem.Ho = sizes.Ho, problem.Wo = sizes.Wo, problem.P = sizes.P;
  problem.stride_x = sizes.stride_x, problem.stride_y = sizes.stride_y;
  problem.base_x = sizes.base_x, problem.base_y = sizes.base_y;
  problem.offset_scale = offset_scale;
  problem.taps = sizes.taps.data();
  problem.x = x.const_data_ptr();
  problem.offset = offset.const_data_ptr();
  problem.mask = mask.const_data_ptr();
  problem.scale = scale.has_value() ? scale->const_data_ptr() : nullptr;
  return problem;
}

// Rows of output from which a backward pass is divided into bands: where these meet, a few rows take a slower path, which
// costs a map of 30 rows more on one thread than it gains on two (docs/experiments.md).
constexpr int64_t kRowsToDivide = 48;

// Width of the column strips in which an image is processed, such that the rows of a kernel, and a few more, fit into a
// megabyte, half of a usual second-level cache. Depends only on shapes, because it decides the order of sums in backward.
int64_t strip_width(const DcnSizes& sizes, int64_t kernel_rows, int64_t bytes_per_number) {
  const int64_t column = (kernel_rows + 4) * sizes.C * bytes_per_number;
  return std::max<int64_t>(16, (int64_t(1) << 20) / column);
}

}  // namespace

std::string cpu_capability() { return kernels().name; }

void force_cpu_capability(std::string name) {
  const Kernels* wanted = nullptr;
  if (name == "auto") wanted = &best_kernels();
  if (name == "baseline") wanted = &kernels_baseline();
#if defined(__x86_64__) || defined(_M_X64)
  const std::string best = best_kernels().name;
  if (name == "AVX2" && best != "baseline") wanted = &kernels_avx2();
  if (name == "AVX-512" && best == "AVX-512") wanted = &kernels_avx512();
#endif
  TORCH_CHECK(wanted != nullptr, "CPU capability ", name, " is not known, or not available on this machine");
  chosen_kernels() = wanted;
}

Tensor msda_forward_cpu(const Tensor& value, at::IntArrayRef shapes, const std::optional<Tensor>& device_shapes,
                        const Tensor& locations, const Tensor& weights) {
  TORCH_CHECK(!device_shapes.has_value(), "spatial_shapes must come as numbers on the CPU");
  const MsdaSizes sizes(value, shapes, device_shapes, locations, weights);
  Tensor output = at::empty({sizes.N, sizes.Q, sizes.M * sizes.D}, value.options());
  if (output.numel() == 0) return output;
  MsdaProblem problem = make_problem(sizes, shapes, value, locations, weights);
  problem.output = output.mutable_data_ptr();
  const Kernels& run = kernels();
  // Packing a head costs about as much as reading each of its positions twice: too much for few queries.
  if (2 * sizes.L * sizes.P * sizes.Q < sizes.S) {
    at::parallel_for(0, sizes.N * sizes.Q, 16, [&](int64_t begin, int64_t end) {
      const Tensor scratch = scratch_of(run.msda_direct_scratch(problem));
      run.msda_direct(problem, begin, end, scratch.mutable_data_ptr());
    });
    return output;
  }
  const int64_t bytes = packed_bytes(run, problem, false);
  // With more threads than heads the queries of a head are divided, and packed once for each part.
  const int64_t heads = sizes.N * sizes.M, threads = at::get_num_threads();
  const int64_t parts = std::min<int64_t>(std::max<int64_t>(threads / heads, 1), 4);
  const int64_t part = (sizes.Q + parts - 1) / parts;
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = scratch_of(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, first = task % parts * part;
      const int64_t last = std::min(first + part, sizes.Q);
      run.msda_forward(problem, head / sizes.M, head % sizes.M, first, last, scratch.mutable_data_ptr());
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> msda_backward_cpu(const Tensor& grad_output, const Tensor& value,
                                                     at::IntArrayRef shapes, const std::optional<Tensor>& device_shapes,
                                                     const Tensor& locations, const Tensor& weights,
                                                     bool /*deterministic*/) {
  TORCH_CHECK(!device_shapes.has_value(), "spatial_shapes must come as numbers on the CPU");
  const MsdaSizes sizes(value, shapes, device_shapes, locations, weights);
  check_tensor("grad_output", grad_output, {sizes.N, sizes.Q, sizes.M * sizes.D}, value.scalar_type(), value);
  Tensor grad_value = at::empty(value.sizes(), value.options());
  Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  MsdaProblem problem = make_problem(sizes, shapes, value, locations, weights);
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_value = grad_value.mutable_data_ptr();
  problem.grad_locations = grad_locations.mutable_data_ptr();
  problem.grad_weights = grad_weights.mutable_data_ptr();
  const Kernels& run = kernels();
  const int64_t bytes = packed_bytes(run, problem, true);
  at::parallel_for(0, sizes.N * sizes.M, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = scratch_of(bytes);
    for (int64_t head = begin; head < end; ++head) {
      run.msda_backward(problem, head / sizes.M, head % sizes.M, scratch.mutable_data_ptr());
    }
  });
  return {grad_value, grad_locations, grad_weights};
}

Tensor dcn_forward_cpu(const Tensor& x, const Tensor& offset, const Tensor& mask, const std::optional<Tensor>& scale,
                       at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const DcnSizes sizes(x, offset, mask, scale, kernel, stride, padding, dilation, groups, offset_scale, remove_center);
  Tensor output = at::empty({sizes.N, sizes.Ho, sizes.Wo, sizes.C}, x.options());
  DcnProblem problem = make_problem(sizes, x, offset, mask, scale, offset_scale);
  problem.output = output.mutable_data_ptr();
  const Kernels& run = kernels();
  const int64_t bytes = run.dcn_scratch(problem);
  const int64_t width = strip_width(sizes, kernel[0] * dilation[0], x.element_size());
  const int64_t strips = (sizes.Wo + width - 1) / width;
  // One item is one row of one strip; consecutive rows of a strip share what they read.
  at::parallel_for(0, sizes.N * strips * sizes.Ho, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = scratch_of(bytes);
    while (begin < end) {
      const int64_t row = begin % sizes.Ho, strip = begin / sizes.Ho % strips, n = begin / sizes.Ho / strips;
      const int64_t last = std::min(row + end - begin, sizes.Ho);
      const DcnTile tile{row, last, strip * width, std::min((strip + 1) * width, sizes.Wo)};
      run.dcn_forward(problem, n, tile, scratch.mutable_data_ptr());
      begin += last - row;
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dcn_backward_cpu(
    const Tensor& grad_output, const Tensor& x, const Tensor& offset, const Tensor& mask,
    const std::optional<Tensor>& scale, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center, bool /*deterministic*/) {
  const DcnSizes sizes(x, offset, mask, scale, kernel, stride, padding, dilation, groups, offset_scale, remove_center);
  check_tensor("grad_output", grad_output, {sizes.N, sizes.Ho, sizes.Wo, sizes.C}, x.scalar_type(), x);
  Tensor grad_x = at::zeros(x.sizes(), x.options().dtype(work_type(x)));
  Tensor grad_offset = at::empty(offset.sizes(), offset.options());
  Tensor grad_mask = at::empty(mask.sizes(), mask.options());
  Tensor grad_scale = scale.has_value() ? at::empty(scale->sizes(), scale->options()) : at::empty({0}, mask.options());
  DcnProblem problem = make_problem(sizes, x, offset, mask, scale, offset_scale);
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_x = grad_x.mutable_data_ptr();
  problem.grad_offset = grad_offset.mutable_data_ptr();
  problem.grad_mask = grad_mask.mutable_data_ptr();
  problem.grad_scale = grad_scale.mutable_data_ptr();
  const Kernels& run = kernels();
  const int64_t bytes = run.dcn_scratch(problem);
  const int64_t numbers = x.element_size() + grad_x.element_size();
  const int64_t width = strip_width(sizes, kernel[0] * dilation[0], numbers);
  // Two bands of rows, which threads may share, if there are many rows. Bands decide the order of sums, so that they
  // depend on the shape alone.
  const int64_t bands = sizes.Ho >= kRowsToDivide ? 2 : 1;
  const int64_t half = sizes.Ho / 2, border = std::clamp<int64_t>(half * sizes.stride_y + sizes.base_y, 0, sizes.H);
  const auto spill_of = [&]() { return at::empty({bands > 1 ? sizes.H * sizes.W * sizes.C : 0}, grad_x.options()); };
  const auto band_of = [&](int64_t number, const Tensor& spill, std::vector<int64_t>& spilled, int64_t block) {
    if (bands == 1) return DcnBand{0, sizes.Ho, 0, sizes.H, nullptr, nullptr};
    int64_t* rows = spilled.data() + (block * bands + number) * 2;
    return number == 0 ? DcnBand{0, half, 0, border, spill.mutable_data_ptr(), rows}
                       : DcnBand{half, sizes.Ho, border, sizes.H, spill.mutable_data_ptr(), rows};
  };
  // Whole images where they divide evenly among threads; elsewhere bands and blocks of groups of one after the other.
  const int64_t threads = at::get_num_threads();
  if (sizes.N % threads == 0) {
    at::parallel_for(0, sizes.N, 1, [&](int64_t begin, int64_t end) {
      const Tensor scratch = scratch_of(bytes), spill = spill_of();
      for (int64_t n = begin; n < end; ++n) {
        std::vector<int64_t> spilled(bands * 2, border);
        for (int64_t b = 0; b < bands; ++b) {
          run.dcn_backward(problem, n, 0, groups, band_of(b, spill, spilled, 0), width, scratch.mutable_data_ptr());
        }
        for (int64_t b = 0; bands > 1 && b < bands; ++b) {
          run.dcn_add_spill(problem, n, 0, groups, band_of(b, spill, spilled, 0));
        }
      }
    });
    return {grad_x, grad_offset, grad_mask, grad_scale};
  }
  const int64_t blocks = std::min(groups, (threads + bands - 1) / bands);
  const Tensor spill = spill_of();
  for (int64_t n = 0; n < sizes.N; ++n) {
    std::vector<int64_t> spilled(blocks * bands * 2, border);
    const auto each = [&](const auto& call) {
      at::parallel_for(0, blocks * bands, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t block = task / bands, first = block * groups / blocks;
          call(first, (block + 1) * groups / blocks - first, band_of(task % bands, spill, spilled, block));
        }
      });
    };
    each([&](int64_t first, int64_t count, const DcnBand& band) {
      const Tensor scratch = scratch_of(bytes);
      run.dcn_backward(problem, n, first, count, band, width, scratch.mutable_data_ptr());
    });
    if (bands > 1) {
      each([&](int64_t first, int64_t count, const DcnBand& band) { run.dcn_add_spill(problem, n, first, count, band); });
    }
  }
  return {grad_x, grad_offset, grad_mask, grad_scale};
}

Tensor upsample_argmax_cpu(const Tensor& scores, const Tensor& row_start, const Tensor& row_weights,
                           const Tensor& column_start, const Tensor& column_weights) {
  const LabelSizes sizes(scores, row_start, row_weights, column_start, column_weights);
  const auto check_starts = [&](const char* name, const Tensor& start, const Tensor& weights, int64_t cells) {
    const int32_t* first = start.const_data_ptr<int32_t>();
    const float* weight = weights.const_data_ptr<float>();
    for (int64_t i = 0; i < start.size(0); ++i) {
      for (int64_t t = 0; t < sizes.taps; ++t) {
        const bool read = t == 0 || weight[i * sizes.taps + t] != 0;
        TORCH_CHECK(!read || (first[i] >= 0 && first[i] + t < cells), name, " reads cell ", first[i] + t, " of ", cells);
      }
    }
  };
  check_starts("row_start", row_start, row_weights, sizes.h);
  check_starts("column_start", column_start, column_weights, sizes.w);
  Tensor labels = at::empty({sizes.H, sizes.W}, scores.options().dtype(sizes.bytes ? at::kByte : at::kInt));
  if (labels.numel() == 0) return labels;
  LabelProblem problem{sizes.K, sizes.h, sizes.w, sizes.H, sizes.W, sizes.taps};
  set_tensors(&problem, scores, row_start, row_weights, column_start, column_weights, labels);
  const Kernels& run = kernels();
  const int64_t bytes = run.labels_scratch(problem);
  at::parallel_for(0, sizes.H, 8, [&](int64_t begin, int64_t end) {
    const Tensor scratch = scratch_of(bytes);
    run.labels(problem, begin, end, scratch.mutable_data_ptr());
  });
  return labels;
}

}  // namespace the_mask
