// Lists from bits in three launches: count, prefix sum, fill. One warp serves one block of a row.
#include "cuda/launch.h"
#include "cuda/pack_pattern.h"

namespace sparsemtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kScan = 512;  // starts that the prefix sum takes at a time

struct Place {  // what a warp serves
  int64_t row, tap, channel;
};

__device__ Place place_of(const PackShape& shape, int64_t panels, int64_t slot) {
  const int64_t block = slot / shape.rows;
  return {slot % shape.rows, block / panels, block % panels * kPanel};
}

__device__ bool alive(const PackShape& shape, const Place& place, const uint8_t* bits,
                      int64_t channel, int64_t* source) {
  if (channel >= shape.channels) return false;
  *source =
      place.row * shape.row_stride + channel * shape.channel_stride + place.tap * shape.tap_stride;
  return (bits[*source / 8] >> (*source % 8)) & 1;
}

// starts[slot] = live weights of the slot
__global__ void __launch_bounds__(kThreads)
    count_kernel(PackShape shape, int64_t panels, int64_t slots, const uint8_t* bits, int* starts) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (slot >= slots) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const Place place = place_of(shape, panels, slot);
  int count = 0;
  for (int part = 0; part < kPanel; part += 32) {
    int64_t source;
    const bool live = alive(shape, place, bits, place.channel + part + lane, &source);
    count += __popc(__ballot_sync(0xffffffffu, live));
  }
  if (lane == 0) starts[slot] = count;
}

// starts[slot] = live weights of the slots before it; starts[slots] = all. One block.
__global__ void __launch_bounds__(kScan) scan_kernel(int64_t slots, int* starts) {
  __shared__ int sums[2][kScan];
  int carry = 0;
  for (int64_t first = 0; first < slots; first += kScan) {
    const int64_t slot = first + threadIdx.x;
    const int own = slot < slots ? starts[slot] : 0;
    sums[0][threadIdx.x] = own;
    int from = 0;
    for (int reach = 1; reach < kScan; reach *= 2) {
      __syncthreads();
      const int before = threadIdx.x >= reach ? sums[from][threadIdx.x - reach] : 0;
      sums[1 - from][threadIdx.x] = sums[from][threadIdx.x] + before;
      from = 1 - from;
    }
    __syncthreads();
    if (slot < slots) starts[slot] = carry + sums[from][threadIdx.x] - own;
    carry += sums[from][kScan - 1];
    __syncthreads();  // before the sums are overwritten
  }
  if (threadIdx.x == 0) starts[slots] = carry;
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(PackShape shape, int64_t panels, int64_t slots, const uint8_t* bits,
                const float* weight, PackedLists lists) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (slot >= slots) return;
  const int lane = threadIdx.x % 32;
  const Place place = place_of(shape, panels, slot);
  int64_t at = lists.starts[slot];
  for (int part = 0; part < kPanel; part += 32) {
    int64_t source = 0;
    const bool live = alive(shape, place, bits, place.channel + part + lane, &source);
    const unsigned found = __ballot_sync(0xffffffffu, live);
    const int64_t own = at + __popc(found & ((1u << lane) - 1));
    if (live && own < lists.capacity) {
      lists.entries[own] = {part + lane, weight[source]};
      lists.sources[own] = static_cast<int>(source);
    }
    at += __popc(found);
  }
}

__global__ void __launch_bounds__(kThreads)
    refresh_kernel(PackedLists lists, int64_t slots, const float* weight) {
  const int64_t count = min(static_cast<int64_t>(lists.starts[slots]), lists.capacity);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    lists.entries[i].value = weight[lists.sources[i]];
  }
}

}  // namespace

void pack_pattern(const PackShape& shape, const uint8_t* bits, const float* weight,
                  const PackedLists& lists, uintptr_t stream) {
  const int64_t panels = panels_of(shape), slots = shape.rows * shape.taps * panels;
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const int64_t blocks = (slots + kWarps - 1) / kWarps;
  const std::string given =
      list_arguments("rows", shape.rows, "channels", shape.channels, "taps", shape.taps);
  check_grid("pack_pattern_cuda", blocks);
  const auto grid = static_cast<unsigned>(blocks);
  if (slots > 0) {
    SPARSEMTL_LAUNCH(count_kernel, grid, kThreads, on, shape, panels, slots, bits, lists.starts);
    check_launch("pack_pattern_cuda: count", given);
  }
  SPARSEMTL_LAUNCH(scan_kernel, 1, kScan, on, slots, lists.starts);
  check_launch("pack_pattern_cuda: scan", given);
  if (slots > 0) {
    SPARSEMTL_LAUNCH(fill_kernel, grid, kThreads, on, shape, panels, slots, bits, weight, lists);
    check_launch("pack_pattern_cuda: fill", given);
  }
}

void refresh_values(const PackedLists& lists, int64_t slots, const float* weight,
                    uintptr_t stream) {
  if (lists.capacity == 0) return;
  const int64_t blocks = (lists.capacity + kThreads - 1) / kThreads;
  const auto grid = static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
  SPARSEMTL_LAUNCH(refresh_kernel, grid, kThreads, reinterpret_cast<cudaStream_t>(stream), lists,
                   slots, weight);
  check_launch("refresh_values_cuda", list_arguments("capacity", lists.capacity));
}

}  // namespace sparsemtl::cuda
