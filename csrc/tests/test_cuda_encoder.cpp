// The GPU's encoder kernel on a CPU: its body (cuda/body.h) as it is, a thread for each warp of each block,
// on memory that knows who wrote and who read what in which phase. Under the thread sanitizer a barrier that
// is missing is a race.
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>

#include "../cuda/body.h"
#include "check.h"
#include "cuda_model.h"

using namespace dynabert::cuda;

namespace {

// ---- memory that watches ----

/// An array of the kernel's, in cells of 8 bytes, the least that a lane moves. What is noted is noted in
/// relaxed order, so that it does not make threads wait for each other where the kernel does not.
class Watched {
 public:
  Watched(const char* name, const void* memory, std::size_t bytes, bool ready, int phases)
      : name_(name),
        begin_(static_cast<const char*>(memory)),
        bytes_(bytes),
        cells_(bytes / 8),
        counts_(phases) {
    for (Cell& cell : cells_) cell.written = ready ? kReady : kNever;
  }

  bool holds(const void* p) const {
    return static_cast<const char*>(p) >= begin_ && static_cast<const char*>(p) < begin_ + bytes_;
  }
  const char* name() const { return name_; }
  /// Cells written in a phase.
  long count(int phase) const { return counts_[phase]; }

  /// What is wrong with an access, or null.
  const char* read(const void* p, std::size_t size, int phase, int block) {
    const char* wrong = each(p, size, [&](Cell& cell) -> const char* {
      const int written = cell.written.load(std::memory_order_relaxed);
      if (written == kNever) return "reads what nobody wrote";
      if (written == phase) return "reads what is written in its own phase";
      const int before = cell.read.load(std::memory_order_relaxed);
      const bool other = before / kBlocks == phase && before % kBlocks != block;
      cell.read.store(phase * kBlocks + (other ? kSeveral : block), std::memory_order_relaxed);
      return nullptr;
    });
    return wrong;
  }
  const char* write(const void* p, std::size_t size, int phase, int block) {
    return each(p, size, [&](Cell& cell) -> const char* {
      if (cell.written.exchange(phase, std::memory_order_relaxed) == phase)
        return "writes what is written already";
      const int before = cell.read.load(std::memory_order_relaxed);
      if (before / kBlocks == phase && before % kBlocks != block) return "writes what another block reads";
      counts_[phase].fetch_add(1, std::memory_order_relaxed);
      return nullptr;
    });
  }

 private:
  static constexpr int kNever = -2, kReady = -1, kBlocks = 4096, kSeveral = kBlocks - 1;
  struct Cell {
    std::atomic<int> written{kNever}, read{-kBlocks};
  };

  template <class F>
  const char* each(const void* p, std::size_t size, F f) {
    const std::size_t at = static_cast<const char*>(p) - begin_;
    if (at % size || at + size > bytes_) return "an access that is not aligned, or leaves";
    for (std::size_t cell = at / 8; cell < (at + size) / 8; ++cell) {
      if (const char* wrong = f(cells_[cell])) return wrong;
    }
    return nullptr;
  }

  const char* name_;
  const char* begin_;
  std::size_t bytes_;
  std::vector<Cell> cells_;
  std::vector<std::atomic<long>> counts_;
};

/// So many threads wait for each other, again and again.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long mine = turn_;
    if (++arrived_ == threads_) {
      arrived_ = 0, ++turn_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return turn_ != mine; });
    }
  }

 private:
  const int threads_;
  int arrived_ = 0;
  long turn_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
};

/// What the threads of a launch share.
struct Launch {
  std::vector<std::unique_ptr<Watched>> arrays;
  std::atomic<uint32_t> counter{0};
  std::atomic<long> mistakes{0};
  bool late = false;  // copies arrive when they are waited for, else at once
};

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

/// An mbarrier, and what comes into its buffer.
struct Filling {
  std::vector<Copy> coming;
  int expected = 0;
  std::atomic<int> claimed{0}, ended{0};  // phases
};

/// What the warps of a block share.
struct Block {
  std::vector<Word4> shared;
  Barrier warps{kWarps};
  bool prepared = false;
  Filling fillings[2];
  /// Of each warp: whether it wrote to buffers what the way of bulk copies may not have seen.
  std::atomic<bool> unseen[kWarps] = {};
  /// What each warp gave to wgmma: the four of a group must agree.
  uint64_t asked[kWarps] = {};

