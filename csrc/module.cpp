// Python bindings of sparsemtl._C, and nothing else.
//
// Tensors arrive as addresses: sparsemtl.ops takes them from torch, allocates every output and
// keeps all of it alive for the call. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/masking.h"
#include "cpu/memory.h"
#include "cpu/roof.h"
#include "cpu/soft_threshold.h"
#include "cpu/threshold_adam.h"
#ifdef SPARSEMTL_CUDA
#include "cuda/soft_threshold.h"
#endif

namespace py = pybind11;
using namespace sparsemtl;

#ifdef SPARSEMTL_CUDA
namespace sparsemtl::cuda {
void bind_cuda_ops(py::module_& m);  // cuda_module.cpp
}
#endif

namespace sparsemtl::cpu {
void bind_sparse_conv2d(py::module_& m);  // sparse_conv2d_module.cpp
}
namespace sparsemtl::engine {
void bind_engine(py::module_& m);  // engine/module.cpp
}

namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

void soft_threshold_forward(int dtype, Addresses weights, Sizes sizes, const Addresses& outs,
                            double alpha, const Addresses& masks, uintptr_t counts, int threads) {
  const cpu::Tensors tensors{static_cast<DType>(dtype), std::move(weights), std::move(sizes)};
  cpu::soft_threshold_forward(tensors, outs, static_cast<float>(alpha), masks,
                              reinterpret_cast<int64_t*>(counts), threads);
}

double soft_threshold_backward(int dtype, Addresses weights, Sizes sizes, const Addresses& grads,
                               const Addresses& grad_weights, double alpha, uintptr_t sums,
                               int64_t chunks, int threads) {
  const cpu::Tensors tensors{static_cast<DType>(dtype), std::move(weights), std::move(sizes)};
  return cpu::soft_threshold_backward(tensors, grads, grad_weights, static_cast<float>(alpha),
                                      {reinterpret_cast<double*>(sums), chunks}, threads);
}

void threshold_adam(Addresses weights, Sizes sizes, Addresses grads, Addresses means,
                    Addresses squares, const std::vector<float>& rules, Sizes rule_of, int dtype,
                    std::vector<float> alphas, Addresses values, Addresses masks, uintptr_t counts,
                    int threads) {
  std::vector<cpu::AdamRule> read(rules.size() / cpu::kAdamRuleFloats);
  check_count("threshold_adam", "rules", read.size() * cpu::kAdamRuleFloats, rules.size());
  if (!read.empty()) std::memcpy(read.data(), rules.data(), rules.size() * sizeof(float));
  cpu::threshold_adam({std::move(weights), std::move(grads), std::move(means), std::move(squares),
                       std::move(sizes), std::move(read), std::move(rule_of)},
                      {static_cast<DType>(dtype), std::move(alphas), std::move(values),
                       std::move(masks), reinterpret_cast<int64_t*>(counts)},
                      threads);
}

#ifdef SPARSEMTL_CUDA
void bind_cuda(py::module_& m) {
  m.attr("SOFT_THRESHOLD_CUDA_CHUNK") = cuda::kSoftThresholdChunk;
  m.def(
      "soft_threshold_forward_cuda",
      [](int dtype, int values, const Addresses& weights, const Sizes& sizes, const Addresses& outs,
         uintptr_t alpha, uintptr_t stream) {
        cuda::soft_threshold_forward(static_cast<DType>(dtype), static_cast<DType>(values), weights,
                                     sizes, outs, alpha, stream);
      },
      py::arg("dtype"), py::arg("values"), py::arg("weights"), py::arg("sizes"), py::arg("outs"),
      py::arg("alpha"), py::arg("stream"), Unlocked());
  m.def(
      "soft_threshold_backward_cuda",
      [](int dtype, int values, const Addresses& weights, const Sizes& sizes,
         const Addresses& grads, const Addresses& grad_weights, uintptr_t alpha, uintptr_t sums,
         uintptr_t grad_alpha, uintptr_t stream) {
        cuda::soft_threshold_backward(static_cast<DType>(dtype), static_cast<DType>(values),
                                      weights, sizes, grads, grad_weights, alpha, sums, grad_alpha,
                                      stream);
      },
      py::arg("dtype"), py::arg("values"), py::arg("weights"), py::arg("sizes"), py::arg("grads"),
      py::arg("grad_weights"), py::arg("alpha"), py::arg("sums"), py::arg("grad_alpha"),
      py::arg("stream"), Unlocked());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of sparsemtl; sparsemtl.ops is the way in.";
  m.def("isa", [] { return std::string(cpu::isa().name); });
  m.def("usable_isas", &cpu::usable_isas);
  m.def("force_isa", &cpu::force_isa, py::arg("name"));
  py::class_<cpu::Block>(m, "Block", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](cpu::Block& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data()), block.size());
      });
  m.attr("LARGE_BYTES") = cpu::kLargeBytes;
  m.attr("KEPT_BYTES") = cpu::kKeptBytes;
  m.def("waiting_bytes", &cpu::waiting_bytes);
  m.def("mapped_blocks", &cpu::mapped_blocks);
  m.def("release_memory", &cpu::release_memory);
  m.def("apply_mask", &cpu::apply_mask, py::arg("x"), py::arg("keep"), py::arg("out"), py::arg("n"),
        py::arg("threads"), Unlocked());
  m.def("roof_flops", &cpu::roof_flops, py::arg("rounds"));
  m.def("run_roof", &cpu::run_roof, py::arg("rounds"), py::arg("threads"), Unlocked());
  m.attr("SOFT_THRESHOLD_CHUNK") = cpu::kSoftThresholdChunk;
  m.def("soft_threshold_forward", &soft_threshold_forward, py::arg("dtype"), py::arg("weights"),
        py::arg("sizes"), py::arg("outs"), py::arg("alpha"), py::arg("masks"), py::arg("counts"),
        py::arg("threads"), Unlocked());
  m.def("soft_threshold_backward", &soft_threshold_backward, py::arg("dtype"), py::arg("weights"),
        py::arg("sizes"), py::arg("grads"), py::arg("grad_weights"), py::arg("alpha"),
        py::arg("sums"), py::arg("chunks"), py::arg("threads"), Unlocked());
  m.def("threshold_adam", &threshold_adam, py::arg("weights"), py::arg("sizes"), py::arg("grads"),
        py::arg("means"), py::arg("squares"), py::arg("rules"), py::arg("rule_of"),
        py::arg("dtype"), py::arg("alphas"), py::arg("values"), py::arg("masks"), py::arg("counts"),
        py::arg("threads"), Unlocked());
#ifdef SPARSEMTL_CUDA
  bind_cuda(m);
  cuda::bind_cuda_ops(m);
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
  cpu::bind_sparse_conv2d(m);
  engine::bind_engine(m);
}
