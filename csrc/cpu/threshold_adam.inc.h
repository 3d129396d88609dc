// Body of threshold_adam, included after soft_threshold.inc.h inside the anonymous namespace of
// kernels_<isa>.cpp: the values are those of soft_threshold_forward, bit for bit.

struct AdamLanes {
  Vec shrink, decay, pull, keep, rate, step, epsilon;
  bool from_grad, decays;
};

inline AdamLanes spread(const AdamRule& rule) {
  return {broadcast(rule.shrink),  broadcast(rule.decay),  broadcast(rule.pull),
          broadcast(rule.keep),    broadcast(rule.rate),   broadcast(rule.step),
          broadcast(rule.epsilon), rule.from_grad != 0.0f, rule.decay != 0.0f};
}

// Steps one vector of weights, in place with its moments; returns the new weights.
inline Vec adam_lanes(const AdamLanes& a, float* w, const float* g, float* m, float* v) {
  const Vec old = multiply(load(w), a.shrink);
  Vec grad = load(g);
  if (a.decays) grad = add(grad, multiply(old, a.decay));  // not for 0: inf · 0 is NaN
  const Vec mean = load(m);
  const Vec moved = add(a.from_grad ? grad : mean, multiply(a.pull, subtract(grad, mean)));
  const Vec square = add(multiply(load(v), a.keep), multiply(multiply(grad, a.rate), grad));
  const Vec divisor = add(square_root(square), a.epsilon);
  const Vec now = subtract(old, multiply(a.step, divide(moved, divisor)));
  store(m, moved);
  store(v, square);
  store(w, now);
  return now;
}

template <typename T, bool kStream>
inline uint32_t threshold_lanes(Vec w, Vec alpha, T* value) {
  const Mask alive = not_less_equal(absolute(w), alpha);
  if (kStream) {
    stream(value, shrink(w, alpha, alive));
  } else {
    store(value, shrink(w, alpha, alive));
  }
  return bits(alive);
}

template <typename T, bool kThreshold, bool kStream>
int64_t threshold_adam_body(const AdamRule& rule, float* w, const float* g, float* m, float* v,
                            float alpha, T* value, uint8_t* mask, int64_t n) {
  const AdamLanes lanes = spread(rule);
  const Vec a = broadcast(alpha);
  int64_t live = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec now = adam_lanes(lanes, w + i, g + i, m + i, v + i);
    if (!kThreshold) continue;
    const uint32_t packed = threshold_lanes<T, kStream>(now, a, value + i);
    live += __builtin_popcount(packed);
    if (mask != nullptr) write_bits(mask + i / 8, packed);
  }
  if (i < n) {  // the rest, in padded copies
    const int64_t size = n - i;
    float x[kLanes] = {}, grad[kLanes] = {}, mean[kLanes] = {}, square[kLanes] = {};
    __builtin_memcpy(x, w + i, size * sizeof(float));
    __builtin_memcpy(grad, g + i, size * sizeof(float));
    __builtin_memcpy(mean, m + i, size * sizeof(float));
    __builtin_memcpy(square, v + i, size * sizeof(float));
    const Vec now = adam_lanes(lanes, x, grad, mean, square);
    __builtin_memcpy(w + i, x, size * sizeof(float));
    __builtin_memcpy(m + i, mean, size * sizeof(float));
    __builtin_memcpy(v + i, square, size * sizeof(float));
    if (kThreshold) {
      T s[kLanes];
      const uint32_t packed = threshold_lanes<T, false>(now, a, s) & ((1u << size) - 1);
      __builtin_memcpy(value + i, s, size * sizeof(T));
      live += __builtin_popcount(packed);
      for (int64_t at = i; mask != nullptr && at < n; at += 8) {
        mask[at / 8] = static_cast<uint8_t>(packed >> (at - i));
      }
    }
  }
  if (kStream) end_stream();
  return live;
}

template <typename T>
int64_t threshold_adam(const AdamRule& rule, float* w, const float* g, float* m, float* v,
                       float alpha, void* value, uint8_t* mask, int64_t n, bool stream) {
  const auto body = value == nullptr ? threshold_adam_body<T, false, false>
                    : stream         ? threshold_adam_body<T, true, true>
                                     : threshold_adam_body<T, true, false>;
  return body(rule, w, g, m, v, alpha, static_cast<T*>(value), mask, n);
}
