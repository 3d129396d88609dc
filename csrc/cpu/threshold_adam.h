// One step of Adam on all tensors of a model, and S(w, α) of the weights it leaves, in one pass.
//
// All arithmetic and all state is fp32; S may be stored narrower. Multiplications and additions
// are never fused, so every instruction set gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "views.h"

namespace sparsemtl::cpu {

// The numbers of one step for the tensors that share them. With s = √(1 − β₂ᵗ):
//   w ← w · shrink                  g ← g + decay · w
//   m ← base + pull · (g − m)       v ← keep · v + (rate · g) · g
//   w ← w − step · m / (√v + epsilon)
struct AdamRule {
  float shrink;     // 1 − lr · λ where the decay is decoupled, else 1
  float decay;      // λ where it is coupled, else 0
  float from_grad;  // 0: base is m, pull is 1 − β₁; 1: base is g, pull is −β₁
  float pull;
  float keep;     // β₂
  float rate;     // 1 − β₂
  float step;     // lr · s / (1 − β₁ᵗ)
  float epsilon;  // ε · s
};
constexpr int kAdamRuleFloats = sizeof(AdamRule) / sizeof(float);

// One chunk of one tensor. value: S(w), or null for Adam alone, as is mask for no bits; `stream`
// writes values past the caches and needs them aligned to 64 bytes. Returns the live weights.
using ThresholdAdamKernel = int64_t (*)(const AdamRule& rule, float* w, const float* g, float* m,
                                        float* v, float alpha, void* value, uint8_t* mask,
                                        int64_t n, bool stream);

constexpr int64_t kThresholdAdamChunk = 1 << 16;

struct AdamTensors {  // parallel arrays over n tensors
  std::vector<uintptr_t> weights, grads, means, squares;
  std::vector<int64_t> sizes;  // elements
  std::vector<AdamRule> rules;
  std::vector<int64_t> rule_of;  // [n] index into rules
};

struct ThresholdOutputs {
  DType dtype;                    // of the values
  std::vector<float> alphas;      // [n], any number where there is no value
  std::vector<uintptr_t> values;  // [n], null for a tensor without a threshold
  std::vector<uintptr_t> masks;   // [n] of ceil(size / 8) bytes, or empty
  int64_t* counts;                // [n] live weights; 0 for a tensor without a threshold
};

void threshold_adam(const AdamTensors& tensors, const ThresholdOutputs& outs, int threads);

}  // namespace sparsemtl::cpu
