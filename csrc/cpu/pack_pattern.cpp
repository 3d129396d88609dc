#include "cpu/pack_pattern.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sparsemtl::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64 flags of a row, from its weights or from what the caller keeps
template <typename T>
uint64_t flags(const T* from, int64_t n) {
  uint64_t word = 0;
  if (n == 64) {
    uint8_t set[64];
    for (int i = 0; i < 64; ++i) set[i] = from[i] != T{0};
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, set + 8 * byte, 8);  // gather the lowest bit of each byte
      word |= (eight * 0x0102040810204080ull >> 56) << (8 * byte);
    }
    return word;
  }
  for (int64_t i = 0; i < n; ++i) word |= static_cast<uint64_t>(from[i] != T{0}) << i;
  return word;
}

// Where the lists of one orientation take a weight from.
struct Orientation {
  const PackShape& shape;
  int64_t group_rows, group_channels, words;  // of the weight; rows in units of the vector
  int64_t list_rows, list_channels;           // of the list, per group
  std::vector<int32_t> channel, tap;          // of a bit's place in its row of the weight

  explicit Orientation(const PackShape& s)
      : shape(s),
        group_rows(ceil_div(s.rows / s.groups, s.vector)),
        group_channels(s.channels),
        words(ceil_div(s.channels * s.taps, 64)),
        list_rows(s.transposed ? s.channels : group_rows),
        list_channels(s.transposed ? s.rows / s.groups : s.channels),
        channel(s.channels * s.taps),
        tap(s.channels * s.taps) {
    for (int64_t i = 0; i < s.channels * s.taps; ++i) {
      channel[i] = static_cast<int32_t>(i / s.taps);
      tap[i] = static_cast<int32_t>(i % s.taps);
    }
  }
  int64_t place(int64_t t, int64_t c) const {  // in the order of columns
    return shape.channel_major ? c * shape.taps + t : t * list_channels + c;
  }
  int64_t source(int64_t group, int64_t row, int64_t i) const {
    const int64_t rows = shape.rows / shape.groups;
    return (group * rows + row * shape.vector) * shape.channels * shape.taps + i;
  }

  // each(row of list in its group, place of the column, source) over list rows [begin, end) of a
  // group, with channels ascending for each row
  template <typename Each>
  void visit(const uint64_t* bits, int64_t group, int64_t begin, int64_t end,
             const Each& each) const {
    const bool across = shape.transposed;
    const int64_t from = across ? begin * shape.taps : 0;
    const int64_t to = across ? end * shape.taps : shape.channels * shape.taps;
    if (from >= to) return;
    for (int64_t r = across ? 0 : begin; r < (across ? group_rows : end); ++r) {
      const uint64_t* row = bits + (group * group_rows + r) * words;
      for (int64_t w = from / 64; w <= (to - 1) / 64; ++w) {
        uint64_t word = row[w];
        if (w == from / 64) word &= ~uint64_t{0} << (from % 64);
        if (w == (to - 1) / 64) word &= ~uint64_t{0} >> (63 - (to - 1) % 64);
        for (; word != 0; word &= word - 1) {
          const int64_t i = 64 * w + __builtin_ctzll(word);
          const int64_t row_in_list = across ? channel[i] : r;
          const int64_t channel_in_list = across ? r : channel[i];
          each(row_in_list, place(tap[i], channel_in_list), source(group, r, i));
        }
      }
    }
  }
};

// Thread `me`'s rows of each group; all of a group's work of a row stays in one thread.
template <typename Each>
void each_share(const Orientation& o, int me, int threads, const Each& each) {
  const int64_t rows = o.shape.groups * o.list_rows;
  const int64_t begin = rows * me / threads, end = rows * (me + 1) / threads;
  for (int64_t at = begin; at < end;) {
    const int64_t group = at / o.list_rows, first = at % o.list_rows;
    const int64_t last = std::min(o.list_rows, first + end - at);
    each(group, first, last);
    at += last - first;
  }
}

void copy_vector(const PackShape& shape, const float* weight, int64_t source, float* values) {
  if (shape.vector == 1) {
    *values = weight[source];
    return;
  }
  // The last vector of a group may be short: what it lacks is zero and never written to the output.
  const int64_t row_size = shape.channels * shape.taps, rows = shape.rows / shape.groups;
  const int64_t left = rows - source / row_size % rows;
  for (int64_t v = 0; v < shape.vector; ++v) {
    values[v] = v < left ? weight[source + v * row_size] : 0.0f;
  }
}

}  // namespace

int64_t pattern_bits(const PackShape& shape, const float* weight, const uint8_t* keep,
                     uint64_t* bits, int threads) {
  const int64_t n = shape.channels * shape.taps, words = ceil_div(n, 64);
  const int64_t rows = shape.rows / shape.groups, vectors = ceil_div(rows, shape.vector);
  int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (int64_t at = 0; at < shape.groups * vectors; ++at) {
    const int64_t group = at / vectors, first = at % vectors * shape.vector;
    const int64_t last = std::min(rows, first + shape.vector);
    for (int64_t w = 0; w < words; ++w) {
      const int64_t size = std::min<int64_t>(64, n - 64 * w);
      uint64_t word = 0;
      for (int64_t r = first; r < last; ++r) {
        const int64_t from = (group * rows + r) * n + 64 * w;
        word |= keep != nullptr ? flags(keep + from, size) : flags(weight + from, size);
      }
      bits[at * words + w] = word;
      total += __builtin_popcountll(word);
    }
  }
  return total;
}

