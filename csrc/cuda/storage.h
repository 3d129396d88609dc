// Storage types on the device: loads widen to fp32, stores round to nearest even.
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

}  // namespace sparsemtl::cuda
