#include "cpu/soft_threshold.h"

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsemtl::cpu {
namespace {

// Outputs that no cache can hold are written past the caches: they would only push out the inputs.
constexpr int64_t kStreamBytes = 16 << 20;

int64_t width(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t total(const std::vector<int64_t>& sizes) {
  int64_t sum = 0;
  for (const int64_t size : sizes) sum += size;
  return sum;
}

template <typename T = void>
T* at(uintptr_t base, int64_t bytes) {
  return reinterpret_cast<T*>(base + static_cast<uintptr_t>(bytes));
}

void check(const char* who, const char* argument, const Tensors& weights,
           const std::vector<uintptr_t>& pointers) {
  check_count(who, argument, weights.data.size(), pointers.size());
  for (size_t i = 0; i < pointers.size(); ++i) {
    check_pointer(who, argument, pointers[i], weights.sizes[i]);
  }
}

}  // namespace

void soft_threshold_forward(const Tensors& weights, const std::vector<uintptr_t>& outs, float alpha,
                            const std::vector<uintptr_t>& masks, int64_t* counts, int threads) {
  const char* who = "soft_threshold_forward";
  check_count(who, "sizes", weights.data.size(), weights.sizes.size());
  check(who, "weights", weights, weights.data);
  check(who, "outs", weights, outs);
  if (!masks.empty()) check(who, "masks", weights, masks);

  const auto body = isa().soft_threshold[static_cast<int>(weights.dtype)].forward;
  const int64_t bytes = width(weights.dtype);
  const bool large = total(weights.sizes) * bytes >= kStreamBytes;
  const auto chunks = chunk_table(weights.sizes, kSoftThresholdChunk);
  std::vector<int64_t> live(counts == nullptr ? 0 : chunks.size());
  for_each_chunk(chunks.size(), threads, [&](int64_t c) {
    const auto [i, begin, size] = chunks[c];
    const uintptr_t out = outs[i] + static_cast<uintptr_t>(begin * bytes);
    uint8_t* mask = masks.empty() ? nullptr : at<uint8_t>(masks[i], begin / 8);
    const int64_t count = body(at(weights.data[i], begin * bytes), alpha, at(out, 0), mask, size,
                               large && out % 64 == 0);
    if (counts != nullptr) live[c] = count;
  });
  if (counts == nullptr) return;
  for (size_t i = 0; i < weights.sizes.size(); ++i) counts[i] = 0;
  for (size_t c = 0; c < chunks.size(); ++c) counts[chunks[c].tensor] += live[c];
}

double soft_threshold_backward(const Tensors& weights, const std::vector<uintptr_t>& grads,
                               const std::vector<uintptr_t>& grad_weights, float alpha,
                               TensorView<double> sums, int threads) {
  const char* who = "soft_threshold_backward";
  check_count(who, "sizes", weights.data.size(), weights.sizes.size());
  check(who, "weights", weights, weights.data);
  check(who, "grads", weights, grads);
  check(who, "grad_weights", weights, grad_weights);
  const auto chunks = chunk_table(weights.sizes, kSoftThresholdChunk);
  check_count(who, "sums", chunks.size(), static_cast<size_t>(sums.size));

  const auto body = isa().soft_threshold[static_cast<int>(weights.dtype)].backward;
  const int64_t bytes = width(weights.dtype);
  const bool large = total(weights.sizes) * bytes >= kStreamBytes;
  for_each_chunk(chunks.size(), threads, [&](int64_t c) {
    const auto [i, begin, size] = chunks[c];
    const uintptr_t gw = grad_weights[i] + static_cast<uintptr_t>(begin * bytes);
    sums.data[c] = body(at(weights.data[i], begin * bytes), alpha, at(grads[i], begin * bytes),
                        at(gw, 0), size, large && gw % 64 == 0);
  });
  double sum = 0.0;
  for (int64_t c = 0; c < sums.size; ++c) sum += sums.data[c];
  return -sum;
}

}  // namespace sparsemtl::cpu
