// A vector of fp32 lanes under one set of names for each instruction set.
//
// Included inside the anonymous namespace of kernels_<isa>.cpp, so no two files share a symbol and
// the linker cannot hand AVX-512 code to a generic caller. No STL in here for the same reason.
// The includes that it needs stand in kernels_<isa>.cpp, outside that namespace.
//
// Vec   kLanes floats           load, store, stream (aligned to 64 bytes), all from and to fp32,
//                               bf16 and fp16 storage, rounding to nearest even
// Mask  kLanes truth values     bits(mask): lane 0 in the lowest bit

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

#if defined(SPARSEMTL_ISA_AVX512)

constexpr int kLanes = 16;
using Vec = __m512;
using Mask = __mmask16;

inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m256i to_half(Vec x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(x));
}
inline void store(Bf16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline void stream(Half* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half(x));
}
inline void stream(Bf16* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
inline void end_stream() { _mm_sfence(); }

inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }
inline Vec with_sign_of(Vec magnitude, Vec sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
inline Mask not_less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
inline Vec keep(Mask m, Vec x) { return _mm512_maskz_mov_ps(m, x); }
inline Vec add_where(Mask m, Vec a, Vec b) { return _mm512_mask_add_ps(a, m, a, b); }
inline Vec subtract_where(Mask m, Vec a, Vec b) { return _mm512_mask_sub_ps(a, m, a, b); }
inline uint32_t bits(Mask m) { return m; }

#elif defined(SPARSEMTL_ISA_AVX2)

constexpr int kLanes = 8;
using Vec = __m256;
using Mask = __m256;  // all ones or all zeros in each lane

inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m128i to_half(Vec x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_packus_epi32(chosen, chosen);  // low halves of both lanes
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(x)); }
inline void store(Bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline void stream(Half* p, Vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_half(x)); }
inline void stream(Bf16* p, Vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
inline void end_stream() { _mm_sfence(); }

inline Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec square_root(Vec x) { return _mm256_sqrt_ps(x); }
inline Vec with_sign_of(Vec magnitude, Vec sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline Mask not_less_equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Vec keep(Mask m, Vec x) { return _mm256_and_ps(m, x); }
inline Vec add_where(Mask m, Vec a, Vec b) { return _mm256_add_ps(a, keep(m, b)); }
inline Vec subtract_where(Mask m, Vec a, Vec b) { return _mm256_sub_ps(a, keep(m, b)); }
inline uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }

#else  // generic: plain loops over eight lanes, for the compiler to vectorise as it can

constexpr int kLanes = 8;
struct Vec {
  float lane[kLanes];
};
struct Mask {
  uint32_t lane[kLanes];  // all ones or all zeros
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // Exponent and fraction in fp32's place are the value times 2^-112, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}
inline void narrow(float* p, float x) { *p = x; }
inline void narrow(Bf16* p, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
inline void narrow(Half* p, float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the subnormal's fraction, rounded, in the lowest bits.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
}

#define SPARSEMTL_LANES for (int i = 0; i < kLanes; ++i)
inline Vec broadcast(float x) {
  Vec v;
  SPARSEMTL_LANES v.lane[i] = x;
  return v;
}
template <typename T>
inline Vec load(const T* p) {
  Vec v;
  SPARSEMTL_LANES v.lane[i] = widen(p[i]);
  return v;
}
template <typename T>
inline void store(T* p, Vec x) {
  SPARSEMTL_LANES narrow(p + i, x.lane[i]);
}
template <typename T>
inline void stream(T* p, Vec x) {
  store(p, x);
}
inline void end_stream() {}

inline Vec absolute(Vec x) {
  SPARSEMTL_LANES x.lane[i] = __builtin_fabsf(x.lane[i]);
  return x;
}
inline Vec subtract(Vec a, Vec b) {
  SPARSEMTL_LANES a.lane[i] -= b.lane[i];
  return a;
}
inline Vec add(Vec a, Vec b) {
  SPARSEMTL_LANES a.lane[i] += b.lane[i];
  return a;
}
inline Vec multiply(Vec a, Vec b) {
  SPARSEMTL_LANES a.lane[i] *= b.lane[i];
  return a;
}
inline Vec divide(Vec a, Vec b) {
  SPARSEMTL_LANES a.lane[i] /= b.lane[i];
  return a;
}
inline Vec square_root(Vec x) {
  SPARSEMTL_LANES x.lane[i] = __builtin_sqrtf(x.lane[i]);
  return x;
}
inline Vec with_sign_of(Vec magnitude, Vec sign) {
  SPARSEMTL_LANES magnitude.lane[i] =
      float_of(bits_of(magnitude.lane[i]) | (bits_of(sign.lane[i]) & 0x80000000));
  return magnitude;
}
inline Mask not_less_equal(Vec a, Vec b) {
  Mask m;
  SPARSEMTL_LANES m.lane[i] = a.lane[i] <= b.lane[i] ? 0 : ~0u;
  return m;
}
inline Mask less(Vec a, Vec b) {
  Mask m;
  SPARSEMTL_LANES m.lane[i] = a.lane[i] < b.lane[i] ? ~0u : 0;
  return m;
}
inline Mask both(Mask a, Mask b) {
  SPARSEMTL_LANES a.lane[i] &= b.lane[i];
  return a;
}
inline Vec keep(Mask m, Vec x) {
  SPARSEMTL_LANES x.lane[i] = float_of(bits_of(x.lane[i]) & m.lane[i]);
  return x;
}
inline Vec add_where(Mask m, Vec a, Vec b) {
  b = keep(m, b);
  SPARSEMTL_LANES a.lane[i] += b.lane[i];
  return a;
}
inline Vec subtract_where(Mask m, Vec a, Vec b) { return subtract(a, keep(m, b)); }
inline uint32_t bits(Mask m) {
  uint32_t packed = 0;
  SPARSEMTL_LANES packed |= (m.lane[i] & 1u) << i;
  return packed;
}
#undef SPARSEMTL_LANES

#endif

inline double sum(Vec x) {  // in lane order
  float lanes[kLanes];
  store(lanes, x);
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(lanes[i]);
  return total;
}
