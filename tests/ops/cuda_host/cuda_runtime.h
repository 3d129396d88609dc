// Enough of CUDA to run the kernels of csrc/cuda on the host, exactly and slowly.
//
// A block's threads are fibers. Each runs until it meets a barrier or a ballot; those of a block or
// a warp go on when all of them have arrived. Blocks run one after the other. What cannot be seen
// here: races between threads that no barrier separates, memory order, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define SPARSEMTL_CUDA_HOST 1
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockIdx, threadIdx;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace cuda_host {

enum class State { kRunning, kAtBlock, kAtWarp, kDone };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  unsigned vote;
};
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline unsigned current, seen;  // seen: what the last block-wide or got
inline unsigned ballots[64];

inline void wait(State state) {
  Fiber& own = fibers[current];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}
inline void enter() {
  body();
  fibers[current].state = State::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

inline bool release(State state, unsigned begin, unsigned end, unsigned* votes) {
  bool any = false;
  *votes = 0;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state == State::kDone) continue;
    if (fibers[i].state != state) return false;
    any = true;
    if (fibers[i].vote) *votes |= 1u << (i % 32);
  }
  if (!any) return false;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::kRunning;
  }
  return true;
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.state = State::kRunning;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  for (;;) {
    bool progress = false, all_done = true;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kRunning) {
        current = i;
        threadIdx = dim3(i);
        swapcontext(&scheduler, &fibers[i].context);
        progress = true;
      }
      all_done = all_done && fibers[i].state == State::kDone;
    }
    if (all_done) return;
    unsigned votes;
    for (unsigned w = 0; w < threads; w += 32) {
      if (release(State::kAtWarp, w, std::min(w + 32, threads), &votes)) {
        ballots[w / 32] = votes;
        progress = true;
      }
    }
    if (release(State::kAtBlock, 0, threads, &votes)) {
      seen = votes;
      progress = true;
    }
    if (!progress) {
      std::fprintf(stderr, "cuda_host: the threads of a block wait for each other for ever\n");
      std::abort();
    }
  }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& f : fibers) f.stack.resize(64 << 10);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
    }
  }
}

}  // namespace cuda_host

#define SPARSEMTL_LAUNCH(kernel, grid, threads, stream, ...) \
  ((void)(stream), ::cuda_host::launch(dim3(grid), threads, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { cuda_host::wait(cuda_host::State::kAtBlock); }
inline int __syncthreads_or(int predicate) {
  cuda_host::fibers[cuda_host::current].vote = predicate != 0;
  cuda_host::wait(cuda_host::State::kAtBlock);
  return cuda_host::seen != 0;
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const unsigned own = cuda_host::current;
  cuda_host::fibers[own].vote = predicate;
  cuda_host::wait(cuda_host::State::kAtWarp);
  return cuda_host::ballots[own / 32];
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline void atomicAdd(unsigned long long* sum, unsigned long long value) { *sum += value; }
