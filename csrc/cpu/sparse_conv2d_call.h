// What the drivers of sparse_conv2d share.
#pragma once

#include "cpu/sparse_conv2d.h"

namespace sparsemtl::cpu {

int thread_number();  // in a parallel region

ConvCall make_call(const ConvArguments& a, const SparseList& list, const float* x,
                   int64_t widest_block);
int64_t count_tiles(const ConvCall& call);

}  // namespace sparsemtl::cpu
