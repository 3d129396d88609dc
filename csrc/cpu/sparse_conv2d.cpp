#include "cpu/sparse_conv2d.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv2d_call.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsemtl::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cut [0, out) where a tap enters or leaves the plane; without `wanted`, or with more cuts than
// there is room for, not at all.
int64_t cut_axis(const ConvProblem& p, int axis, int64_t out, int64_t size, bool wanted,
                 int32_t* cuts) {
  int64_t n = 0;
  cuts[n++] = 0;
  for (int64_t t = 0; wanted && t < p.n_taps; ++t) {
    if (p.taps[3 * t + 1] == kNoTap) continue;
    const int64_t shift = p.taps[3 * t + axis];
    for (const int64_t at : {-shift, size - shift}) {
      if (at <= 0 || at >= out || std::find(cuts, cuts + n, at) != cuts + n) continue;
      if (n + 1 < kMaxCuts) cuts[n++] = static_cast<int32_t>(at);
    }
  }
  std::sort(cuts, cuts + n);
  cuts[n] = static_cast<int32_t>(out);
  return n;
}

// Strides of planes without gaps, where none are given.
PlaneStrides or_dense(const PlaneStrides& given, int64_t planes, int64_t height, int64_t width) {
  return given.pitch != 0 ? given : PlaneStrides{planes * height * width, height * width, width};
}

void fill_offsets(const ConvCall& call, int32_t* offsets, int threads) {
  const ConvProblem& p = call.problem;
  const SparseList& list = call.list;
  const int64_t channels = p.channels / p.groups;
  const int64_t blocks = list.n_parts == 0 ? 0 : list.n_blocks / list.n_parts;  // of a part
  int64_t columns = 0;
  for (int64_t b = 0; b < list.n_blocks; ++b) columns += list.blocks[b].n_columns;
  std::vector<int32_t> found(columns);  // here, because no exception may leave a parallel region
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < list.n_blocks; ++b) {
    const PatternBlock& block = list.blocks[b];
    const int64_t first_channel = list.parts[b / blocks].group * channels;
    int32_t* of_column = found.data() + block.first_column;
    for (int32_t j = 0; j < block.n_columns; ++j) {
      const int64_t column = list.columns[block.first_column + j];
      const int32_t* tap = p.taps + 3 * (column / channels);
      const int64_t channel = first_channel + column % channels;
      of_column[j] = static_cast<int32_t>((channel * p.phases + tap[0]) * p.in.plane +
                                          tap[1] * p.in.pitch + tap[2]);
    }
    const int64_t end = b + 1 < list.n_blocks ? list.first_nonzero[b + 1] : list.n_nonzeros;
    for (int64_t z = list.first_nonzero[b]; z < end; ++z) {
      offsets[z] = of_column[list.positions[z]];
    }
  }
}

int64_t offset_floats(const ConvArguments& a, const SparseList& list) {
  const bool needed = a.mode == ConvMode::kDirect && a.offsets == nullptr;
  return needed ? ceil_div(list.n_nonzeros + 3, 16) * 16 : 0;
}

// Offsets into the front of the scratch, where they are needed and were not given; the rest of it.
float* with_offsets(const ConvArguments& a, ConvCall& call, float* scratch) {
  if (offset_floats(a, call.list) == 0) return scratch;
  int32_t* offsets = reinterpret_cast<int32_t*>(scratch);
  fill_offsets(call, offsets, a.threads);
  call.offsets = offsets;
  return scratch + offset_floats(a, call.list);
}

// How a tile's rows are shared out where tiles are few. Which thread computes what changes no bit.
// Slices of rows cost nothing where nothing is packed; otherwise only whole parts are split.
void share_rows(const ConvCall& call, int64_t tiles, int threads, int64_t* parts, int64_t* slices) {
  const int64_t wanted = tiles == 0 ? 1 : ceil_div(4 * threads, tiles);
  *parts = std::max<int64_t>(1, std::min(wanted, call.list.n_parts));
  *slices = 1;
  if (threads == 1 || call.mode != ConvMode::kDirect || !rows_are_whole(call.list)) return;
  constexpr int64_t kSlices = 4, kLeastRows = 8;
  const int64_t rows = call.list.n_parts == 0 ? 0 : call.list.parts[0].n_rows;
  const int64_t most = std::max<int64_t>(1, std::min(kSlices, rows / kLeastRows));
  *slices = std::min(most, ceil_div(16 * threads, std::max<int64_t>(1, tiles * *parts)));
}

}  // namespace

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

