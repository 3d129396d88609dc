// Storage types on the device: loads widen to fp32, stores round to nearest even. And who owns a
// block of a launch over many tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "views.h"

namespace sparsemtl::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float* p, float x) { *p = x; }
__device__ inline void narrow(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void narrow(__half* p, float x) { *p = __float2half_rn(x); }

// The last of `count` tensors whose first block is not after this one
__device__ inline int owner_of(const int64_t* first, int count, int64_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// body(value of the storage type)
template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBfloat16:
      return body(__nv_bfloat16());
    case DType::kFloat16:
      return body(__half());
  }
}

// body(value of the one type, value of the other)
template <typename Body>
void for_dtypes(DType one, DType other, const Body& body) {
  for_dtype(one, [&](auto a) { for_dtype(other, [&](auto b) { body(a, b); }); });
}

}  // namespace sparsemtl::cuda
