// Soft threshold on CUDA: all tensors of a component in as few launches as their table allows.
#include "check.h"
#include "cuda/launch.h"
#include "cuda/soft_threshold.h"
#include "cuda/storage.h"

namespace sparsemtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 64;  // of one launch: the table is a kernel argument, at most 4 KiB

struct Table {  // of one launch; blocks from first[i] on belong to tensor i
  const void* w[kTensors];
  const void* g[kTensors];
  void* out[kTensors];
  int64_t size[kTensors];
  int64_t first[kTensors];
  int tensors;
};
static_assert(sizeof(Table) <= 4096 - 64, "a kernel's arguments hold 4 KiB");

// out = S(w); T: storage of the weights, V: of the values
template <typename T, typename V>
__global__ void __launch_bounds__(kThreads) forward_kernel(Table table, const float* alpha) {
  const int i = owner_of(table.first, table.tensors, blockIdx.x);
  const int64_t begin = (blockIdx.x - table.first[i]) * kSoftThresholdChunk;
  const int64_t end = min(begin + kSoftThresholdChunk, table.size[i]);
  const T* w = static_cast<const T*>(table.w[i]);
  V* out = static_cast<V*>(table.out[i]);
  const float a = *alpha;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    const float x = widen(w[at]);
    narrow(out + at, fabsf(x) <= a ? 0.0f : x - copysignf(a, x));
  }
}

// out = g where w is alive, else 0; sums[block] = Σ sign(w) · g over the block's live weights
template <typename T, typename V>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Table table, const float* alpha, double* sums) {
  __shared__ float partial[kThreads];
  const int i = owner_of(table.first, table.tensors, blockIdx.x);
  const int64_t begin = (blockIdx.x - table.first[i]) * kSoftThresholdChunk;
  const int64_t end = min(begin + kSoftThresholdChunk, table.size[i]);
  const T* w = static_cast<const T*>(table.w[i]);
  const V* g = static_cast<const V*>(table.g[i]);
  T* out = static_cast<T*>(table.out[i]);
  const float a = *alpha;
  float sum = 0.0f;  // 16 terms, then a tree over the block
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    const float x = widen(w[at]);
    const float grad = fabsf(x) <= a ? 0.0f : widen(g[at]);
    narrow(out + at, grad);
    sum += x > 0.0f ? grad : x < 0.0f ? -grad : 0.0f;
  }
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// grad_alpha = -Σ sums, by one block: each thread a fixed stride, then a tree
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const double* sums, int64_t count, double* grad_alpha) {
  __shared__ double partial[kThreads];
  double sum = 0.0;
  for (int64_t at = threadIdx.x; at < count; at += kThreads) sum += sums[at];
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *grad_alpha = -partial[0];
}

// launch(table, blocks, chunks before them) for each run of at most kTensors tensors
template <typename Launch>
int64_t for_each_table(const std::vector<uintptr_t>& weights, const std::vector<int64_t>& sizes,
                       const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& outs,
                       const Launch& launch) {
  int64_t done = 0;
  for (size_t begin = 0; begin < weights.size(); begin += kTensors) {
    Table table = {};
    int64_t blocks = 0;
    for (size_t i = begin; i < weights.size() && i < begin + kTensors; ++i) {
      if (sizes[i] == 0) continue;
      const int at = table.tensors++;
      table.w[at] = reinterpret_cast<const void*>(weights[i]);
      table.g[at] = grads.empty() ? nullptr : reinterpret_cast<const void*>(grads[i]);
      table.out[at] = reinterpret_cast<void*>(outs[i]);
      table.size[at] = sizes[i];
      table.first[at] = blocks;
      blocks += (sizes[i] + kSoftThresholdChunk - 1) / kSoftThresholdChunk;
    }
    check_grid("soft_threshold_cuda", blocks);
    if (blocks > 0) launch(table, static_cast<unsigned>(blocks), done);
    done += blocks;
  }
  return done;
}

}  // namespace

void soft_threshold_forward(DType dtype, DType values, const std::vector<uintptr_t>& weights,
                            const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& outs,
                            uintptr_t alpha, uintptr_t stream) {
  const char* who = "soft_threshold_forward_cuda";
  check_count(who, "sizes", weights.size(), sizes.size());
  check_count(who, "outs", weights.size(), outs.size());
  const auto* a = reinterpret_cast<const float*>(alpha);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  for_dtypes(dtype, values, [&](auto zero, auto value) {
    using T = decltype(zero);
    using V = decltype(value);
    for_each_table(weights, sizes, {}, outs, [&](const Table& table, unsigned blocks, int64_t) {
      SPARSEMTL_LAUNCH((forward_kernel<T, V>), blocks, kThreads, on, table, a);
      check_launch(who, list_arguments("blocks", blocks, "tensors", table.tensors));
    });
  });
}

void soft_threshold_backward(DType dtype, DType values, const std::vector<uintptr_t>& weights,
                             const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& grads,
                             const std::vector<uintptr_t>& grad_weights, uintptr_t alpha,
                             uintptr_t sums, uintptr_t grad_alpha, uintptr_t stream) {
  const char* who = "soft_threshold_backward_cuda";
  check_count(who, "sizes", weights.size(), sizes.size());
  check_count(who, "grads", weights.size(), grads.size());
  check_count(who, "grad_weights", weights.size(), grad_weights.size());
  const auto* a = reinterpret_cast<const float*>(alpha);
  auto* partials = reinterpret_cast<double*>(sums);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  int64_t chunks = 0;
  for_dtypes(dtype, values, [&](auto zero, auto value) {
    using T = decltype(zero);
    using V = decltype(value);
    const auto launch = [&](const Table& table, unsigned blocks, int64_t done) {
      SPARSEMTL_LAUNCH((backward_kernel<T, V>), blocks, kThreads, on, table, a, partials + done);
      check_launch(who, list_arguments("blocks", blocks, "tensors", table.tensors));
    };
    chunks = for_each_table(weights, sizes, grads, grad_weights, launch);
  });
  SPARSEMTL_LAUNCH(reduce_kernel, 1, kThreads, on, partials, chunks,
                   reinterpret_cast<double*>(grad_alpha));
  check_launch(who, list_arguments("chunks", chunks));
}

}  // namespace sparsemtl::cuda
