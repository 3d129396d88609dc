// Body of apply_mask, included inside the anonymous namespace of kernels_<isa>.cpp. A loop that the
// compiler vectorises; not a product with the mask, because NaN · 0 is NaN.

inline void masking(const float* x, const uint8_t* keep, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = keep[i] != 0 ? x[i] : 0.0f;
}
