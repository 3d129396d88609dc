// Launchers of soft_threshold on CUDA; plain C++, so that module.cpp needs no CUDA header.
#pragma once

#include <cstdint>
#include <vector>

#include "views.h"

namespace sparsemtl::cuda {

constexpr int64_t kSoftThresholdChunk = 4096;  // weights of one block: 16 for each of 256 threads

// weights, outs: n device addresses of storage types dtype and values; sizes: n, in elements
// alpha: device address of one float; stream: a cudaStream_t
void soft_threshold_forward(DType dtype, DType values, const std::vector<uintptr_t>& weights,
                            const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& outs,
                            uintptr_t alpha, uintptr_t stream);

// grads: of type values, as the forward pass gave them out; grad_weights: of type dtype
// sums: device address of one double per chunk, over the tensors in order
// grad_alpha: device address of one double, -Σ sign(w) · g over live weights, in a fixed order
void soft_threshold_backward(DType dtype, DType values, const std::vector<uintptr_t>& weights,
                             const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& grads,
                             const std::vector<uintptr_t>& grad_weights, uintptr_t alpha,
                             uintptr_t sums, uintptr_t grad_alpha, uintptr_t stream);

}  // namespace sparsemtl::cuda
