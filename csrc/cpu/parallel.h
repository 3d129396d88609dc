// Work on many tensors, cut by size and never by thread, so that bits do not depend on threads.
#pragma once

#include <cstdint>
#include <vector>

namespace sparsemtl::cpu {

struct Chunk {  // elements [at, at + size) of tensor `tensor`
  int64_t tensor, at, size;
};

// The chunk table of tensors of these sizes, in tensor order; an empty tensor has no chunk.
inline std::vector<Chunk> chunk_table(const std::vector<int64_t>& sizes, int64_t length) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t at = 0; at < sizes[i]; at += length) {
      const int64_t rest = sizes[i] - at;
      chunks.push_back({static_cast<int64_t>(i), at, rest < length ? rest : length});
    }
  }
  return chunks;
}

// body(c) for every chunk index c, on at most `threads` threads.
template <typename Body>
void for_each_chunk(int64_t count, int threads, const Body& body) {
  if (count <= 1 || threads <= 1) {  // a parallel region costs more than a small tensor
    for (int64_t c = 0; c < count; ++c) body(c);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < count; ++c) body(c);
}

}  // namespace sparsemtl::cpu
