// Python bindings of the CUDA kernels beside soft_threshold; as module.cpp, and nothing else.
#ifdef SPARSEMTL_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "check.h"
#include "cuda/pack_pattern.h"
#include "cuda/sparse_conv2d.h"
#include "cuda/threshold_adam.h"

namespace py = pybind11;

namespace sparsemtl::cuda {
namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

PackedLists lists_of(const Addresses& addresses, int64_t capacity) {
  check_count("sparse_conv2d_cuda", "lists", 3, addresses.size());
  return {reinterpret_cast<int*>(addresses[0]), reinterpret_cast<Entry*>(addresses[1]),
          reinterpret_cast<int*>(addresses[2]), capacity};
}

}  // namespace

void bind_cuda_ops(py::module_& m) {
  m.attr("CUDA_PANEL") = kPanel;
  m.attr("THRESHOLD_ADAM_CUDA_RULES") = kThresholdAdamRules;
  m.def(
      "threshold_adam_cuda",
      [](Addresses weights, Sizes sizes, Addresses grads, Addresses means, Addresses squares,
         const std::vector<float>& rules, Sizes rule_of, int dtype, Addresses values,
         Addresses masks, Sizes owners, uintptr_t alphas, uintptr_t counts, uintptr_t stream) {
        std::vector<cpu::AdamRule> read(rules.size() / cpu::kAdamRuleFloats);
        if (!read.empty()) std::memcpy(read.data(), rules.data(), read.size() * sizeof(read[0]));
        threshold_adam({std::move(weights), std::move(grads), std::move(means), std::move(squares),
                        std::move(sizes), std::move(read), std::move(rule_of)},
                       {static_cast<DType>(dtype), std::move(values), std::move(masks),
                        std::move(owners), alphas, counts},
                       stream);
      },
      py::arg("weights"), py::arg("sizes"), py::arg("grads"), py::arg("means"), py::arg("squares"),
      py::arg("rules"), py::arg("rule_of"), py::arg("dtype"), py::arg("values"), py::arg("masks"),
      py::arg("owners"), py::arg("alphas"), py::arg("counts"), py::arg("stream"), Unlocked());
  m.def(
      "pack_pattern_cuda",
      [](const Sizes& s, uintptr_t bits, uintptr_t weight, const Addresses& lists, int64_t capacity,
         uintptr_t stream) {
        check_count("pack_pattern_cuda", "shape", 6, s.size());
        pack_pattern({s[0], s[1], s[2], s[3], s[4], s[5]}, reinterpret_cast<const uint8_t*>(bits),
                     reinterpret_cast<const float*>(weight), lists_of(lists, capacity), stream);
      },
      py::arg("shape"), py::arg("bits"), py::arg("weight"), py::arg("lists"), py::arg("capacity"),
      py::arg("stream"), Unlocked());
  m.def(
      "refresh_values_cuda",
      [](const Addresses& lists, int64_t capacity, int64_t slots, uintptr_t weight,
         uintptr_t stream) {
        refresh_values(lists_of(lists, capacity), slots, reinterpret_cast<const float*>(weight),
                       stream);
      },
      py::arg("lists"), py::arg("capacity"), py::arg("slots"), py::arg("weight"), py::arg("stream"),
      Unlocked());
  m.def(
      "sparse_conv2d_cuda",
      [](int dtype, const Sizes& s, const Addresses& lists, int64_t capacity, uintptr_t source,
         uintptr_t bias, uintptr_t dest, int activation, uintptr_t stream) {
        check_count("sparse_conv2d_cuda", "shape", 16, s.size());
        sparse_conv2d(static_cast<DType>(dtype),
                      {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11],
                       s[12], s[13], s[14], s[15] != 0},
                      lists_of(lists, capacity), reinterpret_cast<const void*>(source),
                      reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(dest),
                      activation, stream);
      },
      py::arg("dtype"), py::arg("shape"), py::arg("lists"), py::arg("capacity"), py::arg("source"),
      py::arg("bias"), py::arg("dest"), py::arg("activation"), py::arg("stream"), Unlocked());
}

}  // namespace sparsemtl::cuda
#endif
