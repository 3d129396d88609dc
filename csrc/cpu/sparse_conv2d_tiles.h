// Tiles of output pixels: which pixels, which taps they need, and how their values are moved.
// Included by sparse_conv2d.inc.h.

#include "cpu/sparse_conv2d_vec.h"

constexpr int kMaxVectors = 12;
constexpr int kMaxSlots = kMaxVectors * kLanes;
constexpr uint32_t kFull = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);

struct Run {  // pixels (y, x), (y, x + 1), ... of one image in consecutive slots of the tile
  int64_t slot, length, image, y, x;
};

// How the P vectors of a tile are gathered from (or scattered to) one plane per channel: each is
// the union of masked runs, most often one or two. Offsets are from the channel's plane in image 0
// and already moved back by the run's first lane.
struct CopyTable {
  struct Pair {
    uint32_t first, second;  // masks; 0: none
    int64_t first_offset, second_offset;
  };
  struct Extra {
    int32_t vector;
    uint32_t mask;
    int64_t offset;
  };
  bool plain;  // all vectors full and consecutive from `start`
  int64_t start;
  int32_t n_extra;
  Pair pairs[kMaxVectors];
  Extra extras[kMaxSlots];
};

// Slots [start, start + n) in the order of the tiling: rectangle by rectangle, serpentine, each
// over the whole batch, so that neighbours share most of their taps.
inline int make_runs(const ConvCall& call, int64_t start, int64_t n, Run* runs) {
  const ConvTiling& t = call.tiling;
  int count = 0;
  int64_t base = 0, done = 0;
  for (int64_t i = 0; i < t.n_y * t.n_x && done < n; ++i) {
    const int64_t iy = i / t.n_x, across = i % t.n_x;
    const int64_t ix = iy % 2 == 0 ? across : t.n_x - 1 - across;
    const int64_t height = t.y_cuts[iy + 1] - t.y_cuts[iy];
    const int64_t width = t.x_cuts[ix + 1] - t.x_cuts[ix];
    const int64_t size = call.problem.batch * height * width;
    while (done < n && start + done < base + size) {
      const int64_t at = start + done - base, x = at % width, left = width - x;
      const int64_t length = left < n - done ? left : n - done;
      runs[count++] = {done, length, at / (height * width), t.y_cuts[iy] + at / width % height,
                       t.x_cuts[ix] + x};
      done += length;
    }
    base += size;
  }
  return count;
}

// The same in the linear domain of one image: rows of the pitch, whose last columns are no pixels.
inline int make_linear_runs(const ConvProblem& p, int64_t image, int64_t start, int64_t n,
                            Run* runs) {
  int count = 0;
  for (int64_t done = 0; done < n;) {
    const int64_t y = (start + done) / p.in.pitch, x = (start + done) % p.in.pitch;
    if (y >= p.out_height) break;
    const int64_t step = p.in.pitch - x < n - done ? p.in.pitch - x : n - done;
    const int64_t length = p.out_width - x < step ? p.out_width - x : step;
    if (length > 0) runs[count++] = {done, length, image, y, x};
    done += step;
  }
  return count;
}

// Bit t is set if some pixel reads inside the plane through tap t; all bits if there are more taps
// than bits.
inline uint64_t taps_of(const ConvProblem& p, const Run* runs, int n_runs) {
  if (p.n_taps > 64) return ~uint64_t{0};
  uint64_t taps = 0;
  for (int r = 0; r < n_runs; ++r) {
    for (int64_t t = 0; t < p.n_taps; ++t) {
      const int64_t y = runs[r].y + p.taps[3 * t + 1], x = runs[r].x + p.taps[3 * t + 2];
      const bool inside = y >= 0 && y < p.height && x < p.width && x + runs[r].length > 0;
      taps |= static_cast<uint64_t>(inside) << t;
    }
  }
  return taps;
}

inline void add_run(CopyTable& table, int64_t slot, int64_t length, int64_t offset) {
  while (length > 0) {
    const int64_t lane = slot % kLanes, vector = slot / kLanes;
    const int64_t n = kLanes - lane < length ? kLanes - lane : length;
    const uint32_t mask = ((1u << n) - 1) << lane;
    CopyTable::Pair& pair = table.pairs[vector];
    if (pair.first == 0 || pair.first_offset == offset - lane) {
      pair.first |= mask;
      pair.first_offset = offset - lane;
    } else if (pair.second == 0) {
      pair.second = mask;
      pair.second_offset = offset - lane;
    } else {
      table.extras[table.n_extra++] = {static_cast<int32_t>(vector), mask, offset - lane};
    }
    slot += n;
    length -= n;
    offset += n;
  }
}

struct Plane {  // of one channel, in every image
  int64_t height, width, image_stride, pitch, offset;
};

