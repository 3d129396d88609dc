#include "cpu/sparse_conv2d.h"

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsemtl::cpu {
namespace {

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

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
  call.panel_size = a.mode == ConvMode::kDirect ? 0 : widest_block * width;
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

void fill_offsets(const ConvCall& call, int32_t* offsets, int threads) {
  const ConvProblem& p = call.problem;
  const SparseList& list = call.list;
  const int64_t channels = p.channels / p.groups;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < list.n_parts; ++i) {
    const PatternPart& part = list.parts[i];
    for (int64_t b = part.first_block; b < part.first_block + part.n_blocks; ++b) {
      const PatternBlock& block = list.blocks[b];
      const int64_t begin = list.first_nonzero[b];
      int64_t n = 0;
      for (int32_t r = 0; r < part.n_rows; ++r) n += list.counts[block.first_entry + r];
      for (int64_t z = begin; z < begin + n; ++z) {
        const int64_t column = list.columns[block.first_column + list.positions[z]];
        const int32_t* tap = p.taps + 3 * (column / channels);
        const int64_t channel = part.group * channels + column % channels;
        offsets[z] = static_cast<int32_t>((channel * p.phases + tap[0]) * p.in.plane +
                                          tap[1] * p.in.pitch + tap[2]);
      }
    }
  }
}

int64_t offset_floats(const ConvArguments& a, const SparseList& list) {
  return a.mode == ConvMode::kDirect && a.offsets == nullptr ? ceil_div(list.n_nonzeros, 16) * 16
                                                             : 0;
}

}  // namespace

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
  call.offsets = a.offsets;
  if (a.mode == ConvMode::kDirect && a.offsets == nullptr) {
    int32_t* offsets = reinterpret_cast<int32_t*>(scratch);
    fill_offsets(call, offsets, a.threads);
    call.offsets = offsets;
    scratch += offset_floats(a, list);
  }
  const auto body = isa().sparse_conv2d.forward;
  const int64_t tiles = count_tiles(call);
  // With few tiles the parts are shared out too. Which thread computes what changes no bit.
  const int64_t wanted = tiles == 0 ? 1 : ceil_div(4 * a.threads, tiles);
  const int64_t shares = std::max<int64_t>(1, std::min(wanted, list.n_parts));
  const int64_t per_thread = call.panel_size + call.strip_size;
  // Neighbours share input rows, so they are handed out together, yet in enough pieces to balance.
  const int64_t together = std::max<int64_t>(1, tiles * shares / (8 * a.threads));
#pragma omp parallel for schedule(dynamic, together) num_threads(a.threads)
  for (int64_t i = 0; i < tiles * shares; ++i) {
    const int64_t share = i % shares;
    body(call, i / shares, list.n_parts * share / shares, list.n_parts * (share + 1) / shares, y,
         epilogue, scratch + thread_number() * per_thread);
  }
}

void sparse_conv2d_weight_grad(const ConvArguments& a, const SparseList& list, const float* x,
                               const float* grad_y, float* partials, float* grad,
                               int64_t widest_block, float* scratch) {
  const ConvCall call = make_call(a, list, x, widest_block);
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
