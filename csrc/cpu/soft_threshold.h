// Soft threshold S(w, α) = sign(w) · max(|w| − α, 0) of all tensors of a component in one call.
//
// A weight is dead if |w| <= α; every other weight is alive, NaN included.
#pragma once

#include <cstdint>
#include <vector>

#include "views.h"

namespace sparsemtl::cpu {

// One chunk; `stream` writes past the caches and needs an output aligned to 64 bytes.
struct SoftThresholdKernels {
  // out = S(w); mask, if not null, gets one bit per weight, lowest bit first; returns live weights
  int64_t (*forward)(const void* w, float alpha, void* out, uint8_t* mask, int64_t n, bool stream);
  // gw = g where alive, else 0; returns the sum of sign(w) · g over the live weights
  double (*backward)(const void* w, float alpha, const void* g, void* gw, int64_t n, bool stream);
};

constexpr int64_t kSoftThresholdChunk = 1 << 16;  // 256 KiB of w in fp32: dwarfs a thread's wake-up

struct Tensors {  // parallel arrays over the tensors of a component, all of one storage type
  DType dtype;
  std::vector<uintptr_t> data;
  std::vector<int64_t> sizes;  // elements
};

// outs: [n] like the weights; masks: [n] of ceil(size / 8) bytes, or empty
// counts: [n] live weights per tensor, or null
void soft_threshold_forward(const Tensors& weights, const std::vector<uintptr_t>& outs, float alpha,
                            const std::vector<uintptr_t>& masks, int64_t* counts, int threads);

// Returns the gradient of α, -Σ sign(w) · g over live weights, summed in tensor and chunk order.
// sums: scratch, one double per chunk, see soft_threshold_chunks
double soft_threshold_backward(const Tensors& weights, const std::vector<uintptr_t>& grads,
                               const std::vector<uintptr_t>& grad_weights, float alpha,
                               TensorView<double> sums, int threads);

}  // namespace sparsemtl::cpu
