// The GPU's encoder kernel on a CPU: its phases (cuda/phases.h) run as they are, warp by warp, in the order
// of cuda/kernel.cuh, on memory that knows who wrote and who read what in which phase.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <tuple>

#include "../cuda/phases.h"
#include "../cuda/plan.h"
#include "check.h"
#include "cuda_model.h"

using namespace dynabert::cuda;

namespace {

// ---- memory that watches ----

/// An array of the kernel's, in cells of 8 bytes, the least that a lane moves.
struct Watched {
  const char* name;
  const char* begin;
  std::size_t bytes;
  std::vector<int> written, read;   // phase of the last, -1 never
  std::vector<int> writer, reader;  // block of the last; -2: several readers

  Watched(const char* label, const void* memory, std::size_t size, bool ready)
      : name(label),
        begin(static_cast<const char*>(memory)),
        bytes(size),
        written(size / 8, ready ? -1 : kNever),
        read(size / 8, kNever),
        writer(size / 8, -1),
        reader(size / 8, -1) {}
  static constexpr int kNever = -1000;

  bool holds(const void* p) const {
    return static_cast<const char*>(p) >= begin && static_cast<const char*>(p) < begin + bytes;
  }
};

struct Memory {
  std::vector<Watched> arrays;
  int phase = 0, block = 0;
  bool late = false;  // copies arrive when they are waited for, else at once
  long mistakes = 0;

  void wrong(const Watched& a, std::size_t cell, const char* what) {
    if (++mistakes > 5) return;
    check::report(
        false, a.name, static_cast<int>(cell),
        std::string(what) + " in phase " + std::to_string(phase) + " by block " + std::to_string(block));
  }
  template <class F>
  void each_cell(const void* p, std::size_t size, F f) {
    for (Watched& a : arrays) {
      if (!a.holds(p)) continue;
      const std::size_t at = static_cast<const char*>(p) - a.begin;
      if (at % size || at + size > a.bytes)
        return wrong(a, at / 8, "an access that is not aligned, or leaves");
      for (std::size_t cell = at / 8; cell < (at + size) / 8; ++cell) f(a, cell);
      return;
    }
    ++mistakes;
    check::report(false, "memory", 0, "an access to no array in phase " + std::to_string(phase));
  }
  void reads(const void* p, std::size_t size) {
    each_cell(p, size, [&](Watched& a, std::size_t cell) {
      if (a.written[cell] == Watched::kNever) wrong(a, cell, "reads what nobody wrote");
      if (a.written[cell] == phase) wrong(a, cell, "reads what is written in its own phase");
      a.reader[cell] = a.read[cell] == phase && a.reader[cell] != block ? -2 : block;
      a.read[cell] = phase;
    });
  }
  void writes(const void* p, std::size_t size) {
    each_cell(p, size, [&](Watched& a, std::size_t cell) {
      if (a.written[cell] == phase) wrong(a, cell, "writes what is written already");
      if (a.read[cell] == phase && a.reader[cell] != block) wrong(a, cell, "writes what another reads");
      a.written[cell] = phase, a.writer[cell] = block;
    });
  }
  long count(const char* name) const {
    for (const Watched& a : arrays) {
      if (name == std::string(a.name)) return std::count(a.written.begin(), a.written.end(), phase);
    }
    return -1;
  }
};

struct Copy {
  char* to;
  Word4 value;
};

/// `M` of phases.h.
struct Simulated {
  int warp;
  char* shared;
  Memory* memory;
  std::vector<Copy>* copies;
  std::size_t shared_bytes;