  explicit Block(std::size_t words) : shared(words, Word4{{~0u, ~0u, ~0u, ~0u}}) {}  // NaN until written
};

/// `M` of phases.h and body.h: a warp.
template <bool kBulkCopies, bool kHasWgmma>
struct Simulated {
  static constexpr bool kBulk = kBulkCopies, kWgmma = kHasWgmma;
  static constexpr uint32_t kBase = 1024;  // of a block's shared memory, in addresses of wgmma

  struct Wide {
    PerLane<Float4> (*sums)[8];
    const PerLane<Fragment>* a;
    int blocks;
    uint64_t b;
  };

  int warp, block, grid;
  char* shared;
  Block* own;
  Launch* launch;
  int phase = 0;
  std::vector<Copy> copies = {};
  std::vector<Wide> open = {};
  std::vector<std::vector<Wide>> groups = {};
  bool fenced = false;

  void wrong(const char* where, const char* what) {
    if (++launch->mistakes > 5) return;
    check::report(false, where, block, std::string(what) + " in phase " + std::to_string(phase));
  }
  Watched* array(const void* p) {
    for (auto& a : launch->arrays) {
      if (a->holds(p)) return a.get();
    }
    wrong("memory", "an access to no array");
    return nullptr;
  }
  void reads(const void* p, std::size_t size) {
    Watched* a = array(p);
    if (const char* what = a ? a->read(p, size, phase, block) : nullptr) wrong(a->name(), what);
  }
  void writes(const void* p, std::size_t size) {
    Watched* a = array(p);
    if (const char* what = a ? a->write(p, size, phase, block) : nullptr) wrong(a->name(), what);
  }

  Word4 activations(const Bf16* p) {
    reads(p, 16);
    Word4 v;
    std::memcpy(&v, p, 16);
    return v;
  }
  void half_activations(const Bf16* p, uint32_t* to) {
    reads(p, 8);
    std::memcpy(to, p, 8);
  }
  void constants(const void* p, uint32_t* to) { std::memcpy(to, p, 8); }
  Float4 sums(const float* p) {
    reads(p, 16);
    Float4 v;
    std::memcpy(&v, p, 16);
    return v;
  }

  /// A copy into shared memory: until it has come, there is nothing.
  void begin(std::vector<Copy>& coming, int to, const char* from, int bytes) {
    if (to < kSmallBytes || to + static_cast<std::size_t>(bytes) > own->shared.size() * sizeof(Word4))
      return wrong("shared memory", "a copy beyond");
    if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
      return wrong("shared memory", "a copy that is not aligned");
    std::memset(shared + to, 0xff, bytes);
    coming.push_back({shared + to, from, bytes});
    if (!launch->late) std::memcpy(shared + to, from, bytes);
  }
  static void end(std::vector<Copy>& coming) {
    for (const Copy& c : coming) std::memcpy(c.to, c.from, c.bytes);
    coming.clear();
  }
  void copy(int to, const char* from) { begin(copies, to, from, sizeof(Word4)); }

  void prepare() {
    if (warp == 0) own->prepared = true;
  }
  void expect(int buffer, int bytes) {
    Filling& f = own->fillings[buffer];
    if (f.expected || !f.coming.empty()) wrong("mbarrier", "is expected before the last has come");
    for (const auto& unseen : own->unseen) {
      if (unseen.load(std::memory_order_relaxed)) wrong("buffers", "are filled before they were given back");
    }
    f.expected = bytes;
  }
  void copy_run(int buffer, int to, const char* from, int bytes) {
    begin(own->fillings[buffer].coming, to, from, bytes);
  }
  /// As an mbarrier: who waits for the parity of a phase that has ended does not wait.
  void arrived(int buffer, int parity) {
    if (!kBulk) return end(copies);
    if (!own->prepared) wrong("mbarrier", "is not there");
    Filling& f = own->fillings[buffer];
    int now = f.ended.load(std::memory_order_acquire);
    if (now % 2 != parity) return;
    int claimed = now;
    if (!f.claimed.compare_exchange_strong(claimed, now + 1, std::memory_order_relaxed)) {
      while (f.ended.load(std::memory_order_acquire) == now) std::this_thread::yield();
      return;
    }
    int bytes = 0;
    for (const Copy& c : f.coming) bytes += c.bytes;
    if (bytes == 0 || bytes != f.expected) wrong("mbarrier", "waits for what does not come");
    if (launch->late) end(f.coming);
    f.coming.clear();
    f.expected = 0;
    f.ended.store(now + 1, std::memory_order_release);
  }
  void give_back() { own->unseen[warp].store(false, std::memory_order_relaxed); }
  template <class T>
  void put(float* p, const T& value) {
    std::memcpy(p, &value, sizeof value);
    own->unseen[warp].store(true, std::memory_order_relaxed);
  }

