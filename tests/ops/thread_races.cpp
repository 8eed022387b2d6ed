// Runs the CPU kernels as csrc/cpu/ops.cpp divides them among threads, once on one thread and once on several, without
// torch, so that the thread sanitizer sees every access. Results have to be the same to the last bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "problems.h"

using namespace the_mask;

namespace {

typedef std::vector<float> Floats;
std::mt19937 generator(7);

Floats random_floats(int64_t count, float low, float high) {
  std::uniform_real_distribution<float> draw(low, high);
  Floats values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

struct Scratch {
  void* memory;
  explicit Scratch(int64_t bytes) : memory(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { std::free(memory); }
};

// Every task on a thread of its own, or all on this one.
void run(int64_t tasks, bool parallel, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) {
    if (parallel) {
      threads.emplace_back(task, i);
    } else {
      task(i);
    }
  }
  for (std::thread& thread : threads) thread.join();
}

void expect_equal(const char* kernel, const char* what, const Floats& one, const Floats& other) {
  if (std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0) return;
  std::printf("%s: %s differs between threads\n", kernel, what);
  std::exit(1);
}

struct DcnResult {
  Floats output, x, offset, mask, scale;
};

DcnResult dcn(const Kernels& kernels, const DcnProblem& given, const Floats& grad, bool parallel) {
  DcnProblem problem = given;
  const int64_t pixels = problem.Ho * problem.Wo, channels = problem.G * problem.D, points = problem.G * problem.P;
  const int64_t input = problem.H * problem.W * channels;
  DcnResult r{Floats(pixels * channels), Floats(input), Floats(2 * pixels * points), Floats(pixels * points),
              Floats(pixels * problem.G)};
  problem.output = r.output.data();
  problem.grad_output = grad.data();
  problem.grad_x = r.x.data(), problem.grad_offset = r.offset.data(), problem.grad_mask = r.mask.data();
  problem.grad_scale = r.scale.data();
  const int64_t bytes = kernels.dcn_scratch(problem);
  run(4, parallel, [&](int64_t part) {
    const Scratch scratch(bytes);
    const DcnTile tile{part * problem.Ho / 4, (part + 1) * problem.Ho / 4, 0, problem.Wo};
    kernels.dcn_forward(problem, 0, tile, scratch.memory);
  });
  // Two bands of rows, times two blocks of groups.
  const Scratch spill(input * int64_t(sizeof(float)));
  const int64_t half = problem.Ho / 2, border = half * problem.stride_y + problem.base_y;
  std::vector<int64_t> spilled(8, border);
  const auto each = [&](const std::function<void(int64_t, int64_t, const DcnBand&)>& call) {
    run(4, parallel, [&](int64_t task) {
      const int64_t first = task / 2 * problem.G / 2, last = (task / 2 + 1) * problem.G / 2;
      int64_t* rows = spilled.data() + task * 2;
      const DcnBand band = task % 2 ? DcnBand{half, problem.Ho, border, problem.H, spill.memory, rows}
                                    : DcnBand{0, half, 0, border, spill.memory, rows};
      call(first, last - first, band);
    });
  };
  each([&](int64_t first, int64_t count, const DcnBand& band) {
    const Scratch scratch(bytes);
    kernels.dcn_backward(problem, 0, first, count, band, 7, scratch.memory);
  });
  each([&](int64_t first, int64_t count, const DcnBand& band) { kernels.dcn_add_spill(problem, 0, first, count, band); });
  return r;
}

void check_dcn(const Kernels& kernels, float reach, bool center) {
  DcnProblem problem{};
  problem.storage = Storage::f32;
  problem.N = 1, problem.H = problem.Ho = 26, problem.W = problem.Wo = 11, problem.G = 4, problem.D = 16, problem.P = 9;
  problem.stride_x = problem.stride_y = 1;
  problem.offset_scale = 1;
  std::vector<double> taps;
  for (int x = -1; x <= 1; ++x) {
    for (int y = -1; y <= 1; ++y) taps.push_back(x), taps.push_back(y);
  }
  problem.taps = taps.data();
  const int64_t pixels = 26 * 11, channels = 64, points = 36;
  const Floats x = random_floats(pixels * channels, -1, 1), offset = random_floats(2 * pixels * points, -reach, reach);
  const Floats mask = random_floats(pixels * points, 0, 1), scale = random_floats(pixels * 4, 0, 1);
  const Floats grad = random_floats(pixels * channels, -1, 1);
  problem.x = x.data(), problem.offset = offset.data(), problem.mask = mask.data();
  problem.scale = center ? scale.data() : nullptr;
  const DcnResult one = dcn(kernels, problem, grad, false), many = dcn(kernels, problem, grad, true);
  expect_equal(kernels.name, "DCNv3's output", one.output, many.output);
  expect_equal(kernels.name, "DCNv3's gradient of x", one.x, many.x);
  expect_equal(kernels.name, "DCNv3's gradient of offset", one.offset, many.offset);
  expect_equal(kernels.name, "DCNv3's gradient of mask", one.mask, many.mask);
  expect_equal(kernels.name, "DCNv3's gradient of the centre share", one.scale, many.scale);
}

struct MsdaResult {
  Floats output, direct, value, locations, weights;
};

MsdaResult msda(const Kernels& kernels, const MsdaProblem& given, const Floats& grad, bool parallel) {
  MsdaProblem problem = given;
  const int64_t samples = problem.Q * problem.M * problem.L * problem.P, size = problem.Q * problem.M * problem.D;
  MsdaResult r{Floats(size), Floats(size), Floats(problem.S * problem.M * problem.D), Floats(2 * samples), Floats(samples)};
  problem.output = r.output.data();
  // Two parts of the queries of each head.
  const int64_t bytes = kernels.msda_scratch(problem, false);
  run(2 * problem.M, parallel, [&](int64_t task) {
    const Scratch scratch(bytes);
    kernels.msda_forward(problem, 0, task / 2, task % 2 * problem.Q / 2, (task % 2 + 1) * problem.Q / 2, scratch.memory);
  });
  problem.output = r.direct.data();
  run(4, parallel, [&](int64_t task) {
    const Scratch scratch(kernels.msda_direct_scratch(problem));
    kernels.msda_direct(problem, task * problem.Q / 4, (task + 1) * problem.Q / 4, scratch.memory);
  });
  problem.grad_output = grad.data();
  problem.grad_value = r.value.data(), problem.grad_locations = r.locations.data(), problem.grad_weights = r.weights.data();
  const int64_t backward = kernels.msda_scratch(problem, true);
  run(problem.M, parallel, [&](int64_t head) {
    const Scratch scratch(backward);
    kernels.msda_backward(problem, 0, head, scratch.memory);
  });
  return r;
}

void check_msda(const Kernels& kernels) {
  MsdaProblem problem{};
  const int64_t sizes[] = {9, 7, 5, 4};
  problem.storage = Storage::f32;
  problem.N = 1, problem.S = 83, problem.M = 3, problem.D = 32, problem.Q = 40, problem.L = 2, problem.P = 4;
  problem.sizes = sizes;
  const Floats value = random_floats(83 * 3 * 32, -1, 1), locations = random_floats(40 * 3 * 2 * 4 * 2, -0.3f, 1.3f);
  const Floats weights = random_floats(40 * 3 * 2 * 4, 0, 1), grad = random_floats(40 * 3 * 32, -1, 1);
  problem.value = value.data(), problem.locations = locations.data(), problem.weights = weights.data();
  const MsdaResult one = msda(kernels, problem, grad, false), many = msda(kernels, problem, grad, true);
  expect_equal(kernels.name, "MSDeformAttn's output", one.output, many.output);
  expect_equal(kernels.name, "MSDeformAttn's output without packing", one.direct, many.direct);
  expect_equal(kernels.name, "MSDeformAttn's gradient of value", one.value, many.value);
  expect_equal(kernels.name, "MSDeformAttn's gradient of locations", one.locations, many.locations);
  expect_equal(kernels.name, "MSDeformAttn's gradient of weights", one.weights, many.weights);
}

void check_labels(const Kernels& kernels) {
  LabelProblem problem{19, 6, 7, 24, 28, 2};
  const Floats scores = random_floats(19 * 6 * 7, -1, 1);
  std::vector<int32_t> rows(24), columns(28);
  for (int i = 0; i < 24; ++i) rows[i] = i * 5 / 24;
  for (int i = 0; i < 28; ++i) columns[i] = i * 6 / 28;
  const Floats row_weights = random_floats(48, 0, 1), column_weights = random_floats(56, 0, 1);
  problem.scores = scores.data();
  problem.row_start = rows.data(), problem.column_start = columns.data();
  problem.row_weights = row_weights.data(), problem.column_weights = column_weights.data();
  problem.bytes = true;
  std::vector<uint8_t> found[2] = {std::vector<uint8_t>(24 * 28), std::vector<uint8_t>(24 * 28)};
  for (int parallel = 0; parallel < 2; ++parallel) {
    problem.labels = found[parallel].data();
    run(4, parallel, [&](int64_t part) {
      const Scratch scratch(kernels.labels_scratch(problem));
      kernels.labels(problem, part * 6, (part + 1) * 6, scratch.memory);
    });
  }
  if (found[0] != found[1]) std::printf("%s: labels differ between threads\n", kernels.name), std::exit(1);
}

void check(const Kernels& kernels) {
  check_dcn(kernels, 2, true);
  check_dcn(kernels, 40, false);
  check_msda(kernels);
  check_labels(kernels);
  std::printf("%s passed\n", kernels.name);
}

}  // namespace

int main() {
  check(kernels_baseline());
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) check(kernels_avx2());
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    check(kernels_avx512());
  }
#endif
}
