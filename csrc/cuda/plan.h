// Sizes of the units of a launch, chosen by a model of what they cost. On the host; nothing of it was
// measured yet.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "schedule.h"

namespace dynabert::cuda {

/// A kernel: rows of a tile of a product, and how its warps share them.
struct TileShape {
  int row_groups, fragments;
  int rows() const { return 16 * row_groups * fragments; }
  int parts() const { return kWarps / row_groups; }
};
/// As many kernels are compiled, each for every sub-network; `encoder.cu` instantiates these.
constexpr TileShape kTileShapes[] = {{1, 1}, {1, 2}, {2, 2}};

/// What a GPU has.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

struct Plan {
  TileShape tile;
  int blocks;
  int parts;  // of the longest sum: what `Encoder::parts` must have room for, times T D floats
};

constexpr int kSmallBytes = 512;  // before the two buffers: `kSmallWords`, rounded up
static_assert(kSmallWords * sizeof(float) <= kSmallBytes);

/// Bytes that a unit of attention takes of a buffer.
constexpr int attention_bytes(int head_size) {
  return kWarps * kQueries * (head_size + 6) * static_cast<int>(sizeof(float));
}

namespace plan_detail {

// Rates of an H200's multiprocessor, from data sheets and measurements of others: its share of the L2
// cache, 5.5 TB/s over 132; shared memory, 128 bytes a cycle; `mma.sync` at bfloat16, 1024 products a cycle,
// two thirds of it reached.
constexpr double kL2 = 42, kShared = 218, kProducts = 1200;  // bytes, bytes, products in a nanosecond
constexpr double kLatency = 700;                             // ns: the first load, the last store

inline int slab_bytes(TileShape tile, int columns) {
  return tile.parts() * tile.rows() * sum_pitch(columns) * static_cast<int>(sizeof(float));
}

/// Nanoseconds of a phase; infinite if a unit does not fit.
inline double cost(const Product& p, int tokens, TileShape tile, int blocks, int buffer_bytes) {
  const int columns = p.tiling.columns, depth = p.tiling.depth;
  if (weight_bytes(p) > buffer_bytes || slab_bytes(tile, columns) > buffer_bytes) return INFINITY;
  const int rounds = ceil_div(product_units(p, tokens, tile.rows()), blocks);
  const double a = 2.0 * tile.rows() * depth, weights = 2.0 * columns * depth;
  // Weights come ahead of the barrier, but over the same wires: half of their time is hidden. Products begin
  // when the first of A is there; where chunks are no multiple of the parts, some warps wait.
  const int steps = ceil_div(ceil_div(depth, kChunk), tile.parts()) * tile.parts() * kChunk;
  const double loads = (a + weights / 2) / kL2, products = 1.0 * tile.rows() * columns * steps / kProducts;
  const double unit = kLatency + std::max(loads, products) + 2.0 * slab_bytes(tile, columns) / kShared;
  const double adding = p.rows ? 0 : 4.0 * splits(p) * ceil_div(tokens, blocks) * p.columns / kL2;
  return rounds * unit + adding;
}

/// The cheapest tiling of a product, and its cost.
inline double choose(Product p, int tokens, TileShape tile, int blocks, int buffer_bytes, Tiling& best) {
  double least = INFINITY;
  auto consider = [&](int columns, int depth) {
    p.tiling = {static_cast<uint16_t>(columns), static_cast<uint16_t>(depth)};
    const double found = cost(p, tokens, tile, blocks, buffer_bytes);
    if (found < least) least = found, best = p.tiling;
  };
  if (p.rows) {
    for (int columns = 8; columns <= kMostColumns; columns += 8)
      consider(columns, ceil_div(p.depth, kChunk) * kChunk);
  } else {
    const int chunks = ceil_div(p.depth, kChunk);
    for (int parts = 1; parts <= std::min(16, chunks); ++parts)
      consider(kMostColumns, ceil_div(chunks, parts) * kChunk);
  }
  return least;
}

}  // namespace plan_detail

/// Why the kernel cannot compute the encoder, or nothing.
inline std::string why_not(const Encoder& e) {
  auto text = [](const char* what, int given, const std::string& allowed) {
    return std::string(what) + " must be " + allowed + ", got " + std::to_string(given);
  };
  if (e.layers < 1 || e.layers > kMostLayers)
    return text("layers", e.layers, "1 to " + std::to_string(kMostLayers));
  if (e.hidden % 8 || e.hidden < 8 || e.hidden > kMostHidden)
    return text("hidden_size", e.hidden, "a multiple of 8 up to " + std::to_string(kMostHidden));
  if (e.head_size != 32 && e.head_size != 64) return text("head_size", e.head_size, "32 or 64");
  if (e.tokens < 1) return text("tokens", e.tokens, "1 or more");
  for (int i = 0; i < e.layers; ++i) {
    if (e.layer[i].heads < 1) return text("heads", e.layer[i].heads, "1 or more");
    if (e.layer[i].neurons < 8 || e.layer[i].neurons % 8)
      return text("neurons", e.layer[i].neurons, "a multiple of 8");
  }
  return "";
}

/// Fills in the encoder's tilings and buffer size; throws std::invalid_argument where it cannot be computed.
/// `tile_rows`: the kernel with tiles of so many rows, 0 for the one that should be fastest.
inline Plan plan(Encoder& e, const Device& device, int tile_rows = 0) {
  using namespace plan_detail;
  if (const std::string wrong = why_not(e); !wrong.empty()) throw std::invalid_argument(wrong);
  e.buffer_bytes = (device.shared_bytes - kSmallBytes) / 2 / 128 * 128;
  Encoder best = e;
  Plan result{};
  double least = INFINITY;
  for (TileShape tile : kTileShapes) {
    if (tile_rows && tile.rows() != tile_rows) continue;
    double total = 0;
    for (int phase = 0; phase < phases(e); ++phase) {
      if (!is_product(step_of(phase))) continue;
      Layer& l = e.layer[phase / kSteps];
      Tiling* tilings[] = {&l.qkv, nullptr, &l.out, nullptr, &l.up, &l.down, nullptr};
      total += choose(product(e, phase), e.tokens, tile, device.multiprocessors, e.buffer_bytes,
                      *tilings[phase % kSteps]);
    }
    if (total < least) least = total, result.tile = tile, best = e;
  }
  if (least == INFINITY || attention_bytes(e.head_size) > e.buffer_bytes) {
    throw std::invalid_argument("the kernel needs more shared memory than the " +
                                std::to_string(device.shared_bytes) + " bytes of a block on this GPU");
  }
  e = best;
  result.blocks = 1;
  for (int phase = 0; phase < phases(e); ++phase) {
    result.blocks = std::max(result.blocks, units(e, phase, result.tile.rows()));
    if (is_product(step_of(phase))) result.parts = std::max(result.parts, splits(product(e, phase)));
  }
  result.blocks = std::min(result.blocks, device.multiprocessors);
  return result;
}

}  // namespace dynabert::cuda
