// Body of soft_threshold, included after vec.h inside the anonymous namespace of kernels_<isa>.cpp.

constexpr int kBlock = 4 * kLanes;       // four independent vectors hide the latency of the sums
constexpr int64_t kGroup = 32 * kBlock;  // fp32 lanes hold 32 terms each before they go to fp64

inline Vec shrink(Vec w, Vec alpha, Mask alive) {
  return keep(alive, subtract(w, with_sign_of(alpha, w)));
}

inline void write_bits(uint8_t* mask, uint32_t alive) {
  for (int byte = 0; byte < kLanes / 8; ++byte)
    mask[byte] = static_cast<uint8_t>(alive >> 8 * byte);
}

template <typename T, bool kStream>
int64_t soft_threshold_forward_body(const T* w, float alpha, T* out, uint8_t* mask, int64_t n) {
  const Vec a = broadcast(alpha);
  int64_t live = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load(w + i);
    const Mask alive = not_less_equal(absolute(x), a);
    if (kStream) {
      stream(out + i, shrink(x, a, alive));
    } else {
      store(out + i, shrink(x, a, alive));
    }
    const uint32_t packed = bits(alive);
    live += __builtin_popcount(packed);
    if (mask != nullptr) write_bits(mask + i / 8, packed);
  }
  if (i < n) {  // the rest, in a padded copy
    T x[kLanes] = {}, s[kLanes];
    __builtin_memcpy(x, w + i, (n - i) * sizeof(T));
    const Mask alive = not_less_equal(absolute(load(x)), a);
    store(s, shrink(load(x), a, alive));
    __builtin_memcpy(out + i, s, (n - i) * sizeof(T));
    const uint32_t packed = bits(alive) & ((1u << (n - i)) - 1);
    live += __builtin_popcount(packed);
    for (int64_t at = i; mask != nullptr && at < n; at += 8) {
      mask[at / 8] = static_cast<uint8_t>(packed >> (at - i));
    }
  }
  if (kStream) end_stream();
  return live;
}

template <typename T, bool kStream>
inline Vec gradient_lanes(const T* w, Vec alpha, const T* g, T* gw, Vec sums) {
  const Vec x = load(w), grad = load(g), zero = broadcast(0.0f);
  const Mask alive = not_less_equal(absolute(x), alpha);
  if (kStream) {
    stream(gw, keep(alive, grad));
  } else {
    store(gw, keep(alive, grad));
  }
  sums = add_where(both(alive, less(zero, x)), sums, grad);
  return subtract_where(both(alive, less(x, zero)), sums, grad);
}

template <typename T, bool kStream>
double soft_threshold_backward_body(const T* w, float alpha, const T* g, T* gw, int64_t n) {
  const Vec a = broadcast(alpha);
  double total = 0.0;
  int64_t i = 0;
  while (i + kBlock <= n) {
    Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    const int64_t end = n - i < kGroup ? n : i + kGroup;
    for (; i + kBlock <= end; i += kBlock) {
      for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * kLanes;
        sums[v] = gradient_lanes<T, kStream>(w + at, a, g + at, gw + at, sums[v]);
      }
    }
    for (int v = 0; v < 4; ++v) total += sum(sums[v]);
  }
  for (; i < n; i += kLanes) {  // the rest, in padded copies: a gradient of zero adds nothing
    const int64_t size = n - i < kLanes ? n - i : kLanes;
    T x[kLanes] = {}, grad[kLanes] = {}, masked[kLanes];
    __builtin_memcpy(x, w + i, size * sizeof(T));
    __builtin_memcpy(grad, g + i, size * sizeof(T));
    total += sum(gradient_lanes<T, false>(x, a, grad, masked, broadcast(0.0f)));
    __builtin_memcpy(gw + i, masked, size * sizeof(T));
  }
  if (kStream) end_stream();
  return total;
}

template <typename T>
int64_t soft_threshold_forward(const void* w, float alpha, void* out, uint8_t* mask, int64_t n,
                               bool stream) {
  const auto body =
      stream ? soft_threshold_forward_body<T, true> : soft_threshold_forward_body<T, false>;
  return body(static_cast<const T*>(w), alpha, static_cast<T*>(out), mask, n);
}

template <typename T>
double soft_threshold_backward(const void* w, float alpha, const void* g, void* gw, int64_t n,
                               bool stream) {
  const auto body =
      stream ? soft_threshold_backward_body<T, true> : soft_threshold_backward_body<T, false>;
  return body(static_cast<const T*>(w), alpha, static_cast<const T*>(g), static_cast<T*>(gw), n);
}
