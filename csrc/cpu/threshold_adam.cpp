#include "cpu/threshold_adam.h"

#include <stdexcept>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsemtl::cpu {
namespace {

constexpr const char* kWho = "threshold_adam";
// Values that no cache can hold are written past the caches; nothing reads them before the next
// forward. Weights and moments are not: their lines have just been loaded.
constexpr int64_t kStreamBytes = 16 << 20;

int64_t width(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
T* at(uintptr_t base, int64_t index, int64_t bytes = sizeof(T)) {
  if (base == 0) return nullptr;
  return reinterpret_cast<T*>(base + static_cast<uintptr_t>(index * bytes));
}

void check(const AdamTensors& tensors, const ThresholdOutputs& outs) {
  const size_t n = tensors.sizes.size();
  const std::pair<const char*, const std::vector<uintptr_t>*> arrays[] = {
      {"weights", &tensors.weights},
      {"grads", &tensors.grads},
      {"means", &tensors.means},
      {"squares", &tensors.squares},
  };
  for (const auto& [name, pointers] : arrays) {
    check_count(kWho, name, n, pointers->size());
    for (size_t i = 0; i < n; ++i) check_pointer(kWho, name, (*pointers)[i], tensors.sizes[i]);
  }
  check_count(kWho, "rule_of", n, tensors.rule_of.size());
  for (const int64_t rule : tensors.rule_of) {
    if (rule < 0 || rule >= static_cast<int64_t>(tensors.rules.size())) {
      throw std::invalid_argument(std::string(kWho) + ": Expected rule_of below " +
                                  std::to_string(tensors.rules.size()) + ", got " +
                                  std::to_string(rule));
    }
  }
  check_count(kWho, "alphas", n, outs.alphas.size());
  check_count(kWho, "values", n, outs.values.size());
  if (!outs.masks.empty()) check_count(kWho, "masks", n, outs.masks.size());
}

}  // namespace

void threshold_adam(const AdamTensors& tensors, const ThresholdOutputs& outs, int threads) {
  check(tensors, outs);
  const auto body = isa().threshold_adam[static_cast<int>(outs.dtype)];
  const int64_t bytes = width(outs.dtype);
  int64_t total = 0;
  for (const int64_t size : tensors.sizes) total += size * bytes;
  const bool large = total >= kStreamBytes;
  const auto chunks = chunk_table(tensors.sizes, kThresholdAdamChunk);
  std::vector<int64_t> live(chunks.size());
  for_each_chunk(chunks.size(), threads, [&](int64_t c) {
    const auto [i, begin, size] = chunks[c];
    void* value = at<void>(outs.values[i], begin, bytes);
    uint8_t* mask = outs.masks.empty() ? nullptr : at<uint8_t>(outs.masks[i], begin / 8);
    live[c] = body(tensors.rules[tensors.rule_of[i]], at<float>(tensors.weights[i], begin),
                   at<const float>(tensors.grads[i], begin), at<float>(tensors.means[i], begin),
                   at<float>(tensors.squares[i], begin), outs.alphas[i], value, mask, size,
                   large && reinterpret_cast<uintptr_t>(value) % 64 == 0);
  });
  if (outs.counts == nullptr) return;
  for (size_t i = 0; i < tensors.sizes.size(); ++i) outs.counts[i] = 0;
  for (size_t c = 0; c < chunks.size(); ++c) outs.counts[chunks[c].tensor] += live[c];
}

}  // namespace sparsemtl::cpu
