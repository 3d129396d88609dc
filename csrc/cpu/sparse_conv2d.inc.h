// Bodies of sparse_conv2d, included after vec.h inside the anonymous namespace of
// kernels_<isa>.cpp, and so are the two files that it includes in turn.
//
// A tile is P vectors of output pixels. For each block of columns its inputs are packed into a
// panel [column][P vectors] (L1), then each row loads its P sums from the strip [row][P vectors]
// (L2), adds value · panel[position] over its nonzeros and stores them, after the last block to y.
// What bounds this is loads, two per clock: one per multiply-add; values and positions therefore
// come four at a time.

#include "cpu/sparse_conv2d_tiles.h"

inline uint64_t four_positions(const uint16_t* p) {
  uint64_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return four;
}

template <int P>
inline __attribute__((always_inline)) void accumulate(Vec* sums, Vec value, const float* x) {
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    sums[p] = multiply_add(value, load(x + p * kLanes), sums[p]);
  }
}

// Inputs of nonzero i: a column of the panel, or in place.
template <int P>
struct FromPanel {
  const float* panel;
  const uint16_t* positions;
  uint64_t four;
  inline void at(int32_t i) { four = four_positions(positions + i); }
  template <int I>
  inline const float* get() const {
    return panel + (four >> (16 * I) & 0xffff) * (P * kLanes);
  }
  inline const float* one(int32_t i) const {
    return panel + static_cast<uint64_t>(positions[i]) * (P * kLanes);
  }
  inline void advance(int32_t n) { positions += n; }
};
struct InPlace {
  const float* x;
  const int32_t* offsets;
  const int32_t* now;
  inline void at(int32_t i) { now = offsets + i; }
  template <int I>
  inline const float* get() const {
    return x + now[I];
  }
  inline const float* one(int32_t i) const { return x + offsets[i]; }
  inline void advance(int32_t n) { offsets += n; }
};

// sums += one row of a block. Few registers of sums would wait for each other's latency, so they
// are doubled and added at the end.
template <int P, typename Inputs>
inline __attribute__((always_inline)) void walk_row(Vec* sums, const float* values, int32_t n,
                                                    Inputs& in) {
  constexpr bool kSplit = P <= 4;
  Vec others[P];
  if (kSplit) {
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) others[p] = zeros();
  }
  Vec* odd = kSplit ? others : sums;
  int32_t i = 0;
  for (; i + 4 <= n; i += 4) {
    in.at(i);
    const auto four = load_four(values + i);
    accumulate<P>(sums, broadcast_of_four<0>(four), in.template get<0>());
    accumulate<P>(odd, broadcast_of_four<1>(four), in.template get<1>());
    accumulate<P>(sums, broadcast_of_four<2>(four), in.template get<2>());
    accumulate<P>(odd, broadcast_of_four<3>(four), in.template get<3>());
  }
  if (i < n) {
    in.at(i);
    const auto four = load_four(values + i);
    accumulate<P>(sums, broadcast_of_four<0>(four), in.template get<0>());
    if (i + 1 < n) accumulate<P>(odd, broadcast_of_four<1>(four), in.template get<1>());
    if (i + 2 < n) accumulate<P>(sums, broadcast_of_four<2>(four), in.template get<2>());
  }
  if (kSplit) {
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) sums[p] = add(sums[p], others[p]);
  }
}

constexpr int32_t kRowsAhead = 10;

// Ask for what the next tile reads in place, a few channels behind each row: planes are far apart,
// so the hardware sees no stream, and all at once would wait for itself.
template <int P>
struct Ahead {
  const float* x = nullptr;  // of the group's first plane; null: nothing to ask for
  int64_t stride = 0;
  int32_t planes = 0, per_row = 0;
  inline void after_row(int32_t e) const {
    if (x == nullptr) return;
    for (int32_t c = e * per_row; c < (e + 1) * per_row && c < planes; ++c) {
      SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
        __builtin_prefetch(x + c * stride + p * kLanes, 0, 2);
      }
    }
  }
};

