// Sizes of the units of a launch, chosen by a model of what they cost. On the host; nothing of it was
// measured yet.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "schedule.h"

namespace dynabert::cuda {

/// Rows of a tile of a product. As many kernels are compiled, for each type of weights; `encoder.cu`
/// instantiates these.
constexpr int kTileRows[] = {16, 32, 64};

/// What a GPU has.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  bool wgmma;
};

struct Plan {
  int tile_rows;
  int blocks;
  int parts;  // of the longest sum: what `Encoder::parts` must have room for, times T D floats
};

constexpr int kSmallBytes = 768;  // before the two buffers: `kSmallWords`, rounded up
static_assert(kSmallWords * sizeof(float) <= kSmallBytes);

/// Bytes that a unit of attention takes of a buffer.
constexpr int attention_bytes(int head_size) {
  return kWarps * kQueries * (head_size + 6) * static_cast<int>(sizeof(float));
}

namespace plan_detail {

// Rates of an H200's multiprocessor, from data sheets and measurements of others: its share of the L2
// cache, 5.5 TB/s over 132; shared memory, 128 bytes a cycle; bfloat16 on tensor cores, 2048 products a cycle
// by `wgmma` and half of it by `mma.sync`, two thirds of both reached. Below 32 columns a `wgmma` takes as
// long as of 32. An int8 is made a bfloat16 in a sixteenth of an instruction of a warp, of which four begin
// in a cycle.
constexpr double kL2 = 42, kShared = 218;                                 // bytes in a nanosecond
constexpr double kProducts = 1200, kWideProducts = 2400, kWidened = 112;  // in a nanosecond
constexpr int kLeastWide = 32;
constexpr double kLatency = 700;  // ns: the first load, the last store

/// Of all parts of a tile's sums, at most: a GPU with `wgmma` may run code that has none.
inline int slab_bytes(int tile_rows, int columns) {
  return kWarps / row_groups(tile_rows, false) * tile_rows * sum_pitch(columns) *
         static_cast<int>(sizeof(float));
}

/// Nanoseconds of a phase; infinite if a unit does not fit.
inline double cost(const Product& p, int tokens, int tile_rows, const Device& device, int buffer_bytes) {
  const int columns = p.tiling.columns, depth = p.tiling.depth, blocks = device.multiprocessors;
  if (weight_bytes(p) > buffer_bytes || slab_bytes(tile_rows, columns) > buffer_bytes) return INFINITY;
  const bool wide = device.wgmma && tile_rows == 64 && !p.int8;
  const int groups = row_groups(tile_rows, wide), parts = kWarps / groups;
  const int rounds = ceil_div(product_units(p, tokens, tile_rows), blocks);
  // Weights come ahead of the barrier, but over the same wires: half of their time is hidden. Products begin
  // when the first of A is there; where chunks are no multiple of the parts, some warps wait.
  const double loads = (2.0 * tile_rows * depth + weight_bytes(p) / 2.0) / kL2;
  const int together = parts * (wide ? chunks_ahead(wide) : 1) * kChunk;
  const int steps = ceil_div(depth, together) * together;
  const int counted = wide ? std::max(columns, kLeastWide) : columns;
  double products = 1.0 * tile_rows * counted * steps / (wide ? kWideProducts : kProducts);
  if (p.int8) products += 1.0 * groups * columns * steps / kWidened;
  const double slabs = 2.0 * parts * tile_rows * sum_pitch(columns) * sizeof(float) / kShared;
  const double unit = kLatency + std::max(loads, products) + slabs;
  const double adding = p.in_parts ? 4.0 * splits(p) * ceil_div(tokens, blocks) * p.columns / kL2 : 0;
  return rounds * unit + adding;
}

/// The cheapest tiling of a product, and its cost.
inline double choose(Product p, int tokens, int tile_rows, const Device& device, int buffer_bytes,
                     Tiling& best) {
  double least = INFINITY;
  const int chunks = ceil_div(p.depth, kChunk), most_parts = p.in_parts ? std::min(16, chunks) : 1;
  for (int columns = 8; columns <= kMostColumns; columns += 8) {
    for (int parts = 1; parts <= most_parts; ++parts) {
      p.tiling = {static_cast<uint16_t>(columns), static_cast<uint16_t>(ceil_div(chunks, parts) * kChunk)};
      const double found = cost(p, tokens, tile_rows, device, buffer_bytes);
      if (found < least) least = found, best = p.tiling;
    }
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
    const Layer& l = e.layer[i];
    if (l.heads < 1 || l.heads > e.heads) return text("heads", l.heads, "1 to " + std::to_string(e.heads));
    if (l.neurons < 8 || l.neurons % 8 || l.neurons > e.neurons)
      return text("neurons", l.neurons, "a multiple of 8 up to " + std::to_string(e.neurons));
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
  for (int rows : kTileRows) {
    if (tile_rows && rows != tile_rows) continue;
    double total = 0;
    for (int phase = 0; phase < phases(e); ++phase) {
      if (!is_product(step_of(phase))) continue;
      Layer& l = e.layer[phase / kSteps];
      Tiling* tilings[] = {&l.qkv, nullptr, &l.out, nullptr, &l.up, &l.down, nullptr};
      total += choose(product(e, phase), e.tokens, rows, device, e.buffer_bytes, *tilings[phase % kSteps]);
    }
    if (total < least) least = total, result.tile_rows = rows, best = e;
  }
  if (least == INFINITY || attention_bytes(e.head_size) > e.buffer_bytes) {
    throw std::invalid_argument("the kernel needs more shared memory than the " +
                                std::to_string(device.shared_bytes) + " bytes of a block on this GPU");
  }
  e = best;
  result.blocks = 1;
  for (int phase = 0; phase < phases(e); ++phase) {
    result.blocks = std::max(result.blocks, units(e, phase, result.tile_rows));
    if (step_of(phase) == Step::kOut || step_of(phase) == Step::kDown)
      result.parts = std::max(result.parts, splits(product(e, phase)));
  }
  result.blocks = std::min(result.blocks, device.multiprocessors);
  return result;
}

}  // namespace dynabert::cuda
