// What steps do to one row of pixels; a body per instruction set, see rows.inc.h.
#pragma once

#include <cstdint>

namespace sparsemtl::engine {

enum class Map : int { kCopy, kRelu, kRelu6, kClamp, kSigmoid, kSilu, kHardswish };
constexpr int kMaps = 7;

struct RowKernels {
  // y = map(x); low and high bound Map::kClamp
  void (*map)(Map map, float low, float high, const float* x, float* y, int64_t n);
  // y = act(Σ x[i]), added in order; act: 0 none, 1 ReLU, 2 ReLU6
  void (*sum)(const float* const* x, int64_t count, int act, float* y, int64_t n);
  // y = a · b, or a + b; b is a single number if b_single
  void (*binary)(bool multiply, const float* a, const float* b, bool b_single, float* y, int64_t n);
  // y = largest of the rows, NaN if any is
  void (*max_rows)(const float* const* rows, int64_t count, float* y, int64_t n);
  // y[i] = largest of x[i · stride + k · dilation], k < kernel
  void (*max_windows)(const float* x, int64_t kernel, int64_t stride, int64_t dilation, float* y,
                      int64_t n);
  // y[i] = scale · scales[i] · Σ x[from[i] .. to[i])
  void (*mean_windows)(const float* x, const int32_t* from, const int32_t* to, const float* scales,
                       float scale, float* y, int64_t n);
  // y = a + w · (b − a), and the same from one row by index
  void (*blend)(const float* a, const float* b, float w, float* y, int64_t n);
  void (*blend_at)(const float* x, const int32_t* low, const int32_t* high, const float* w,
                   float* y, int64_t n);
  void (*pick)(const float* x, const int32_t* at, float* y, int64_t n);  // y[i] = x[at[i]]
  void (*stride)(const float* x, int64_t stride, float* y, int64_t n);   // y[i] = x[i · stride]
  // y = act(bias + Σ weights[t] · x[offsets[t] + i] + residual[i]); residual may be null
  void (*taps)(const float* x, const int32_t* offsets, const float* weights, int64_t n_taps,
               float bias, const float* residual, int act, float* y, int64_t n);
  // Softmax over `count` rows that lie `from_stride` apart; sums is scratch of 2 n
  void (*softmax)(const float* x, int64_t x_plane, float* y, int64_t y_plane, int64_t count,
                  float* sums, int64_t n);
  // at[i] = the first of `count` rows with the largest value, the first NaN if there is one;
  // best is scratch of n
  void (*argmax)(const float* x, int64_t plane, int64_t count, float* best, int64_t* at, int64_t n);
};

}  // namespace sparsemtl::engine