  void matrices(int at, PerLane<Word4>& b) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i)
        std::memcpy(&b[lane].word[i], shared + at + i * kCoreBytes + lane * 4, sizeof(uint32_t));
    }
  }
  void bytes(int at, PerLane<Pair>& b) {
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(b[lane].b, shared + at + lane * 8, 8);
  }

  /// Computed as late as can be, from what registers and shared memory then hold.
  template <int kBlocks>
  void wgmma(PerLane<Float4> (&sums)[8], const PerLane<Fragment>& a, int at, int run) {
    if (!fenced) wrong("wgmma", "begins without a fence");
    const uint64_t b = describe(kBase + at, run);
    open.push_back({&sums, &a, kBlocks, b});
    own->asked[warp] = own->asked[warp] * 31 + (b ^ kBlocks);
  }
  void wgmma_fence() { fenced = true; }
  void wgmma_commit() {
    groups.push_back(std::move(open));
    open.clear();
    fenced = false;
  }
  template <std::size_t kGroups>
  void wgmma_wait() {
    while (groups.size() > kGroups) {
      for (const Wide& w : groups.front()) compute(w);
      groups.erase(groups.begin());
    }
  }
  /// B as PTX ISA says ("Matrix descriptor"; without swizzle, indices of the sum adjacent): core matrices of
  /// 8 columns by 16 bytes, the next of the sum at the leading offset, of the columns at the stride offset.
  void compute(const Wide& w) {
    if (w.b >> 62 || (w.b >> 49 & 7)) wrong("wgmma", "has another layout");
    auto field = [&](int bit) { return static_cast<int>(w.b >> bit & 0x3fff) << 4; };
    const int start = field(0) - static_cast<int>(kBase), leading = field(16), stride = field(32);
    for (int j = 0; j < w.blocks; ++j) {
      PerLane<Pair> b;
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 2; ++i) {
          const int index = 2 * lane_step(lane) + 8 * i;
          const std::size_t at =
              start + j * stride + index / 8 * leading + lane_row(lane) * 16 + index % 8 * 2;
          if (at + 4 > own->shared.size() * sizeof(Word4)) return wrong("wgmma", "reads beyond");
          std::memcpy(&b[lane].b[i], shared + at, 4);
        }
      }
      multiply_add((*w.sums)[j], *w.a, b);
    }
  }

  void store(Bf16* p, uint32_t low, uint32_t high) {
    writes(p, 8);
    const uint32_t both[2] = {low, high};
    std::memcpy(p, both, 8);
  }
  void store(float* p, const Float4& v) {
    writes(p, 16);
    std::memcpy(p, &v, 16);
  }

  void sync() { own->warps.wait(); }
  void leave() {
    if (warp == 0) launch->counter.fetch_add(barrier_share(block, grid), std::memory_order_release);
  }
  void meet(int number) {
    sync();
    leave();
    if (number != phase) wrong("meet", "a barrier out of order");
    while (warp == 0 && !barrier_passed(launch->counter.load(std::memory_order_acquire), number))
      std::this_thread::yield();
    sync();
    ++phase;
  }
};