// The rows of one block that a walk visits: entries [begin, end), and where their nonzeros start.
struct Rows {
  int32_t begin, end;
  int64_t nonzero;
};
inline Rows rows_of(const SparseList& list, int64_t block, int64_t slice, int64_t slices) {
  const int64_t n = list.parts[0].n_rows;
  Rows rows = {static_cast<int32_t>(n * slice / slices),
               static_cast<int32_t>(n * (slice + 1) / slices), list.first_nonzero[block]};
  const int32_t* counts = list.counts + list.blocks[block].first_entry;
  for (int32_t e = 0; e < rows.begin; ++e) rows.nonzero += counts[e];
  return rows;
}

template <int P, typename Inputs>
void walk(const SparseList& list, int64_t block, const Rows& span, Inputs in, float* strip,
          bool first, const Finish* finish, const Ahead<P>& ahead) {
  const PatternBlock& b = list.blocks[block];
  const float* values = list.values + span.nonzero;
  const int32_t* rows = list.rows + b.first_entry;
  const int32_t* counts = list.counts + b.first_entry;
  for (int32_t e = span.begin; e < span.end; ++e) {
    const int32_t n = counts[e];
    if (n == 0 && !first && finish == nullptr) break;  // the rest have none either
    if (finish != nullptr && e + kRowsAhead < span.end) {
      prefetch_row<P>(*finish, rows[e + kRowsAhead]);
    }
    float* strip_row = strip + static_cast<int64_t>(rows[e]) * (P * kLanes);
    Vec sums[P];
    if (first) {
      SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) sums[p] = zeros();
    } else {
      SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) sums[p] = load(strip_row + p * kLanes);
    }
    walk_row<P>(sums, values, n, in);
    values += n;
    in.advance(n);
    if (finish != nullptr) {
      scatter<P>(*finish, rows[e], sums);
    } else {
      SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) store(strip_row + p * kLanes, sums[p]);
    }
    ahead.after_row(e);
  }
}

// The same for V rows that share their positions: P · V sums, and a load serves V multiply-adds.
template <int P, int V, typename Inputs>
void walk_vectors(const SparseList& list, int64_t block, const Rows& span, Inputs in, float* strip,
                  bool first, const Finish* finish, int64_t rows_of_part, const Ahead<P>& ahead) {
  const PatternBlock& b = list.blocks[block];
  const int64_t stride = list.vector;
  const float* values = list.values + span.nonzero * stride;
  const int32_t* rows = list.rows + b.first_entry;
  const int32_t* counts = list.counts + b.first_entry;
  for (int32_t e = span.begin; e < span.end; ++e) {
    const int32_t n = counts[e];
    if (n == 0 && !first && finish == nullptr) break;
    if (finish != nullptr && e + 1 < span.end) {
      const int64_t next = rows[e + 1] * stride;
      for (int64_t v = 0; v < stride && next + v < rows_of_part; ++v) {
        prefetch_row<P>(*finish, next + v);
      }
    }
    for (int64_t half = 0; half < stride; half += V) {
      const int64_t row = rows[e] * stride + half;
      float* strip_row = strip + row * (P * kLanes);
      Vec sums[V][P];
      SPARSEMTL_UNROLL for (int v = 0; v < V; ++v) {
        SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
          sums[v][p] = first ? zeros() : load(strip_row + (v * P + p) * kLanes);
        }
      }
      const float* value = values + half;
      for (int32_t i = 0; i < n; ++i, value += stride) {
        const float* x = in.one(i);
        Vec inputs[P];
        SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) inputs[p] = load(x + p * kLanes);
        SPARSEMTL_UNROLL for (int v = 0; v < V; ++v) {
          const Vec factor = broadcast(value[v]);
          SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
            sums[v][p] = multiply_add(factor, inputs[p], sums[v][p]);
          }
        }
      }
      SPARSEMTL_UNROLL for (int v = 0; v < V; ++v) {
        if (finish != nullptr) {
          if (row + v < rows_of_part) scatter<P>(*finish, row + v, sums[v]);
        } else {
          SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
            store(strip_row + (v * P + p) * kLanes, sums[v][p]);
          }
        }
      }
    }
    values += static_cast<int64_t>(n) * stride;
    in.advance(n);
    ahead.after_row(e);
  }
}

