// A whole plan as one call: steps over an arena, on the caller's inputs and outputs.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/memory.h"
#include "engine/steps.h"

namespace sparsemtl::cpu {
struct Kernels;
}
namespace sparsemtl::engine {

// Immutable once built; any number of threads may run it at once, each with memory of its own.
class Program {
 public:
  // arena: floats of slot 0.   externals: floats of slots 1, 2, ... that the caller gives
  // Throws std::invalid_argument unless every step stays within them.
  Program(int64_t arena, std::vector<int64_t> externals, std::vector<Step> steps);

  // addresses: of slots 1, 2, ..., each as large as was said.   seconds: of each step, or null
  // Throws std::bad_alloc where there is no memory for the arena.
  void run(const std::vector<uintptr_t>& addresses, int threads, double* seconds) const;

  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }
  int64_t bytes(int threads) const;  // of one caller: arena and scratch

 private:
  struct Workspace {
    Workspace(int64_t arena, int64_t scratch, int threads_for);
    cpu::Block arena, scratch;
    int threads;
  };
  int64_t scratch(int threads) const;
  std::unique_ptr<Workspace> take(int threads) const;
  void give_back(std::unique_ptr<Workspace> workspace) const;

  const cpu::Kernels* isa_;
  int64_t arena_;
  std::vector<int64_t> externals_;
  std::vector<Step> steps_;
  std::vector<std::vector<int32_t>> offsets_;  // of the convolutions in direct mode
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> waiting_;
};

}  // namespace sparsemtl::engine
