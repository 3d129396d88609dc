// What every launcher needs on the host side. No torch headers: the stream is an argument.
//
// Kernels are launched through SPARSEMTL_LAUNCH and take dynamic shared memory from
// dynamic_shared(), so that the same files compile for the host, where tests run a block's threads
// as fibers between barriers (tests/ops/cuda_host).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparsemtl::cuda {

constexpr int64_t kMostBlocks = 2147483647;  // of a grid's first dimension

// Raise a failed launch with the kernel's name and arguments; to be called right after the launch.
inline void check_launch(const char* who, const std::string& arguments = "") {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(who) + "(" + arguments +
                             "): " + cudaGetErrorString(error));
  }
}

inline void check_grid(const char* who, int64_t blocks) {
  if (blocks > kMostBlocks) {
    throw std::invalid_argument(std::string(who) + ": Expected at most " +
                                std::to_string(kMostBlocks) + " blocks, got " +
                                std::to_string(blocks));
  }
}

// "name value, name value"
template <typename... Rest>
std::string list_arguments(const char* name, int64_t value, Rest... rest) {
  std::string text = std::string(name) + " " + std::to_string(value);
  if constexpr (sizeof...(rest) > 0) text += ", " + list_arguments(rest...);
  return text;
}

}  // namespace sparsemtl::cuda

#ifndef SPARSEMTL_CUDA_HOST
#define SPARSEMTL_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif
