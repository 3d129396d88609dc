// What a core reaches in multiply-adds when nothing has to be loaded: the roof of every kernel.
#pragma once

#include <cstdint>

namespace sparsemtl::cpu {

// Independent sums: two units of four cycles need eight, and sixteen registers hold so many.
constexpr int kRoofSums = 12;

// Runs `rounds` rounds of kRoofSums multiply-adds of vectors; returns a value that depends on all.
using RoofBody = float (*)(float factor, float addend, int64_t rounds);

struct RoofKernel {
  int lanes;
  RoofBody run;
};

// Floating-point operations that each of `threads` threads does in `rounds` rounds.
int64_t roof_flops(int64_t rounds);

// Keeps `threads` threads busy with them at once. Throws std::invalid_argument for rounds < 0.
float run_roof(int64_t rounds, int threads);

}  // namespace sparsemtl::cpu
