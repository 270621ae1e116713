// Where things lie in the tiles that one `mma.m16n8k16` multiplies, and in shared memory on their way there.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"). With g = lane / 4 and t = lane % 4 a lane holds,
// as pairs of bfloat16:
//   A [16 x 16]: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)    and the element to the right of each
//   B [16 x 8]:  (2t, g), (2t + 8, g)                                  and the element below each
//   C [16 x 8]:  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)    float
//
// A sum does not mind the order of its terms. So where the instruction says index 2t, 2t + 1, 2t + 8, 2t + 9
// of its step s (of two), we put the indices 8t + 4s to 8t + 4s + 3 of a *chunk* of 32, in A and in B alike:
// the eight indices a lane needs in two steps are then adjacent, one load of 16 bytes, and an operand whose
// rows run along the sum goes from memory to registers as it is, without `ldmatrix`, swizzles or padding.
//
// Two layouts of a weight are multiplied (docs/architecture.md):
//   rows:    `weight [K, D]`, a row for each output column (qkv, up); block j of a chunk holds 8 columns:
//   lane (g, t) has
//            row 8j + g, indices 8t to 8t + 7.
//   columns: `weight_t [K, D]`, a row for each index of the sum (out, down); block i of a chunk holds, for 64
//   columns, the
//            indices congruent to i modulo 8: lane (g, t) has index 8t + i, columns 8g to 8g + 7. Two such
//            words are spliced into the pairs that B needs, for the columns 8g + j of instruction j: a
//            permutation of the 64 columns, undone where the sums are stored.
// A block is what a warp copies by one instruction, 16 bytes a lane, and is read back in that order: no bank
// conflicts.
#pragma once

#include "portable.h"

namespace dynabert::cuda {

constexpr int kChunk = 32;                           // indices of the sum
constexpr int kBlockBytes = kLanes * sizeof(Word4);  // of a block of a chunk
constexpr int kMostColumns = 64;                     // of a tile: 8 instructions wide

struct Fragment {
  uint32_t a[4];
};

HD int lane_row(int lane) { return lane / 4; }   // g
HD int lane_step(int lane) { return lane % 4; }  // t

/// Index within a chunk of the first of a lane's eight.
HD int chunk_index(int lane) { return 8 * lane_step(lane); }

/// Which element of the weight the 16 bytes of a lane in a block begin with.
struct Place {
  int index;   // of the sum
  int column;  // of the output
};
HD Place place_in_rows(int chunk, int block, int lane) {
  return {chunk * kChunk + chunk_index(lane), 8 * block + lane_row(lane)};
}
HD Place place_in_columns(int chunk, int block, int lane) {
  return {chunk * kChunk + chunk_index(lane) + block, 8 * lane_row(lane)};
}

/// Step s of the operand A: from 16 bytes of row g and 16 of row g + 8.
HD Fragment fragment_a(const Word4& upper, const Word4& lower, int s) {
  return {{upper.word[2 * s], lower.word[2 * s], upper.word[2 * s + 1], lower.word[2 * s + 1]}};
}

/// Floats between two rows of a tile of sums in shared memory: 8 more than a multiple of 32, so that the rows
/// of the four groups of a half-warp fall into different banks.
HD int sum_pitch(int columns) { return ceil_div(larger(columns, 8) - 8, 32) * 32 + 8; }

}  // namespace dynabert::cuda
