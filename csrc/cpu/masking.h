// Copy what a mask keeps and write zeros elsewhere.
#pragma once

#include <cstdint>

namespace sparsemtl::cpu {

// out[i] = keep[i] ? x[i] : 0; out may be x.
using MaskingKernel = void (*)(const float* x, const uint8_t* keep, float* out, int64_t n);

// The same on many threads. Throws std::invalid_argument for a null address with n > 0.
void apply_mask(uintptr_t x, uintptr_t keep, uintptr_t out, int64_t n, int threads);

}  // namespace sparsemtl::cpu
