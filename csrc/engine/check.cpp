// What a step may touch, checked before a program ever runs.
#include "engine/check.h"

#include <algorithm>
#include <stdexcept>

namespace sparsemtl::engine {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // no size, stride or offset is as large

void check_numbers(const View& v) {
  for (const int64_t n :
       {v.offset, v.batch, v.channels, v.height, v.width, v.image, v.plane, v.pitch}) {
    require(n >= 0 && n < kMost, "sizes and strides from 0 to 2^40");
  }
}

}  // namespace

void refuse(const std::string& what) {
  throw std::invalid_argument("EngineProgram: Expected " + what);
}
void require(bool good, const char* what) {
  if (!good) refuse(what);
}

void check_span(const View& v, const Slots& slots, Wide low, Wide high) {
  require(v.slot >= 0 && v.slot < slots.count, "a slot that exists");
  if (high <= low) return;
  if (v.offset + low < 0 || v.offset + high > slots.sizes[v.slot]) {
    refuse("a view within its slot of " + std::to_string(slots.sizes[v.slot]) +
           " floats, got offset " + std::to_string(v.offset));
  }
}

Wide last_plane(const View& v) {
  return static_cast<Wide>(v.batch - 1) * v.image + static_cast<Wide>(v.channels - 1) * v.plane;
}
bool empty(const View& v) { return v.batch * v.channels == 0 || v.height * v.width == 0; }

void check_view(const View& v, const Slots& slots) {
  check_numbers(v);
  require(v.batch < 1 << 20 && v.channels < 1 << 20 && v.height < 1 << 20 && v.width < 1 << 30,
          "sizes of a view that multiply within 64 bits");
  const Wide high = last_plane(v) + static_cast<Wide>(v.height - 1) * v.pitch + v.width;
  check_span(v, slots, 0, empty(v) ? 0 : high);
}

void check_output(const View& v, const Slots& slots) {
  check_view(v, slots);
  require(v.height <= 1 || v.pitch >= v.width, "an output pitch of at least its width");
  const int64_t plane = v.height == 0 ? 0 : (v.height - 1) * v.pitch + v.width;
  require(v.channels <= 1 || v.plane >= plane, "output planes that do not overlap");
  require(v.batch <= 1 || v.image >= (v.channels - 1) * v.plane + plane,
          "output images that do not overlap");
}

bool same_shape(const View& a, const View& b) {
  return a.batch == b.batch && a.channels == b.channels && a.height == b.height &&
         a.width == b.width;
}

void check_act(int act) { require(act >= 0 && act <= 2, "an activation from 0 to 2"); }

void check_residual(const View& residual, const View& y, const Slots& slots) {
  check_view(residual, slots);
  require(same_shape(residual, y), "a residual of the output's shape");
}

