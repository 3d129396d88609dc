#include "cpu/sparse_conv2d_bands.h"

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/sparse_conv2d_call.h"

namespace sparsemtl::cpu {
namespace {

constexpr int64_t kBandFloats = 128 << 10;  // of a band's planes: half of a usual L2 cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t plane_floats(const ConvArguments& band, const BandSource& source) {
  const ConvProblem& p = band.problem;
  const int64_t planes = p.channels * p.phases * p.height * p.width;
  return ceil_div(source.lead + planes + source.slack, 16) * 16;
}

// Copy the rows that output rows [first, first + band) of one image read; whether all are finite.
bool fill_band(const ConvArguments& band, const BandSource& s, const float* x, int64_t first,
               float* planes) {
  const auto body = isa().sparse_conv2d.fill_plane;
  const ConvProblem& p = band.problem;
  bool finite = true;
  for (int64_t i = 0; i < p.channels * p.phases; ++i) {
    const int64_t phase = i % p.phases, py = phase / s.stride_x, px = phase % s.stride_x;
    const int64_t rows = s.height > py ? ceil_div(s.height - py, s.stride_y) : 0;
    const int64_t n = s.width > px ? ceil_div(s.width - px, s.stride_x) : 0;
    const int64_t begin = std::min(rows, std::max<int64_t>(0, first - s.top));
    const int64_t end = std::max(begin, std::min(rows, first - s.top + p.height));
    const int64_t above = std::min(p.height, std::max<int64_t>(0, s.top - first));
    const float* from =
        x + i / p.phases * s.height * s.width + (begin * s.stride_y + py) * s.width + px;
    finite &= body(from, end - begin, n, s.width * s.stride_y, s.stride_x,
                   planes + i * p.height * p.width, above, p.height, p.width);
  }
  return finite;
}

// One band of one image, as a convolution of its own.
struct Band {
  int64_t image, first, rows;
  Band(const ConvArguments& a, const Bands& bands, int64_t i)
      : image(i / bands.count),
        first(i % bands.count * bands.rows),
        rows(std::min(bands.rows, a.problem.out_height - first)) {}

  ConvCall call(const ConvArguments& band, const SparseList& list, const float* planes,
                int64_t widest_block) const {
    ConvArguments mine = band;
    mine.problem.out_height = rows;
    return make_call(mine, list, planes, widest_block);
  }
  int64_t in_output(const PlaneStrides& strides) const {
    return image * strides.image + first * strides.pitch;
  }
};

}  // namespace

Bands cut_bands(const ConvArguments& a, const BandSource& source) {
  const ConvProblem& p = a.problem;
  const int64_t halo = source.top + source.bottom, row = p.channels * p.phases * p.width;
  if (row <= 0 || p.out_height <= 0) return {0, 0};
  const int64_t most = kBandFloats / row - halo;
  if (most < 1) return {0, 0};
  // An even number of bands suits an even number of threads.
  const int64_t count = ceil_div(std::max<int64_t>(2, ceil_div(p.out_height, most)), 2) * 2;
  const int64_t rows = ceil_div(p.out_height, count);
  if (rows < 4 || rows < 2 * halo) return {0, 0};
  return {rows, ceil_div(p.out_height, rows)};
}

ConvArguments band_arguments(const ConvArguments& a, const BandSource& source, const Bands& bands) {
  ConvArguments band = a;
  band.problem.batch = 1;
  band.problem.height = bands.rows + source.top + source.bottom;
  band.problem.out_height = bands.rows;
  band.problem.in = {0, 0, 0};
  band.problem.out = make_call(a, {}, nullptr, 0).problem.out;  // the whole image's
  band.problem.residual = band.problem.out;
  return band;
}

int64_t bands_scratch(const ConvArguments& band, const BandSource& source, const SparseList& list,
                      int64_t widest_block) {
  const ConvCall call = make_call(band, list, nullptr, widest_block);
  return band.threads * (plane_floats(band, source) + call.panel_size + call.strip_size);
}

void forward_bands(const ConvArguments& a, const ConvArguments& band, const BandSource& source,
                   const Bands& bands, const SparseList& list, const float* x, float* y,
                   const ConvEpilogue& epilogue, int64_t widest_block, float* scratch) {
  const auto body = isa().sparse_conv2d.forward;
  const int64_t image = a.problem.channels * source.height * source.width;
  const int64_t per_thread = bands_scratch(band, source, list, widest_block) / band.threads;
#pragma omp parallel num_threads(a.threads)
  {
    float* planes = scratch + thread_number() * per_thread;
    float* rest = planes + plane_floats(band, source);
    std::fill(planes, planes + source.lead, 0.0f);
    std::fill(std::max(planes, rest - source.slack - 16), rest, 0.0f);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.problem.batch * bands.count; ++i) {
      const Band b(a, bands, i);
      fill_band(band, source, x + b.image * image, b.first, planes + source.lead);
      const ConvCall call = b.call(band, list, planes, widest_block);
      ConvEpilogue mine = epilogue;
      if (mine.residual != nullptr) mine.residual += b.in_output(call.problem.residual);
      float* out = y + b.in_output(call.problem.out);
      const ConvShare all = {0, list.n_parts, 0, 1};
      for (int64_t t = 0, n = count_tiles(call); t < n; ++t) body(call, t, all, out, mine, rest);
    }
  }
}

bool weight_grad_bands(const ConvArguments& a, const ConvArguments& band, const BandSource& source,
                       const Bands& bands, const SparseList& list, const float* x,
                       const float* grad_y, float* partials, float* grad, int64_t widest_block,
                       float* scratch) {
  const auto body = isa().sparse_conv2d.weight_grad;
  const int64_t image = a.problem.channels * source.height * source.width;
  const int64_t per_thread = bands_scratch(band, source, list, widest_block) / band.threads;
  const int64_t n = list.n_nonzeros, size = n + 3;
  std::atomic<bool> finite{true};
#pragma omp parallel num_threads(a.threads)
  {
    // Bands are dealt out in turn and the shares added in order: the same bits in every run.
#pragma omp for schedule(static, 1)
    for (int me = 0; me < a.threads; ++me) {
      float* planes = scratch + me * per_thread;
      float* rest = planes + plane_floats(band, source);
      float* mine = partials + me * size;
      std::fill(planes, planes + source.lead, 0.0f);
      std::fill(std::max(planes, rest - source.slack - 16), rest, 0.0f);
      std::fill(mine, mine + n, 0.0f);
      for (int64_t i = me; i < a.problem.batch * bands.count; i += a.threads) {
        const Band b(a, bands, i);
        if (!fill_band(band, source, x + b.image * image, b.first, planes + source.lead)) {
          finite.store(false, std::memory_order_relaxed);
        }
        const ConvCall call = b.call(band, list, planes, widest_block);
        const float* from = grad_y + b.in_output(call.problem.out);
        for (int64_t t = 0, tiles = count_tiles(call); t < tiles; ++t) {
          body(call, t, from, mine, rest);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      float total = partials[i];
      for (int t = 1; t < a.threads; ++t) total += partials[t * size + i];
      grad[i] = total;
    }
  }
  return finite.load();
}

}  // namespace sparsemtl::cpu
