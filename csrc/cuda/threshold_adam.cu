// One step of Adam on all tensors of a model and S(w, α) of what it leaves, in one pass over
// memory.
#include <algorithm>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/storage.h"
#include "cuda/threshold_adam.h"

namespace sparsemtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 48;  // of one launch: the table is a kernel argument, at most 4 KiB

struct Table {  // of one launch; blocks from first[i] on belong to tensor i
  float* w[kTensors];
  const float* g[kTensors];
  float* m[kTensors];
  float* v[kTensors];
  void* s[kTensors];
  uint8_t* mask[kTensors];
  int64_t size[kTensors];
  int64_t first[kTensors];
  int rule[kTensors];
  int owner[kTensors];
  int place[kTensors];  // in counts
  cpu::AdamRule rules[kThresholdAdamRules];
  int tensors;
};
static_assert(sizeof(Table) <= 4096 - 64, "a kernel's arguments hold 4 KiB");

// Every operation rounds by itself, as on the CPU: a fused multiply-add would be another number.
__device__ float stepped(const cpu::AdamRule& r, float w, float g, float* m, float* v) {
  w = __fmul_rn(w, r.shrink);
  if (r.decay != 0.0f) g = __fadd_rn(g, __fmul_rn(r.decay, w));  // 0 · inf would be NaN
  const float base = r.from_grad != 0.0f ? g : *m;
  *m = __fadd_rn(base, __fmul_rn(r.pull, __fsub_rn(g, *m)));
  *v = __fadd_rn(__fmul_rn(*v, r.keep), __fmul_rn(__fmul_rn(g, r.rate), g));
  const float divisor = __fadd_rn(__fsqrt_rn(*v), r.epsilon);
  return __fsub_rn(w, __fmul_rn(r.step, __fdiv_rn(*m, divisor)));
}

// VALUES: write S(w) as T, a bit for each weight where there are masks, and count the live ones.
template <typename T, bool VALUES>
__global__ void __launch_bounds__(kThreads)
    threshold_adam_kernel(Table table, const float* alphas, unsigned long long* counts) {
  __shared__ int alive[kThreads / 32];
  const int i = owner_of(table.first, table.tensors, blockIdx.x);
  const int64_t begin = (blockIdx.x - table.first[i]) * kThresholdAdamChunk;
  const int64_t end = min(begin + kThresholdAdamChunk, table.size[i]);
  const cpu::AdamRule rule = table.rules[table.rule[i]];
  const float alpha = VALUES ? alphas[table.owner[i]] : 0.0f;
  int live = 0;
  // Whole warps go round together: a bit of a lane that has no weight is 0.
  for (int64_t at = begin + threadIdx.x; at - threadIdx.x % 32 < end; at += kThreads) {
    const bool there = at < end;
    float w = 0.0f;
    if (there) {
      float m = table.m[i][at], v = table.v[i][at];
      w = stepped(rule, table.w[i][at], table.g[i][at], &m, &v);
      table.w[i][at] = w;
      table.m[i][at] = m;
      table.v[i][at] = v;
    }
    if (VALUES) {
      const bool dead = fabsf(w) <= alpha;
      if (there) narrow(static_cast<T*>(table.s[i]) + at, dead ? 0.0f : w - copysignf(alpha, w));
      const unsigned bits = __ballot_sync(0xffffffffu, there && !dead);
      live += __popc(bits);
      if (table.mask[i] != nullptr && threadIdx.x % 32 < 4) {
        const int64_t byte = at / 32 * 4 + threadIdx.x % 32;  // of the warp's four
        if (byte * 8 < table.size[i]) {
          table.mask[i][byte] = static_cast<uint8_t>(bits >> (8 * (threadIdx.x % 32)));
        }
      }
    }
  }
  if (VALUES) {
    if (threadIdx.x % 32 == 0) alive[threadIdx.x / 32] = live;
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned long long sum = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) sum += alive[warp];
      atomicAdd(counts + table.place[i], sum);  // integers: exact in any order
    }
  }
}

template <typename T>
void launch(const Table& table, int64_t blocks, const AdamOutputs& outs, cudaStream_t on) {
  const char* who = "threshold_adam_cuda";
  check_grid(who, blocks);
  const auto* alphas = reinterpret_cast<const float*>(outs.alphas);
  auto* counts = reinterpret_cast<unsigned long long*>(outs.counts);
  const auto grid = static_cast<unsigned>(blocks);
  if (outs.values.empty()) {
    SPARSEMTL_LAUNCH((threshold_adam_kernel<T, false>), grid, kThreads, on, table, alphas, counts);
  } else {
    SPARSEMTL_LAUNCH((threshold_adam_kernel<T, true>), grid, kThreads, on, table, alphas, counts);
  }
  check_launch(who, list_arguments("blocks", blocks, "tensors", table.tensors));
}

}  // namespace

void threshold_adam(const AdamState& state, const AdamOutputs& outs, uintptr_t stream) {
  const char* who = "threshold_adam_cuda";
  const size_t n = state.weights.size();
  check_count(who, "grads", n, state.grads.size());
  check_count(who, "means", n, state.means.size());
  check_count(who, "squares", n, state.squares.size());
  check_count(who, "sizes", n, state.sizes.size());
  check_count(who, "rule_of", n, state.rule_of.size());
  if (!outs.values.empty()) {
    check_count(who, "values", n, outs.values.size());
    check_count(who, "owners", n, outs.owners.size());
  }
  if (!outs.masks.empty()) check_count(who, "masks", n, outs.masks.size());
  if (state.rules.size() > kThresholdAdamRules) {
    check_count(who, "rules", kThresholdAdamRules, state.rules.size());
  }
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  for (size_t begin = 0; begin < n; begin += kTensors) {
    Table table = {};
    std::copy(state.rules.begin(), state.rules.end(), table.rules);
    int64_t blocks = 0;
    for (size_t i = begin; i < std::min(n, begin + kTensors); ++i) {
      if (state.sizes[i] == 0) continue;
      const int at = table.tensors++;
      table.w[at] = reinterpret_cast<float*>(state.weights[i]);
      table.g[at] = reinterpret_cast<const float*>(state.grads[i]);
      table.m[at] = reinterpret_cast<float*>(state.means[i]);
      table.v[at] = reinterpret_cast<float*>(state.squares[i]);
      if (!outs.values.empty()) {
        table.s[at] = reinterpret_cast<void*>(outs.values[i]);
        table.owner[at] = static_cast<int>(outs.owners[i]);
      }
      if (!outs.masks.empty()) table.mask[at] = reinterpret_cast<uint8_t*>(outs.masks[i]);
      table.size[at] = state.sizes[i];
      table.first[at] = blocks;
      table.rule[at] = static_cast<int>(state.rule_of[i]);
      table.place[at] = static_cast<int>(i);
      blocks += (state.sizes[i] + kThresholdAdamChunk - 1) / kThresholdAdamChunk;
    }
    if (blocks == 0) continue;
    for_dtype(outs.dtype, [&](auto zero) { launch<decltype(zero)>(table, blocks, outs, on); });
  }
}

}  // namespace sparsemtl::cuda
