// Launcher of threshold_adam on CUDA; plain C++, so that module.cpp needs no CUDA header.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/threshold_adam.h"
#include "views.h"

namespace sparsemtl::cuda {

constexpr int64_t kThresholdAdamChunk = 4096;  // weights of a block: 16 for each of 256 threads
constexpr int kThresholdAdamRules = 8;         // different rules that one call may have

struct AdamState {  // parallel arrays over n tensors, device addresses
  std::vector<uintptr_t> weights, grads, means, squares;
  std::vector<int64_t> sizes;  // elements
  std::vector<cpu::AdamRule> rules;
  std::vector<int64_t> rule_of;  // [n] index into rules
};

struct AdamOutputs {
  DType dtype;                    // of the values
  std::vector<uintptr_t> values;  // [n], or empty for Adam alone
  std::vector<uintptr_t> masks;   // [n] of ceil(size / 8) bytes, or empty
  std::vector<int64_t> owners;    // [n] index into alphas, or empty
  uintptr_t alphas;               // floats on the device
  uintptr_t counts;               // [n] int64 on the device, 0 at the start: live weights are added
};

// The step of csrc/cpu/threshold_adam.h. stream: a cudaStream_t
void threshold_adam(const AdamState& state, const AdamOutputs& outs, uintptr_t stream);

}  // namespace sparsemtl::cuda