  Word4 activations(const Bf16* p) {
    memory->reads(p, 16);
    Word4 v;
    std::memcpy(&v, p, 16);
    return v;
  }
  void half_activations(const Bf16* p, uint32_t* to) {
    memory->reads(p, 8);
    std::memcpy(to, p, 8);
  }
  void weights(const Bf16* p, uint32_t* to) { std::memcpy(to, p, 8); }
  Float4 sums(const float* p) {
    memory->reads(p, 16);
    Float4 v;
    std::memcpy(&v, p, 16);
    return v;
  }
  void copy(int to, const Bf16* from, bool inside) {
    Copy c{shared + to, {}};
    if (to < 0 || to + 16u > shared_bytes) ++memory->mistakes, check::report(false, "shared", to, "outside");
    if (inside) std::memcpy(&c.value, from, 16);
    if (memory->late) {
      copies->push_back(c);
    } else {
      std::memcpy(c.to, &c.value, 16);
    }
  }
  void store(Bf16* p, uint32_t low, uint32_t high) {
    memory->writes(p, 8);
    const uint32_t both[2] = {low, high};
    std::memcpy(p, both, 8);
  }
  void store(float* p, const Float4& v) {
    memory->writes(p, 16);
    std::memcpy(p, &v, 16);
  }
};

// ---- the kernel's order, a block at a time ----

struct Block {
  std::vector<Word4> memory;  // aligned to 16 bytes, as shared memory is
  std::vector<Copy> copies;
  int full, empty;
  Cursor next;
};

template <int kRowGroups, int kFragments>
class Kernel {
  using Tile = ProductTile<Simulated, kRowGroups, kFragments>;

 public:
  Kernel(const Encoder& e, int grid, Memory& memory, unsigned seed)
      : e_(e), grid_(grid), memory_(memory), random_(seed), blocks_(grid) {
    const std::size_t bytes = kSmallBytes + 2 * static_cast<std::size_t>(e.buffer_bytes);
    for (int b = 0; b < grid; ++b) {
      Block& s = blocks_[b];
      s.memory.assign(bytes / 16, Word4{{~0u, ~0u, ~0u, ~0u}});  // NaN
      s.full = kSmallBytes, s.empty = kSmallBytes + e.buffer_bytes;
      each_warp(b, [&](Simulated& m) { keep_offsets(m, e_); });
      s.next = settle(e, {0, b}, b, Tile::kRows);
      fetch(b, s.full);
    }
  }

