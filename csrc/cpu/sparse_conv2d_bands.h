// Small images: a thread copies a band of rows of all channels into planes that stay in its L2
// cache, computes the band's outputs, and goes on to the next. Copies of the whole image would be
// written to the L3 cache, and read back from there or from another core.
#pragma once

#include "cpu/sparse_conv2d.h"

namespace sparsemtl::cpu {

struct BandSource {  // x [batch · channels][height][width], with a stride split into phases
  int64_t height, width, stride_y, stride_x;
  int64_t lead, slack;  // zeros before the first plane of a band and after its last
  int64_t top, bottom;  // rows that taps reach above and below a band
};
struct Bands {
  int64_t rows, count;  // of output in a band, which the last may not fill; bands of an image
};

// The cut of `a`, whose problem is of the whole image; count 0 where bands do not pay. It depends
// on no thread count, and so no result does.
Bands cut_bands(const ConvArguments& a, const BandSource& source);

// `a` for one band: planes of bands.rows output rows, one image
ConvArguments band_arguments(const ConvArguments& a, const BandSource& source, const Bands& bands);

int64_t bands_scratch(const ConvArguments& band, const BandSource& source, const SparseList& list,
                      int64_t widest_block);

// a: of the whole image; band: of band_arguments, with its offsets
void forward_bands(const ConvArguments& a, const ConvArguments& band, const BandSource& source,
                   const Bands& bands, const SparseList& list, const float* x, float* y,
                   const ConvEpilogue& epilogue, int64_t widest_block, float* scratch);

// partials: [threads][n_nonzeros + 3]; grad [n_nonzeros] is their sum. Whether all of x is finite.
bool weight_grad_bands(const ConvArguments& a, const ConvArguments& band, const BandSource& source,
                       const Bands& bands, const SparseList& list, const float* x,
                       const float* grad_y, float* partials, float* grad, int64_t widest_block,
                       float* scratch);

}  // namespace sparsemtl::cpu
