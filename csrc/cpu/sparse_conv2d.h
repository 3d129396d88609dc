// Convolution with a sparse weight: forward (and input gradient, which is the forward pass of the
// transposed list), and the gradient of the listed weights.
#pragma once

#include <cstdint>

#include "cpu/pack_pattern.h"

namespace sparsemtl::cpu {

// How a tile of output pixels reads its input.
enum class ConvMode : int {
  kTable = 0,   // any geometry: panels are copied by a table of masked runs, taps may be absent
  kLinear = 1,  // zero-padded planes: a tap is a constant offset, panels are plain copies
  kDirect = 2,  // the same planes, read in place: too few nonzeros per column to repay a copy
};

struct PlaneStrides {  // floats from one image, plane and row to the next; all 0: none lies between
  int64_t image, plane, pitch;
};

// Source planes [batch][channels][phases][height][width], where a tap reads output pixel (y, x)
// at (y + dy, x + dx) of its phase; what lies outside the plane is zero. In the linear modes the
// zeros stand in memory, the source's pitch is that of tiles, and `origin` is the offset of pixel
// (0, 0) in its plane.
struct ConvProblem {
  int64_t batch, channels, phases, height, width, origin;
  int64_t rows, out_height, out_width;  // output [batch][rows][out_height][out_width]
  int64_t groups, n_taps;
  const int32_t* taps;  // [n_taps][3]: phase, dy, dx; dy = kNoTap for a tap that reads nothing
  PlaneStrides in, out, residual;  // of the source, the output and what the epilogue adds
};
constexpr int32_t kNoTap = 1 << 29;

struct ConvEpilogue {
  const float* bias;      // [rows] or null
  const float* residual;  // of the output's shape, or null
  int activation;         // 0 none, 1 ReLU, 2 ReLU6
};

constexpr int kMaxCuts = 72;
struct ConvTiling {  // the order of output pixels: rectangles in which the set of taps is constant
  int64_t n_y, n_x, pixels;
  int32_t y_cuts[kMaxCuts], x_cuts[kMaxCuts];
};

struct ConvCall {
  ConvProblem problem;
  SparseList list;
  ConvMode mode;
  int vectors;  // P: registers of pixels in a tile
  ConvTiling tiling;
  const float* x;
  const int32_t* offsets;          // direct mode: [n_nonzeros] of each nonzero's input in an image
  bool guarded;                    // as in ConvArguments
  int64_t panel_size, strip_size;  // floats of scratch per thread
};

struct ConvShare {
  int64_t begin, end;     // parts
  int64_t slice, slices;  // of the rows of each part; more than one only in rows_are_whole lists
};

// Whether each part is one block, so that a row's nonzeros stand together.
inline bool rows_are_whole(const SparseList& list) { return list.n_blocks == list.n_parts; }

struct SparseConvKernels {
  int lanes;
  // Output pixels of one tile and the rows of a share
  void (*forward)(const ConvCall& call, int64_t tile, const ConvShare& share, float* y,
                  const ConvEpilogue& epilogue, float* scratch);
  // Add the tile's share to grad[n_nonzeros]
  void (*weight_grad)(const ConvCall& call, int64_t tile, const float* grad_y, float* grad,
                      float* scratch);
  // plane [plane_height][pitch] = `top` rows of zeros, then x's `rows` rows of `n` pixels, zeros
  // to their right and below; returns whether all of x is finite
  bool (*fill_plane)(const float* x, int64_t rows, int64_t n, int64_t row_stride,
                     int64_t pixel_stride, float* plane, int64_t top, int64_t plane_height,
                     int64_t pitch);
};

struct ConvArguments {  // what a call of Python carries besides tensors
  ConvProblem problem;
  ConvMode mode;
  int vectors;
  bool regions;  // order pixels by tap set: table mode with large dilation
  int threads;
  const int32_t* offsets = nullptr;  // direct mode: from sparse_conv2d_offsets, or null: found anew
  // Linear modes: nothing may be read past the last pixel. For 1x1 convolutions, whose planes are x
  // itself; an image's last tile is then packed behind masks.
  bool guarded = false;
};

// Direct mode: where each nonzero finds its input within an image. offsets: [n_nonzeros]
void sparse_conv2d_offsets(const ConvArguments& a, const SparseList& list, int32_t* offsets);

// Scratch in floats for either pass on this machine's instruction set.
int64_t sparse_conv2d_scratch(const ConvArguments& a, const SparseList& list, int64_t widest_block);

void sparse_conv2d_forward(const ConvArguments& a, const SparseList& list, const float* x, float* y,
                           const ConvEpilogue& epilogue, int64_t widest_block, float* scratch);

// grad: [n_nonzeros + 3]; partials: [threads][n_nonzeros + 3], summed in order of thread
void sparse_conv2d_weight_grad(const ConvArguments& a, const SparseList& list, const float* x,
                               const float* grad_y, float* partials, float* grad,
                               int64_t widest_block, float* scratch);

struct PlaneShape {
  int64_t planes, height, width, stride_y, stride_x, top, plane_height, pitch;
};
// x [planes][height][width] -> out [planes][phases][plane_height][pitch]; whether all is finite
bool sparse_conv2d_planes(const float* x, const PlaneShape& shape, float* out, int threads);

}  // namespace sparsemtl::cpu