  /// One phase of every block; they come in any order.
  void run(int phase) {
    memory_.phase = phase;
    std::vector<int> order(grid_);
    for (int b = 0; b < grid_; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
    for (int b : order) {
      memory_.block = b;
      const Step step = step_of(phase);
      if (is_product(step)) {
        products(phase, b);
      } else if (step == Step::kAttention) {
        e_.head_size == 64 ? attention<64>(phase, b) : attention<32>(phase, b);
      } else {
        norms(phase, b);
      }
    }
  }

 private:
  char* shared(int b) { return reinterpret_cast<char*>(blocks_[b].memory.data()); }
  float* small(int b) { return reinterpret_cast<float*>(shared(b)); }

  /// What every warp does up to the next point where the block waits for all.
  template <class F>
  void each_warp(int b, F f) {
    int order[kWarps];
    for (int w = 0; w < kWarps; ++w) order[w] = w;
    std::shuffle(order, order + kWarps, random_);
    for (int w : order) {
      Simulated m{w, shared(b), &memory_, &blocks_[b].copies, blocks_[b].memory.size() * 16};
      f(m);
    }
  }

  void fetch(int b, int to) {
    const Cursor c = blocks_[b].next;
    if (c.phase >= phases(e_)) return;
    const Product p = product(e_, c.phase);
    each_warp(b, [&](Simulated& m) {
      fetch_weights(m, e_, p, product_unit(p, e_.tokens, Tile::kRows, c.number), to);
    });
  }
  void arrive(int b) {
    for (const Copy& c : blocks_[b].copies) std::memcpy(c.to, &c.value, 16);
    blocks_[b].copies.clear();
  }

  void products(int phase, int b) {
    Block& s = blocks_[b];
    const Product p = product(e_, phase);
    for (int number = b; number < product_units(p, e_.tokens, Tile::kRows); number += grid_) {
      CHECK(s.next.phase == phase && s.next.number == number);
      const Unit u = product_unit(p, e_.tokens, Tile::kRows, number);
      auto tiles = std::make_unique<Tile[]>(kWarps);
      each_warp(b, [&](Simulated& m) { tiles[m.warp].begin(m, e_, p, u); });
      arrive(b);
      each_warp(b, [&](Simulated& m) { fetch_bias(m, p, u, small(b)); });
      s.next = after(e_, s.next, b, grid_, Tile::kRows);
      fetch(b, s.empty);
      each_warp(b, [&](Simulated& m) { tiles[m.warp].multiply(m, e_, p, u, s.full); });
      each_warp(b, [&](Simulated& m) { tiles[m.warp].spill(m, p, s.full); });
      each_warp(b, [&](Simulated& m) { tiles[m.warp].finish(m, e_, p, u, s.full, small(b)); });
      std::swap(s.full, s.empty);
    }
  }

  template <int kHead>
  void attention(int phase, int b) {
    const int heads = e_.layer[phase / kSteps].heads;
    for (int number = b; number < attention_units(e_, heads); number += grid_) {
      const AttentionUnit u = attention_unit(e_, heads, number);
      auto tiles = std::make_unique<AttentionTile<Simulated, kHead>[]>(kWarps);
      each_warp(b, [&](Simulated& m) { tiles[m.warp].attend(m, e_, heads, u, blocks_[b].empty); });
      each_warp(b, [&](Simulated& m) { tiles[m.warp].merge(m, e_, heads, u, blocks_[b].empty); });
    }
  }

  void norms(int phase, int b) {
    const Layer& l = e_.layer[phase / kSteps];
    const bool first = step_of(phase) == Step::kNorm1;
    const int parts = splits(product(e_, phase - 1));
    const Bf16* bias = first ? l.out_bias : l.down_bias;
    const Bf16* scales = first ? l.norm1_weight : l.norm2_weight;
    const Bf16* shifts = first ? l.norm1_bias : l.norm2_bias;
    float* sums = small(b) + kSmallSums;
    for (int row = b; row < e_.tokens; row += grid_) {
      auto norm = std::make_unique<NormRow<Simulated>[]>(kWarps);
      each_warp(b, [&](Simulated& m) { norm[m.warp].gather(m, e_, bias, scales, shifts, parts, row, sums); });
      each_warp(b, [&](Simulated& m) { norm[m.warp].centre(m, e_, sums); });
      each_warp(b, [&](Simulated& m) { norm[m.warp].store(m, e_, row, sums); });
    }
  }

  Encoder e_;
  int grid_;
  Memory& memory_;
  std::mt19937 random_;
  std::vector<Block> blocks_;
};

struct Case {
  TileShape tile;
  int blocks;
  std::vector<int64_t> offsets;
  int tokens;  // may be more than the sequences have
  Activation activation;
  bool late;
};

/// Runs the simulated kernel and compares; every tile must have been computed once, from what phases before
/// wrote.
void compare(const Model& model, const Subnet& net, const Case& c) {
  const int d = model.s.hidden, real = static_cast<int>(c.offsets.back());
  Encoder e = encoder_of(model, net, c.tokens);
  e.activation = c.activation;
  e.offsets = c.offsets.data();
  e.sequences = static_cast<int>(c.offsets.size()) - 1;
  for (std::size_t b = 0; b + 1 < c.offsets.size(); ++b)
    e.longest = std::max(e.longest, static_cast<int>(c.offsets[b + 1] - c.offsets[b]));
  // Small buffers: units of several sizes, and sums in parts.
  const Device device{c.blocks, kSmallBytes + 2 * (96 << 10)};
  plan(e, device);
  for (int i = 0; i < e.layers; ++i) {
    Layer& l = e.layer[i];
    Tiling* tilings[] = {&l.qkv, nullptr, &l.out, nullptr, &l.up, &l.down, nullptr};
    for (int step = 0; step < kSteps; ++step) {
      if (!tilings[step]) continue;
      plan_detail::choose(product(e, i * kSteps + step), e.tokens, c.tile, c.blocks, e.buffer_bytes,
                          *tilings[step]);
    }
    l.down.depth = kChunk;  // the most parts there can be
  }
  int widest = 0, inner = 0, parts = 0;
  for (int i = 0; i < e.layers; ++i) {
    widest = std::max(widest, e.layer[i].heads * e.head_size), inner = std::max(inner, e.layer[i].neurons);
    parts = std::max({parts, splits(product(e, i * kSteps + 2)), splits(product(e, i * kSteps + 5))});
  }

  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  Vector x(c.tokens * d), qkv(c.tokens * 3 * widest), context(c.tokens * widest), hidden(c.tokens * inner);
  for (std::size_t i = 0; i < x.count; ++i) x.data()[i] = round_bf16(normal(random));
  Vector input(real * d);
  std::memcpy(input.data(), x.data(), input.count * sizeof(Bf16));
  std::vector<Float4> sums(static_cast<std::size_t>(parts) * c.tokens * d / 4, Float4{{NAN, NAN, NAN, NAN}});
  e.x = x.data(), e.qkv = qkv.data(), e.context = context.data(), e.inner = hidden.data();
  e.parts = sums.data()->value;

  Memory memory;
  memory.late = c.late;
  memory.arrays.emplace_back("x", e.x, x.count * 2, true);
  memory.arrays.emplace_back("qkv", e.qkv, qkv.count * 2, false);
  // Rows of no sequence stay what they are, and are read.
  memory.arrays.emplace_back("context", e.context, context.count * 2, real < c.tokens);
  memory.arrays.emplace_back("inner", e.inner, hidden.count * 2, false);
  memory.arrays.emplace_back("parts", e.parts, sums.size() * 16, false);

  auto run = [&](auto kernel) {
    for (int phase = 0; phase < phases(e); ++phase) {
      kernel.run(phase);
      const Layer& l = e.layer[phase / kSteps];
      const long row = l.heads * e.head_size / 4;
      const std::map<Step, std::pair<const char*, long>> cells = {
          {Step::kQkv, {"qkv", c.tokens * 3 * row}},
          {Step::kAttention, {"context", real * row}},
          {Step::kOut, {"parts", 0L}},
          {Step::kNorm1, {"x", c.tokens * d / 4L}},
          {Step::kUp, {"inner", c.tokens * l.neurons / 4L}},
          {Step::kDown, {"parts", 0L}},
          {Step::kNorm2, {"x", c.tokens * d / 4L}},
      };
      auto [name, count] = cells.at(step_of(phase));
      if (name == std::string("parts")) count = splits(product(e, phase)) * c.tokens * d / 2L;
      CHECK(memory.count(name) == count);
    }
  };
  if (c.tile.row_groups == 2) {
    run(Kernel<2, 2>(e, c.blocks, memory, 3));
  } else if (c.tile.fragments == 2) {
    run(Kernel<1, 2>(e, c.blocks, memory, 3));
  } else {
    run(Kernel<1, 1>(e, c.blocks, memory, 3));
  }
  CHECK(memory.mistakes == 0);

  const std::vector<double> exact = plain(model, net, input, c.offsets, c.activation, e.eps, false);
  const std::vector<double> usual = plain(model, net, input, c.offsets, c.activation, e.eps, true);
  double theirs = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) theirs = std::max(theirs, std::fabs(usual[i] - exact[i]));
  const double ours = largest_error(x.data(), exact);
  const bool good = ours <= 2 * theirs;
  check::report(good, __FILE__, __LINE__,
                "error " + std::to_string(ours) + ", of plain bfloat16 " + std::to_string(theirs));
}

const Sizes kTiny{96, 32, 4, 160, 4};  // no tile divides 96 columns, nor 40 neurons

TEST(every_sub_network_of_the_grid) {
  const Model model(kTiny);
  for (double width : {1.0, 0.75, 0.5, 0.25}) {
    for (double depth : {1.0, 0.75, 0.5}) {
      const check::Where where("w" + std::to_string(width) + " d" + std::to_string(depth));
      compare(model, subnet(kTiny, width, depth), {{1, 2}, 5, {0, 19, 37}, 37, Activation::kGelu, true});
    }
  }
}

TEST(every_kernel_and_length) {
  const Model model({64, 64, 3, 72, 1});
  const Subnet net{{0}, {3}, {72}};
  for (TileShape tile : kTileShapes) {
    for (int length : {1, 15, 16, 17, 33, 65, 130}) {
      for (bool late : {false, true}) {
        const check::Where where(std::to_string(tile.rows()) + " rows, length " + std::to_string(length));
        compare(model, net, {tile, 7, {0, length}, length, Activation::kGelu, late});
      }
    }
  }
}

TEST(tokens_of_no_sequence_and_sequences_of_no_token) {
  const Model model(kTiny);
  const Subnet net = subnet(kTiny, 0.5, 0.5);
  compare(model, net, {{1, 1}, 3, {0, 5, 5, 5}, 16, Activation::kGelu, true});
  compare(model, net, {{2, 2}, 40, {0, 0, 21}, 32, Activation::kGelu, true});
}

TEST(more_sequences_than_are_kept) {
  const Model model(kTiny);
  std::vector<int64_t> offsets = {0};
  for (int i = 0; i < kKeptSequences + 3; ++i) offsets.push_back(offsets.back() + 1 + i % 3);
  const int tokens = static_cast<int>(offsets.back());
  compare(model, subnet(kTiny, 0.5, 0.5), {{2, 2}, 9, offsets, tokens, Activation::kGelu, true});
}

TEST(activations) {
  const Model model(kTiny);
  for (Activation a : {Activation::kNone, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
    compare(model, subnet(kTiny, 0.75, 0.5), {{1, 2}, 4, {0, 9}, 9, a, true});
  }
}

TEST(layers_of_different_extents) {
  const Model model(kTiny);
  compare(model, {{0, 1, 3}, {1, 4, 2}, {8, 152, 56}}, {{1, 1}, 6, {0, 11, 23}, 23, Activation::kGelu, true});
}

// ---- the schedule of real models ----

const Device kH200{132, 232448}, kA100{108, 166912};
const Sizes kBase{768, 64, 12, 3072, 12}, kSmall{384, 32, 12, 1536, 12}, kLarge{1024, 64, 16, 4096, 24};

/// Every element of every product's sum is in one unit; buffers hold what is put there.
void check_plan(const Sizes& s, const Subnet& net, int tokens, const Device& device) {
  Encoder e{};
  e.tokens = tokens, e.hidden = s.hidden, e.head_size = s.head_size, e.sequences = 1, e.longest = tokens;
  e.layers = static_cast<int>(net.layers.size());
  for (int i = 0; i < e.layers; ++i) e.layer[i].heads = net.heads[i], e.layer[i].neurons = net.neurons[i];
  const Plan found = plan(e, device);
  const int rows = found.tile.rows();
  CHECK(found.blocks >= 1 && found.blocks <= device.multiprocessors);
  CHECK(kSmallBytes + 2 * e.buffer_bytes <= device.shared_bytes);
  for (int phase = 0; phase < phases(e); ++phase) {
    if (!is_product(step_of(phase))) continue;
    const Product p = product(e, phase);
    CHECK(weight_bytes(p) <= e.buffer_bytes);
    CHECK(plan_detail::slab_bytes(found.tile, p.tiling.columns) <= e.buffer_bytes);
    CHECK(p.tiling.depth % kChunk == 0 && p.tiling.columns % 8 == 0 && p.tiling.columns <= kMostColumns);
    CHECK(p.out || splits(p) <= found.parts);
    long volume = 0;
    std::set<std::tuple<int, int, int>> corners;
    for (int number = 0; number < product_units(p, tokens, rows); ++number) {
      const Unit u = product_unit(p, tokens, rows, number);
      CHECK(u.row < tokens && u.column < p.columns && u.first < u.last && u.last <= p.depth);
      CHECK(u.row % rows == 0 && u.column % p.tiling.columns == 0 && u.first % p.tiling.depth == 0);
      corners.insert({u.row, u.column, u.first});
      volume += 1L * std::min(rows, tokens - u.row) * std::min<int>(p.tiling.columns, p.columns - u.column) *
                (u.last - u.first);
    }
    CHECK(volume == 1L * tokens * p.columns * p.depth);
    CHECK(static_cast<int>(corners.size()) == product_units(p, tokens, rows));
  }
  // A block's weights are fetched in the order in which it computes.
  for (int block = 0; block < found.blocks; ++block) {
    Cursor next = settle(e, {0, block}, block, rows);
    for (int phase = 0; phase < phases(e); ++phase) {
      if (!is_product(step_of(phase))) continue;
      for (int number = block; number < units(e, phase, rows); number += found.blocks) {
        CHECK(next.phase == phase && next.number == number);
        next = after(e, next, block, found.blocks, rows);
      }
    }
    CHECK(next.phase == phases(e));
  }
}

TEST(plans_of_the_grid) {
  for (const Sizes& s : {kBase, kSmall}) {
    for (const Device& device : {kH200, kA100}) {
      for (double width : {1.0, 0.75, 0.5, 0.25}) {
        for (double depth : {1.0, 0.75, 0.5}) {
          for (int tokens : {16, 32, 64, 128}) check_plan(s, subnet(s, width, depth), tokens, device);
        }
      }
    }
  }
  check_plan(kLarge, subnet(kLarge, 1, 1), 128, kA100);
  check_plan(kBase, {{0, 5}, {1, 12}, {8, 3064}}, 1, kH200);
  check_plan(kBase, subnet(kBase, 1, 1), 1024, kH200);
}

TEST(attention_units_are_all_queries_once) {
  Encoder e{};
  e.sequences = 3, e.longest = 37;
  std::set<std::tuple<int, int, int>> seen;
  const int count = attention_units(e, 5);
  for (int number = 0; number < count; ++number) {
    const AttentionUnit u = attention_unit(e, 5, number);
    CHECK(u.sequence < 3 && u.head < 5 && u.query % kQueries == 0 && u.query < e.longest);
    seen.insert({u.sequence, u.head, u.query});
  }
  CHECK(static_cast<int>(seen.size()) == count && count == 3 * 5 * 3);
}

TEST(the_barrier_opens_when_the_last_block_comes) {
  std::mt19937 random(5);
  uint32_t counter = 0;
  for (int grid : {1, 2, 3, 132, 1000}) {
    for (int layers : {1, 2}) {
      Encoder e{};
      e.layers = layers;
      std::vector<int> order(grid);
      for (int b = 0; b < grid; ++b) order[b] = b;
      for (int number = 0; number < barriers(e); ++number) {
        std::shuffle(order.begin(), order.end(), random);
        for (int b : order) {
          CHECK(!barrier_passed(counter, number));
          counter += barrier_share(b, grid);
        }
        CHECK(barrier_passed(counter, number));
        CHECK(!barrier_passed(counter, number + 1));
      }
      for (int b = 0; barriers(e) % 2 && b < grid; ++b) counter += barrier_share(b, grid);
      CHECK(counter == 0);  // as the next launch wants it
    }
  }
}

TEST(what_cannot_be_computed_is_refused) {
  const Device device = kH200;
  auto of = [&](Sizes s, int tokens) {
    Encoder e{};
    e.tokens = tokens, e.hidden = s.hidden, e.head_size = s.head_size, e.layers = s.layers;
    e.sequences = 1, e.longest = tokens;
    for (int i = 0; i < std::min(e.layers, kMostLayers); ++i)
      e.layer[i].heads = s.heads, e.layer[i].neurons = s.neurons;
    return e;
  };
  auto refused = [&](const char* text, Sizes s, int tokens) {
    Encoder e = of(s, tokens);
    CHECK_REFUSES(text, plan(e, device));
  };
  refused("layers must be 1 to 30, got 31", {768, 64, 12, 3072, 31}, 8);
  refused("hidden_size must be a multiple of 8 up to 1024, got 1032", {1032, 64, 12, 3072, 2}, 8);
  refused("head_size must be 32 or 64, got 48", {768, 48, 12, 3072, 2}, 8);
  refused("neurons must be a multiple of 8, got 13", {768, 64, 12, 13, 2}, 8);
  refused("tokens must be 1 or more, got 0", {768, 64, 12, 3072, 2}, 0);
  Encoder e = of({768, 64, 12, 3072, 2}, 8);
  CHECK_REFUSES("needs more shared memory than the 49152 bytes", plan(e, Device{132, 49152}));
}

}  // namespace
