// The kernels for AVX-512 (F, BW, VL, DQ); setup.py gives this file its flags, and no other.
#include <immintrin.h>

#include "cpu/isa.h"

#define SPARSEMTL_ISA_AVX512

namespace sparsemtl::cpu {
namespace {

#include "cpu/vec.h"
// after vec.h, which they use
#include "cpu/soft_threshold.inc.h"
#include "cpu/sparse_conv2d.inc.h"
// after soft_threshold, whose shrink it uses
#include "cpu/threshold_adam.inc.h"
// after sparse_conv2d, whose multiply_add it uses
#include "cpu/roof_body.h"
// after sparse_conv2d, whose vectors it uses
#include "engine/rows.inc.h"
// needs none of them
#include "cpu/masking_body.h"

}  // namespace

const Kernels& kernels_avx512() {
  static constexpr Kernels kernels = {
      "avx512",
      {{&soft_threshold_forward<float>, &soft_threshold_backward<float>},
       {&soft_threshold_forward<Bf16>, &soft_threshold_backward<Bf16>},
       {&soft_threshold_forward<Half>, &soft_threshold_backward<Half>}},
      {kLanes, &sparse_conv2d_forward, &sparse_conv2d_weight_grad, &sparse_conv2d_fill_plane},
      {&threshold_adam<float>, &threshold_adam<Bf16>, &threshold_adam<Half>},
      {kLanes, &multiply_add_in_registers},
      kRowKernels,
      &masking,
  };
  return kernels;
}

}  // namespace sparsemtl::cpu