// One tile of one call, ready to pack panels.
template <int P>
struct Tile {
  const ConvCall& call;
  const ConvProblem& problem;
  int64_t image = 0, start = 0, slots = 0;  // linear modes; slots: of an image
  int n_runs = 0;
  uint64_t taps = ~uint64_t{0};
  CopyTable out, residual;
  Run runs[P * kLanes];
  static constexpr int32_t kTables = 16;  // of as many taps as are met in turn
  int32_t tap_of_table[kTables];
  CopyTable tables[kTables];

  Tile(const ConvCall& c, int64_t tile) : call(c), problem(c.problem) {
    for (int32_t& tap : tap_of_table) tap = -1;
    // Tiles are counted in slots of the call's full width; a last, narrower tile starts at the
    // same.
    const int64_t width = static_cast<int64_t>(c.vectors) * kLanes;
    if (c.mode == ConvMode::kTable) {
      start = tile * width;
      const int64_t left = c.tiling.pixels - start;
      n_runs = make_runs(c, start, left < P * kLanes ? left : P * kLanes, runs);
      taps = taps_of(problem, runs, n_runs);
    } else {
      slots = (problem.out_height - 1) * problem.in.pitch + problem.out_width;
      const int64_t tiles = (slots + width - 1) / width;
      image = tile / tiles;
      start = tile % tiles * width;
      n_runs = make_linear_runs(problem, image, start, P * kLanes, runs);
    }
    set_output(problem.out, out);
  }

  void set_output(const PlaneStrides& to, CopyTable& table) {
    const Plane plane = {problem.out_height, problem.out_width, to.image, to.pitch, 0};
    make_table(runs, n_runs, P, plane, 0, 0, table);
  }
  int64_t linear_start() const { return image * problem.in.image + problem.origin + start; }
  bool live(const PatternBlock& block) const {
    if (block.n_columns == 0) return false;
    if (problem.n_taps > 64) return true;
    return (taps >> block.tap_low & ~uint64_t{0} >> (63 - (block.tap_high - block.tap_low))) != 0;
  }

  // Linear modes: whether vectors of this tile would read what must not be read.
  bool behind_masks() const { return call.guarded && start + P * kLanes > slots; }
  bool in_place() const { return call.mode == ConvMode::kDirect && !behind_masks(); }
  uint32_t mask_of(int p) const {
    const int64_t left = slots - start - p * kLanes;
    const uint32_t n = left < 0 ? 0 : left < kLanes ? static_cast<uint32_t>(left) : kLanes;
    return static_cast<uint32_t>((uint64_t{1} << n) - 1);
  }

  // Linear modes: what the next tile reads first, of the planes of one part.
  Ahead<P> next_tile(const PatternPart& part) const {
    if (call.mode == ConvMode::kTable || start + 2 * P * kLanes > slots) return {};
    int64_t last = 0;
    for (int64_t t = 0; t < problem.n_taps; ++t) {
      const int64_t at = problem.taps[3 * t + 1] * problem.in.pitch + problem.taps[3 * t + 2];
      last = at > last ? at : last;
    }
    const auto planes = static_cast<int32_t>(problem.channels / problem.groups * problem.phases);
    const float* x = call.x + linear_start() + part.group * planes * problem.in.plane;
    return {x + last + P * kLanes, problem.in.plane, planes, planes / part.n_rows + 1};
  }

