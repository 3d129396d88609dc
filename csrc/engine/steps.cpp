#include "engine/steps.h"

#include <algorithm>

#include "cpu/isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsemtl::engine {
namespace {

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

const RowKernels& rows() { return cpu::isa().rows; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rounded(int64_t floats) { return ceil_div(floats, 16) * 16; }

// body(b, c, scratch of this thread) for every plane, split evenly.
template <typename Body>
void each_plane(const View& v, const Run& run, int64_t scratch_each, const Body& body) {
  const int64_t planes = v.batch * v.channels;
  const int threads = static_cast<int>(std::min<int64_t>(run.threads, planes));
  if (threads <= 1) {
    for (int64_t i = 0; i < planes; ++i) body(i / v.channels, i % v.channels, run.scratch);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < planes; ++i) {
    body(i / v.channels, i % v.channels, run.scratch + thread_number() * scratch_each);
  }
}

int64_t plane_at(const View& v, int64_t b, int64_t c) { return b * v.image + c * v.plane; }

// Rows of a plane that can be taken as one: all of them where nothing lies between.
struct Rows {
  int64_t count, length;
};
template <typename... Views>
Rows rows_of(const View& v, const Views&... others) {
  const bool joined = ((v.pitch == v.width) && ... && (others.pitch == v.width));
  return joined ? Rows{1, v.height * v.width} : Rows{v.height, v.width};
}

void run_one(const ConvStep& s, const Run& run) {
  cpu::ConvArguments a = s.arguments;
  a.threads = run.threads;
  const cpu::ConvEpilogue epilogue = {s.bias, s.has_residual ? run.at(s.residual) : nullptr, s.act};
  cpu::sparse_conv2d_forward(a, s.list, run.at(s.x), run.at(s.y), epilogue, s.widest_block,
                             run.scratch);
}
int64_t scratch_one(const ConvStep& s, int threads) {
  cpu::ConvArguments a = s.arguments;
  a.threads = threads;
  return cpu::sparse_conv2d_scratch(a, s.list, s.widest_block);
}

void run_one(const PhaseStep& s, const Run& run) {
  const auto stride = rows().stride;
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
  each_plane(s.y, run, 0, [&](int64_t b, int64_t c, float*) {
    const int64_t phase = s.first + c % s.count, py = phase / s.stride_x, px = phase % s.stride_x;
    const int64_t n_rows = s.x.height > py ? ceil_div(s.x.height - py, s.stride_y) : 0;
    const int64_t n = s.x.width > px ? ceil_div(s.x.width - px, s.stride_x) : 0;
    const float* from = x + plane_at(s.x, b, c / s.count) + py * s.x.pitch + px;
    float* to = y + plane_at(s.y, b, c);
    for (int64_t r = 0; r < n_rows; ++r) {
      stride(from + r * s.stride_y * s.x.pitch, s.stride_x, to + r * s.y.pitch, n);
    }
  });
}
int64_t scratch_one(const PhaseStep&, int) { return 0; }

void run_one(const TransposeStep& s, const Run& run) {
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
#pragma omp parallel for schedule(static) num_threads(run.threads)
  for (int64_t r = 0; r < s.y.height; ++r) {
    rows().stride(x + r, s.x.pitch, y + r * s.y.pitch, s.y.width);
  }
}
int64_t scratch_one(const TransposeStep&, int) { return 0; }

int64_t depthwise_plane(const DepthwiseStep& s) {
  // `left` zeros before the planes and a vector after them may be read
  return rounded(s.left + s.stride_y * s.stride_x * s.plane_height * s.pitch + 64 + s.pitch);
}
void run_one(const DepthwiseStep& s, const Run& run) {
  const auto taps = rows().taps;
  const auto fill = cpu::isa().sparse_conv2d.fill_plane;
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
  const float* residual = s.has_residual ? run.at(s.residual) : nullptr;
  const int64_t size = s.plane_height * s.pitch, each = s.in_place ? 0 : depthwise_plane(s);
  each_plane(s.x, run, each, [&](int64_t b, int64_t c, float* scratch) {
    const float* plane = x + plane_at(s.x, b, c);
    const float* from = plane;
    if (!s.in_place) {
      std::fill(scratch, scratch + s.left, 0.0f);
      for (int64_t phase = 0; phase < s.stride_y * s.stride_x; ++phase) {
        const int64_t py = phase / s.stride_x, px = phase % s.stride_x;
        const int64_t n_rows = s.x.height > py ? ceil_div(s.x.height - py, s.stride_y) : 0;
        const int64_t n = s.x.width > px ? ceil_div(s.x.width - px, s.stride_x) : 0;
        fill(plane + py * s.x.pitch + px, n_rows, n, s.x.pitch * s.stride_y, s.stride_x,
             scratch + s.left + phase * size, s.top, s.plane_height, s.pitch);
      }
      std::fill(scratch + s.left + s.stride_y * s.stride_x * size, scratch + each, 0.0f);
      from = scratch + s.left + s.top * s.pitch;
    }
    for (int64_t k = c * s.multiplier; k < (c + 1) * s.multiplier; ++k) {
      const int64_t first = s.first[k], count = s.first[k + 1] - first;
      const float bias = s.bias == nullptr ? 0.0f : s.bias[k];
      for (int64_t r = 0; r < s.y.height; ++r) {
        const float* rest = residual == nullptr
                                ? nullptr
                                : residual + plane_at(s.residual, b, k) + r * s.residual.pitch;
        taps(from + r * s.step_y, s.offsets + first, s.weights + first, count, bias, rest, s.act,
             y + plane_at(s.y, b, k) + r * s.y.pitch, s.y.width);
      }
    }
  });
}
int64_t scratch_one(const DepthwiseStep& s, int threads) {
  return s.in_place ? 0 : threads * depthwise_plane(s);
}

// A row with room for what windows hang over on both sides.
int64_t max_pool_row(const MaxPoolStep& s) {
  const int64_t reach = (s.y.width - 1) * s.stride_x + (s.kernel_x - 1) * s.dilation_x + 1;
  return rounded(std::max(reach, s.x.width + s.pad_x));
}
constexpr int64_t kRowsAtOnce = 64;
void run_one(const MaxPoolStep& s, const Run& run) {
  const int64_t each = max_pool_row(s);
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
  each_plane(s.x, run, each, [&](int64_t b, int64_t c, float* row) {
    std::fill(row, row + each, -__builtin_inff());
    const float* plane = x + plane_at(s.x, b, c);
    for (int64_t i = 0; i < s.y.height; ++i) {
      const float* found[kRowsAtOnce];
      int64_t count = 0;
      for (int64_t k = 0; k < s.kernel_y; ++k) {
        const int64_t at = i * s.stride_y - s.pad_y + k * s.dilation_y;
        if (at < 0 || at >= s.x.height) continue;
        if (count == kRowsAtOnce) {
          rows().max_rows(found, count, row + s.pad_x, s.x.width);
          found[0] = row + s.pad_x;
          count = 1;
        }
        found[count++] = plane + at * s.x.pitch;
      }
      rows().max_rows(found, count, row + s.pad_x, s.x.width);
      rows().max_windows(row, s.kernel_x, s.stride_x, s.dilation_x,
                         y + plane_at(s.y, b, c) + i * s.y.pitch, s.y.width);
    }
  });
}
int64_t scratch_one(const MaxPoolStep& s, int threads) { return threads * max_pool_row(s); }

void run_one(const MeanStep& s, const Run& run) {
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
  each_plane(s.x, run, rounded(s.x.width), [&](int64_t b, int64_t c, float* row) {
    const float* plane = x + plane_at(s.x, b, c);
    for (int64_t i = 0; i < s.y.height; ++i) {
      std::fill(row, row + s.x.width, 0.0f);
      for (int64_t r = s.from_y[i]; r < s.to_y[i]; ++r) {
        rows().binary(false, row, plane + r * s.x.pitch, false, row, s.x.width);
      }
      rows().mean_windows(row, s.from_x, s.to_x, s.scale_x, s.scale_y[i],
                          y + plane_at(s.y, b, c) + i * s.y.pitch, s.y.width);
    }
  });
}
int64_t scratch_one(const MeanStep& s, int threads) { return threads * rounded(s.x.width); }

void run_one(const SumStep& s, const Run& run) {
  bool joined = s.y.pitch == s.y.width;
  for (int64_t k = 0; k < s.count; ++k) joined &= s.x[k].pitch == s.y.width;
  const int64_t n_rows = joined ? 1 : s.y.height, n = joined ? s.y.height * s.y.width : s.y.width;
  float* y = run.at(s.y);
  each_plane(s.y, run, 0, [&](int64_t b, int64_t c, float*) {
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* x[kMaxTerms];
      for (int64_t k = 0; k < s.count; ++k) {
        x[k] = run.at(s.x[k]) + plane_at(s.x[k], b, c) + r * s.x[k].pitch;
      }
      rows().sum(x, s.count, s.act, y + plane_at(s.y, b, c) + r * s.y.pitch, n);
    }
  });
}
int64_t scratch_one(const SumStep&, int) { return 0; }

void run_one(const BinaryStep& s, const Run& run) {
  const bool flat_b = s.single && s.b.pitch == 0;
  const Rows r = flat_b     ? rows_of(s.y, s.a)
                 : s.single ? Rows{s.y.height, s.y.width}
                            : rows_of(s.y, s.a, s.b);
  each_plane(s.y, run, 0, [&](int64_t b, int64_t c, float*) {
    for (int64_t i = 0; i < r.count; ++i) {
      rows().binary(s.multiply, run.at(s.a) + plane_at(s.a, b, c) + i * s.a.pitch,
                    run.at(s.b) + plane_at(s.b, b, c) + i * s.b.pitch, s.single,
                    run.at(s.y) + plane_at(s.y, b, c) + i * s.y.pitch, r.length);
    }
  });
}
int64_t scratch_one(const BinaryStep&, int) { return 0; }

void run_one(const MapStep& s, const Run& run) {
  const Rows r = rows_of(s.y, s.x);
  each_plane(s.y, run, 0, [&](int64_t b, int64_t c, float*) {
    for (int64_t i = 0; i < r.count; ++i) {
      rows().map(s.map, s.low, s.high, run.at(s.x) + plane_at(s.x, b, c) + i * s.x.pitch,
                 run.at(s.y) + plane_at(s.y, b, c) + i * s.y.pitch, r.length);
    }
  });
}
int64_t scratch_one(const MapStep&, int) { return 0; }

void run_one(const ResizeStep& s, const Run& run) {
  const float* x = run.at(s.x);
  float* y = run.at(s.y);
  each_plane(s.x, run, rounded(s.x.width), [&](int64_t b, int64_t c, float* row) {
    const float* plane = x + plane_at(s.x, b, c);
    for (int64_t i = 0; i < s.y.height; ++i) {
      const float* low = plane + s.low_y[i] * s.x.pitch;
      float* out = y + plane_at(s.y, b, c) + i * s.y.pitch;
      if (s.nearest) {
        rows().pick(low, s.low_x, out, s.y.width);
        continue;
      }
      rows().blend(low, plane + s.high_y[i] * s.x.pitch, s.weight_y[i], row, s.x.width);
      rows().blend_at(row, s.low_x, s.high_x, s.weight_x, out, s.y.width);
    }
  });
}
int64_t scratch_one(const ResizeStep& s, int threads) { return threads * rounded(s.x.width); }

// Rows of all images, each with all of its channels.
template <typename Body>
void each_row(const View& v, const Run& run, int64_t scratch_each, const Body& body) {
  const Rows r = rows_of(v);
  // A long joined row is cut, so that threads have a share and the channels' rows stay in cache.
  constexpr int64_t kPiece = 512;
  const int64_t pieces = ceil_div(r.length, kPiece);
#pragma omp parallel for schedule(static) num_threads(run.threads)
  for (int64_t i = 0; i < v.batch * r.count * pieces; ++i) {
    const int64_t piece = i % pieces, row = i / pieces % r.count, b = i / pieces / r.count;
    const int64_t at = piece * kPiece, n = std::min(kPiece, r.length - at);
    body(b, row, at, n, run.scratch + thread_number() * scratch_each);
  }
}
constexpr int64_t kRowScratch = 2 * 512;

void run_one(const SoftmaxStep& s, const Run& run) {
  const View& v = s.x.pitch != s.x.width ? s.x : s.y;  // rows are joined only where both allow it
  each_row(v, run, kRowScratch, [&](int64_t b, int64_t row, int64_t at, int64_t n, float* sums) {
    rows().softmax(run.at(s.x) + b * s.x.image + row * s.x.pitch + at, s.x.plane,
                   run.at(s.y) + b * s.y.image + row * s.y.pitch + at, s.y.plane, s.x.channels,
                   sums, n);
  });
}
int64_t scratch_one(const SoftmaxStep&, int threads) { return threads * kRowScratch; }

void run_one(const ArgmaxStep& s, const Run& run) {
  int64_t* y = reinterpret_cast<int64_t*>(run.slots[s.slot]);
  each_row(s.x, run, kRowScratch, [&](int64_t b, int64_t row, int64_t at, int64_t n, float* best) {
    rows().argmax(run.at(s.x) + b * s.x.image + row * s.x.pitch + at, s.x.plane, s.x.channels, best,
                  y + (b * s.x.height + row) * s.x.width + at, n);
  });
}
int64_t scratch_one(const ArgmaxStep&, int threads) { return threads * kRowScratch; }

}  // namespace

int64_t scratch_of(const Step& step, int threads) {
  return std::visit([&](const auto& s) { return scratch_one(s, threads); }, step);
}

void run_step(const Step& step, const Run& run) {
  std::visit([&](const auto& s) { run_one(s, run); }, step);
}

}  // namespace sparsemtl::engine
