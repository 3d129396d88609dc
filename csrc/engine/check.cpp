// What a step may touch, checked before a program ever runs.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "engine/steps.h"

namespace sparsemtl::engine {
namespace {

using Wide = __int128;                       // sizes multiply without overflow
constexpr int64_t kMost = int64_t{1} << 40;  // no size, stride or offset is as large
constexpr int64_t kWidestTile = 12 * 16;     // pixels that a tile may read at once

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("EngineProgram: Expected " + what);
}
void require(bool good, const char* what) {
  if (!good) refuse(what);
}

struct Slots {
  const int64_t* sizes;
  int64_t count;
};

// Floats [low, high) from the view's pixel (0, 0, 0, 0) on lie in its slot.
void check_span(const View& v, const Slots& slots, Wide low, Wide high) {
  require(v.slot >= 0 && v.slot < slots.count, "a slot that exists");
  if (high <= low) return;
  if (v.offset + low < 0 || v.offset + high > slots.sizes[v.slot]) {
    refuse("a view within its slot of " + std::to_string(slots.sizes[v.slot]) +
           " floats, got offset " + std::to_string(v.offset));
  }
}

void check_numbers(const View& v) {
  for (const int64_t n :
       {v.offset, v.batch, v.channels, v.height, v.width, v.image, v.plane, v.pitch}) {
    require(n >= 0 && n < kMost, "sizes and strides from 0 to 2^40");
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

// What is written must not fold onto itself: threads would race.
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

void check_taps(const cpu::ConvProblem& p) {
  require(p.n_taps >= 1 && p.n_taps < 1 << 20, "at least one tap");
  for (int64_t t = 0; t < p.n_taps; ++t) {
    const int32_t* tap = p.taps + 3 * t;
    require(tap[0] >= 0 && tap[0] < p.phases, "taps of phases that exist");
    require(std::abs(tap[1]) < 1 << 24 && std::abs(tap[2]) < 1 << 24, "taps within 2^24");
  }
}

// What the linear modes read: whole tiles of the padded domain, through every tap.
void check_linear(const ConvStep& s, const Slots& slots) {
  const cpu::ConvProblem& p = s.arguments.problem;
  require(p.in.pitch >= p.out_width && p.in.pitch > 0, "a pitch that holds an output row");
  require(static_cast<Wide>(s.x.channels) * s.x.plane < int64_t{1} << 31,
          "an image that 32-bit offsets reach");
  int64_t low = 0, high = 0;
  for (int64_t t = 0; t < p.n_taps; ++t) {
    const int64_t at = p.taps[3 * t + 1] * p.in.pitch + p.taps[3 * t + 2];
    low = std::min(low, at);
    high = std::max(high, at);
  }
  const int64_t pixels = (p.out_height - 1) * p.in.pitch + p.out_width;
  check_span(s.x, slots, low, last_plane(s.x) + pixels + high + kWidestTile);
}

void check_block(const ConvStep& s, const cpu::PatternBlock& b, int64_t columns, int64_t entries) {
  const cpu::ConvProblem& p = s.arguments.problem;
  require(b.n_columns >= 0 && b.n_columns <= s.widest_block && b.first_column >= 0 &&
              b.first_column + int64_t{b.n_columns} <= columns,
          "blocks of known columns");
  require(b.first_entry >= 0 && b.first_entry + int64_t{s.list.parts[0].n_rows} <= entries,
          "blocks of known rows");
  const int64_t channels = p.channels / p.groups;
  require(b.n_columns == 0 || (b.tap_low >= 0 && b.tap_low <= b.tap_high && b.tap_high < p.n_taps),
          "blocks of known taps");
  for (int32_t j = 0; j < b.n_columns; ++j) {
    const int32_t column = s.list.columns[b.first_column + j];
    require(column >= 0 && column < channels * p.n_taps, "columns of the weight");
    const int64_t tap = column / channels;
    require(tap >= b.tap_low && tap <= b.tap_high, "columns of their block's taps");
  }
}

// Rows of a block: each once, by falling number of nonzeros, which point at the block's columns.
void check_rows(const ConvStep& s, int64_t at, std::vector<int64_t>& seen) {
  const cpu::PatternBlock& b = s.list.blocks[at];
  const int32_t n_rows = s.list.parts[0].n_rows;
  int64_t begin = s.list.first_nonzero[at], count = 0;
  for (int32_t e = 0; e < n_rows; ++e) {
    const int32_t row = s.list.rows[b.first_entry + e], n = s.list.counts[b.first_entry + e];
    require(row >= 0 && row < n_rows && seen[row] != at, "each row once in a block");
    seen[row] = at;
    require(n >= 0 && (e == 0 || n <= s.list.counts[b.first_entry + e - 1]),
            "rows by falling number of nonzeros");
    count += n;
  }
  require(begin >= 0 && begin <= s.list.n_nonzeros && count <= s.list.n_nonzeros - begin,
          "nonzeros that exist");
  int32_t largest = -1;
  for (int64_t z = begin; z < begin + count; ++z) {
    largest = std::max<int32_t>(largest, s.list.positions[z]);
  }
  require(largest < b.n_columns, "positions within their block");
}

void check_list(const ConvStep& s, int64_t columns, int64_t entries) {
  const cpu::ConvProblem& p = s.arguments.problem;
  const cpu::SparseList& list = s.list;
  const int64_t v = list.vector, parts = list.n_parts;
  require(v == 1 || v == 4 || v == 8 || v == 16, "vectors of 1, 4, 8 or 16");
  require(parts >= 1 && parts % p.groups == 0 && p.rows % parts == 0, "even parts of the groups");
  const int64_t rows = p.rows / parts, per_group = parts / p.groups;
  std::vector<int64_t> seen(static_cast<size_t>((rows + v - 1) / v), -1);
  for (int64_t i = 0; i < list.n_parts; ++i) {
    const cpu::PatternPart& part = list.parts[i];
    require(part.n_rows == (rows + v - 1) / v && part.group == i / per_group &&
                part.first_row == i * rows,
            "parts of the groups' rows");
    require(part.first_block >= 0 && part.n_blocks >= 0 &&
                part.first_block + int64_t{part.n_blocks} <= list.n_blocks,
            "parts of known blocks");
    for (int64_t b = part.first_block; b < part.first_block + part.n_blocks; ++b) {
      check_block(s, list.blocks[b], columns, entries);
      check_rows(s, b, seen);
    }
  }
}

// Widths of with_width in cpu/sparse_conv2d.inc.h: a full tile must be computed as it is counted.
bool width_exists(int vectors) {
  if (std::string(cpu::isa().name) == "generic") return vectors == 1 || vectors == 4;
  for (const int width : {1, 2, 3, 4, 6, 8, 12}) {
    if (vectors == width) return true;
  }
  return false;
}

void check_one(const ConvStep& s, const Slots& slots) {
  const cpu::ConvProblem& p = s.arguments.problem;
  check_view(s.x, slots);
  check_output(s.y, slots);
  check_act(s.act);
  require(s.x.batch == s.y.batch, "one batch size");
  require(p.phases >= 1 && p.groups >= 1 && s.x.channels % p.phases == 0 &&
              p.channels % p.groups == 0 && p.rows % p.groups == 0,
          "groups and phases that divide the channels");
  if (s.has_residual) {
    check_view(s.residual, slots);
    require(same_shape(s.residual, s.y), "a residual of the output's shape");
  }
  require(width_exists(s.arguments.vectors), "a tile width that this instruction set has");
  check_taps(p);
  if (s.arguments.mode != cpu::ConvMode::kTable) {
    require(
        s.arguments.mode == cpu::ConvMode::kLinear || s.arguments.mode == cpu::ConvMode::kDirect,
        "a mode from 0 to 2");
    if (!empty(s.y)) check_linear(s, slots);
  }
}

void check_one(const PhaseStep& s, const Slots& slots) {
  check_view(s.x, slots);
  check_output(s.y, slots);
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
  check_view(s.x, slots);
  check_output(s.y, slots);
  require(s.x.batch * s.x.channels == 1 && s.y.batch * s.y.channels == 1 &&
              s.x.height == s.y.width && s.x.width == s.y.height,
          "a matrix and its transpose");
}

void check_one(const DepthwiseStep& s, const Slots& slots) {
  check_view(s.x, slots);
  check_output(s.y, slots);
  check_act(s.act);
  for (const int64_t n : {s.stride_y, s.stride_x, s.multiplier}) {
    require(n >= 1 && n < 1 << 20, "positive strides and multiplier");
  }
  require(s.x.batch == s.y.batch && s.y.channels == s.x.channels * s.multiplier,
          "output channels by the multiplier");
  if (s.has_residual) {
    check_view(s.residual, slots);
    require(same_shape(s.residual, s.y), "a residual of the output's shape");
  }
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
  check_view(s.x, slots);
  check_output(s.y, slots);
  require(s.x.batch == s.y.batch && s.x.channels == s.y.channels, "planes of one number");
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
  check_view(s.x, slots);
  check_output(s.y, slots);
  require(s.x.batch == s.y.batch && s.x.channels == s.y.channels, "planes of one number");
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
  check_view(s.x, slots);
  check_output(s.y, slots);
  require(same_shape(s.x, s.y), "an output of the input's shape");
  require(static_cast<int>(s.map) >= 0 && static_cast<int>(s.map) < kMaps, "a known map");
}

void check_places(const int32_t* at, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; ++i) {
    require(at[i] >= 0 && at[i] < size, "neighbours within the input");
  }
}
void check_one(const ResizeStep& s, const Slots& slots) {
  check_view(s.x, slots);
  check_output(s.y, slots);
  require(s.x.batch == s.y.batch && s.x.channels == s.y.channels, "planes of one number");
  check_places(s.low_y, s.y.height, s.x.height);
  check_places(s.low_x, s.y.width, s.x.width);
  check_places(s.high_y, s.y.height, s.x.height);
  check_places(s.high_x, s.y.width, s.x.width);
}

void check_one(const SoftmaxStep& s, const Slots& slots) {
  check_view(s.x, slots);
  check_output(s.y, slots);
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

void check_list(const ConvStep& step, const ListLengths& lengths) {
  const cpu::SparseList& list = step.list;
  const int64_t n = list.n_nonzeros;
  require(list.n_parts >= 0 && list.n_blocks >= 0 && n >= 0 && n < kMost, "sizes from 0 on");
  require(step.widest_block >= 0 && step.widest_block <= 1 << 16, "blocks of 2^16 columns at most");
  require(lengths.parts >= list.n_parts && lengths.blocks >= list.n_blocks &&
              lengths.first_nonzero >= list.n_blocks && lengths.counts == lengths.rows &&
              lengths.positions >= n + 3 &&
              lengths.values / std::max<int64_t>(list.vector, 1) >= n + 3,
          "lists as long as their sizes say");
  check_list(step, lengths.columns, lengths.rows);
}

}  // namespace sparsemtl::engine