namespace {

template <typename S>
void check_in_out(const S& s, const Slots& slots) {
  check_view(s.x, slots);
  check_output(s.y, slots);
}
void check_planes(const View& x, const View& y, const Slots& slots) {
  check_view(x, slots);
  check_output(y, slots);
  require(x.batch == y.batch && x.channels == y.channels, "planes of one number");
}

void check_one(const ConvStep& s, const Slots& slots) { check_conv(s, slots); }

void check_one(const PhaseStep& s, const Slots& slots) {
  check_in_out(s, slots);
  require(s.stride_y >= 1 && s.stride_x >= 1 && s.stride_y < 1 << 20 && s.stride_x < 1 << 20,
          "positive strides");
  const int64_t phases = s.stride_y * s.stride_x;
  require(s.first >= 0 && s.count >= 1 && s.first < phases && s.count <= phases - s.first,
          "phases of the stride");
  require(s.y.batch == s.x.batch && s.y.channels == s.x.channels * s.count,
          "a plane for each phase");
  require(s.y.height * s.stride_y >= s.x.height && s.y.width * s.stride_x >= s.x.width,
          "phases that hold the input");
}

void check_one(const TransposeStep& s, const Slots& slots) {
  check_in_out(s, slots);
  require(s.x.batch * s.x.channels == 1 && s.y.batch * s.y.channels == 1 &&
              s.x.height == s.y.width && s.x.width == s.y.height,
          "a matrix and its transpose");
}

void check_one(const DepthwiseStep& s, const Slots& slots) {
  check_in_out(s, slots);
  check_act(s.act);
  for (const int64_t n : {s.stride_y, s.stride_x, s.multiplier}) {
    require(n >= 1 && n < 1 << 20, "positive strides and multiplier");
  }
  require(s.x.batch == s.y.batch && s.y.channels == s.x.channels * s.multiplier,
          "output channels by the multiplier");
  if (s.has_residual) check_residual(s.residual, s.y, slots);
  for (const int64_t n : {s.top, s.left, s.plane_height, s.pitch, s.step_y}) {
    require(n >= 0 && n < 1 << 26, "planes within 2^26");
  }
  Wide low = 0, high = 0;
  for (int64_t k = 0; k < s.y.channels; ++k) {
    for (int64_t t = s.first[k]; t < s.first[k + 1]; ++t) {
      low = std::min<Wide>(low, s.offsets[t]);
      high = std::max<Wide>(high, s.offsets[t]);
    }
  }
  if (empty(s.y)) return;
  high += static_cast<Wide>(s.y.height - 1) * s.step_y + s.y.width;
  if (s.in_place) {
    check_span(s.x, slots, low, last_plane(s.x) + high);
    return;
  }
  require(s.top + (s.x.height + s.stride_y - 1) / s.stride_y <= s.plane_height &&
              (s.x.width + s.stride_x - 1) / s.stride_x <= s.pitch,
          "planes that hold the input");
  const Wide before = s.left + static_cast<Wide>(s.top) * s.pitch;
  const Wide after = static_cast<Wide>(s.stride_y) * s.stride_x * s.plane_height * s.pitch -
                     static_cast<Wide>(s.top) * s.pitch + 64 + s.pitch;
  require(before + low >= 0 && high <= after, "taps within the phases' planes");
}

void check_one(const MaxPoolStep& s, const Slots& slots) {
  check_planes(s.x, s.y, slots);
  for (const int64_t n :
       {s.kernel_y, s.kernel_x, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x}) {
    require(n >= 1 && n < 1 << 24, "a positive kernel, stride and dilation");
  }
  require(s.pad_y >= 0 && s.pad_x >= 0 && s.pad_y < 1 << 24 && s.pad_x < 1 << 24,
          "padding from 0 on");
}

void check_windows(const int32_t* from, const int32_t* to, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; ++i) {
    require(from[i] >= 0 && from[i] <= to[i] && to[i] <= size, "windows within the input");
  }
}
void check_one(const MeanStep& s, const Slots& slots) {
  check_planes(s.x, s.y, slots);
  check_windows(s.from_y, s.to_y, s.y.height, s.x.height);
  check_windows(s.from_x, s.to_x, s.y.width, s.x.width);
}

void check_one(const SumStep& s, const Slots& slots) {
  require(s.count >= 1 && s.count <= kMaxTerms, "1 to 8 terms");
  check_output(s.y, slots);
  check_act(s.act);
  for (int64_t k = 0; k < s.count; ++k) {
    check_view(s.x[k], slots);
    require(same_shape(s.x[k], s.y), "terms of the output's shape");
  }
}

void check_one(const BinaryStep& s, const Slots& slots) {
  check_view(s.a, slots);
  check_output(s.y, slots);
  require(same_shape(s.a, s.y), "an input of the output's shape");
  View b = s.b;  // stretched to the output: strides of 0 where it lacks an axis
  require(b.batch == s.y.batch && b.channels == s.y.channels && b.height == s.y.height &&
              b.width == (s.single ? std::min<int64_t>(s.y.width, 1) : s.y.width),
          "an input stretched to the output's shape");
  check_view(b, slots);
}

void check_one(const MapStep& s, const Slots& slots) {
  check_in_out(s, slots);
  require(same_shape(s.x, s.y), "an output of the input's shape");
  require(static_cast<int>(s.map) >= 0 && static_cast<int>(s.map) < kMaps, "a known map");
}

void check_places(const int32_t* at, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; ++i) {
    require(at[i] >= 0 && at[i] < size, "neighbours within the input");
  }
}
void check_one(const ResizeStep& s, const Slots& slots) {
  check_planes(s.x, s.y, slots);
  check_places(s.low_y, s.y.height, s.x.height);
  check_places(s.low_x, s.y.width, s.x.width);
  check_places(s.high_y, s.y.height, s.x.height);
  check_places(s.high_x, s.y.width, s.x.width);
}

void check_one(const SoftmaxStep& s, const Slots& slots) {
  check_in_out(s, slots);
  require(same_shape(s.x, s.y) && s.x.channels >= 1, "an output of the input's shape");
}

void check_one(const ArgmaxStep& s, const Slots& slots) {
  check_view(s.x, slots);
  require(s.x.channels >= 1, "at least one channel");
  require(s.slot >= 1 && s.slot < slots.count &&
              slots.sizes[s.slot] >= 2 * s.x.batch * s.x.height * s.x.width,
          "a slot that holds the indices");
}

}  // namespace

void check_step(const Step& step, const int64_t* slot_sizes, int64_t slots) {
  std::visit([&](const auto& s) { check_one(s, Slots{slot_sizes, slots}); }, step);
}

}  // namespace sparsemtl::engine
