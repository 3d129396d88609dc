// Checks with the argument's name in the message. The callers are our own Python files, so these
// guard against a mistake there; users' mistakes are answered in sparsemtl/ops.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sparsemtl {

inline void check_count(const char* who, const char* argument, size_t expected, size_t got) {
  if (expected != got) {
    throw std::invalid_argument(std::string(who) + ": Expected " + argument + " to hold " +
                                std::to_string(expected) + " entries, got " + std::to_string(got));
  }
}

inline void check_pointer(const char* who, const char* argument, uintptr_t pointer, int64_t size) {
  if (pointer == 0 && size > 0) {
    throw std::invalid_argument(std::string(who) + ": Expected " + argument +
                                " to point at memory, got null");
  }
}

}  // namespace sparsemtl
