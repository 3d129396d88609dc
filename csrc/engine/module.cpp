// Python bindings of the engine: a program is built from numbers and arrays, which it keeps alive.
//
// A step is (kind, views, numbers, arrays): views of nine integers each, see View in steps.h;
// numbers and arrays in the order in which the readers below take them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "engine/program.h"

namespace py = pybind11;

namespace sparsemtl::engine {
namespace {

struct Given {  // one step, as it came; numbers, views and arrays are taken from the front
  std::string kind;
  std::vector<std::vector<int64_t>> views;
  std::vector<double> numbers;
  std::vector<py::array> arrays;
  size_t next_view = 0, next_number = 0, next_array = 0;

  [[noreturn]] void refuse(const std::string& what) const {
    throw std::invalid_argument("EngineProgram: Expected " + what + " in a step " + kind);
  }
  View view() {
    if (next_view >= views.size() || views[next_view].size() != 9) refuse("views of 9 integers");
    const std::vector<int64_t>& v = views[next_view++];
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]};
  }
  double number() {
    if (next_number >= numbers.size()) refuse("more numbers");
    return numbers[next_number++];
  }
  int64_t integer() {
    const double n = number();
    if (!(n > -9e15 && n < 9e15) || n != static_cast<double>(static_cast<int64_t>(n))) {
      refuse("integers");
    }
    return static_cast<int64_t>(n);
  }
  int small() {
    const int64_t n = integer();
    if (n < -(int64_t{1} << 30) || n > int64_t{1} << 30) refuse("small integers");
    return static_cast<int>(n);
  }
  // An array of at least `least` entries; its size goes to `size`.
  template <typename T>
  const T* array(int64_t least, int64_t* size = nullptr, int64_t per_entry = 1) {
    if (next_array >= arrays.size()) refuse("more arrays");
    const py::array& a = arrays[next_array++];
    if (!py::isinstance<py::array_t<T>>(a) || (a.flags() & py::array::c_style) == 0) {
      refuse("contiguous arrays of the right type");
    }
    const int64_t entries = a.size() / per_entry;
    if (entries < least) {
      refuse("an array of " + std::to_string(least) + " entries, got " + std::to_string(entries));
    }
    if (size != nullptr) *size = entries;
    return static_cast<const T*>(a.data());
  }
  template <typename T>
  const T* optional(bool there, int64_t least) {
    return there ? array<T>(least) : nullptr;
  }
  template <typename S>
  void in_out(S& s) {
    s.x = view();
    s.y = view();
  }
  void integers(std::initializer_list<int64_t*> all) {
    for (int64_t* n : all) *n = integer();
  }
  void end() const {
    if (next_view != views.size() || next_number != numbers.size() || next_array != arrays.size()) {
      refuse("no more than it takes");
    }
  }
};

template <typename T, typename U>
const T* records(Given& g, int64_t* size) {  // structs of U, handed over as rows of integers
  static_assert(sizeof(T) % sizeof(U) == 0);
  return reinterpret_cast<const T*>(g.array<U>(0, size, sizeof(T) / sizeof(U)));
}

Step read_conv(Given& g) {
  ConvStep s{};
  g.in_out(s);
  s.has_residual = g.integer() != 0;
  if (s.has_residual) s.residual = g.view();
  const bool has_bias = g.integer() != 0;
  cpu::ConvProblem& p = s.arguments.problem;
  p.batch = s.x.batch;
  p.phases = g.integer();
  if (p.phases < 1) g.refuse("a positive number of phases");
  p.channels = s.x.channels / p.phases;
  p.height = s.x.height;
  p.width = s.x.width;
  p.rows = s.y.channels;
  p.out_height = s.y.height;
  p.out_width = s.y.width;
  p.groups = g.integer();
  s.arguments.mode = static_cast<cpu::ConvMode>(g.small());
  s.arguments.vectors = g.small();
  s.arguments.regions = g.integer() != 0;
  s.arguments.threads = 1;
  s.act = g.small();
  g.integers(
      {&s.list.n_parts, &s.list.n_blocks, &s.list.n_nonzeros, &s.list.vector, &s.widest_block});
  p.taps = reinterpret_cast<const int32_t*>(g.array<int32_t>(3, &p.n_taps, 1));
  p.n_taps /= 3;
  p.in = {s.x.image, s.x.plane, s.x.pitch};
  p.out = {s.y.image, s.y.plane, s.y.pitch};
  p.residual = {s.residual.image, s.residual.plane, s.residual.pitch};
  ListLengths lengths{};
  s.list.parts = records<cpu::PatternPart, int32_t>(g, &lengths.parts);
  s.list.blocks = records<cpu::PatternBlock, int32_t>(g, &lengths.blocks);
  s.list.first_nonzero = g.array<int64_t>(0, &lengths.first_nonzero);
  s.list.columns = g.array<int32_t>(0, &lengths.columns);
  s.list.rows = g.array<int32_t>(0, &lengths.rows);
  s.list.counts = g.array<int32_t>(0, &lengths.counts);
  s.list.positions = reinterpret_cast<const uint16_t*>(g.array<int16_t>(0, &lengths.positions));
  s.list.values = g.array<float>(0, &lengths.values);
  s.bias = g.optional<float>(has_bias, p.rows);
  if (p.groups < 1 || p.channels < 0 || p.rows < 0) g.refuse("positive sizes");
  check_list(s, lengths);
  return s;
}

template <typename S>
Step read_plain(Given& g) {  // of views alone
  S s{};
  g.in_out(s);
  return s;
}

Step read_phase(Given& g) {
  PhaseStep s{};
  g.in_out(s);
  g.integers({&s.stride_y, &s.stride_x, &s.first, &s.count});
  return s;
}

