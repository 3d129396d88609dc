// Body of run_roof, included inside the anonymous namespace of kernels_<isa>.cpp.

inline float multiply_add_in_registers(float factor, float addend, int64_t rounds) {
  const Vec a = broadcast(factor), b = broadcast(addend);
  Vec sums[kRoofSums];
  SPARSEMTL_UNROLL
  for (int i = 0; i < kRoofSums; ++i) sums[i] = broadcast(addend + static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
    SPARSEMTL_UNROLL
    for (int i = 0; i < kRoofSums; ++i) sums[i] = multiply_add(sums[i], a, b);
  }
  for (int i = 1; i < kRoofSums; ++i) sums[0] = add(sums[0], sums[i]);
  float lanes[kLanes];
  store(lanes, sums[0]);
  return lanes[0];
}
