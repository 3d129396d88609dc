// A sparse weight [K][C / groups][taps] as lists of nonzeros that the convolution kernels walk.
//
// A part is what is computed together: the rows (output channels) of one group of the convolution,
// or an even share of them, where pixels are too few to keep all threads busy. A column is a (tap,
// channel) pair of the part's group, numbered tap · channels + c. Blocks follow this order where
// channels are many, so that tiles can skip a tap's blocks; where they are few, all taps of a
// channel stand together, because they read the same rows of x. Each part cuts its columns into
// blocks, small enough that the inputs of a block stay in the L1 cache. Within a block the rows
// stand by falling number of nonzeros, so that the inner loops have trip counts that the branch
// predictor learns; every row is there, those without nonzeros last, because the first and the last
// block of a part visit all of them.
//
// In a transposed list, for the input gradient, rows are input channels and columns are (tap,
// output channel).
#pragma once

#include <cstdint>

namespace sparsemtl::cpu {

struct PatternPart {
  int32_t first_block, n_blocks, first_row, n_rows, group;  // n_rows in units of `vector`
};
struct PatternBlock {
  int32_t first_column, n_columns;  // those with a nonzero, in SparseList::columns
  int32_t first_entry;              // in SparseList::rows and ::counts, n_rows of them
  int32_t tap_low, tap_high;        // taps of these columns, both inclusive
};
struct SparseList {
  int64_t n_parts, n_blocks, n_nonzeros;
  int64_t vector;                // rows that share a nonzero: 1, or V for the structure vector(V)
  const PatternPart* parts;      // [n_parts]
  const PatternBlock* blocks;    // [n_blocks]
  const int64_t* first_nonzero;  // [n_blocks]
  const int32_t* columns;        // tap · channels of a group + channel in the group
  const int32_t* rows;           // [n_blocks · n_rows] row in the part
  const int32_t* counts;         // [n_blocks · n_rows] nonzeros of that row in this block
  const uint16_t* positions;     // [n_nonzeros + 3] index into the block's columns
  const float* values;           // [(n_nonzeros + 3) · vector]
};

struct PackShape {  // of the weight [rows][channels][taps], where channels are those of one group
  int64_t groups, rows, channels, taps;
  int64_t vector;
  bool transposed;
  bool channel_major;  // order of columns in blocks: all taps of a channel together, or the reverse
};
struct PackTarget {  // what SparseList points to
  PatternPart* parts;
  PatternBlock* blocks;
  int64_t* first_nonzero;
  int32_t *columns, *rows, *counts;
  uint16_t* positions;
  float* values;
  int32_t*
      sources;  // [n_nonzeros] where the nonzero (the first of its vector) stands in the weight
};

// One bit per column of [ceil(rows / vector)][ceil(channels · taps / 64)]: set where any of the
// vector's weights is not zero (NaN is not). `keep`, one byte per weight, decides instead where it
// is given. Returns the number of bits set.
int64_t pattern_bits(const PackShape& shape, const float* weight, const uint8_t* keep,
                     uint64_t* bits, int threads);

// Fill the lists. block_ends: [n_blocks] where each block of a part ends, in the order of columns
void pack_pattern(const PackShape& shape, const float* weight, const uint64_t* bits,
                  const int32_t* block_ends, int64_t n_blocks, const PackTarget& target,
                  int threads);

// values of a packed list from a weight of the same pattern
void refresh_values(const PackShape& shape, const float* weight, const int32_t* sources,
                    int64_t n_nonzeros, float* values, int threads);

// dense[...] = grad at its source, 0 elsewhere. Lists of vector 1.
void spread_values(const float* grad, const int32_t* sources, int64_t n_nonzeros, float* dense,
                   int64_t n_dense, int threads);

}  // namespace sparsemtl::cpu
