// What every launcher needs on the host side. No torch headers: the stream is an argument.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparsemtl::cuda {

// Raise a failed launch with the op's name; to be called right after the launch.
inline void check_launch(const char* who) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(who) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace sparsemtl::cuda
