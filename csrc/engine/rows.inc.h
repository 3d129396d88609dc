// Bodies of rows.h, included after sparse_conv2d.inc.h inside the anonymous namespace of
// kernels_<isa>.cpp. Plain loops, which the compiler turns into that set's vectors.

inline float relu_of(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
inline float clamp_of(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// e^x to 2 ulp: 2^n · e^r with r in ±ln 2 / 2, e^r by its series. Beyond ±88, 0 and infinity.
inline float exp_of(float x) {
  const float bounded = clamp_of(x, -87.0f, 88.0f);
  constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const float n = (bounded * 1.44269504f + kShift) - kShift;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  float y = p * power;
  y = x < -87.0f ? 0.0f : y;
  y = x > 88.0f ? float_of(0x7f800000) : y;
  return x != x ? x : y;
}
inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

template <typename F>
inline __attribute__((always_inline)) void each(const float* x, float* y, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) y[i] = f(x[i]);
}

void map_row(engine::Map map, float low, float high, const float* x, float* y, int64_t n) {
  switch (map) {
    case engine::Map::kCopy:
      if (x != y) __builtin_memmove(y, x, n * sizeof(float));
      break;
    case engine::Map::kRelu:
      each(x, y, n, relu_of);
      break;
    case engine::Map::kRelu6:
      each(x, y, n, [](float v) { return clamp_of(v, 0.0f, 6.0f); });
      break;
    case engine::Map::kClamp:
      each(x, y, n, [=](float v) { return clamp_of(v, low, high); });
      break;
    case engine::Map::kSigmoid:
      each(x, y, n, sigmoid_of);
      break;
    case engine::Map::kSilu:
      each(x, y, n, [](float v) { return v / (1.0f + exp_of(-v)); });
      break;
    case engine::Map::kHardswish:
      each(x, y, n, [](float v) { return v * clamp_of(v + 3.0f, 0.0f, 6.0f) / 6.0f; });
      break;
  }
}

inline void activate_row(int act, float* y, int64_t n) {
  if (act == 1) each(y, y, n, relu_of);
  if (act == 2) each(y, y, n, [](float v) { return clamp_of(v, 0.0f, 6.0f); });
}

void sum_row(const float* const* x, int64_t count, int act, float* y, int64_t n) {
  constexpr int64_t kPiece = 1024;  // stays in the L1 cache between the inputs
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t size = n - at < kPiece ? n - at : kPiece;
    if (count == 1) {
      each(x[0] + at, y + at, size, [](float v) { return v; });
    } else {
      for (int64_t i = 0; i < size; ++i) y[at + i] = x[0][at + i] + x[1][at + i];
    }
    for (int64_t k = 2; k < count; ++k) {
      for (int64_t i = 0; i < size; ++i) y[at + i] += x[k][at + i];
    }
    activate_row(act, y + at, size);
  }
}

void binary_row(bool multiply, const float* a, const float* b, bool b_single, float* y, int64_t n) {
  if (b_single) {
    const float value = b[0];
    if (multiply) {
      each(a, y, n, [=](float v) { return v * value; });
    } else {
      each(a, y, n, [=](float v) { return v + value; });
    }
  } else if (multiply) {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
  }
}

inline float larger(float most, float x) { return x > most || x != x ? x : most; }

void max_rows(const float* const* rows, int64_t count, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = count == 0 ? -__builtin_inff() : rows[0][i];
  for (int64_t r = 1; r < count; ++r) {
    const float* x = rows[r];
    for (int64_t i = 0; i < n; ++i) y[i] = larger(y[i], x[i]);
  }
}

template <int64_t kStride>
inline void max_windows_by(const float* x, int64_t kernel, int64_t stride, int64_t dilation,
                           float* y, int64_t n) {
  const int64_t step = kStride > 0 ? kStride : stride;
  for (int64_t i = 0; i < n; ++i) y[i] = x[i * step];
  for (int64_t k = 1; k < kernel; ++k) {
    const float* shifted = x + k * dilation;
    for (int64_t i = 0; i < n; ++i) y[i] = larger(y[i], shifted[i * step]);
  }
}
void max_windows(const float* x, int64_t kernel, int64_t stride, int64_t dilation, float* y,
                 int64_t n) {
  if (stride == 1) return max_windows_by<1>(x, kernel, stride, dilation, y, n);
  if (stride == 2) return max_windows_by<2>(x, kernel, stride, dilation, y, n);
  max_windows_by<0>(x, kernel, stride, dilation, y, n);
}