template <class Machine, int kTileRows, bool kInt8>
void run_kernel(const Encoder& e, int grid, Launch& launch) {
  const std::size_t words = (kSmallBytes + 2 * static_cast<std::size_t>(e.buffer_bytes)) / sizeof(Word4);
  std::vector<std::unique_ptr<Block>> blocks;
  for (int b = 0; b < grid; ++b) blocks.push_back(std::make_unique<Block>(words));
  std::vector<std::thread> threads;
  for (int b = 0; b < grid; ++b) {
    for (int w = 0; w < kWarps; ++w) {
      threads.emplace_back([&, b, w] {
        char* memory = reinterpret_cast<char*>(blocks[b]->shared.data());
        Machine m{w, b, grid, memory, blocks[b].get(), &launch};
        encode_block<Machine, kTileRows, kInt8>(m, e);
        if (!m.open.empty() || !m.groups.empty()) m.wrong("wgmma", "is not waited for");
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& block : blocks) {
    for (int w = 0; w < kWarps; ++w) CHECK(block->asked[w] == block->asked[w / 4 * 4]);
  }
}

/// What is compiled for sm_80, and for sm_90a.
using Ampere = Simulated<false, false>;
using Hopper = Simulated<true, true>;

template <class Machine, bool kInt8>
void run_kernel(const Encoder& e, int tile_rows, int grid, Launch& launch) {
  if (tile_rows == 64) return run_kernel<Machine, 64, kInt8>(e, grid, launch);
  if (tile_rows == 32) return run_kernel<Machine, 32, kInt8>(e, grid, launch);
  run_kernel<Machine, 16, kInt8>(e, grid, launch);
}

struct Case {
  int tile_rows;
  bool hopper;
  int blocks;
  std::vector<int64_t> offsets;
  int tokens;  // may be more than the sequences have
  Activation activation;
  bool late;
  int columns = 0;  // of every unit of a product; 0 as planned
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
  const Device device{c.blocks, kSmallBytes + 2 * (96 << 10), c.hopper};
  plan(e, device);
  for (int i = 0; i < e.layers; ++i) {
    Layer& l = e.layer[i];
    Tiling* tilings[] = {&l.qkv, nullptr, &l.out, nullptr, &l.up, &l.down, nullptr};
    for (int step = 0; step < kSteps; ++step) {
      if (!tilings[step]) continue;
      plan_detail::choose(product(e, i * kSteps + step), e.tokens, c.tile_rows, device, e.buffer_bytes,
                          *tilings[step]);
      if (c.columns) tilings[step]->columns = static_cast<uint16_t>(c.columns);
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

  Launch launch;
  launch.late = c.late;
  auto watch = [&](const char* name, const void* memory, std::size_t bytes, bool ready) {
    launch.arrays.push_back(std::make_unique<Watched>(name, memory, bytes, ready, phases(e)));
  };
  watch("x", e.x, x.count * sizeof(Bf16), true);
  watch("qkv", e.qkv, qkv.count * sizeof(Bf16), false);
  // Rows of no sequence stay what they are, and are read.
  watch("context", e.context, context.count * sizeof(Bf16), real < c.tokens);
  watch("inner", e.inner, hidden.count * sizeof(Bf16), false);
  watch("parts", e.parts, sums.size() * sizeof(Float4), false);
  auto run = [&](auto machine) {
    using Machine = decltype(machine);
    return model.int8 ? run_kernel<Machine, true>(e, c.tile_rows, c.blocks, launch)
                      : run_kernel<Machine, false>(e, c.tile_rows, c.blocks, launch);
  };
  c.hopper ? run(Hopper{}) : run(Ampere{});
  CHECK(launch.mistakes == 0);
  CHECK(launch.counter == 0);  // as the next launch wants it
  // Nothing was written twice in a phase; this many cells are everything.
  for (int phase = 0; phase < phases(e); ++phase) {
    const Layer& l = e.layer[phase / kSteps];
    const long row = l.heads * e.head_size / 4, all = c.tokens * d / 4L;
    const std::map<Step, std::pair<int, long>> cells = {
        {Step::kQkv, {1, c.tokens * 3 * row}},
        {Step::kAttention, {2, real * row}},
        {Step::kOut, {4, 2 * all}},
        {Step::kNorm1, {0, all}},
        {Step::kUp, {3, c.tokens * l.neurons / 4L}},
        {Step::kDown, {4, 2 * all}},
        {Step::kNorm2, {0, all}},
    };
    auto [written, count] = cells.at(step_of(phase));
    if (written == 4) count *= splits(product(e, phase));
    for (int array = 0; array < 5; ++array)
      CHECK(launch.arrays[array]->count(phase) == (array == written ? count : 0));
  }

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
  for (bool int8 : {false, true}) {
    const Model model(kTiny, int8);
    for (bool hopper : {false, true}) {
      for (double width : {1.0, 0.75, 0.5, 0.25}) {
        for (double depth : {1.0, 0.75, 0.5}) {
          const check::Where where(std::string(int8 ? "int8" : "bf16") + (hopper ? " sm_90a" : " sm_80") +
                                   " w" + std::to_string(width) + " d" + std::to_string(depth));
          compare(model, subnet(kTiny, width, depth),
                  {hopper ? 64 : 32, hopper, 5, {0, 19, 37}, 37, Activation::kGelu, true});
        }
      }
    }
  }
}

TEST(every_kernel_and_length) {
  const Subnet net{{0}, {3}, {72}};
  for (bool int8 : {false, true}) {
    const Model model({64, 64, 3, 72, 1}, int8);
    for (bool hopper : {false, true}) {
      for (int rows : kTileRows) {
        for (int length : {1, 15, 16, 17, 33, 65, 130}) {
          const bool late = (length + rows / 16) % 2;
          const check::Where where(std::string(int8 ? "int8" : "bf16") + (hopper ? " sm_90a " : " sm_80 ") +
                                   std::to_string(rows) + " rows, length " + std::to_string(length));
          compare(model, net, {rows, hopper, 7, {0, length}, length, Activation::kGelu, late});
        }
      }
    }
  }
}

/// Every width of an instruction, and units at the edge that are narrower than their tile. 200 indices end
/// within a chunk, of which a sub-network may use fewer; none of its others may be seen.
TEST(every_width_of_a_unit) {
  for (bool int8 : {false, true}) {
    const Model model({200, 32, 3, 136, 1}, int8);
    for (int columns = 8; columns <= kMostColumns; columns += 8) {
      for (int rows : {16, 64}) {
        const check::Where where(std::to_string(columns) + " columns");
        compare(model, {{0}, {2}, {88}}, {rows, true, 6, {0, 40}, 40, Activation::kGelu, true, columns});
      }
    }
  }
}

/// So many chunks that all registers of A are filled again.
TEST(long_sums) {
  for (bool int8 : {false, true}) {
    const Model model({1000, 32, 1, 40, 1}, int8);
    for (bool hopper : {false, true}) {
      for (int rows : kTileRows) {
        const check::Where where(std::string(hopper ? "sm_90a " : "sm_80 ") + std::to_string(rows) + " rows");
        compare(model, {{0}, {1}, {40}}, {rows, hopper, 3, {0, 17}, 17, Activation::kGelu, true});
      }
    }
  }
}

TEST(tokens_of_no_sequence_and_sequences_of_no_token) {
  const Model model(kTiny);
  const Subnet net = subnet(kTiny, 0.5, 0.5);
  compare(model, net, {16, false, 3, {0, 5, 5, 5}, 16, Activation::kGelu, true});
  compare(model, net, {64, true, 11, {0, 0, 21}, 32, Activation::kGelu, true});
}

TEST(more_sequences_than_are_kept) {
  const Model model(kTiny);
  std::vector<int64_t> offsets = {0};
  for (int i = 0; i < kKeptSequences + 3; ++i) offsets.push_back(offsets.back() + 1 + i % 3);
  const int tokens = static_cast<int>(offsets.back());
  compare(model, subnet(kTiny, 0.5, 0.5), {64, false, 9, offsets, tokens, Activation::kGelu, true});
}

TEST(activations) {
  const Model model(kTiny, true);
  for (Activation a : {Activation::kNone, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
    compare(model, subnet(kTiny, 0.75, 0.5), {32, true, 4, {0, 9}, 9, a, true});
  }
}

TEST(layers_of_different_extents) {
  const Model model(kTiny);
  const Subnet net{{0, 1, 3}, {1, 4, 2}, {8, 152, 56}};
  compare(model, net, {16, false, 6, {0, 11, 23}, 23, Activation::kGelu, true});
  compare(model, net, {64, true, 6, {0, 11, 23}, 23, Activation::kGelu, true});
}

// ---- packed weights ----

TEST(a_packed_weight_has_every_element_once) {
  for (bool int8 : {false, true}) {
    for (auto [columns, depth] : {std::pair(8, 32), std::pair(24, 40), std::pair(96, 160)}) {
      const int size = int8 ? 1 : 2;
      const int64_t first = scale_bytes(int8, columns);
      const int64_t last = first + ceil_div(columns, 8) * run_stride(int8, depth);
      std::set<int64_t> seen;
      for (int c = 0; c < columns; ++c) {
        for (int i = 0; i < depth; ++i) {
          const int64_t at = packed_offset(int8, columns, depth, c, i);
          CHECK(at >= first && at + size <= last && at % size == 0);
          // A prefix of the sum is one run from the column block's begin.
          CHECK((at - first) % run_stride(int8, depth) < (i / kChunk + 1) * block_bytes(int8));
          seen.insert(at);
        }
      }
      CHECK(static_cast<int>(seen.size()) == columns * depth);
    }
  }
}

TEST(an_int8_becomes_its_bfloat16) {
  for (int value = -128; value < 128; ++value) {
    for (int place = 0; place < 4; ++place) {
      const uint32_t four = static_cast<uint32_t>(value & 0xff) << 8 * place;
      const uint32_t pair = widen(four, place / 2);
      CHECK((place % 2 ? high_bf16(pair) : low_bf16(pair)) == static_cast<float>(value));
      CHECK((place % 2 ? low_bf16(pair) : high_bf16(pair)) == 0);
      CHECK(widen(four, 1 - place / 2) == 0);
    }
  }
}

// ---- the schedule of real models ----

const Device kH200{132, 232448, true}, kA100{108, 166912, false};
const Sizes kBase{768, 64, 12, 3072, 12}, kSmall{384, 32, 12, 1536, 12}, kLarge{1024, 64, 16, 4096, 24};

/// Every element of every product's sum is in one unit; buffers hold what is put there.
void check_plan(const Sizes& s, const Subnet& net, int tokens, const Device& device, bool int8 = false) {
  Encoder e{};
  e.heads = s.heads, e.neurons = s.neurons, e.int8 = int8;
  e.tokens = tokens, e.hidden = s.hidden, e.head_size = s.head_size, e.sequences = 1, e.longest = tokens;
  e.layers = static_cast<int>(net.layers.size());
  for (int i = 0; i < e.layers; ++i) e.layer[i].heads = net.heads[i], e.layer[i].neurons = net.neurons[i];
  const Plan found = plan(e, device);
  const int rows = found.tile_rows;
  CHECK(found.blocks >= 1 && found.blocks <= device.multiprocessors);
  CHECK(kSmallBytes + 2 * e.buffer_bytes <= device.shared_bytes);
  for (int phase = 0; phase < phases(e); ++phase) {
    if (!is_product(step_of(phase))) continue;
    const Product p = product(e, phase);
    CHECK(weight_bytes(p) <= e.buffer_bytes);
    CHECK(plan_detail::slab_bytes(rows, p.tiling.columns) <= e.buffer_bytes);
    CHECK(p.tiling.depth % kChunk == 0 && p.tiling.columns % 8 == 0 && p.tiling.columns <= kMostColumns);
    CHECK(splits(p) <= (p.in_parts ? found.parts : 1));
    long volume = 0;
    std::set<std::tuple<int, int, int>> corners;
    for (int number = 0; number < product_units(p, tokens, rows); ++number) {
      const Unit u = product_unit(p, tokens, rows, number);
      CHECK(u.row < tokens && u.column < p.columns && u.first < u.last && u.last <= p.depth);
      CHECK(u.blocks == ceil_div(std::min<int>(p.tiling.columns, p.columns - u.column), 8));
      CHECK(unit_run(p, u) * u.blocks <= weight_bytes(p));
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
          for (int tokens : {16, 32, 64, 128}) {
            for (bool int8 : {false, true}) check_plan(s, subnet(s, width, depth), tokens, device, int8);
          }
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
    e.heads = s.heads, e.neurons = s.neurons;
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
  refused("neurons must be a multiple of 8 up to 13, got 13", {768, 64, 12, 13, 2}, 8);
  refused("tokens must be 1 or more, got 0", {768, 64, 12, 3072, 2}, 0);
  Encoder e = of({768, 64, 12, 3072, 2}, 8);
  CHECK_REFUSES("needs more shared memory than the 49152 bytes", plan(e, Device{132, 49152, true}));
}

}  // namespace
