// Where things lie in the tiles that tensor cores multiply, in shared memory and in the packed weights.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"). With g = lane / 4 and t = lane % 4 a lane holds,
// as pairs of bfloat16:
//   A [16 x 16]: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)    and the element to the right of each
//   B [16 x 8]:  (2t, g), (2t + 8, g)                                  and the element below each
//   C [16 x 8]:  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)    float
// `wgmma` has 64 rows: those of A and C are 16 for each of four warps, as above; B is read from shared
// memory.
//
// A sum does not mind the order of its terms. So where the instruction says index 2t, 2t + 1, 2t + 8, 2t + 9
// of its step s (of two), we put the indices 8t + 4s to 8t + 4s + 3 of a *chunk* of 32, in A and in B alike:
// the eight indices a lane needs in two steps are then adjacent, one load of 16 bytes, and A goes from memory
// to registers as it is.
//
// A weight is [output column, index of the sum] here, whichever way torch has it, and packed once into blocks
// of 8 columns and a chunk. The blocks of 8 columns lie one behind the other, at a distance that the whole
// weight gives: a prefix of the columns is the first *column blocks*, a prefix of the sum the first blocks in
// each. A block is
//   bfloat16: four core matrices [8 columns][16 bytes]; word t of matrix q has the indices 8t + 2q and the
//             next. Matrices 2s and 2s + 1 are the operand B of step s: one `ldmatrix` gives both steps to
//             `mma.sync`, and `wgmma` reads them where they lie, as core matrices that are not swizzled.
//   int8:     [8 columns][32 indices]: the 8 bytes of a lane are adjacent, as its 16 of A are.
// In memory int8 weights come behind a scale for each column of the whole weight, in float. So a tile's
// weights are one contiguous run for each 8 columns, and all reads from shared memory are without conflicts.
#pragma once

#include "portable.h"

namespace dynabert::cuda {

constexpr int kChunk = 32;                  // indices of the sum
constexpr int kMostColumns = 64;            // of a tile: 8 instructions wide
constexpr int kCoreBytes = 8 * 16;          // of a core matrix
constexpr int kStepBytes = 2 * kCoreBytes;  // of B in one step

struct Fragment {
  uint32_t a[4];
};

HD int lane_row(int lane) { return lane / 4; }   // g
HD int lane_step(int lane) { return lane % 4; }  // t

/// Index within a chunk of the first of a lane's eight.
HD int chunk_index(int lane) { return 8 * lane_step(lane); }

/// Bytes of a block of 8 columns and a chunk.
HD constexpr int block_bytes(bool int8) { return 8 * kChunk * (int8 ? 1 : 2); }

/// Bytes between two column blocks of a weight with so many indices in all.
HD int64_t run_stride(bool int8, int depth) {
  return static_cast<int64_t>(ceil_div(depth, kChunk)) * block_bytes(int8);
}
/// Bytes of the scales, before the first block.
HD int64_t scale_bytes(bool int8, int columns) {
  return int8 ? static_cast<int64_t>(ceil_div(columns, 8)) * 8 * static_cast<int>(sizeof(float)) : 0;
}

/// Where an element of a weight [columns, depth] is in the packed one, in bytes.
HD int64_t packed_offset(bool int8, int columns, int depth, int column, int index) {
  const int at = index % kChunk, row = column % 8;
  const int inside = int8 ? row * kChunk + at : at % 8 / 2 * kCoreBytes + row * 16 + at / 8 * 4 + at % 2 * 2;
  return scale_bytes(int8, columns) + column / 8 * run_stride(int8, depth) +
         static_cast<int64_t>(index / kChunk) * block_bytes(int8) + inside;
}

/// Step s of the operand A: from 16 bytes of row g and 16 of row g + 8.
HD Fragment fragment_a(const Word4& upper, const Word4& lower, int s) {
  return {{upper.word[2 * s], lower.word[2 * s], upper.word[2 * s + 1], lower.word[2 * s + 1]}};
}

/// Two of four int8 as bfloat16, exactly. Behind the exponent of 128 the lower seven bits are 128 more than
/// they say, and the sign bit is worth -128: 0x4300 is 128 and 0x4380 is 256.
HD uint32_t widen(uint32_t four, bool upper) {
  const uint32_t two = spread_bytes(four, upper);
  return add_bf16((two & 0x007f007fu) | 0x43004300u, (two & 0x00800080u) | 0xc300c300u);
}

/// What tells `wgmma` where B begins and how its core matrices lie (PTX ISA, "Matrix descriptor"): those that
/// follow along the sum at `kCoreBytes`, those of the next 8 columns at `run` bytes; nothing is swizzled.
HD uint64_t describe(uint32_t address, int run) {
  return (address >> 4 & 0x3fffu) | static_cast<uint64_t>(kCoreBytes >> 4) << 16 |
         static_cast<uint64_t>(run >> 4 & 0x3fff) << 32;
}

/// Floats between two rows of a tile of sums in shared memory: 8 more than a multiple of 32, so that the rows
/// of the four groups of a half-warp fall into different banks.
HD int sum_pitch(int columns) { return ceil_div(larger(columns, 8) - 8, 32) * 32 + 8; }

}  // namespace dynabert::cuda
