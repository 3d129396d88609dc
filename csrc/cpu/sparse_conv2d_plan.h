// One pass of a sparse convolution, prepared once: geometry, list and offsets. A call then names
// tensors only, finds its own scratch and copies x into planes where the pass wants them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_conv2d_bands.h"

namespace sparsemtl::cpu {

// Planes that a pass reads: x itself, or a copy with zeros around and phases apart.
struct PlaneCopy {
  bool wanted;
  PlaneShape shape;
  int64_t lead, slack;  // zeros before the first plane and after the last
};

class ConvPlan {
 public:
  // The list's arrays must outlive the plan; its values may change. Offsets are found here, with
  // a.threads; std::bad_alloc where memory runs out, here and in the passes.
  ConvPlan(const ConvArguments& a, std::vector<int32_t> taps, const SparseList& list,
           int64_t widest_block, const PlaneCopy& copy);
  ConvPlan(const ConvPlan&) = delete;
  ConvPlan& operator=(const ConvPlan&) = delete;

  void forward(const float* x, float* y, const ConvEpilogue& epilogue, int threads) const;

  // grad: [n_nonzeros + 3]. False, with grad unwritten, where x is not finite and gaps between
  // rows would take 0 · x into the sums.
  bool weight_grad(const float* x, const float* grad_y, float* grad, int threads) const;

 private:
  static ConvArguments with(ConvArguments a, int threads);
  int64_t plane_floats() const;
  // x, or its planes at the front of memory; finite: whether all of x is, if asked
  const float* source(const float* x, float* memory, int threads, bool* finite) const;

  std::vector<int32_t> taps_, offsets_;
  ConvArguments arguments_, band_;
  SparseList list_;
  int64_t widest_block_;
  PlaneCopy copy_;
  BandSource source_;
  Bands bands_;  // none where the whole image is copied, or nothing
};

}  // namespace sparsemtl::cpu
