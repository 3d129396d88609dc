// From a bitmask to the lists that csrc/cuda/sparse_conv2d.cu walks, on the device.
//
// Nothing waits for the GPU and every size is known beforehand, so a CUDA graph can hold it: the
// lists have room for `capacity` entries, and the number that is there stays on the device.
#pragma once

#include <cstdint>

namespace sparsemtl::cuda {

constexpr int kPanel = 64;  // source channels of a list's block: what one tap stages at a time

// A weight as the convolution sees it: rows are its destination channels, columns its sources.
struct PackShape {
  int64_t rows, channels, taps;
  int64_t row_stride, channel_stride, tap_stride;  // of the bits and the weight, in elements
};

struct Entry {  // one live weight
  int column;   // source channel within the panel
  float value;
};

// Blocks are (tap, panel of source channels), tap by tap; block b of row r holds the entries from
// starts[b · rows + r] on, to the next start, in the order of their channels.
struct PackedLists {
  int* starts;     // [taps · panels · rows + 1]
  Entry* entries;  // [capacity]
  int* sources;    // [capacity] where each stands in the flat weight
  int64_t capacity;
};

inline int64_t panels_of(const PackShape& shape) { return (shape.channels + kPanel - 1) / kPanel; }

// bits: one for each weight in the order of its memory, lowest first
// weight: float32 values. stream: a cudaStream_t
void pack_pattern(const PackShape& shape, const uint8_t* bits, const float* weight,
                  const PackedLists& lists, uintptr_t stream);

// Copy new values into lists whose pattern has not changed. slots: taps · panels · rows
void refresh_values(const PackedLists& lists, int64_t slots, const float* weight, uintptr_t stream);

}  // namespace sparsemtl::cuda
