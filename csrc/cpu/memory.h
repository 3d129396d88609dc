// Fresh output memory: what it costs to touch it first.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsemtl::cpu {

// Ask for 2 MiB pages under a large output before it is first written. torch's CPU allocator maps
// tensors above 32 MiB anew each time, and one fault per 4 KiB costs several times the kernel
// itself. A hint about memory that is mapped already: no contents change, failure is harmless.
inline void hint_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 12;
  constexpr int64_t kWorthwhile = 8 << 20;  // below, the pages are usually reused by malloc
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace sparsemtl::cpu