  void pack(const PatternBlock& block, int32_t group, float* panel) {
    const int64_t per_group = problem.channels / problem.groups;
    const int64_t channel_stride = problem.phases * problem.in.plane;
    const float* first = call.x + group * per_group * channel_stride;
    const int32_t* columns = call.list.columns + block.first_column;
    const bool linear = call.mode != ConvMode::kTable;
    for (int32_t j = 0; j < block.n_columns; ++j, panel += P * kLanes) {
      const int32_t tap = columns[j] / static_cast<int32_t>(per_group);
      const int64_t channel = columns[j] - tap * per_group;
      const int32_t* t = problem.taps + 3 * tap;
      const float* plane = first + channel * channel_stride;
      if (linear) {
        const float* from = plane + start_of_tap(t);
        if (behind_masks()) {
          for (int p = 0; p < P; ++p) {
            store(panel + p * kLanes, load_run(zeros(), mask_of(p), from + p * kLanes));
          }
          continue;
        }
        SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
          store(panel + p * kLanes, load(from + p * kLanes));
        }
        continue;
      }
      CopyTable& table = tables[tap % kTables];
      if (tap != tap_of_table[tap % kTables]) set_tap(t, table);
      tap_of_table[tap % kTables] = tap;
      if (j + kAhead < block.n_columns) {  // planes are pages apart: no hardware prefetch follows
        const int64_t next = columns[j + kAhead] - tap * per_group;
        const float* ahead = first + next * channel_stride + table.pairs[0].first_offset;
        SPARSEMTL_UNROLL for (int p = 0; p <= P; ++p) __builtin_prefetch(ahead + p * kLanes);
      }
      gather<P>(table, plane, panel);
    }
  }
  static constexpr int32_t kAhead = 14;

  int64_t start_of_tap(const int32_t* t) const {
    return linear_start() + t[0] * problem.in.plane + t[1] * problem.in.pitch + t[2];
  }
  void set_tap(const int32_t* t, CopyTable& table) {
    const Plane plane = {problem.height, problem.width, problem.in.image, problem.in.pitch,
                         t[0] * problem.in.plane};
    make_table(runs, n_runs, P, plane, t[1], t[2], table);
  }
};

template <int P>
inline void zero_rows(const Finish& finish, int64_t n_rows) {
  Vec sums[P];
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) sums[p] = zeros();
  for (int64_t row = 0; row < n_rows; ++row) scatter<P>(finish, row, sums);
}

// One block of one tile: its nonzeros, single or in vectors, over inputs from a panel or in place.
template <int P, typename Inputs>
void walk_any(const ConvCall& call, int64_t block, const Rows& rows, const Inputs& in, float* strip,
              bool first, const Finish* finish, const Ahead<P>& ahead) {
  const SparseList& list = call.list;
  const int64_t rows_of_part = call.problem.rows / list.n_parts;
  if (list.vector == 1) {
    walk<P>(list, block, rows, in, strip, first, finish, ahead);
  } else if (P > 3 || kLanes < 16 || list.vector == 4) {
    walk_vectors<P, 4>(list, block, rows, in, strip, first, finish, rows_of_part, ahead);
  } else {
    walk_vectors<P, P <= 3 ? 8 : 4>(list, block, rows, in, strip, first, finish, rows_of_part,
                                    ahead);
  }
}

template <int P>
void forward_part(const ConvCall& call, Tile<P>& tile, const PatternPart& part,
                  const ConvShare& share, const Finish& finish, float* panel) {
  const SparseList& list = call.list;
  float* strip = panel + call.panel_size;
  int32_t last = -1;
  for (int32_t b = 0; b < part.n_blocks; ++b) {
    if (tile.live(list.blocks[part.first_block + b])) last = b;
  }
  if (last < 0 && share.slice == 0) zero_rows<P>(finish, call.problem.rows / list.n_parts);
  const Ahead<P> ahead = tile.next_tile(part);
  bool first = true;
  for (int32_t b = 0; b <= last; ++b) {
    const int64_t at = part.first_block + b;
    const PatternBlock& block = list.blocks[at];
    if (!tile.live(block)) continue;
    const Finish* done = b == last ? &finish : nullptr;
    const Rows rows = rows_of(list, at, share.slice, share.slices);
    if (tile.in_place()) {
      const InPlace in = {call.x + tile.linear_start(), call.offsets + rows.nonzero, nullptr};
      walk_any<P>(call, at, rows, in, strip, first, done, ahead);
    } else {
      tile.pack(block, part.group, panel);
      const FromPanel<P> in = {panel, list.positions + rows.nonzero, 0};
      walk_any<P>(call, at, rows, in, strip, first, done, first ? ahead : Ahead<P>());
    }
    first = false;
  }
}

