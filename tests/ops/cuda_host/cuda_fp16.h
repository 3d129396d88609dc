// The storage type alone; the processor converts (compile with -mf16c).
#pragma once

#include <immintrin.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float x) {
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
}
