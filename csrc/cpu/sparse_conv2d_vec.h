// What the convolution needs of a vector beside vec.h: multiply-add, masked runs, four dot
// products. Included after vec.h inside the anonymous namespace of kernels_<isa>.cpp.
//
// A run mask holds one bit per lane, lane 0 lowest; lanes outside it are neither read nor written.
// multiply_add may round once or twice, as the instruction set has it.

#if defined(SPARSEMTL_ISA_AVX512) || defined(SPARSEMTL_ISA_AVX2)
#define SPARSEMTL_UNROLL _Pragma("GCC unroll 32")  // so that arrays of Vec become registers
#else
#define SPARSEMTL_UNROLL
#endif

#if defined(SPARSEMTL_ISA_AVX512)

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec relu(Vec x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }  // NaN is second: kept
inline Vec at_most(float bound, Vec x) { return _mm512_min_ps(_mm512_set1_ps(bound), x); }
inline Vec load_run(Vec other, uint32_t run, const float* p) {
  return _mm512_mask_loadu_ps(other, static_cast<__mmask16>(run), p);
}
inline void store_run(float* p, uint32_t run, Vec x) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(run), x);
}
inline Vec load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int I>
inline Vec broadcast_of_four(Vec four) {
  return _mm512_permute_ps(four, I * 0x55);
}
inline __m128 sum_each(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(SPARSEMTL_ISA_AVX2)

inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec relu(Vec x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }  // NaN is second: kept
inline Vec at_most(float bound, Vec x) { return _mm256_min_ps(_mm256_set1_ps(bound), x); }
inline __m256i lanes_of(uint32_t run) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(run));
  return _mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit);
}
inline Vec load_run(Vec other, uint32_t run, const float* p) {
  const __m256i lanes = lanes_of(run);
  return _mm256_blendv_ps(other, _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
}
inline void store_run(float* p, uint32_t run, Vec x) { _mm256_maskstore_ps(p, lanes_of(run), x); }
inline Vec load_four(const float* p) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
template <int I>
inline Vec broadcast_of_four(Vec four) {
  return _mm256_permute_ps(four, I * 0x55);
}
inline __m128 sum_each(Vec a, Vec b, Vec c, Vec d) {
  const Vec all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

#else

#define SPARSEMTL_LANES for (int i = 0; i < kLanes; ++i)
inline Vec zeros() { return broadcast(0.0f); }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  SPARSEMTL_LANES c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Vec relu(Vec x) {
  SPARSEMTL_LANES x.lane[i] = x.lane[i] < 0.0f ? 0.0f : x.lane[i];
  return x;
}
inline Vec at_most(float bound, Vec x) {
  SPARSEMTL_LANES x.lane[i] = x.lane[i] > bound ? bound : x.lane[i];
  return x;
}
inline Vec load_run(Vec other, uint32_t run, const float* p) {
  SPARSEMTL_LANES if (run >> i & 1) other.lane[i] = p[i];
  return other;
}
inline void store_run(float* p, uint32_t run, Vec x) {
  SPARSEMTL_LANES if (run >> i & 1) p[i] = x.lane[i];
}
struct Four {
  float lane[4];
};
inline Four load_four(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
template <int I>
inline Vec broadcast_of_four(Four four) {
  return broadcast(four.lane[I]);
}
inline float lane_sum(Vec x) {
  float total = 0.0f;
  SPARSEMTL_LANES total += x.lane[i];
  return total;
}
inline Four sum_each(Vec a, Vec b, Vec c, Vec d) {
  return {{lane_sum(a), lane_sum(b), lane_sum(c), lane_sum(d)}};
}
#undef SPARSEMTL_LANES

#endif

// out[0..n) += the lane sums of a, b, c, d; n from 1 to 4
#if defined(SPARSEMTL_ISA_AVX512) || defined(SPARSEMTL_ISA_AVX2)
inline void add_four(float* out, __m128 sums) {
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
inline void add_some(float* out, int32_t n, __m128 sums) {
  float lanes[4];
  _mm_storeu_ps(lanes, sums);
  for (int32_t i = 0; i < n; ++i) out[i] += lanes[i];
}
#else
inline void add_some(float* out, int32_t n, Four sums) {
  for (int32_t i = 0; i < n; ++i) out[i] += sums.lane[i];
}
inline void add_four(float* out, Four sums) { add_some(out, 4, sums); }
#endif
