// Memory for large outputs that is mapped once and used again.
//
// malloc maps everything from 32 MiB on anew and unmaps it when freed, and touching fresh pages
// costs several times what an elementwise kernel does: at 20 M weights more than the whole
// forward and backward. Blocks given back wait here for the next output of their size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsemtl::cpu {

// From this size on malloc never reuses memory (DEFAULT_MMAP_THRESHOLD_MAX of glibc).
constexpr int64_t kLargeBytes = 32 << 20;
// Waiting blocks beyond this are unmapped, the oldest first.
constexpr int64_t kKeptBytes = 512 << 20;

class Block {  // owns its pages; gives them back when destroyed
 public:
  explicit Block(int64_t bytes);  // std::bad_alloc where the system has no more
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void* data_;
  int64_t size_;   // bytes asked for
  size_t mapped_;  // whole huge pages
};

int64_t waiting_bytes();  // of blocks that wait
void release_memory();    // unmaps them
int64_t mapped_blocks();  // mapped since the start, for tests
}  // namespace sparsemtl::cpu