void pack_pattern(const PackShape& shape, const float* weight, const uint64_t* bits,
                  const int32_t* block_ends, int64_t n_blocks, const PackTarget& target,
                  int threads) {
  const Orientation o(shape);
  const int64_t n_columns = o.list_channels * shape.taps, rows = o.list_rows;
  std::vector<int32_t> block_of(n_columns);
  for (int64_t b = 0, c = 0; b < n_blocks; ++b) {
    for (; c < block_ends[b]; ++c) block_of[c] = static_cast<int32_t>(b);
  }
  std::vector<int32_t> counts(shape.groups * n_blocks * rows);
  std::vector<uint8_t> used(static_cast<size_t>(threads) * shape.groups * n_columns);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int me = 0; me < threads; ++me) {
    uint8_t* mine = used.data() + me * shape.groups * n_columns;
    each_share(o, me, threads, [&](int64_t group, int64_t begin, int64_t end) {
      o.visit(bits, group, begin, end, [&](int64_t row, int64_t column, int64_t) {
        ++counts[(group * n_blocks + block_of[column]) * rows + row];
        mine[group * n_columns + column] = 1;
      });
    });
  }

  std::vector<int32_t> position(shape.groups * n_columns);
  std::vector<int64_t> cursor(counts.size());
  std::vector<int32_t> row_of_count;
  int64_t nonzero = 0;
  int32_t column_at = 0, entry = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    target.parts[group] = {
        static_cast<int32_t>(group * n_blocks), static_cast<int32_t>(n_blocks),
        static_cast<int32_t>(group *
                             (shape.transposed ? shape.channels : shape.rows / shape.groups)),
        static_cast<int32_t>(rows), static_cast<int32_t>(group)};
    for (int64_t b = 0, column = 0; b < n_blocks; ++b) {
      const int64_t at = group * n_blocks + b;
      PatternBlock& block = target.blocks[at];
      block = {column_at, 0, entry, 0, -1};
      for (; column < block_ends[b]; ++column) {
        bool any = false;
        for (int t = 0; t < threads; ++t) {
          any |= used[(t * shape.groups + group) * n_columns + column] != 0;
        }
        if (!any) continue;
        const int64_t by = shape.channel_major ? shape.taps : o.list_channels;
        const int64_t tap = shape.channel_major ? column % by : column / by;
        const int64_t channel = shape.channel_major ? column / by : column % by;
        const int32_t tap32 = static_cast<int32_t>(tap);
        block.tap_low = block.n_columns == 0 ? tap32 : std::min(block.tap_low, tap32);
        block.tap_high = std::max(block.tap_high, tap32);
        position[group * n_columns + column] = block.n_columns++;
        target.columns[column_at++] = static_cast<int32_t>(tap * o.list_channels + channel);
      }
      // rows by falling count, equal counts in row order
      const int32_t* count = counts.data() + at * rows;
      int32_t most = 0;
      for (int64_t r = 0; r < rows; ++r) most = std::max(most, count[r]);
      row_of_count.assign(most + 2, 0);
      for (int64_t r = 0; r < rows; ++r) ++row_of_count[most - count[r] + 1];
      for (int32_t i = 1; i < most + 2; ++i) row_of_count[i] += row_of_count[i - 1];
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t e = entry + row_of_count[most - count[r]]++;
        target.rows[e] = static_cast<int32_t>(r);
        target.counts[e] = count[r];
      }
      target.first_nonzero[at] = nonzero;
      for (int64_t i = 0; i < rows; ++i, ++entry) {
        cursor[at * rows + target.rows[entry]] = nonzero;
        nonzero += target.counts[entry];
      }
    }
  }

#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int me = 0; me < threads; ++me) {
    each_share(o, me, threads, [&](int64_t group, int64_t begin, int64_t end) {
      o.visit(bits, group, begin, end, [&](int64_t row, int64_t column, int64_t source) {
        const int64_t i = cursor[(group * n_blocks + block_of[column]) * rows + row]++;
        target.positions[i] = static_cast<uint16_t>(position[group * n_columns + column]);
        target.sources[i] = static_cast<int32_t>(source);
        copy_vector(shape, weight, source, target.values + i * shape.vector);
      });
    });
  }
}

void refresh_values(const PackShape& shape, const float* weight, const int32_t* sources,
                    int64_t n_nonzeros, float* values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n_nonzeros; ++i) {
    copy_vector(shape, weight, sources[i], values + i * shape.vector);
  }
}

void spread_values(const float* grad, const int32_t* sources, int64_t n_nonzeros, float* dense,
                   int64_t n_dense, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_dense; ++i) dense[i] = 0.0f;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_nonzeros; ++i) dense[sources[i]] = grad[i];
  }
}

}  // namespace sparsemtl::cpu
