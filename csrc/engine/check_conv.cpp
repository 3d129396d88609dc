// What a convolution may touch: its taps and lists, checked before a program ever runs.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "engine/check.h"

namespace sparsemtl::engine {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // no size is as large
constexpr int64_t kWidestTile = 12 * 16;     // pixels that a tile may read at once

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

}  // namespace

void check_conv(const ConvStep& s, const Slots& slots) {
  const cpu::ConvProblem& p = s.arguments.problem;
  check_view(s.x, slots);
  check_output(s.y, slots);
  check_act(s.act);
  require(s.x.batch == s.y.batch, "one batch size");
  require(p.phases >= 1 && p.groups >= 1 && s.x.channels % p.phases == 0 &&
              p.channels % p.groups == 0 && p.rows % p.groups == 0,
          "groups and phases that divide the channels");
  if (s.has_residual) check_residual(s.residual, s.y, slots);
  require(width_exists(s.arguments.vectors), "a tile width that this instruction set has");
  check_taps(p);
  if (s.arguments.mode != cpu::ConvMode::kTable) {
    require(
        s.arguments.mode == cpu::ConvMode::kLinear || s.arguments.mode == cpu::ConvMode::kDirect,
        "a mode from 0 to 2");
    if (!empty(s.y)) check_linear(s, slots);
  }
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
