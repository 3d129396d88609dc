// Python bindings of pack_pattern and sparse_conv2d; see module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/pack_pattern.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_conv2d_plan.h"

namespace py = pybind11;

namespace sparsemtl::cpu {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PackShape pack_shape(const std::vector<int64_t>& s) {  // fields in order
  check_count("pack_pattern", "shape", 7, s.size());
  return {s[0], s[1], s[2], s[3], s[4], s[5] != 0, s[6] != 0};
}

// parts, blocks, first_nonzero, columns, rows, counts, positions, values: addresses in this order
struct List {
  SparseList list;
  int64_t widest_block;
};
List make_list(const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& arrays) {
  check_count("sparse_conv2d", "list sizes", 5, sizes.size());
  check_count("sparse_conv2d", "list arrays", 8, arrays.size());
  return {{sizes[0], sizes[1], sizes[2], sizes[3], pointer<PatternPart>(arrays[0]),
           pointer<PatternBlock>(arrays[1]), pointer<int64_t>(arrays[2]),
           pointer<int32_t>(arrays[3]), pointer<int32_t>(arrays[4]), pointer<int32_t>(arrays[5]),
           pointer<uint16_t>(arrays[6]), pointer<float>(arrays[7])},
          sizes[4]};
}

ConvArguments make_arguments(const std::vector<int64_t>& a, const int32_t* taps, int threads) {
  check_count("sparse_conv2d", "geometry", 15, a.size());
  ConvArguments made{};
  made.problem = {a[0], a[1], a[2],  a[3], a[4], a[5], a[6], a[7],
                  a[8], a[9], a[10], taps, {},   {},   {}};
  made.mode = static_cast<ConvMode>(a[11]);
  made.vectors = static_cast<int>(a[12]);
  made.regions = a[13] != 0;
  made.guarded = a[14] != 0;
  made.threads = threads;
  return made;
}

// wanted, planes, height, width, stride_y, stride_x, top, plane_height, pitch, lead, slack
PlaneCopy make_copy(const std::vector<int64_t>& c) {
  check_count("sparse_conv2d", "planes", 11, c.size());
  return {c[0] != 0, {c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]}, c[9], c[10]};
}

}  // namespace

void bind_sparse_conv2d(py::module_& m) {
  using Sizes = std::vector<int64_t>;
  using Addresses = std::vector<uintptr_t>;
  m.def("vector_lanes", [] { return isa().sparse_conv2d.lanes; });
  m.def(
      "pattern_bits",
      [](const Sizes& shape, uintptr_t weight, uintptr_t keep, uintptr_t bits, int threads) {
        return pattern_bits(pack_shape(shape), pointer<float>(weight), pointer<uint8_t>(keep),
                            pointer<uint64_t>(bits), threads);
      },
      Unlocked());
  m.def(
      "pack_pattern",
      [](const Sizes& shape, uintptr_t weight, uintptr_t bits,
         const std::vector<int32_t>& block_ends, const Addresses& target, int threads) {
        check_count("pack_pattern", "target", 9, target.size());
        const PackTarget to = {pointer<PatternPart>(target[0]), pointer<PatternBlock>(target[1]),
                               pointer<int64_t>(target[2]),     pointer<int32_t>(target[3]),
                               pointer<int32_t>(target[4]),     pointer<int32_t>(target[5]),
                               pointer<uint16_t>(target[6]),    pointer<float>(target[7]),
                               pointer<int32_t>(target[8])};
        pack_pattern(pack_shape(shape), pointer<float>(weight), pointer<uint64_t>(bits),
                     block_ends.data(), static_cast<int64_t>(block_ends.size()), to, threads);
      },
      Unlocked());
  m.def(
      "refresh_values",
      [](const Sizes& shape, uintptr_t weight, uintptr_t sources, int64_t n, uintptr_t values,
         int threads) {
        refresh_values(pack_shape(shape), pointer<float>(weight), pointer<int32_t>(sources), n,
                       pointer<float>(values), threads);
      },
      Unlocked());
  m.def(
      "spread_values",
      [](uintptr_t grad, uintptr_t sources, int64_t n, uintptr_t dense, int64_t size, int threads) {
        spread_values(pointer<float>(grad), pointer<int32_t>(sources), n, pointer<float>(dense),
                      size, threads);
      },
      Unlocked());
  py::class_<ConvPlan>(m, "ConvPlan")
      .def(py::init([](const Sizes& geometry, const std::vector<int32_t>& taps, const Sizes& sizes,
                       const Addresses& arrays, const Sizes& copy, int threads) {
             const List l = make_list(sizes, arrays);
             return std::make_unique<ConvPlan>(make_arguments(geometry, taps.data(), threads), taps,
                                               l.list, l.widest_block, make_copy(copy));
           }),
           Unlocked())
      .def(
          "forward",
          [](const ConvPlan& plan, uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t residual,
             int activation, int threads) {
            plan.forward(pointer<float>(x), pointer<float>(y),
                         {pointer<float>(bias), pointer<float>(residual), activation}, threads);
          },
          Unlocked())
      .def(
          "weight_grad",
          [](const ConvPlan& plan, uintptr_t x, uintptr_t grad_y, uintptr_t grad, int threads) {
            return plan.weight_grad(pointer<float>(x), pointer<float>(grad_y), pointer<float>(grad),
                                    threads);
          },
          Unlocked());
}

}  // namespace sparsemtl::cpu
