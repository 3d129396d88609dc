// A thread block computes kPixels pixels of kRows destination channels. For each tap that some of
// its pixels read and each panel of source channels, it stages the panel's pixels in shared memory;
// each warp then walks the live weights of its rows. Lanes are pixels: a weight is the same for all
// of a warp and meets sums that stay in registers.
#include <cstring>

#include "cuda/launch.h"
#include "cuda/sparse_conv2d.h"
#include "cuda/storage.h"

namespace sparsemtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 128;
constexpr int kWarpRows = 16;  // sums of a lane: kWarpRows · kPixels / 32 = 64 registers
constexpr int kRows = kWarps * kWarpRows;
constexpr int kLanePixels = kPixels / 32;
static_assert(kThreads % kPixels == 0, "staging gives each thread one pixel");

// A line of shared memory holds one channel of the tile: a word for each pixel in fp32, a word for
// two neighbouring pixels in the narrow types, which halves the loads. Lane l has pixels
// l · kPer + 32 · kPer · j + 0 .. kPer - 1.
template <typename T>
struct Line {
  static constexpr int kPer = 2;
  static constexpr int kWords = kPixels / 2;
  __device__ static void store(unsigned* line, int pixel, T value) {
    reinterpret_cast<T*>(line)[pixel] = value;
  }
  __device__ static void load(unsigned word, float* out) {
    T pair[2];
    memcpy(pair, &word, sizeof(word));
    out[0] = widen(pair[0]);
    out[1] = widen(pair[1]);
  }
};
template <>
struct Line<float> {
  static constexpr int kPer = 1;
  static constexpr int kWords = kPixels;
  __device__ static void store(unsigned* line, int pixel, float value) {
    memcpy(line + pixel, &value, sizeof(value));
  }
  __device__ static void load(unsigned word, float* out) { memcpy(out, &word, sizeof(word)); }
};

struct Pixel {
  int64_t batch;
  int y, x;
};

__device__ Pixel pixel_of(const ConvShape& s, int64_t index) {
  const int64_t plane = s.dest_height * s.dest_width, rest = index % plane;
  return {index / plane, static_cast<int>(rest / s.dest_width),
          static_cast<int>(rest % s.dest_width)};
}

// Where a tap of a destination pixel reads along one axis, or -1
__device__ int64_t source_of(int64_t dest, int64_t tap, int64_t stride, int64_t padding,
                             int64_t dilation, int64_t size, bool transposed) {
  int64_t at =
      transposed ? dest + padding - tap * dilation : dest * stride + tap * dilation - padding;
  if (transposed) {
    if (at < 0 || at % stride != 0) return -1;
    at /= stride;
  }
  return at >= 0 && at < size ? at : -1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sparse_conv2d_kernel(ConvShape s, PackedLists lists, const T* source, const T* bias, T* dest,
                         int activation) {
  using L = Line<T>;
  __shared__ unsigned panel[kPanel * L::kWords];
  const int64_t pixels = s.batch * s.dest_height * s.dest_width;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kPixels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows + warp * kWarpRows;
  const int64_t panels = (s.source_channels + kPanel - 1) / kPanel;
  const int64_t plane = s.source_height * s.source_width;
  const int own = threadIdx.x % kPixels;  // the pixel that this thread stages
  const bool there = tile + own < pixels;
  const Pixel p = pixel_of(s, there ? tile + own : 0);
  float sums[kWarpRows][kLanePixels] = {};

  for (int64_t tap = 0; tap < s.kernel_height * s.kernel_width; ++tap) {
    const int64_t y = source_of(p.y, tap / s.kernel_width, s.stride_y, s.padding_y, s.dilation_y,
                                s.source_height, s.transposed);
    const int64_t x = source_of(p.x, tap % s.kernel_width, s.stride_x, s.padding_x, s.dilation_x,
                                s.source_width, s.transposed);
    const bool live = there && y >= 0 && x >= 0;
    // Also the barrier behind which the panel of the tap before has been read by all.
    if (!__syncthreads_or(live)) continue;
    const T* at = source + p.batch * s.source_channels * plane + y * s.source_width + x;
    for (int64_t part = 0; part < panels; ++part) {
      if (part > 0) __syncthreads();
      for (int c = threadIdx.x / kPixels; c < kPanel; c += kThreads / kPixels) {
        const int64_t channel = part * kPanel + c;
        const bool used = live && channel < s.source_channels;
        L::store(panel + c * L::kWords, own, used ? at[channel * plane] : T());
      }
      __syncthreads();
      const int* starts = lists.starts + (tap * panels + part) * s.dest_channels;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        if (first_row + r >= s.dest_channels) break;
        const int last = starts[first_row + r + 1];
        for (int i = starts[first_row + r]; i < last; ++i) {
          const Entry entry = lists.entries[i];  // the same for every lane
          const unsigned* line = panel + entry.column * L::kWords + lane;
#pragma unroll
          for (int j = 0; j < kLanePixels / L::kPer; ++j) {
            float values[L::kPer];
            L::load(line[32 * j], values);
#pragma unroll
            for (int k = 0; k < L::kPer; ++k) sums[r][j * L::kPer + k] += entry.value * values[k];
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) {  // unrolled: sums are registers, which have no index
    const int64_t index = tile + (lane + 32 * (j / L::kPer)) * L::kPer + j % L::kPer;
    if (index >= pixels) continue;
    const Pixel out = pixel_of(s, index);
    const int64_t area = s.dest_height * s.dest_width;
    T* column = dest + out.batch * s.dest_channels * area + out.y * s.dest_width + out.x;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int64_t row = first_row + r;
      if (row >= s.dest_channels) break;
      float value = sums[r][j] + (bias == nullptr ? 0.0f : widen(bias[row]));
      if (activation > 0) value = value < 0.0f ? 0.0f : value;  // a NaN stays one
      if (activation > 1) value = value > 6.0f ? 6.0f : value;
      narrow(column + row * area, value);
    }
  }
}

}  // namespace

void sparse_conv2d(DType dtype, const ConvShape& s, const PackedLists& lists, const void* source,
                   const void* bias, void* dest, int activation, uintptr_t stream) {
  const char* who = "sparse_conv2d_cuda";
  const int64_t pixels = s.batch * s.dest_height * s.dest_width;
  if (pixels == 0 || s.dest_channels == 0) return;
  const int64_t tiles = (pixels + kPixels - 1) / kPixels;
  check_grid(who, tiles);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>((s.dest_channels + kRows - 1) / kRows));
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    SPARSEMTL_LAUNCH(sparse_conv2d_kernel<T>, grid, kThreads,
                     reinterpret_cast<cudaStream_t>(stream), s, lists,
                     static_cast<const T*>(source), static_cast<const T*>(bias),
                     static_cast<T*>(dest), activation);
    check_launch(who,
                 list_arguments("pixels", pixels, "source channels", s.source_channels, "channels",
                                s.dest_channels, "taps", s.kernel_height * s.kernel_width));
  });
}

}  // namespace sparsemtl::cuda