template <int P>
void forward_tile(const ConvCall& call, int64_t index, const ConvShare& share, float* y,
                  const ConvEpilogue& epilogue, float* panel) {
  Tile<P> tile(call, index);
  const int64_t plane = call.problem.out.plane, residual_plane = call.problem.residual.plane;
  const float* residual = epilogue.residual;
  if (residual != nullptr) tile.set_output(call.problem.residual, tile.residual);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const PatternPart& part = call.list.parts[i];
    const int64_t row = part.first_row;
    const Finish finish = {&tile.out,
                           y + row * plane,
                           epilogue.bias == nullptr ? nullptr : epilogue.bias + row,
                           residual == nullptr ? nullptr : residual + row * residual_plane,
                           &tile.residual,
                           plane,
                           residual_plane,
                           epilogue.activation};
    forward_part<P>(call, tile, part, share, finish, panel);
  }
}

// grad[nonzero] += Σ over the tile of grad_y[row] · input, four nonzeros of a row at a time.
template <int P, typename Inputs>
void dot_rows(const SparseList& list, int64_t block, Inputs in, const float* strip, float* grad,
              const Ahead<P>& ahead) {
  const PatternBlock& b = list.blocks[block];
  const int32_t* rows = list.rows + b.first_entry;
  const int32_t* counts = list.counts + b.first_entry;
  grad += list.first_nonzero[block];
  for (int32_t e = 0; e < list.parts[0].n_rows && counts[e] > 0; ++e) {
    const int32_t n = counts[e];
    const float* strip_row = strip + static_cast<int64_t>(rows[e]) * (P * kLanes);
    Vec g[P];
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) g[p] = load(strip_row + p * kLanes);
    for (int32_t i = 0; i < n; i += 4) {
      in.at(i);
      const float* x[4] = {in.template get<0>(), in.template get<1>(), in.template get<2>(),
                           in.template get<3>()};
      const int32_t left = n - i;
      Vec sums[4] = {zeros(), zeros(), zeros(), zeros()};
      if (left >= 4) {
        SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
          SPARSEMTL_UNROLL for (int j = 0; j < 4; ++j) {
            sums[j] = multiply_add(g[p], load(x[j] + p * kLanes), sums[j]);
          }
        }
        add_four(grad + i, sum_each(sums[0], sums[1], sums[2], sums[3]));
        continue;
      }
      SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
        sums[0] = multiply_add(g[p], load(x[0] + p * kLanes), sums[0]);
        if (left > 1) sums[1] = multiply_add(g[p], load(x[1] + p * kLanes), sums[1]);
        if (left > 2) sums[2] = multiply_add(g[p], load(x[2] + p * kLanes), sums[2]);
      }
      add_some(grad + i, left, sum_each(sums[0], sums[1], sums[2], sums[3]));
    }
    in.advance(n);
    grad += n;
    ahead.after_row(e);
  }
}

template <int P>
void weight_grad_tile(const ConvCall& call, int64_t index, const float* grad_y, float* grad,
                      float* panel) {
  Tile<P> tile(call, index);
  const SparseList& list = call.list;
  float* strip = panel + call.panel_size;
  const int64_t plane = call.problem.out.plane;
  for (int64_t i = 0; i < list.n_parts; ++i) {
    const PatternPart& part = list.parts[i];
    Ahead<P> ahead = tile.next_tile(part);
    for (int64_t row = 0; row < part.n_rows; ++row) {
      gather<P>(tile.out, grad_y + (part.first_row + row) * plane, strip + row * (P * kLanes));
    }
    for (int32_t b = 0; b < part.n_blocks; ++b) {
      const int64_t at = part.first_block + b;
      if (!tile.live(list.blocks[at])) continue;
      const int64_t nonzero = list.first_nonzero[at];
      if (tile.in_place()) {
        const InPlace in = {call.x + tile.linear_start(), call.offsets + nonzero, nullptr};
        dot_rows<P>(list, at, in, strip, grad, ahead);
      } else {
        tile.pack(list.blocks[at], part.group, panel);
        dot_rows<P>(list, at, FromPanel<P>{panel, list.positions + nonzero, 0}, strip, grad, ahead);
      }
      ahead = Ahead<P>();
    }
  }
}

