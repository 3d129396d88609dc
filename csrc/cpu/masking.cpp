#include "cpu/masking.h"

#include <algorithm>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsemtl::cpu {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: a few hundred kilobytes of the three arrays

}  // namespace

void apply_mask(uintptr_t x, uintptr_t keep, uintptr_t out, int64_t n, int threads) {
  const char* who = "apply_mask";
  check_pointer(who, "x", x, n);
  check_pointer(who, "keep", keep, n);
  check_pointer(who, "out", out, n);
  const auto body = isa().masking;
  const auto* from = reinterpret_cast<const float*>(x);
  const auto* mask = reinterpret_cast<const uint8_t*>(keep);
  auto* to = reinterpret_cast<float*>(out);
  for_each_chunk((n + kChunk - 1) / kChunk, threads, [&](int64_t c) {
    const int64_t at = c * kChunk;
    body(from + at, mask + at, to + at, std::min(kChunk, n - at));
  });
}

}  // namespace sparsemtl::cpu