void mean_windows(const float* x, const int32_t* from, const int32_t* to, const float* scales,
                  float scale, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float total = 0.0f;
    for (int32_t k = from[i]; k < to[i]; ++k) total += x[k];
    y[i] = total * (scale * scales[i]);
  }
}

void blend_rows(const float* a, const float* b, float w, float* y, int64_t n) {
  const float rest = 1.0f - w;
  for (int64_t i = 0; i < n; ++i) y[i] = rest * a[i] + w * b[i];
}
void blend_at(const float* x, const int32_t* low, const int32_t* high, const float* w, float* y,
              int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = (1.0f - w[i]) * x[low[i]] + w[i] * x[high[i]];
}
void pick_at(const float* x, const int32_t* at, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[at[i]];
}
void stride_row(const float* x, int64_t stride, float* y, int64_t n) {
  if (stride == 1) {
    __builtin_memcpy(y, x, n * sizeof(float));
  } else if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[2 * i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i * stride];
  }
}

constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);

// The last vector is read and written in the lanes of `run`.
template <int P>
inline __attribute__((always_inline)) void taps_piece(const float* x, const int32_t* offsets,
                                                      const float* weights, int64_t n_taps,
                                                      Vec bias, const float* residual, int act,
                                                      float* y, uint32_t run) {
  Vec sums[P];
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) sums[p] = bias;
  for (int64_t t = 0; t < n_taps; ++t) {
    const float* from = x + offsets[t];
    const Vec w = broadcast(weights[t]);
    SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
      const Vec v = p < P - 1 || run == kAllLanes ? load(from + p * kLanes)
                                                  : load_run(zeros(), run, from + p * kLanes);
      sums[p] = multiply_add(w, v, sums[p]);
    }
  }
  SPARSEMTL_UNROLL for (int p = 0; p < P; ++p) {
    const uint32_t lanes = p == P - 1 ? run : kAllLanes;
    if (residual != nullptr) {
      sums[p] = add(sums[p], load_run(zeros(), lanes, residual + p * kLanes));
    }
    store_run(y + p * kLanes, lanes, activate(sums[p], act));
  }
}

void taps_row(const float* x, const int32_t* offsets, const float* weights, int64_t n_taps,
              float bias, const float* residual, int act, float* y, int64_t n) {
  const Vec b = broadcast(bias);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    taps_piece<4>(x + i, offsets, weights, n_taps, b, residual == nullptr ? nullptr : residual + i,
                  act, y + i, kAllLanes);
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i;
    const uint32_t run = left >= kLanes ? kAllLanes : (1u << left) - 1;
    taps_piece<1>(x + i, offsets, weights, n_taps, b, residual == nullptr ? nullptr : residual + i,
                  act, y + i, run);
  }
}

void softmax_rows(const float* x, int64_t x_plane, float* y, int64_t y_plane, int64_t count,
                  float* sums, int64_t n) {
  float* most = sums + n;
  for (int64_t i = 0; i < n; ++i) {
    most[i] = x[i];
    sums[i] = 0.0f;
  }
  for (int64_t c = 1; c < count; ++c) {
    const float* row = x + c * x_plane;
    for (int64_t i = 0; i < n; ++i) most[i] = larger(most[i], row[i]);
  }
  for (int64_t c = 0; c < count; ++c) {
    const float* row = x + c * x_plane;
    float* out = y + c * y_plane;
    for (int64_t i = 0; i < n; ++i) {
      const float e = exp_of(row[i] - most[i]);
      out[i] = e;
      sums[i] += e;
    }
  }
  for (int64_t i = 0; i < n; ++i) sums[i] = 1.0f / sums[i];
  for (int64_t c = 0; c < count; ++c) {
    float* out = y + c * y_plane;
    for (int64_t i = 0; i < n; ++i) out[i] *= sums[i];
  }
}

void argmax_rows(const float* x, int64_t plane, int64_t count, float* best, int64_t* at,
                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    best[i] = x[i];
    at[i] = 0;
  }
  for (int64_t c = 1; c < count; ++c) {
    const float* row = x + c * plane;
    for (int64_t i = 0; i < n; ++i) {
      const bool better = row[i] > best[i] || (row[i] != row[i] && best[i] == best[i]);
      best[i] = better ? row[i] : best[i];
      at[i] = better ? c : at[i];
    }
  }
}

constexpr engine::RowKernels kRowKernels = {
    &map_row,  &sum_row, &binary_row, &max_rows, &max_windows,  &mean_windows, &blend_rows,
    &blend_at, &pick_at, &stride_row, &taps_row, &softmax_rows, &argmax_rows,
};
