#include "cpu/memory.h"

#include <sys/mman.h>

#include <deque>
#include <mutex>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace sparsemtl::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;

// Under the sanitizer, what lies behind a block's bytes is out of bounds like what lies behind an
// array, and so is all of a block that waits.
void allow(void* data, size_t bytes, size_t mapped) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data, mapped);
  __asan_unpoison_memory_region(data, bytes);
#else
  (void)data, (void)bytes, (void)mapped;
#endif
}

struct Pages {
  void* data;
  size_t bytes;
};

struct Waiting {
  std::mutex mutex;
  std::deque<Pages> blocks;  // the oldest first
  size_t bytes = 0;
  int64_t mapped = 0;
};

Waiting& waiting() {
  static Waiting* state = new Waiting;  // never destroyed: tensors may outlive static objects
  return *state;
}

// Mapped at a multiple of the huge page, so that all of it can be huge pages.
void* map(size_t bytes) {
  const size_t room = bytes + kHugePage;
  void* found = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(found);
  const uintptr_t aligned = (begin + kHugePage - 1) & ~(kHugePage - 1);
  if (aligned > begin) munmap(found, aligned - begin);
  const uintptr_t end = aligned + bytes, last = begin + room;
  if (last > end) munmap(reinterpret_cast<void*>(end), last - end);
  void* data = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // a wish; small pages serve as well
#endif
  return data;
}

void drop_oldest(Waiting& state) {
  const Pages oldest = state.blocks.front();
  state.blocks.pop_front();
  state.bytes -= oldest.bytes;
  allow(oldest.data, oldest.bytes, oldest.bytes);  // whoever is given these addresses next
  munmap(oldest.data, oldest.bytes);
}

}  // namespace

Block::Block(int64_t bytes)
    : data_(nullptr),
      size_(bytes),
      mapped_((static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage) {
  Waiting& state = waiting();
  const std::lock_guard<std::mutex> lock(state.mutex);
  for (auto at = state.blocks.rbegin(); at != state.blocks.rend(); ++at) {  // the warmest first
    if (at->bytes != mapped_) continue;
    data_ = at->data;
    state.bytes -= mapped_;
    state.blocks.erase(std::next(at).base());
    allow(data_, static_cast<size_t>(size_), mapped_);
    return;
  }
  data_ = map(mapped_);
  ++state.mapped;
  allow(data_, static_cast<size_t>(size_), mapped_);
}

Block::~Block() {
  Waiting& state = waiting();
  const std::lock_guard<std::mutex> lock(state.mutex);
  allow(data_, 0, mapped_);
  state.blocks.push_back({data_, mapped_});
  state.bytes += mapped_;
  while (state.bytes > static_cast<size_t>(kKeptBytes)) drop_oldest(state);
}

int64_t waiting_bytes() {
  Waiting& state = waiting();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return static_cast<int64_t>(state.bytes);
}

int64_t mapped_blocks() {
  Waiting& state = waiting();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.mapped;
}

void release_memory() {
  Waiting& state = waiting();
  const std::lock_guard<std::mutex> lock(state.mutex);
  while (!state.blocks.empty()) drop_oldest(state);
}

}  // namespace sparsemtl::cpu