// The widths that exist; a last tile takes the next wider one and leaves its last vectors empty.
template <int P>
struct Width {
  static constexpr int value = P;
};
template <typename Body>
void with_width(int vectors, const Body& body) {
  if (vectors <= 1) return body(Width<1>());
#if !defined(SPARSEMTL_ISA_AVX512) && !defined(SPARSEMTL_ISA_AVX2)
  return body(Width<4>());  // speed is not what the generic table is for
#else
  if (vectors == 2) return body(Width<2>());
  if (vectors == 3) return body(Width<3>());
  if (vectors == 4) return body(Width<4>());
  if (vectors <= 6) return body(Width<6>());
  if (vectors <= 8) return body(Width<8>());
  return body(Width<12>());
#endif
}

inline int width_of_tile(const ConvCall& call, int64_t tile) {
  const int64_t width = static_cast<int64_t>(call.vectors) * kLanes;
  int64_t slots = call.tiling.pixels;
  if (call.mode != ConvMode::kTable) {
    slots = (call.problem.out_height - 1) * call.problem.in.pitch + call.problem.out_width;
    tile %= (slots + width - 1) / width;
  }
  const int64_t left = (slots - tile * width + kLanes - 1) / kLanes;
  return left < call.vectors ? static_cast<int>(left) : call.vectors;
}

void sparse_conv2d_forward(const ConvCall& call, int64_t tile, const ConvShare& share, float* y,
                           const ConvEpilogue& epilogue, float* scratch) {
  with_width(width_of_tile(call, tile), [&](auto width) {
    forward_tile<decltype(width)::value>(call, tile, share, y, epilogue, scratch);
  });
}

void sparse_conv2d_weight_grad(const ConvCall& call, int64_t tile, const float* grad_y, float* grad,
                               float* scratch) {
  with_width(width_of_tile(call, tile), [&](auto width) {
    weight_grad_tile<decltype(width)::value>(call, tile, grad_y, grad, scratch);
  });
}

bool sparse_conv2d_fill_plane(const float* x, int64_t rows, int64_t n, int64_t row_stride,
                              int64_t pixel_stride, float* plane, int64_t top, int64_t plane_height,
                              int64_t pitch) {
  Vec bad = zeros();
  float bad_alone = 0.0f;
  for (int64_t i = 0; i < top * pitch; ++i) plane[i] = 0.0f;
  float* to = plane + top * pitch;
  for (int64_t r = 0; r < rows; ++r, to += pitch, x += row_stride) {
    int64_t i = 0;
    for (; pixel_stride == 1 && i + kLanes <= n; i += kLanes) {
      const Vec v = load(x + i);
      store(to + i, v);
      bad = multiply_add(v, zeros(), bad);  // 0 · x is NaN for a NaN or an infinity
    }
    if (pixel_stride == 1 && i < n && pitch - i <= kLanes) {  // the rest of the row at once
      const Vec v = load_run(zeros(), (1u << (n - i)) - 1, x + i);
      store_run(to + i, static_cast<uint32_t>((uint64_t{1} << (pitch - i)) - 1), v);
      bad = multiply_add(v, zeros(), bad);
      continue;
    }
    for (; i < n; ++i) {
      to[i] = x[i * pixel_stride];
      bad_alone += 0.0f * to[i];
    }
    for (; i < pitch; ++i) to[i] = 0.0f;
  }
  float* end = plane + plane_height * pitch;
  for (; to < end; ++to) *to = 0.0f;
  return bad_alone == 0.0f && sum(bad) == 0.0;
}
