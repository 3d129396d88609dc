// One table of kernels per instruction set, chosen once, when first asked for.
//
// A new op adds its entries to Kernels, its body to the three kernels_<isa>.cpp, and nothing here
// or in isa.cpp. SPARSEMTL_CPU_ISA = generic | avx2 | avx512 forces a table.
#pragma once

#include <string>
#include <vector>

#include "cpu/masking.h"
#include "cpu/roof.h"
#include "cpu/soft_threshold.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/threshold_adam.h"
#include "engine/rows.h"

namespace sparsemtl::cpu {

struct Kernels {
  const char* name;
  SoftThresholdKernels soft_threshold[3];  // by DType
  SparseConvKernels sparse_conv2d;
  ThresholdAdamKernel threshold_adam[3];  // by DType of the values
  RoofKernel roof;
  engine::RowKernels rows;
  MaskingKernel masking;
};

const Kernels& kernels_generic();
#ifdef SPARSEMTL_X86
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

// The table in use. Throws std::runtime_error where SPARSEMTL_CPU_ISA names none that runs here.
const Kernels& isa();

// Names of the tables that this machine can run, best first.
std::vector<std::string> usable_isas();

// Switch tables, for tests; throws std::invalid_argument for a name that cannot run here.
void force_isa(const std::string& name);

}  // namespace sparsemtl::cpu