// The table of all runs shifted by (dy, dx), without what falls outside the plane.
inline void make_table(const Run* runs, int n_runs, int vectors, const Plane& plane, int64_t dy,
                       int64_t dx, CopyTable& table) {
  table.n_extra = 0;
  for (int p = 0; p < vectors; ++p) table.pairs[p] = {0, 0, 0, 0};
  for (int r = 0; r < n_runs; ++r) {
    const int64_t y = runs[r].y + dy;
    int64_t x = runs[r].x + dx, length = runs[r].length, slot = runs[r].slot;
    if (y < 0 || y >= plane.height) continue;
    if (x < 0) {
      slot -= x;
      length += x;
      x = 0;
    }
    if (length > plane.width - x) length = plane.width - x;
    add_run(table, slot, length,
            runs[r].image * plane.image_stride + plane.offset + y * plane.pitch + x);
  }
  table.start = table.pairs[0].first_offset;
  table.plain = true;
  for (int p = 0; p < vectors; ++p) {
    const CopyTable::Pair& pair = table.pairs[p];
    table.plain &= pair.first == kFull && pair.first_offset == table.start + p * kLanes;
  }
}

template <int P>
inline void gather(const CopyTable& table, const float* plane, float* to) {
  if (table.plain) {
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
      store(to + p * kLanes, load(plane + table.start + p * kLanes));
    }
    return;
  }
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    const CopyTable::Pair& pair = table.pairs[p];
    Vec v = pair.first == kFull ? load(plane + pair.first_offset)
                                : load_run(zeros(), pair.first, plane + pair.first_offset);
    if (pair.second != 0) v = load_run(v, pair.second, plane + pair.second_offset);
    store(to + p * kLanes, v);
  }
  for (int32_t e = 0; e < table.n_extra; ++e) {
    const CopyTable::Extra& extra = table.extras[e];
    float* v = to + extra.vector * kLanes;
    store(v, load_run(load(v), extra.mask, plane + extra.offset));
  }
}

// One row's results on their way out: + bias + residual, activation.
struct Finish {
  const CopyTable* table;
  float* y;  // plane of the part's first row; rows are plane_size apart
  const float* bias;
  const float* residual;
  const CopyTable* residual_table;
  int64_t plane_size, residual_plane;
  int activation;
};

inline Vec activate(Vec v, int activation) {
  if (activation != 0) v = relu(v);
  return activation == 2 ? at_most(6.0f, v) : v;
}

// Ask for the lines that a row will be scattered to: outputs come from far away, and stores retire
// in order, so that each miss would be waited for.
template <int P>
inline void prefetch_row(const Finish& f, int64_t row) {
  const float* y = f.y + row * f.plane_size;
  if (f.table->plain) {
    SPARSEMTL_UNROLL for (int p = 0; p <= P; ++p) {
      __builtin_prefetch(y + f.table->start + p * kLanes, 1);
    }
    return;
  }
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    __builtin_prefetch(y + f.table->pairs[p].first_offset + kLanes - 1, 1);
  }
}

template <int P>
__attribute__((noinline)) void scatter_by_table(const Finish& f, int64_t row, const Vec* sums) {
  const CopyTable& table = *f.table;
  float* y = f.y + row * f.plane_size;
  const float* residual = f.residual == nullptr ? nullptr : f.residual + row * f.residual_plane;
  const Vec bias = f.bias == nullptr ? zeros() : broadcast(f.bias[row]);
  float rest[P * kLanes];
  if (residual != nullptr) gather<P>(*f.residual_table, residual, rest);
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    const CopyTable::Pair& pair = table.pairs[p];
    Vec v = add(sums[p], bias);
    if (residual != nullptr) v = add(v, load(rest + p * kLanes));
    v = activate(v, f.activation);
    if (pair.first != 0) store_run(y + pair.first_offset, pair.first, v);
    if (pair.second != 0) store_run(y + pair.second_offset, pair.second, v);
    if (table.n_extra != 0) store(rest + p * kLanes, v);
  }
  for (int32_t e = 0; e < table.n_extra; ++e) {
    const CopyTable::Extra& extra = table.extras[e];
    store_run(y + extra.offset, extra.mask, load(rest + extra.vector * kLanes));
  }
}

template <int P>
inline __attribute__((always_inline)) void scatter(const Finish& f, int64_t row, const Vec* sums) {
  const CopyTable& table = *f.table;
  if (table.n_extra != 0 || f.residual != nullptr) {
    Vec copy[P];  // whose address may be taken: the sums themselves stay in registers
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) copy[p] = sums[p];
    scatter_by_table<P>(f, row, copy);
    return;
  }
  float* y = f.y + row * f.plane_size;
  const Vec bias = f.bias == nullptr ? zeros() : broadcast(f.bias[row]);
  if (table.plain) {
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
      store(y + table.start + p * kLanes, activate(add(sums[p], bias), f.activation));
    }
    return;
  }
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    const CopyTable::Pair& pair = table.pairs[p];
    const Vec v = activate(add(sums[p], bias), f.activation);
    if (pair.first == kFull) {  // most are, and stores behind masks take longer
      store(y + pair.first_offset, v);
      continue;
    }
    if (pair.first != 0) store_run(y + pair.first_offset, pair.first, v);
    if (pair.second != 0) store_run(y + pair.second_offset, pair.second, v);
  }
}
