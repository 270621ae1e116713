// What a launch computes, in which order, and who computes it: integers only, the same on a CPU and on a GPU.
//
// An encoder of L layers is 7 L phases, with a barrier of the whole grid between two of them. In a phase each
// unit of work is computed by one block: block b has the units b, b + grid, ... A phase reads what phases
// before it wrote, and nothing that is written in it.
//
//   phase      computes                                     unit
//   qkv        qkv = x W^T + b                  [T, 3 h d]  rows x columns
//   attention  context                          [T, h d]    16 queries of a head of a sequence
//   out        parts of context W_t             [S, T, D]   rows x columns x part of the sum
//   norm 1     x = norm(sum of parts + b + x)   [T, D]      a row
//   up         inner = act(x W^T + b)           [T, n]      rows x columns
//   down       parts of inner W_t               [S, T, D]   rows x columns x part of the sum
//   norm 2     x = norm(sum of parts + b + x)   [T, D]      a row
#pragma once

#include "tile.h"

namespace dynabert::cuda {

enum class Step : int { kQkv, kAttention, kOut, kNorm1, kUp, kDown, kNorm2 };
constexpr int kSteps = 7;
constexpr int kMostLayers = 30;            // as many as fit into the 4 KB of a kernel's arguments
constexpr int kMostHidden = 4 * kThreads;  // a thread normalises four columns
// Small things in shared memory, in words of 4 bytes: a unit's bias, sums of a norm, where sequences begin.
constexpr int kSmallSums = kMostColumns, kSmallOffsets = kSmallSums + 2 * kWarps;
constexpr int kKeptSequences = 32;  // of more, offsets are read where they are
constexpr int kSmallWords = kSmallOffsets + kKeptSequences + 1;

/// Sizes of a unit of a product.
struct Tiling {
  uint16_t columns;  // of the output, a multiple of 8
  uint16_t depth;    // indices of the sum, a multiple of `kChunk`
};

/// A kept layer, with its extents.
struct Layer {
  const Bf16 *qkv_weight, *qkv_bias, *out_weight, *out_bias, *norm1_weight, *norm1_bias;
  const Bf16 *up_weight, *up_bias, *down_weight, *down_bias, *norm2_weight, *norm2_bias;
  int heads, neurons;
  Tiling qkv, out, up, down;
};

/// Arguments of the kernel.
struct Encoder {
  int tokens, hidden, head_size, layers;
  int sequences, longest;  // the most tokens of a sequence
  int buffer_bytes;        // of each of the two buffers in shared memory
  Activation activation;
  float eps, scale;        // of norms; of scores, times log2(e)
  const int64_t* offsets;  // [sequences + 1]
  Bf16* x;                 // [T, D], input and output
  Bf16 *qkv, *context, *inner;
  float* parts;
  uint32_t* barrier;
  Layer layer[kMostLayers];
};
static_assert(sizeof(Encoder) <= 4096, "a kernel's arguments");

/// One of a layer's four products.
struct Product {
  const Bf16* a;  // [T, >= depth]
  const Bf16* weight;
  const Bf16* bias;  // of an output in bfloat16
  Bf16* out;         // [T, columns]; without, sums go to the encoder's parts
  int columns, depth;
  bool rows;  // the weight's layout, see tile.h
  Activation activation;
  Tiling tiling;
};

HD bool is_product(Step step) {
  return step == Step::kQkv || step == Step::kOut || step == Step::kUp || step == Step::kDown;
}
HD Step step_of(int phase) { return static_cast<Step>(phase % kSteps); }
HD int phases(const Encoder& e) { return e.layers * kSteps; }

HD Product product(const Encoder& e, int phase) {
  const Layer& l = e.layer[phase / kSteps];
  const int wide = l.heads * e.head_size;
  switch (step_of(phase)) {
    case Step::kQkv:
      return {e.x, l.qkv_weight, l.qkv_bias, e.qkv, 3 * wide, e.hidden, true, Activation::kNone, l.qkv};
    case Step::kOut:
      return {e.context, l.out_weight, nullptr, nullptr, e.hidden, wide, false, Activation::kNone, l.out};
    case Step::kUp:
      return {e.x, l.up_weight, l.up_bias, e.inner, l.neurons, e.hidden, true, e.activation, l.up};
    default:
      return {e.inner,   l.down_weight, nullptr,           nullptr, e.hidden,
              l.neurons, false,         Activation::kNone, l.down};
  }
}

HD int column_tiles(const Product& p) { return ceil_div(p.columns, p.tiling.columns); }
HD int splits(const Product& p) { return ceil_div(p.depth, p.tiling.depth); }
HD int product_units(const Product& p, int tokens, int tile_rows) {
  return ceil_div(tokens, tile_rows) * column_tiles(p) * splits(p);
}

/// A tile of a product: from `row` and `column` on, over the indices from first to last.
struct Unit {
  int row, column, split, first, last;
};

/// Rows run fastest: blocks that share weights run together.
HD Unit product_unit(const Product& p, int tokens, int tile_rows, int number) {
  const int tiles = ceil_div(tokens, tile_rows), across = column_tiles(p);
  Unit u;
  u.row = number % tiles * tile_rows;
  u.column = number / tiles % across * p.tiling.columns;
  u.split = number / tiles / across;
  u.first = u.split * p.tiling.depth;
  u.last = smaller(p.depth, u.first + p.tiling.depth);
  return u;
}

/// Blocks of 512 bytes of a chunk of the unit's weights.
HD int chunk_blocks(const Product& p) { return p.rows ? p.tiling.columns / 8 : 8; }
HD int weight_bytes(const Product& p) { return p.tiling.depth / kChunk * chunk_blocks(p) * kBlockBytes; }

constexpr int kQueries = 16;  // of a unit of attention
HD int attention_units(const Encoder& e, int heads) {
  return e.sequences * heads * ceil_div(e.longest, kQueries);
}
struct AttentionUnit {
  int sequence, head, query;
};
HD AttentionUnit attention_unit(const Encoder& e, int heads, int number) {
  const int tiles = ceil_div(e.longest, kQueries);
  return {number / tiles / heads, number / tiles % heads, number % tiles * kQueries};
}

HD int units(const Encoder& e, int phase, int tile_rows) {
  const Step step = step_of(phase);
  if (is_product(step)) return product_units(product(e, phase), e.tokens, tile_rows);
  return step == Step::kAttention ? attention_units(e, e.layer[phase / kSteps].heads) : e.tokens;
}

// The grid's barrier: a counter that starts at zero. At each barrier every block adds its share; the sum of
// all shares is the highest bit, which flips when the last one comes, and all other bits are zero again.
// Nobody has to be told the value before its own addition, so nobody waits for an answer. A launch flips the
// bit an even number of times, so that the next one finds it as this one did.
constexpr uint32_t kFlip = 0x80000000u;
HD uint32_t barrier_share(int block, int grid) {
  return block == 0 ? kFlip - static_cast<uint32_t>(grid - 1) : 1u;
}
/// Whether all have come to barrier `number`, counted from 0.
HD bool barrier_passed(uint32_t counter, int number) { return counter / kFlip == (number % 2 ? 0u : 1u); }
HD int barriers(const Encoder& e) { return phases(e) - 1; }

/// A block's products, one after the other: their weights are fetched ahead, across barriers.
struct Cursor {
  int phase, number;
};

/// The cursor itself if it names a unit, else the block's next; its phase is `phases(e)` after the last.
HD Cursor settle(const Encoder& e, Cursor c, int block, int tile_rows) {
  while (c.phase < phases(e)) {
    if (is_product(step_of(c.phase)) && c.number < units(e, c.phase, tile_rows)) return c;
    c = {c.phase + 1, block};
  }
  return c;
}
HD Cursor after(const Encoder& e, Cursor c, int block, int grid, int tile_rows) {
  return settle(e, {c.phase, c.number + grid}, block, tile_rows);
}

}  // namespace dynabert::cuda
