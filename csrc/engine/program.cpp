#include "engine/program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace sparsemtl::engine {
namespace {

constexpr int64_t kMostFloats = int64_t{1} << 42;
constexpr size_t kMostWaiting = 8;  // workspaces kept for the next callers
constexpr int kMostThreads = 1024;

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

int64_t bytes_of(int64_t floats) { return 4 * std::max<int64_t>(floats, 16); }

}  // namespace

Program::Program(int64_t arena, std::vector<int64_t> externals, std::vector<Step> steps)
    : isa_(&cpu::isa()), arena_(arena), externals_(std::move(externals)), steps_(std::move(steps)) {
  if (arena < 0 || arena > kMostFloats || externals_.size() >= kMaxSlots) {
    throw std::invalid_argument(
        "EngineProgram: Expected an arena from 0 to 2^42 floats and fewer "
        "than " +
        std::to_string(kMaxSlots) + " inputs and outputs");
  }
  std::vector<int64_t> sizes = {arena};
  sizes.insert(sizes.end(), externals_.begin(), externals_.end());
  for (const Step& step : steps_) {
    check_step(step, sizes.data(), static_cast<int64_t>(sizes.size()));
  }
  for (Step& step : steps_) {
    ConvStep* conv = std::get_if<ConvStep>(&step);
    if (conv == nullptr || conv->arguments.mode != cpu::ConvMode::kDirect) continue;
    offsets_.emplace_back(static_cast<size_t>(conv->list.n_nonzeros));
    cpu::sparse_conv2d_offsets(conv->arguments, conv->list, offsets_.back().data());
    conv->arguments.offsets = offsets_.back().data();
  }
}

// The arena starts as zeros: steps write pixels, never the zeros around them.
Program::Workspace::Workspace(int64_t arena_floats, int64_t scratch_floats, int threads_for)
    : arena(bytes_of(arena_floats)), scratch(bytes_of(scratch_floats)), threads(threads_for) {
  std::memset(arena.data(), 0, static_cast<size_t>(arena.size()));
}

int64_t Program::scratch(int threads) const {
  int64_t most = 0;
  for (const Step& step : steps_) most = std::max(most, scratch_of(step, threads));
  return most;
}

int64_t Program::bytes(int threads) const { return bytes_of(arena_) + bytes_of(scratch(threads)); }

std::unique_ptr<Program::Workspace> Program::take(int threads) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& workspace : waiting_) {
      if (workspace->threads != threads) continue;
      std::unique_ptr<Workspace> found = std::move(workspace);
      workspace = std::move(waiting_.back());
      waiting_.pop_back();
      return found;
    }
  }
  return std::make_unique<Workspace>(arena_, scratch(threads), threads);
}

void Program::give_back(std::unique_ptr<Workspace> workspace) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (waiting_.size() < kMostWaiting) waiting_.push_back(std::move(workspace));
}

void Program::run(const std::vector<uintptr_t>& addresses, int threads, double* seconds) const {
  if (addresses.size() != externals_.size() || threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("EngineProgram: Expected " + std::to_string(externals_.size()) +
                                " addresses and 1 to 1024 threads, got " +
                                std::to_string(addresses.size()) + " and " +
                                std::to_string(threads));
  }
  if (isa_ != &cpu::isa()) {  // tiles and scratch are its
    throw std::invalid_argument("EngineProgram: Expected the instruction set " +
                                std::string(isa_->name) + " that it was built for, got " +
                                cpu::isa().name);
  }
  std::unique_ptr<Workspace> workspace = take(threads);
  Run context{};
  context.slots[0] = static_cast<float*>(workspace->arena.data());
  for (size_t i = 0; i < addresses.size(); ++i) {
    context.slots[i + 1] = reinterpret_cast<float*>(addresses[i]);
  }
  context.scratch = static_cast<float*>(workspace->scratch.data());
  context.threads = threads;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const double begin = seconds == nullptr ? 0.0 : now();
    run_step(steps_[i], context);
    if (seconds != nullptr) seconds[i] = now() - begin;
  }
  give_back(std::move(workspace));
}

}  // namespace sparsemtl::engine
