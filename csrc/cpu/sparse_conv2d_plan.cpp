#include "cpu/sparse_conv2d_plan.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "cpu/memory.h"

namespace sparsemtl::cpu {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kKeptFloats = 0;  // each call's own, so that its end is seen
#else
constexpr int64_t kKeptFloats = 64 << 20;  // larger scratch is mapped for each call
#endif
constexpr int64_t kAlign = 16;  // floats of a cache line

int64_t aligned(int64_t floats) { return (floats + kAlign - 1) / kAlign * kAlign; }

// Uninitialised memory for one call, kept for the thread's next: fresh pages cost more than a small
// convolution, and used ones are still in the cache.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
    if (floats > kKeptFloats) {
      own_ = std::make_unique<Block>(bytes);
      data_ = own_->data();
      return;
    }
    thread_local std::unique_ptr<Block> kept;
    if (kept == nullptr || kept->size() < bytes) {
      kept.reset();
      kept = std::make_unique<Block>(bytes);
    }
    data_ = kept->data();
  }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  std::unique_ptr<Block> own_;
  void* data_;
};

}  // namespace

ConvPlan::ConvPlan(const ConvArguments& a, std::vector<int32_t> taps, const SparseList& list,
                   int64_t widest_block, const PlaneCopy& copy)
    : taps_(std::move(taps)),
      arguments_(a),
      list_(list),
      widest_block_(widest_block),
      copy_(copy),
      bands_{0, 0} {
  arguments_.problem.taps = taps_.data();
  if (copy.wanted && a.mode != ConvMode::kTable) {
    const PlaneShape& s = copy.shape;
    int64_t below = 0;
    for (int64_t t = 0; t < a.problem.n_taps; ++t) {
      below = std::max<int64_t>(below, taps_[3 * t + 1]);
    }
    source_ = {s.height, s.width, s.stride_y, s.stride_x, copy.lead, copy.slack, s.top, below};
    bands_ = cut_bands(arguments_, source_);
  }
  if (bands_.count > 0) band_ = band_arguments(arguments_, source_, bands_);
  if (a.mode != ConvMode::kDirect) return;
  offsets_.resize(list.n_nonzeros + 3);  // bodies take four at a time
  ConvArguments& used = bands_.count > 0 ? band_ : arguments_;
  sparse_conv2d_offsets(used, list_, offsets_.data());
  used.offsets = offsets_.data();
}

ConvArguments ConvPlan::with(ConvArguments a, int threads) {
  a.threads = threads;
  return a;
}

int64_t ConvPlan::plane_floats() const {
  if (!copy_.wanted) return 0;
  const PlaneShape& s = copy_.shape;
  const int64_t planes = s.planes * s.stride_y * s.stride_x;
  return aligned(copy_.lead + planes * s.plane_height * s.pitch + copy_.slack);
}

const float* ConvPlan::source(const float* x, float* memory, int threads, bool* finite) const {
  if (!copy_.wanted) return x;
  std::fill(memory, memory + copy_.lead, 0.0f);
  float* end = memory + plane_floats();
  std::fill(std::max(memory, end - copy_.slack - kAlign), end, 0.0f);
  *finite = sparse_conv2d_planes(x, copy_.shape, memory + copy_.lead, threads);
  return memory;
}

void ConvPlan::forward(const float* x, float* y, const ConvEpilogue& epilogue, int threads) const {
  const ConvArguments a = with(arguments_, threads);
  if (bands_.count > 0) {
    const ConvArguments band = with(band_, threads);
    const Scratch scratch(bands_scratch(band, source_, list_, widest_block_));
    forward_bands(a, band, source_, bands_, list_, x, y, epilogue, widest_block_, scratch.floats());
    return;
  }
  const Scratch scratch(plane_floats() + sparse_conv2d_scratch(a, list_, widest_block_));
  bool finite;
  const float* from = source(x, scratch.floats(), threads, &finite);
  sparse_conv2d_forward(a, list_, from, y, epilogue, widest_block_,
                        scratch.floats() + plane_floats());
}

bool ConvPlan::weight_grad(const float* x, const float* grad_y, float* grad, int threads) const {
  const ConvArguments a = with(arguments_, threads);
  const int64_t partials = aligned(threads * (list_.n_nonzeros + 3));
  if (bands_.count > 0) {
    const ConvArguments band = with(band_, threads);
    const Scratch scratch(partials + bands_scratch(band, source_, list_, widest_block_));
    return weight_grad_bands(a, band, source_, bands_, list_, x, grad_y, scratch.floats(), grad,
                             widest_block_, scratch.floats() + partials);
  }
  const Scratch scratch(plane_floats() + partials + sparse_conv2d_scratch(a, list_, widest_block_));
  bool finite = true;
  const float* from = source(x, scratch.floats(), threads, &finite);
  if (a.mode != ConvMode::kTable && !finite) return false;
  float* rest = scratch.floats() + plane_floats();
  sparse_conv2d_weight_grad(a, list_, from, grad_y, rest, grad, widest_block_, rest + partials);
  return true;
}

}  // namespace sparsemtl::cpu
