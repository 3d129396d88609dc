#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sparsemtl::cpu {
namespace {

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#ifdef SPARSEMTL_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kernels_avx512());
  }
  if (avx2) found.push_back(&kernels_avx2());
#endif
  found.push_back(&kernels_generic());
  return found;
}

const Kernels& named(const std::string& name, const char* who) {
  std::string names;
  for (const Kernels* kernels : usable()) {
    if (name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument(std::string(who) + ": Expected one of " + names +
                              " on this machine, got '" + name + "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& isa() {
  const Kernels* kernels = current.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("SPARSEMTL_CPU_ISA");
    const bool open = wanted == nullptr || *wanted == '\0';
    kernels = open ? usable().front() : &named(wanted, "SPARSEMTL_CPU_ISA");
    current.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

void force_isa(const std::string& name) { current.store(&named(name, "force_isa")); }

}  // namespace sparsemtl::cpu
