#include "cpu/roof.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsemtl::cpu {

int64_t roof_flops(int64_t rounds) { return 2 * rounds * kRoofSums * isa().roof.lanes; }

float run_roof(int64_t rounds, int threads) {
  if (rounds < 0) {
    throw std::invalid_argument("run_roof: Expected rounds to be at least 0, got " +
                                std::to_string(rounds));
  }
  const auto body = isa().roof.run;
  std::vector<float> found(threads < 1 ? 1 : threads);
  // A factor below 1 keeps the sums finite, and the compiler does not know it.
  for_each_chunk(found.size(), static_cast<int>(found.size()),
                 [&](int64_t i) { found[i] = body(0.999f, 1e-3f, rounds); });
  return found[0];
}

}  // namespace sparsemtl::cpu
