// Convolution with single live weights on CUDA, for weights of which almost all are dead.
#pragma once

#include <cstdint>

#include "cuda/pack_pattern.h"
#include "views.h"

namespace sparsemtl::cuda {

struct ConvShape {  // NCHW; from source to destination
  int64_t batch;
  int64_t source_channels, source_height, source_width;
  int64_t dest_channels, dest_height, dest_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  bool transposed;  // the input gradient: from the output's gradient to the input's
};

// dest = act(Σ weight · source + bias); source, bias and dest of one storage type on the device
// bias: may be null. activation: 0 none, 1 relu, 2 relu6. stream: a cudaStream_t
void sparse_conv2d(DType dtype, const ConvShape& shape, const PackedLists& lists,
                   const void* source, const void* bias, void* dest, int activation,
                   uintptr_t stream);

}  // namespace sparsemtl::cuda
