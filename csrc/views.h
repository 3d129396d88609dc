// What crosses the border between Python and the kernels: plain pointers and sizes.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sparsemtl {

// Storage types that are not arithmetic types of C++; arithmetic is always fp32.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

template <typename T>
struct TensorView {  // borrowed and dense: Python owns the memory and keeps it alive for the call
  T* data;
  int64_t size;  // elements
};
static_assert(std::is_trivially_copyable_v<TensorView<float>>);

}  // namespace sparsemtl
