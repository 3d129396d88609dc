// The launchers of csrc/cuda under names that ctypes can call; built for the host.
#include <cstdint>
#include <vector>

#include "cuda/pack_pattern.h"
#include "cuda/soft_threshold.h"
#include "cuda/sparse_conv2d.h"
#include "cuda/threshold_adam.h"

using namespace sparsemtl;

namespace {

template <typename T>
std::vector<T> list(const T* values, int64_t n) {
  return values == nullptr ? std::vector<T>() : std::vector<T>(values, values + n);
}

}  // namespace

extern "C" {

void host_soft_threshold(int dtype, int values, int64_t n, const uintptr_t* w, const int64_t* sizes,
                         const uintptr_t* out, uintptr_t alpha) {
  cuda::soft_threshold_forward(static_cast<DType>(dtype), static_cast<DType>(values), list(w, n),
                               list(sizes, n), list(out, n), alpha, 0);
}

void host_soft_threshold_backward(int dtype, int values, int64_t n, const uintptr_t* w,
                                  const int64_t* sizes, const uintptr_t* g, const uintptr_t* gw,
                                  uintptr_t alpha, uintptr_t sums, uintptr_t grad_alpha) {
  cuda::soft_threshold_backward(static_cast<DType>(dtype), static_cast<DType>(values), list(w, n),
                                list(sizes, n), list(g, n), list(gw, n), alpha, sums, grad_alpha,
                                0);
}

void host_threshold_adam(int64_t n, const uintptr_t* state, const int64_t* sizes,
                         const float* rules, int64_t rule_count, const int64_t* rule_of, int dtype,
                         const uintptr_t* values, const uintptr_t* masks, const int64_t* owners,
                         uintptr_t alphas, uintptr_t counts) {
  const auto* read = reinterpret_cast<const cpu::AdamRule*>(rules);
  cuda::threshold_adam(
      {list(state, n), list(state + n, n), list(state + 2 * n, n), list(state + 3 * n, n),
       list(sizes, n), list(read, rule_count), list(rule_of, n)},
      {static_cast<DType>(dtype), list(values, n), list(masks, n), list(owners, n), alphas, counts},
      0);
}

void host_pack_pattern(const int64_t* shape, const uint8_t* bits, const float* weight, int* starts,
                       void* entries, int* sources, int64_t capacity) {
  cuda::pack_pattern({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]}, bits, weight,
                     {starts, static_cast<cuda::Entry*>(entries), sources, capacity}, 0);
}

void host_refresh_values(int* starts, void* entries, int* sources, int64_t capacity, int64_t slots,
                         const float* weight) {
  cuda::refresh_values({starts, static_cast<cuda::Entry*>(entries), sources, capacity}, slots,
                       weight, 0);
}

void host_sparse_conv2d(int dtype, const int64_t* s, int* starts, void* entries, int* sources,
                        int64_t capacity, const void* source, const void* bias, void* dest,
                        int activation) {
  cuda::sparse_conv2d(static_cast<DType>(dtype),
                      {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11],
                       s[12], s[13], s[14], s[15] != 0},
                      {starts, static_cast<cuda::Entry*>(entries), sources, capacity}, source, bias,
                      dest, activation, 0);
}
}
