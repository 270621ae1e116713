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
// Small things in shared memory, in words of 4 bytes: a unit's bias and scales, sums of a norm, an mbarrier
// of each buffer, where sequences begin.
constexpr int kSmallScales = kMostColumns, kSmallSums = 2 * kMostColumns;
constexpr int kSmallBarriers = kSmallSums + 2 * kWarps, kSmallOffsets = kSmallBarriers + 4;
constexpr int kKeptSequences = 32;  // of more, offsets are read where they are
constexpr int kSmallWords = kSmallOffsets + kKeptSequences + 1;

/// Groups of warps along a tile's rows; warps of a group share the sum. `wide` with wgmma.
HD constexpr int row_groups(int tile_rows, bool wide) { return tile_rows == 64 ? (wide ? 4 : 2) : 1; }

/// Chunks of A that a warp's registers hold; with wgmma all of them are multiplied, the sum's or zeros.
HD constexpr int chunks_ahead(bool wide) { return wide ? 4 : 3; }

/// Sizes of a unit of a product.
struct Tiling {
  uint16_t columns;  // of the output, a multiple of 8
  uint16_t depth;    // indices of the sum, a multiple of `kChunk`
};

/// A kept layer, with its extents. The weights of products are packed (tile.h).
struct Layer {
  const char* qkv_weight;
  const Bf16* qkv_bias;
  const char* out_weight;
  const Bf16 *out_bias, *norm1_weight, *norm1_bias;
  const char* up_weight;
  const Bf16* up_bias;
  const char* down_weight;
  const Bf16 *down_bias, *norm2_weight, *norm2_bias;
  int heads, neurons;
  Tiling qkv, out, up, down;
};

/// Arguments of the kernel.
struct Encoder {
  int tokens, hidden, head_size, layers;
  int heads, neurons;      // of the packed weights
  bool int8;               // packed weights, else bfloat16
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
  const Bf16* a;        // [T, >= depth]
  const char* weight;   // the first block
  const float* scales;  // of int8, of each column
  const Bf16* bias;     // of an output in bfloat16
  Bf16* out;            // [T, columns]
  bool in_parts;        // or sums of parts of the sum go to the encoder's parts
  int columns, depth;
  int64_t stride;  // bytes between the weight's column blocks
  bool int8;
  Activation activation;
  Tiling tiling;
};

HD bool is_product(Step step) {
  return step == Step::kQkv || step == Step::kOut || step == Step::kUp || step == Step::kDown;
}
HD Step step_of(int phase) { return static_cast<Step>(phase % kSteps); }
HD int phases(const Encoder& e) { return e.layers * kSteps; }

/// A product with a weight that is packed for so many columns and indices in all.
HD Product with_weight(Product p, const char* packed, bool int8, int columns, int depth) {
  p.weight = packed + scale_bytes(int8, columns);
  p.scales = int8 ? reinterpret_cast<const float*>(packed) : nullptr;
  p.stride = run_stride(int8, depth);
  p.int8 = int8;
  return p;
}

HD Product product(const Encoder& e, int phase) {
  const Layer& l = e.layer[phase / kSteps];
  const int wide = l.heads * e.head_size, widest = e.heads * e.head_size;
  Product p{};
  switch (step_of(phase)) {
    case Step::kQkv:
      p.a = e.x, p.bias = l.qkv_bias, p.out = e.qkv, p.columns = 3 * wide, p.depth = e.hidden;
      p.tiling = l.qkv;
      return with_weight(p, l.qkv_weight, e.int8, 3 * widest, e.hidden);
    case Step::kOut:
      p.a = e.context, p.in_parts = true, p.columns = e.hidden, p.depth = wide;
      p.tiling = l.out;
      return with_weight(p, l.out_weight, e.int8, e.hidden, widest);
    case Step::kUp:
      p.a = e.x, p.bias = l.up_bias, p.out = e.inner, p.columns = l.neurons, p.depth = e.hidden;
      p.activation = e.activation;
      p.tiling = l.up;
      return with_weight(p, l.up_weight, e.int8, e.neurons, e.hidden);
    default:
      p.a = e.inner, p.in_parts = true, p.columns = e.hidden, p.depth = l.neurons;
      p.tiling = l.down;
      return with_weight(p, l.down_weight, e.int8, e.hidden, e.neurons);
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
  int blocks;  // of 8 columns: the tile's, or fewer at the edge
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
  u.blocks = ceil_div(smaller(p.tiling.columns, p.columns - u.column), 8);
  return u;
}

HD int unit_chunks(const Unit& u) { return ceil_div(u.last - u.first, kChunk); }
/// Bytes of each of a unit's column blocks, in shared memory too.
HD int unit_run(const Product& p, const Unit& u) { return unit_chunks(u) * block_bytes(p.int8); }
/// Of a tile's weights.
HD int weight_bytes(const Product& p) {
  return p.tiling.depth / kChunk * (p.tiling.columns / 8) * block_bytes(p.int8);
}

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
