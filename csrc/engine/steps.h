// The steps of a program: plain data, built and checked once, run many times.
//
// Values stand in slots: slot 0 is the arena, the others are the caller's inputs and outputs.
#pragma once

#include <cstdint>
#include <type_traits>
#include <variant>

#include "cpu/sparse_conv2d.h"
#include "engine/rows.h"

namespace sparsemtl::engine {

constexpr int kMaxSlots = 64;
constexpr int kMaxTerms = 8;

// Pixel (b, c, y, x) stands at slot + offset + b · image + c · plane + y · pitch + x.
struct View {
  int64_t slot, offset, batch, channels, height, width, image, plane, pitch;
};

// y = act(conv(x) + bias + residual) with a sparse weight. Where x is padded, zeros stand in
// memory.
struct ConvStep {
  View x, y, residual;
  bool has_residual;
  cpu::ConvArguments arguments;  // threads and strides are set for each run
  cpu::SparseList list;
  const float* bias;  // [rows] or null
  int64_t widest_block;
  int act;
};

// y [channels · count] = phases of x: phase i · sx + j of a channel holds its pixels
// (r · sy + i, q · sx + j). All of them from `first` = 0 on, or one. Pixels that x lacks are left
// alone.
struct PhaseStep {
  View x, y;
  int64_t stride_y, stride_x, first, count;
};

// y [rows][columns] -> [columns][rows]; views have one channel and one image
struct TransposeStep {
  View x, y;
};

// Depthwise convolution by the live taps of each output channel. In place, offsets are from the
// output pixel in x's own padded plane; else each plane of x is first split into padded phases.
struct DepthwiseStep {
  View x, y, residual;
  bool has_residual, in_place;
  int64_t multiplier;  // output channels of an input channel
  int64_t stride_y, stride_x;
  int64_t top, left, plane_height, pitch;  // of the phases' planes
  int64_t step_y;                          // floats from an output row to the next, in place
  const int32_t* first;                    // [channels + 1] into the two below
  const int32_t* offsets;
  const float* weights;
  const float* bias;  // or null
  int act;
};

struct MaxPoolStep {
  View x, y;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

// Means over windows, and what they are multiplied with: average pooling, adaptive or not.
struct MeanStep {
  View x, y;
  const int32_t *from_y, *to_y, *from_x, *to_x;  // [height], [width] of y
  const float *scale_y, *scale_x;
};

struct SumStep {  // y = act(Σ x)
  View x[kMaxTerms], y;
  int64_t count;
  int act;
};

struct BinaryStep {  // strides of b are 0 along axes that it lacks; single: along rows too
  View a, b, y;
  bool multiply, single;
};

struct MapStep {
  View x, y;
  Map map;
  float low, high;
};

struct ResizeStep {
  View x, y;
  bool nearest;                                    // then only `low` counts
  const int32_t *low_y, *high_y, *low_x, *high_x;  // [height], [width] of y
  const float *weight_y, *weight_x;                // of the higher neighbour
};

struct SoftmaxStep {  // over channels
  View x, y;
};
struct ArgmaxStep {  // over channels; y: slot of [batch][height][width] int64
  View x;
  int64_t slot;
};

using Step = std::variant<ConvStep, PhaseStep, TransposeStep, DepthwiseStep, MaxPoolStep, MeanStep,
                          SumStep, BinaryStep, MapStep, ResizeStep, SoftmaxStep, ArgmaxStep>;
static_assert(std::is_trivially_copyable_v<Step>);

struct Run {
  float* slots[kMaxSlots];
  float* scratch;
  int threads;

  float* at(const View& v) const { return slots[v.slot] + v.offset; }
};

// Floats of scratch that a step needs, all threads together.
int64_t scratch_of(const Step& step, int threads);

void run_step(const Step& step, const Run& run);

// Throws std::invalid_argument unless every access of the step stays within slots of these sizes
// (in floats) and within its own arrays, whose lengths the caller has checked.
void check_step(const Step& step, const int64_t* slot_sizes, int64_t slots);

// The same for the packed weight of a convolution, by the lengths of its arrays.
struct ListLengths {
  int64_t parts, blocks, first_nonzero, columns, rows, counts, positions, values;
};
void check_list(const ConvStep& step, const ListLengths& lengths);

}  // namespace sparsemtl::engine