ConvCall make_call(const ConvArguments& a, const SparseList& list, const float* x,
                   int64_t widest_block) {
  const ConvProblem& p = a.problem;
  ConvCall call{};
  call.problem = p;
  call.problem.in = or_dense(p.in, p.channels * p.phases, p.height, p.width);
  call.problem.out = or_dense(p.out, p.rows, p.out_height, p.out_width);
  call.problem.residual = or_dense(p.residual, p.rows, p.out_height, p.out_width);
  call.list = list;
  call.mode = a.mode;
  call.vectors = a.vectors;
  call.x = x;
  call.tiling.n_y = cut_axis(p, 1, p.out_height, p.height, a.regions, call.tiling.y_cuts);
  call.tiling.n_x = cut_axis(p, 2, p.out_width, p.width, a.regions, call.tiling.x_cuts);
  call.tiling.pixels = p.batch * p.out_height * p.out_width;
  const int64_t width = static_cast<int64_t>(a.vectors) * isa().sparse_conv2d.lanes;
  call.offsets = a.offsets;
  call.guarded = a.guarded;
  const bool packs = a.mode != ConvMode::kDirect || a.guarded;
  call.panel_size = packs ? widest_block * width : 0;
  const int64_t rows = list.n_parts == 0 ? 0 : list.parts[0].n_rows * list.vector;
  call.strip_size = rows * width;
  return call;
}

int64_t count_tiles(const ConvCall& call) {
  const ConvProblem& p = call.problem;
  const int64_t width = static_cast<int64_t>(call.vectors) * isa().sparse_conv2d.lanes;
  if (call.tiling.pixels == 0) return 0;
  if (call.mode == ConvMode::kTable) return ceil_div(call.tiling.pixels, width);
  return p.batch * ceil_div((p.out_height - 1) * p.in.pitch + p.out_width, width);
}

void sparse_conv2d_offsets(const ConvArguments& a, const SparseList& list, int32_t* offsets) {
  fill_offsets(make_call(a, list, nullptr, 0), offsets, a.threads);
}

int64_t sparse_conv2d_scratch(const ConvArguments& a, const SparseList& list,
                              int64_t widest_block) {
  const ConvCall call = make_call(a, list, nullptr, widest_block);
  return offset_floats(a, list) + a.threads * (call.panel_size + call.strip_size);
}

void sparse_conv2d_forward(const ConvArguments& a, const SparseList& list, const float* x, float* y,
                           const ConvEpilogue& epilogue, int64_t widest_block, float* scratch) {
  ConvCall call = make_call(a, list, x, widest_block);
  scratch = with_offsets(a, call, scratch);
  const auto body = isa().sparse_conv2d.forward;
  const int64_t tiles = count_tiles(call);
  int64_t parts, slices;
  share_rows(call, tiles, a.threads, &parts, &slices);
  const int64_t per_thread = call.panel_size + call.strip_size, of_tile = parts * slices;
  // Neighbours share input rows, so they are handed out together, yet in enough pieces to balance.
  const int64_t together = std::max<int64_t>(1, tiles * of_tile / (8 * a.threads));
#pragma omp parallel for schedule(dynamic, together) num_threads(a.threads)
  for (int64_t i = 0; i < tiles * of_tile; ++i) {
    const int64_t at = i % of_tile / slices, slice = i % slices;
    const ConvShare share = {list.n_parts * at / parts, list.n_parts * (at + 1) / parts, slice,
                             slices};
    body(call, i / of_tile, share, y, epilogue, scratch + thread_number() * per_thread);
  }
}

void sparse_conv2d_weight_grad(const ConvArguments& a, const SparseList& list, const float* x,
                               const float* grad_y, float* partials, float* grad,
                               int64_t widest_block, float* scratch) {
  ConvCall call = make_call(a, list, x, widest_block);
  scratch = with_offsets(a, call, scratch);
  const auto body = isa().sparse_conv2d.weight_grad;
  const int64_t tiles = count_tiles(call), n = list.n_nonzeros, size = n + 3;
  const int64_t per_thread = call.panel_size + call.strip_size;
#pragma omp parallel num_threads(a.threads)
  {
    // Tiles are dealt out in turn and the shares added in order: the same bits in every run.
#pragma omp for schedule(static, 1)
    for (int me = 0; me < a.threads; ++me) {
      float* mine = partials + me * size;
      std::fill(mine, mine + n, 0.0f);
      for (int64_t tile = me; tile < tiles; tile += a.threads) {
        body(call, tile, grad_y, mine, scratch + me * per_thread);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      float total = partials[i];
      for (int t = 1; t < a.threads; ++t) total += partials[t * size + i];
      grad[i] = total;
    }
  }
}

bool sparse_conv2d_planes(const float* x, const PlaneShape& s, float* out, int threads) {
  const auto body = isa().sparse_conv2d.fill_plane;
  const int64_t phases = s.stride_y * s.stride_x;
  std::atomic<bool> finite{true};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < s.planes * phases; ++i) {
    const int64_t phase = i % phases, py = phase / s.stride_x, px = phase % s.stride_x;
    const int64_t rows = s.height > py ? ceil_div(s.height - py, s.stride_y) : 0;
    const int64_t n = s.width > px ? ceil_div(s.width - px, s.stride_x) : 0;
    const float* from = x + i / phases * s.height * s.width + py * s.width + px;
    const bool ok = body(from, rows, n, s.width * s.stride_y, s.stride_x,
                         out + i * s.plane_height * s.pitch, s.top, s.plane_height, s.pitch);
    if (!ok) finite.store(false, std::memory_order_relaxed);
  }
  return finite.load();
}

}  // namespace sparsemtl::cpu