Step read_depthwise(Given& g) {
  DepthwiseStep s{};
  g.in_out(s);
  s.has_residual = g.integer() != 0;
  if (s.has_residual) s.residual = g.view();
  const bool has_bias = g.integer() != 0;
  s.in_place = g.integer() != 0;
  g.integers({&s.multiplier, &s.stride_y, &s.stride_x, &s.top, &s.left, &s.plane_height, &s.pitch,
              &s.step_y});
  s.act = g.small();
  int64_t offsets = 0;
  s.first = g.array<int32_t>(s.y.channels + 1);
  s.offsets = g.array<int32_t>(0, &offsets);
  s.weights = g.array<float>(offsets);
  s.bias = g.optional<float>(has_bias, s.y.channels);
  if (s.y.channels < 0) g.refuse("channels from 0 on");
  for (int64_t k = 0; k < s.y.channels; ++k) {
    const bool ordered = s.first[k] >= 0 && s.first[k] <= s.first[k + 1];
    if (!ordered || s.first[k + 1] > offsets) g.refuse("taps within their array, in order");
  }
  return s;
}

Step read_max_pool(Given& g) {
  MaxPoolStep s{};
  g.in_out(s);
  g.integers({&s.kernel_y, &s.kernel_x, &s.stride_y, &s.stride_x, &s.pad_y, &s.pad_x, &s.dilation_y,
              &s.dilation_x});
  return s;
}

Step read_mean(Given& g) {
  MeanStep s{};
  g.in_out(s);
  s.from_y = g.array<int32_t>(s.y.height);
  s.to_y = g.array<int32_t>(s.y.height);
  s.scale_y = g.array<float>(s.y.height);
  s.from_x = g.array<int32_t>(s.y.width);
  s.to_x = g.array<int32_t>(s.y.width);
  s.scale_x = g.array<float>(s.y.width);
  return s;
}

Step read_sum(Given& g) {
  SumStep s{};
  s.count = g.integer();
  if (s.count < 1 || s.count > kMaxTerms) g.refuse("1 to 8 terms");
  for (int64_t k = 0; k < s.count; ++k) s.x[k] = g.view();
  s.y = g.view();
  s.act = g.small();
  return s;
}

Step read_binary(Given& g) {
  BinaryStep s{};
  s.a = g.view();
  s.b = g.view();
  s.y = g.view();
  s.multiply = g.integer() != 0;
  s.single = g.integer() != 0;
  return s;
}

Step read_map(Given& g) {
  MapStep s{};
  g.in_out(s);
  s.map = static_cast<Map>(g.small());
  s.low = static_cast<float>(g.number());
  s.high = static_cast<float>(g.number());
  return s;
}

Step read_resize(Given& g) {
  ResizeStep s{};
  g.in_out(s);
  s.nearest = g.integer() != 0;
  s.low_y = g.array<int32_t>(s.y.height);
  s.high_y = g.array<int32_t>(s.y.height);
  s.weight_y = g.array<float>(s.y.height);
  s.low_x = g.array<int32_t>(s.y.width);
  s.high_x = g.array<int32_t>(s.y.width);
  s.weight_x = g.array<float>(s.y.width);
  return s;
}

Step read_argmax(Given& g) {
  ArgmaxStep s{};
  s.x = g.view();
  s.slot = g.integer();
  return s;
}

using Reader = Step (*)(Given&);
constexpr std::pair<const char*, Reader> kReaders[] = {
    {"conv", read_conv},
    {"phase", read_phase},
    {"transpose", read_plain<TransposeStep>},
    {"depthwise", read_depthwise},
    {"max_pool", read_max_pool},
    {"mean", read_mean},
    {"sum", read_sum},
    {"binary", read_binary},
    {"map", read_map},
    {"resize", read_resize},
    {"softmax", read_plain<SoftmaxStep>},
    {"argmax", read_argmax},
};

Step read(Given& g) {
  for (const auto& [kind, reader] : kReaders) {
    if (g.kind != kind) continue;
    const Step step = reader(g);
    g.end();
    return step;
  }
  g.refuse("a known kind");
}

// A program and the arrays that its steps point into.
struct Kept {
  std::unique_ptr<Program> program;
  std::vector<py::array> arrays;
};

using Item = std::tuple<std::string, std::vector<std::vector<int64_t>>, std::vector<double>,
                        std::vector<py::array>>;

std::unique_ptr<Kept> build(int64_t arena, std::vector<int64_t> externals,
                            const std::vector<Item>& items) {
  auto kept = std::make_unique<Kept>();
  std::vector<Step> steps;
  for (const auto& [kind, views, numbers, arrays] : items) {
    Given given{kind, views, numbers, arrays};
    steps.push_back(read(given));
    kept->arrays.insert(kept->arrays.end(), arrays.begin(), arrays.end());
  }
  kept->program = std::make_unique<Program>(arena, std::move(externals), std::move(steps));
  return kept;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<Kept>(m, "EngineProgram")
      .def(py::init(&build), py::arg("arena"), py::arg("externals"), py::arg("steps"))
      .def(
          "run",
          [](const Kept& kept, const std::vector<uintptr_t>& addresses, int threads) {
            const py::gil_scoped_release unlocked;
            kept.program->run(addresses, threads, nullptr);
          },
          py::arg("addresses"), py::arg("threads"))
      .def(
          "profile",
          [](const Kept& kept, const std::vector<uintptr_t>& addresses, int threads) {
            std::vector<double> seconds(static_cast<size_t>(kept.program->steps()));
            const py::gil_scoped_release unlocked;
            kept.program->run(addresses, threads, seconds.data());
            return seconds;
          },
          py::arg("addresses"), py::arg("threads"))
      .def("bytes", [](const Kept& kept, int threads) { return kept.program->bytes(threads); });
}

}  // namespace sparsemtl::engine
