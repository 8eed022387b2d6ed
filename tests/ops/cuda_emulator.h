// Enough of CUDA to run the kernels of csrc/cuda on the CPU, one block after the other, for tests without a GPU.
//
// The threads of a block are coroutines of one thread of the machine. One runs until it waits for its warp or its block
// and goes on when all that have not ended are there: shuffles, shared memory and atomics behave as on a GPU for code
// without races. (A missing synchronisation may go unnoticed.)
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define CUDA_KERNEL_ASSERT(condition)              \
  do {                                             \
    if (!(condition)) emulator::fail(#condition);  \
  } while (false)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::floor;
using std::min;

namespace emulator {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool ended = false;
  int waits = 0;         // barriers reached
  bool of_block = false;  // what kind the last one was
  unsigned char slot[8];  // what it offers to a shuffle
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int current = 0;
inline std::function<void()> body;
inline const char* failure = nullptr;

// Stops the kernel, as a failed assertion does on a GPU.
inline void fail(const char* condition) {
  failure = condition;
  for (Thread& thread : threads) thread.ended = true;
  swapcontext(&threads[current].context, &scheduler);
}

inline void wait(bool of_block) {
  Thread& self = threads[current];
  ++self.waits;
  self.of_block = of_block;
  swapcontext(&self.context, &scheduler);
}

inline void entry() {
  body();
  threads[current].ended = true;
}

// Whether thread i may go on: its warp (or block) has reached the barrier it waits at.
inline bool is_free(int i) {
  const Thread& self = threads[i];
  if (self.ended) return false;
  const int size = int(threads.size());
  const int first = self.of_block ? 0 : i / 32 * 32, last = self.of_block ? size : std::min(first + 32, size);
  for (int other = first; other < last; ++other) {
    if (!threads[other].ended && threads[other].waits < self.waits) return false;
  }
  return true;
}

inline void run_block(int count) {
  threads = std::vector<Thread>(count);
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, entry, 0);
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < count; ++i) {
      if (!is_free(i)) continue;
      moved = true;
      current = i;
      threadIdx.x = unsigned(i);
      swapcontext(&scheduler, &threads[i].context);
    }
  }
  for (const Thread& thread : threads) {
    if (!thread.ended) failure = "all threads reach every barrier";
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(true); }
inline void __syncwarp() { emulator::wait(false); }

template <class A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  static_assert(sizeof(A) <= 8, "one register or two");
  const int self = emulator::current;
  std::memcpy(emulator::threads[self].slot, &value, sizeof(A));
  emulator::wait(false);
  A other;
  std::memcpy(&other, emulator::threads[self ^ mask].slot, sizeof(A));
  emulator::wait(false);
  return other;
}

inline void atomicAdd(float* to, float value) { *to += value; }
inline void atomicAdd(double* to, double value) { *to += value; }
void atomicAdd(float4* to, float4 value);  // sm_90 only
template <class A>
A __ldg(const A* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(A) != 0) emulator::fail("reads are aligned");
  return *from;
}

namespace the_mask {
namespace cuda {

// At most this many blocks, so that the grid-stride loops take several turns.
inline int most_blocks = 1 << 30;

template <class... Parameters, class... Values>
void launch(void (*kernel)(Parameters...), int blocks, int threads, void*, const Values&... values) {
  blocks = std::min(blocks, most_blocks);
  gridDim.x = unsigned(blocks);
  blockDim.x = unsigned(threads);
  emulator::body = [&] { kernel(values...); };
  for (int block = 0; block < blocks && emulator::failure == nullptr; ++block) {
    blockIdx.x = unsigned(block);
    emulator::run_block(threads);
  }
}

}  // namespace cuda
}  // namespace the_mask
