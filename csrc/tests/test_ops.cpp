// The ops on ordinary tensors, through class Ops: products, sums, attention, LayerNorm, losses. Every case
// runs on each instruction set, and with one thread, two and three, which must give the same bits.
#include "../cpu/ops.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <utility>

#include "support.h"

using namespace dynabert;

namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBf16};

// ---- cases ----

typedef std::vector<int> Choice;

/// Choices of one level of each factor, in which every pair of two factors' levels occurs.
std::vector<Choice> pairs_of(const std::vector<int>& levels) {
  const int factors = static_cast<int>(levels.size());
  typedef std::array<int, 4> Pair;  // factor, level, factor, level
  std::set<Pair> missing;
  for (int f = 0; f < factors; ++f)
    for (int g = f + 1; g < factors; ++g)
      for (int a = 0; a < levels[f]; ++a)
        for (int b = 0; b < levels[g]; ++b) missing.insert({f, a, g, b});
  Random random(1);
  std::vector<Choice> choices;
  auto visit = [&](const Choice& choice, const std::function<void(const Pair&)>& see) {
    for (int f = 0; f < factors; ++f)
      for (int g = f + 1; g < factors; ++g) see({f, choice[f], g, choice[g]});
  };
  while (!missing.empty()) {
    Choice best;
    int most = 0;
    for (int attempt = 0; attempt < 20; ++attempt) {
      Choice choice;
      for (int count : levels) choice.push_back(random.below(count));
      const Pair& first = *missing.begin();
      choice[first[0]] = first[1];
      choice[first[2]] = first[3];
      int found = 0;
      visit(choice, [&](const Pair& pair) { found += static_cast<int>(missing.count(pair)); });
      if (found > most) {
        most = found;
        best = choice;
      }
    }
    visit(best, [&](const Pair& pair) { missing.erase(pair); });
    choices.push_back(best);
  }
  return choices;
}

/// Gives out the values that a choice means, factor by factor.
class Chosen {
 public:
  explicit Chosen(const Choice& choice) : choice_(choice) {}
  template <class List>
  auto from(const List& list) {
    return list[choice_[next_++]];
  }

 private:
  const Choice& choice_;
  int next_ = 0;
};

template <class... Lists>
std::vector<Choice> pairs_among(const Lists&... lists) {
  return pairs_of({static_cast<int>(std::size(lists))...});
}

enum Staircase { kOne, kDown, kUp, kEqual, kEmptyBlocks, kSingleRows };
constexpr Staircase kStaircases[] = {kOne, kDown, kUp, kEqual, kEmptyBlocks, kSingleRows};

/// `rows` rows in blocks with extents up to `most`. The widest of kEmptyBlocks has no rows.
std::vector<Block> staircase(Staircase kind, int64_t rows, int most) {
  const int64_t third = rows / 3, half = rows / 2;
  const int middle = (most + 1) / 2;
  switch (kind) {
    case kOne: return {{rows, most}};
    case kDown: return {{third, most}, {third, middle}, {rows - 2 * third, 1}};
    case kUp: return {{third, 1}, {third, middle}, {rows - 2 * third, most}};
    case kEqual: return {{half, most}, {rows - half, most}};
    case kEmptyBlocks:
      return {{0, most}, {half, std::max(1, most - 1)}, {0, 1}, {rows - half, middle}, {0, most}};
    default: break;
  }
  std::vector<Block> blocks;
  for (int64_t r = 0; r < rows; ++r) blocks.push_back({1, static_cast<int>((r * 37 + most - 1) % most) + 1});
  if (blocks.empty()) blocks.push_back({0, most});
  return blocks;
}

/// The extent of each row.
std::vector<int> extents_of(const std::vector<Block>& blocks) {
  std::vector<int> extents;
  for (const Block& b : blocks) extents.insert(extents.end(), b.rows, b.extent);
  return extents;
}

int largest_of(const std::vector<int>& extents) {
  return extents.empty() ? 0 : *std::max_element(extents.begin(), extents.end());
}

std::string describe(const std::vector<Block>& blocks) {
  std::string text = "blocks";
  for (size_t i = 0; i < blocks.size() && i < 8; ++i)
    text += " " + std::to_string(blocks[i].rows) + ":" + std::to_string(blocks[i].extent);
  return text + (blocks.size() > 8 ? " ..." : "");
}

template <class... Numbers>
std::string numbers(const char* names, Numbers... values) {
  std::string text = names;
  for (double v : {static_cast<double>(values)...}) {
    char number[32];
    std::snprintf(number, sizeof number, " %g", v);
    text += number;
  }
  return text;
}

// ---- tensors ----

/// Numbers that a type holds.
struct Grid {
  int64_t rows = 0;
  int columns = 0;
  std::vector<float> values;

  float at(int64_t row, int column) const { return values[row * columns + column]; }
  float& at(int64_t row, int column) { return values[row * columns + column]; }
};

Grid random_grid(Random& random, DType dtype, int64_t rows, int columns, float scale = 1, float mean = 0) {
  Grid grid{rows, columns, random.normals(rows * columns, scale, mean)};
  if (dtype == DType::kBf16)
    for (float& v : grid.values) v = round_bf16(v);
  return grid;
}

float stored(DType dtype, float value) { return dtype == DType::kBf16 ? round_bf16(value) : value; }

/// Elements before the first row and between two rows: a view inside something larger.
struct Space {
  int before, between;
};
constexpr Space kSpaces[] = {{0, 0}, {0, 5}, {1, 1}, {3, 8}};

/// Rows in poisoned memory, which ends with the last row.
class Tensor {
 public:
  Tensor(DType dtype, int64_t rows, int columns, Space space = {0, 0})
      : dtype_(dtype),
        columns_(columns),
        stride_(columns + space.between),
        before_(space.before),
        memory_((before_ + (rows ? (rows - 1) * stride_ + columns : 0)) * size_of(dtype)) {}
  /// The numbers up to each row's extent.
  Tensor(DType dtype, const Grid& grid, const std::vector<int>& extents, Space space)
      : Tensor(dtype, grid.rows, grid.columns, space) {
    for (int64_t r = 0; r < grid.rows; ++r)
      for (int c = 0; c < extents[r]; ++c) set(r, c, grid.at(r, c));
  }
  Tensor(DType dtype, const Grid& grid, Space space = {0, 0})
      : Tensor(dtype, grid, std::vector<int>(grid.rows, grid.columns), space) {}

  View view() const { return {memory_.data() + before_ * size_of(dtype_), stride_}; }
  char* data() const { return view().data; }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  int columns() const { return columns_; }
  void set(int64_t row, int column, float value) { put(dtype_, memory_.data(), index(row, column), value); }
  float at(int64_t row, int column) const {
    const int64_t i = index(row, column);
    return dtype_ == DType::kBf16 ? bf16_value(memory_.as<uint16_t>()[i]) : memory_.as<float>()[i];
  }
  /// The first values of a row may be written.
  Tensor& expect(int64_t row, int count) {
    memory_.expect(index(row, 0) * size_of(dtype_), int64_t{count} * size_of(dtype_));
    return *this;
  }
  Tensor& expect(const std::vector<int>& counts) {
    for (size_t r = 0; r < counts.size(); ++r) expect(static_cast<int64_t>(r), counts[r]);
    return *this;
  }
  std::string stray() const { return memory_.stray(); }
  bool same_bytes(const Tensor& other) const {
    return memory_.size() == other.memory_.size() &&
           std::memcmp(memory_.data(), other.memory_.data(), static_cast<size_t>(memory_.size())) == 0;
  }

 private:
  int64_t index(int64_t row, int column) const { return before_ + row * stride_ + column; }

  DType dtype_;
  int columns_;
  int64_t stride_, before_;
  Memory memory_;
};

double eps_of(DType dtype) { return dtype == DType::kBf16 ? kBf16Eps : kFloatEps; }

/// What a plain loop in the type gives, and what is true.
struct Expected {
  int columns;
  std::vector<float> plain;
  std::vector<double> truth;

  Expected(int64_t rows, int columns_in)
      : columns(columns_in), plain(rows * columns), truth(rows * columns) {}
  void set(int64_t row, int column, float in_type, double exact) {
    plain[row * columns + column] = in_type;
    truth[row * columns + column] = exact;
  }
};

/// Compares the first values of each row. A value that is what is left of a larger `term` is judged beside
/// it.
std::string wrong(DType dtype, const Tensor& got, const Expected& expected, const std::vector<int>& counts,
                  double term = 0) {
  Judge judge(eps_of(dtype));
  long compared = 0;
  for (size_t r = 0; r < counts.size(); ++r)
    for (int c = 0; c < counts[r]; ++c, ++compared) {
      const int64_t i = static_cast<int64_t>(r) * expected.columns + c;
      judge.add(term + got.at(static_cast<int64_t>(r), c), term + expected.plain[i],
                term + expected.truth[i]);
    }
  return compared ? judge.verdict() : "";  // no rows
}

/// A sum of products in float32 and in double.
struct Sum {
  float plain = 0;
  double truth = 0;

  void add(float a, float b) {
    plain += a * b;
    truth += static_cast<double>(a) * b;
  }
};

// ---- engines ----

Ops& ops_of(const Kernels& kernels, int threads) {
  static std::map<std::pair<const Kernels*, int>, std::unique_ptr<Ops>> all;
  auto& ops = all[{&kernels, threads}];
  if (!ops) ops = std::make_unique<Ops>(threads, kernels, nullptr);
  return *ops;
}

/// Leaves NaN in the scratch that all threads share and in the first thread's: what is read there must have
/// been written.
void spoil_scratch(Ops& ops) {
  static const Memory nan(1025 * 64 * 2), out(130 * 64 * 2);
  const View from{nan.data(), 1025}, thin{nan.data(), 64}, to{out.data(), 64};
  ops.contract(DType::kBf16, from, thin, nullptr, 64, {{1, 1025}}, to);
  ops.expand(DType::kBf16, thin, thin, nullptr, 131, {{97, 1}}, Activation::kNone, to, {});
  ops.weight_gradient(DType::kBf16, thin, thin, 1, {{97, 130}}, 130, to);
}

typedef std::vector<Tensor> Tensors;

template <class... T>
Tensors tensors(T&&... each) {
  Tensors all;
  all.reserve(sizeof...(each));
  (all.push_back(std::forward<T>(each)), ...);
  return all;
}

std::string stray(const Tensors& all) {
  std::string text;
  for (size_t i = 0; i < all.size(); ++i)
    if (const std::string found = all[i].stray(); !found.empty())
      text += "output " + std::to_string(i) + ": " + found + " ";
  return text;
}

/// `call(ops, outputs)` on outputs that `make()` gives; `verify(outputs)` of what one thread computes.
template <class Make, class Call, class Verify>
void everywhere(const Make& make, const Call& call, const Verify& verify) {
  for (const Kernels* kernels : available_kernels()) {
    const check::Where isa(kernels->name);
    const Tensors one = make();
    spoil_scratch(ops_of(*kernels, 1));
    call(ops_of(*kernels, 1), one);
    verify(one);
    CHECK_GOOD(stray(one));
    for (int threads : {2, 3}) {
      const check::Where team(std::to_string(threads) + " threads");
      const Tensors many = make();
      call(ops_of(*kernels, threads), many);
      bool same_bits = true;
      for (size_t i = 0; i < one.size(); ++i) same_bits = same_bits && one[i].same_bytes(many[i]);
      CHECK(same_bits);
    }
  }
}

// ---- products ----

constexpr int kDepths[] = {1, 3, 67, 129};
constexpr int kColumns[] = {1, 15, 16, 17, 63, 64, 65, 130};
constexpr int kRows[] = {0, 1, 5, 6, 7, 97};
constexpr bool kEither[] = {false, true};

/// Makes sums of about 3 and -3 among those of about 1, with their term `at`: the judge looks at the largest
/// value, and a sum that cancels may not be all there is.
void lead(Grid& x, Grid& weight_columns, int at) {
  for (int64_t r = 0; r < x.rows; ++r) x.at(r, at) = r % 2 ? -1.f : 1.f;
  for (int64_t c = 0; c < weight_columns.rows; ++c) weight_columns.at(c, at) = 3;
}

float scale_for(int depth) { return 1 / std::sqrt(static_cast<float>(depth)); }

/// Room for the panels of a weight [rows, columns], or for nothing.
Tensor panels_for(bool packed, DType dtype, int rows, int columns, bool contracts) {
  const int64_t words = packed ? Ops::packed_bytes(dtype, rows, columns, contracts) / kWordBytes : 0;
  Tensor panels(DType::kF32, 1, static_cast<int>(words));
  panels.expect(0, static_cast<int>(words));
  return panels;
}

/// Packs a weight into that room, if there is any.
Panels pack_into(const Tensor& room, Ops& ops, DType dtype, const Tensor& weight, int rows, int columns,
                 bool contracts) {
  if (!room.columns()) return {};
  ops.pack(dtype, weight.view(), rows, columns, contracts, room.data());
  const int across = contracts ? columns : rows;
  return {room.data(), int64_t{room.columns()} * kWordBytes / ((across + kPanelColumns - 1) / kPanelColumns)};
}

struct ExpandCase {
  DType dtype;
  std::vector<Block> blocks;
  int depth;
  Activation activation;
  bool biased, keeps_pre, packed;
  Space space;
};

void check_expand(Random& random, const ExpandCase& c) {
  const std::vector<int> extents = extents_of(c.blocks);
  const int64_t rows = static_cast<int64_t>(extents.size());
  const int widest = largest_of(extents), all = widest + 3;  // neurons that nobody asks for
  Grid x = random_grid(random, c.dtype, rows, c.depth);
  Grid weight = random_grid(random, c.dtype, all, c.depth, scale_for(c.depth));
  lead(x, weight, c.depth - 1);
  const Grid bias = random_grid(random, c.dtype, 1, all, 0.3f);
  std::vector<int> used(all, c.depth);
  std::fill(used.begin() + widest, used.end(), 0);
  const Tensor x_in(c.dtype, x, c.space), weight_in(c.dtype, weight, used, c.space),
      bias_in(c.dtype, bias, {widest}, {0, 0});
  Expected sums(rows, all), outs(rows, all);
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < extents[r]; ++n) {
      Sum sum;
      for (int i = 0; i < c.depth; ++i) sum.add(x.at(r, i), weight.at(n, i));
      if (c.biased) sum.add(bias.at(0, n), 1);
      sums.set(r, n, stored(c.dtype, sum.plain), sum.truth);
      outs.set(r, n, stored(c.dtype, activated(sum.plain, c.activation)), activated(sum.truth, c.activation));
    }
  everywhere(
      [&] {
        Tensor out(c.dtype, rows, widest, c.space), pre(c.dtype, rows, widest, {1, 7});
        out.expect(extents);
        if (c.keeps_pre) pre.expect(extents);
        return tensors(std::move(out), std::move(pre), panels_for(c.packed, c.dtype, all, c.depth, false));
      },
      [&](Ops& ops, const Tensors& to) {
        const Panels panels = pack_into(to[2], ops, c.dtype, weight_in, all, c.depth, false);
        ops.expand(c.dtype, x_in.view(), weight_in.view(), c.biased ? bias_in.data() : nullptr, c.depth,
                   c.blocks, c.activation, to[0].view(), c.keeps_pre ? to[1].view() : View{}, panels);
      },
      [&](const Tensors& got) {
        CHECK_GOOD(wrong(c.dtype, got[0], outs, extents));
        if (c.keeps_pre) CHECK_GOOD(wrong(c.dtype, got[1], sums, extents));
      });
}

TEST(expand) {
  Random random(31);
  for (const Choice& choice : pairs_among(kTypes, kDepths, kColumns, kRows, kStaircases, kActivations,
                                          kEither, kEither, kEither, kSpaces)) {
    Chosen chosen(choice);
    ExpandCase c;
    c.dtype = chosen.from(kTypes);
    c.depth = chosen.from(kDepths);
    const int columns = chosen.from(kColumns), rows = chosen.from(kRows);
    c.blocks = staircase(chosen.from(kStaircases), rows, columns);
    c.activation = chosen.from(kActivations);
    c.biased = chosen.from(kEither);
    // Without an activation the result is the sums.
    c.keeps_pre = chosen.from(kEither) && c.activation != Activation::kNone;
    c.packed = chosen.from(kEither);
    c.space = chosen.from(kSpaces);
    const check::Where where(name_of(c.dtype) +
                             numbers(" depth, activation, bias, pre, packed", c.depth,
                                     static_cast<int>(c.activation), c.biased, c.keeps_pre, c.packed) +
                             numbers(", space", c.space.before, c.space.between) + ", " + describe(c.blocks));
    check_expand(random, c);
  }
}

struct ContractCase {
  DType dtype;
  std::vector<Block> blocks;
  int columns;
  bool biased, packed;
  Space space;
};

void check_contract(Random& random, const ContractCase& c) {
  const std::vector<int> extents = extents_of(c.blocks);
  const int64_t rows = static_cast<int64_t>(extents.size());
  const int widest = largest_of(extents), all = widest + 3;
  Grid x = random_grid(random, c.dtype, rows, widest);
  Grid weight = random_grid(random, c.dtype, c.columns, all, scale_for(all));
  if (widest) lead(x, weight, 0);
  Grid turned{all, c.columns, std::vector<float>(int64_t{all} * c.columns)};
  for (int i = 0; i < all; ++i)
    for (int n = 0; n < c.columns; ++n) turned.at(i, n) = weight.at(n, i);
  const Grid bias = random_grid(random, c.dtype, 1, c.columns, 0.3f);
  std::vector<int> used(all, c.columns);
  std::fill(used.begin() + widest, used.end(), 0);
  const Tensor x_in(c.dtype, x, extents, c.space), weight_in(c.dtype, turned, used, c.space),
      bias_in(c.dtype, bias);
  Expected outs(rows, c.columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < c.columns; ++n) {
      Sum sum;
      for (int i = 0; i < extents[r]; ++i) sum.add(x.at(r, i), weight.at(n, i));
      if (c.biased) sum.add(bias.at(0, n), 1);
      outs.set(r, n, stored(c.dtype, sum.plain), sum.truth);
    }
  const std::vector<int> whole(rows, c.columns);
  everywhere(
      [&] {
        return tensors(std::move(Tensor(c.dtype, rows, c.columns, c.space).expect(whole)),
                       panels_for(c.packed, c.dtype, all, c.columns, true));
      },
      [&](Ops& ops, const Tensors& to) {
        const Panels panels = pack_into(to[1], ops, c.dtype, weight_in, all, c.columns, true);
        ops.contract(c.dtype, x_in.view(), weight_in.view(), c.biased ? bias_in.data() : nullptr, c.columns,
                     c.blocks, to[0].view(), panels);
      },
      [&](const Tensors& got) { CHECK_GOOD(wrong(c.dtype, got[0], outs, whole)); });
}

TEST(contract) {
  Random random(32);
  // Even extents of bf16 are read in place, odd ones (and staircases, whose middle may be odd) from a copy.
  constexpr int extents[] = {1, 2, 3, 64, 67, 128, 129, 130};
  for (const Choice& choice :
       pairs_among(kTypes, extents, kColumns, kRows, kStaircases, kEither, kEither, kSpaces)) {
    Chosen chosen(choice);
    ContractCase c;
    c.dtype = chosen.from(kTypes);
    const int extent = chosen.from(extents);
    c.columns = chosen.from(kColumns);
    const int rows = chosen.from(kRows);
    c.blocks = staircase(chosen.from(kStaircases), rows, extent);
    c.biased = chosen.from(kEither);
    c.packed = chosen.from(kEither);
    c.space = chosen.from(kSpaces);
    const check::Where where(name_of(c.dtype) +
                             numbers(" columns, bias, packed", c.columns, c.biased, c.packed) +
                             numbers(", space", c.space.before, c.space.between) + ", " + describe(c.blocks));
    check_contract(random, c);
  }
}

TEST(contract_in_place_and_from_a_copy) {
  // The last word of an odd prefix of bf16 would reach beyond it.
  Random random(33);
  for (const std::vector<Block>& blocks :
       {std::vector<Block>{{5, 66}, {7, 64}, {6, 2}},  // in place
        std::vector<Block>{{5, 65}, {7, 64}, {6, 2}}, std::vector<Block>{{5, 66}, {7, 33}, {6, 1}},
        std::vector<Block>{{3, 2}, {3, 66}, {1, 65}}})
    for (const Space& space : kSpaces) {
      const check::Where where(describe(blocks) + numbers(", space", space.before, space.between));
      for (bool packed : kEither) check_contract(random, {DType::kBf16, blocks, 67, true, packed, space});
    }
}

TEST(an_extent_of_nothing) {
  // The sum over nothing is the bias.
  Random random(34);
  for (DType dtype : kTypes) {
    const check::Where where(name_of(dtype));
    check_contract(random, {dtype, {{4, 0}, {3, 5}, {2, 0}}, 17, true, false, {0, 0}});
    check_contract(random, {dtype, {{7, 0}}, 17, true, false, {0, 0}});
  }
}

TEST(a_block_alone_gives_the_same_bits) {
  // And so do panels that were packed before.
  Random random(35);
  constexpr int depth = 67, widest = 130;
  for (DType dtype : kTypes) {
    const check::Where where(name_of(dtype));
    const std::vector<Block> blocks = {{7, 64}, {9, widest}, {1, 17}, {0, 5}, {20, 2}, {8, 129}};
    const std::vector<int> extents = extents_of(blocks);
    const int64_t rows = static_cast<int64_t>(extents.size());
    const Tensor x(dtype, random_grid(random, dtype, rows, depth), {1, 3}),
        weight(dtype, random_grid(random, dtype, widest, depth)),
        bias(dtype, random_grid(random, dtype, 1, widest)),
        wide(dtype, random_grid(random, dtype, rows, widest), extents, {1, 3});
    for (const Kernels* kernels : available_kernels()) {
      const check::Where isa(kernels->name);
      Ops& ops = ops_of(*kernels, 2);
      const Tensor expand_room = panels_for(true, dtype, widest, depth, false),
                   contract_room = panels_for(true, dtype, widest, depth, true);
      const Panels expand_panels = pack_into(expand_room, ops, dtype, weight, widest, depth, false),
                   contract_panels = pack_into(contract_room, ops, dtype, weight, widest, depth, true);
      const Tensors together = tensors(Tensor(dtype, rows, widest), Tensor(dtype, rows, depth)),
                    alone = tensors(Tensor(dtype, rows, widest), Tensor(dtype, rows, depth));
      ops.expand(dtype, x.view(), weight.view(), bias.data(), depth, blocks, Activation::kGelu,
                 together[0].view(), {});
      ops.contract(dtype, wide.view(), weight.view(), nullptr, depth, blocks, together[1].view());
      int64_t row = 0;
      auto from = [&](const Tensor& t) {
        const View v = t.view();
        return View{v.data + row * v.stride * size_of(dtype), v.stride};
      };
      for (const Block& b : blocks) {
        ops.expand(dtype, from(x), weight.view(), bias.data(), depth, {b}, Activation::kGelu, from(alone[0]),
                   {}, expand_panels);
        ops.contract(dtype, from(wide), weight.view(), nullptr, depth, {b}, from(alone[1]), contract_panels);
        row += b.rows;
      }
      const bool same_expand = together[0].same_bytes(alone[0]);
      const bool same_contract = together[1].same_bytes(alone[1]);
      CHECK(same_expand);
      CHECK(same_contract);
    }
  }
}

TEST(nan_is_not_lost) {
  // In a row of x: all of that row's outputs.
  Random random(36);
  constexpr int depth = 19, columns = 70, rows = 14, bad = 8;
  for (DType dtype : kTypes)
    for (Activation activation : kActivations) {
      const check::Where where(name_of(dtype) + numbers(" activation", static_cast<int>(activation)));
      Grid x = random_grid(random, dtype, rows, depth);
      x.at(bad, 11) = NAN;
      const Tensor x_in(dtype, x), weight(dtype, random_grid(random, dtype, columns, depth));
      everywhere(
          [&] {
            return tensors(std::move(Tensor(dtype, rows, columns).expect(std::vector<int>(rows, columns))));
          },
          [&](Ops& ops, const Tensors& to) {
            ops.expand(dtype, x_in.view(), weight.view(), nullptr, depth, {{rows, columns}}, activation,
                       to[0].view(), {});
          },
          [&](const Tensors& got) {
            bool good = true;
            for (int r = 0; r < rows; ++r)
              for (int c = 0; c < columns; ++c) good = good && std::isnan(got[0].at(r, c)) == (r == bad);
            CHECK(good);
          });
    }
}

// ---- gradients of weights and biases: of values whose sums are not what is left of larger ones ----

struct GradientCase {
  DType dtype;
  std::vector<Block> blocks;
  int columns, more;  // rows of the weight beyond the largest extent
  bool summed;        // with the sums of left's columns
  Space space;
};

void check_weight_gradient(Random& random, const GradientCase& c) {
  const std::vector<int> extents = extents_of(c.blocks);
  const int64_t rows = static_cast<int64_t>(extents.size());
  const int widest = largest_of(extents), all = widest + c.more;
  const Grid left = random_grid(random, c.dtype, rows, widest, 1, 2),
             right = random_grid(random, c.dtype, rows, c.columns, 1, 2);
  const Tensor left_in(c.dtype, left, extents, c.space), right_in(c.dtype, right, c.space);
  Expected products(all, c.columns), sums(1, all);
  for (int i = 0; i < all; ++i)
    for (int n = 0; n < c.columns; ++n) {
      Sum sum;
      for (int64_t r = 0; r < rows; ++r)
        if (i < extents[r]) sum.add(left.at(r, i), right.at(r, n));
      products.set(i, n, stored(c.dtype, sum.plain), sum.truth);
    }
  for (int i = 0; i < all; ++i) {
    Sum sum;
    for (int64_t r = 0; r < rows; ++r)
      if (i < extents[r]) sum.add(left.at(r, i), 1);
    sums.set(0, i, sum.plain, sum.truth);
  }
  const std::vector<int> whole(all, c.columns);
  everywhere(
      [&] {
        return tensors(std::move(Tensor(c.dtype, all, c.columns, c.space).expect(whole)),
                       std::move(Tensor(DType::kF32, 1, all).expect(0, c.summed ? all : 0)));
      },
      [&](Ops& ops, const Tensors& to) {
        ops.weight_gradient(c.dtype, left_in.view(), right_in.view(), c.columns, c.blocks, all, to[0].view(),
                            c.summed ? to[1].floats() : nullptr);
      },
      [&](const Tensors& got) {
        CHECK_GOOD(wrong(c.dtype, got[0], products, whole));
        if (c.summed) CHECK_GOOD(wrong(DType::kF32, got[1], sums, {all}));
        bool zeros = true;
        for (int i = widest; i < all; ++i) {
          zeros = zeros && (!c.summed || got[1].at(0, i) == 0);
          for (int n = 0; n < c.columns; ++n) zeros = zeros && got[0].at(i, n) == 0;
        }
        CHECK(zeros);
      });
}

TEST(weight_gradient) {
  Random random(41);
  constexpr int more[] = {0, 1, 70};
  for (const Choice& choice :
       pairs_among(kTypes, kColumns, kColumns, kRows, kStaircases, more, kEither, kSpaces)) {
    Chosen chosen(choice);
    GradientCase c;
    c.dtype = chosen.from(kTypes);
    const int extent = chosen.from(kColumns);
    c.columns = chosen.from(kColumns);
    const int rows = chosen.from(kRows);
    c.blocks = staircase(chosen.from(kStaircases), rows, extent);
    c.more = chosen.from(more);
    c.summed = chosen.from(kEither);
    c.space = chosen.from(kSpaces);
    const check::Where where(name_of(c.dtype) +
                             numbers(" columns, more, summed", c.columns, c.more, c.summed) +
                             numbers(", space", c.space.before, c.space.between) + ", " + describe(c.blocks));
    check_weight_gradient(random, c);
  }
}

TEST(weight_gradient_of_many_rows) {
  // A row of the transpose is 4096 bytes here (float32) or there (bf16), which changes its stride.
  Random random(42);
  for (DType dtype : kTypes)
    for (int rows : {1024, 2048}) {
      const check::Where where(name_of(dtype) + numbers(" rows", rows));
      check_weight_gradient(random, {dtype, {{rows - 301, 7}, {301, 19}}, 18, 2, true, {0, 0}});
    }
}

TEST(weight_gradient_in_several_sums) {
  // More rows than are summed at a time: blocks are cut, and the later sums reach less of the neurons or
  // none.
  Random random(45);
  for (DType dtype : kTypes) {
    const int64_t sum = 2048 * group_of(dtype);
    for (const std::vector<Block>& blocks : {std::vector<Block>{{sum, 19}}, std::vector<Block>{{sum + 1, 19}},
                                             std::vector<Block>{{sum - 3, 3}, {1, 8}, {sum + 5, 19}},
                                             std::vector<Block>{{7, 5}, {2 * sum + 3, 1}}}) {
      const check::Where where(name_of(dtype) + (" " + describe(blocks)));
      check_weight_gradient(random, {dtype, blocks, 5, 2, true, {0, 3}});
    }
  }
}

TEST(weight_gradient_of_blocks_that_end_inside_a_vector) {
  // What is written behind one of them lands in another, or in the next row of the transpose.
  Random random(44);
  for (DType dtype : kTypes)
    for (int64_t words : {3, 7, 15}) {
      const int64_t group = group_of(dtype), rows = words * group;
      for (const std::vector<Block>& blocks :
           {std::vector<Block>{{rows, 70}, {rows - 1, 130}, {rows, 129}, {2 * rows, 130}, {1, 3}},
            std::vector<Block>{{group, 130}, {rows, 129}}}) {
        const check::Where where(name_of(dtype) + (" " + describe(blocks)));
        check_weight_gradient(random, {dtype, blocks, 17, 1, true, {0, 0}});
      }
    }
}

TEST(column_sums) {
  Random random(43);
  constexpr int more[] = {0, 1, 70};
  for (const Choice& choice : pairs_among(kTypes, kColumns, kRows, kStaircases, more, kSpaces)) {
    Chosen chosen(choice);
    const DType dtype = chosen.from(kTypes);
    const int extent = chosen.from(kColumns), rows = chosen.from(kRows);
    const auto blocks = staircase(chosen.from(kStaircases), rows, extent);
    const std::vector<int> extents = extents_of(blocks);
    const int widest = largest_of(extents);
    int columns = widest;
    for (const Block& b : blocks) columns = std::max(columns, b.extent);
    columns += chosen.from(more);
    const Space space = chosen.from(kSpaces);
    const check::Where where(name_of(dtype) + numbers(" columns", columns) +
                             numbers(", space", space.before, space.between) + ", " + describe(blocks));
    const Grid x = random_grid(random, dtype, rows, widest, 1, 2);
    const Tensor x_in(dtype, x, extents, space);
    Expected sums(1, columns);
    for (int i = 0; i < columns; ++i) {
      Sum sum;
      for (int r = 0; r < rows; ++r)
        if (i < extents[r]) sum.add(x.at(r, i), 1);
      sums.set(0, i, sum.plain, sum.truth);
    }
    everywhere([&] { return tensors(std::move(Tensor(DType::kF32, 1, columns).expect(0, columns))); },
               [&](Ops& ops, const Tensors& to) {
                 ops.column_sums(dtype, x_in.view(), blocks, columns, to[0].floats());
               },
               [&](const Tensors& got) { CHECK_GOOD(wrong(DType::kF32, got[0], sums, {columns})); });
  }
}

// ---- the activations' gradients ----

template <class T>
T slope_at(T x, Activation activation) {
  const T pi = static_cast<T>(M_PI);
  if (activation == Activation::kGelu)
    return std::erfc(-x / std::sqrt(T{2})) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * pi);
  if (activation == Activation::kGeluTanh) {
    const T root = std::sqrt(2 / pi), cubic = static_cast<T>(0.044715);
    const T t = std::tanh(root * (x + cubic * x * x * x));
    return (1 + t) / 2 + x * (1 - t * t) / 2 * root * (1 + 3 * cubic * x * x);
  }
  return x > 0 ? T{1} : T{0};
}

void check_slope(DType dtype, Activation activation, const Grid& grad, const Grid& pre,
                 const std::vector<Block>& blocks, Space space) {
  const std::vector<int> extents = extents_of(blocks);
  const Tensor grad_in(dtype, grad, extents, space), pre_in(dtype, pre, extents, {0, 3});
  Expected outs(grad.rows, grad.columns);
  for (int64_t r = 0; r < grad.rows; ++r)
    for (int c = 0; c < extents[r]; ++c) {
      const float x = pre.at(r, c);
      outs.set(r, c, stored(dtype, grad.at(r, c) * slope_at(x, activation)),
               grad.at(r, c) * slope_at(static_cast<double>(x), activation));
    }
  // The weight is the identity, so that the gradient of x is the slopes themselves.
  const auto columns = static_cast<int>(grad.columns);
  Grid one{columns, columns, std::vector<float>(grad.columns * grad.columns)};
  for (int i = 0; i < columns; ++i) one.at(i, i) = 1;
  const Tensor one_in(dtype, one, space);
  const std::vector<int> whole(grad.rows, columns);
  for (int64_t r = 0; r < grad.rows; ++r)
    for (int c = extents[r]; c < columns; ++c) outs.set(r, c, 0, 0);
  everywhere([&] { return tensors(std::move(Tensor(dtype, grad.rows, grad.columns, space).expect(whole))); },
             [&](Ops& ops, const Tensors& to) {
               ops.expand_backward(dtype, activation, grad_in.view(), pre_in.view(), {}, one_in.view(),
                                   columns, blocks, columns, to[0].view(), {}, nullptr);
             },
             [&](const Tensors& got) { CHECK_GOOD(wrong(dtype, got[0], outs, whole)); });
}

constexpr Activation kCurved[] = {Activation::kGelu, Activation::kGeluTanh, Activation::kRelu};

TEST(expand_backward_of_x) {
  Random random(51);
  for (const Choice& choice : pairs_among(kTypes, kColumns, kRows, kStaircases, kCurved, kSpaces)) {
    Chosen chosen(choice);
    const DType dtype = chosen.from(kTypes);
    const int extent = chosen.from(kColumns), rows = chosen.from(kRows);
    const auto blocks = staircase(chosen.from(kStaircases), rows, extent);
    const Activation activation = chosen.from(kCurved);
    const Space space = chosen.from(kSpaces);
    const check::Where where(name_of(dtype) + numbers(" activation", static_cast<int>(activation)) +
                             numbers(", space", space.before, space.between) + ", " + describe(blocks));
    const int widest = largest_of(extents_of(blocks));
    Grid grad = random_grid(random, dtype, rows, widest), pre = random_grid(random, dtype, rows, widest, 2);
    if (rows) pre.at(0, 0) = grad.at(0, 0) = 2;  // not only values near zero
    check_slope(dtype, activation, grad, pre, blocks, space);
  }
}

TEST(slopes_from_end_to_end) {
  constexpr int columns = 512;
  for (DType dtype : kTypes)
    for (Activation activation : kCurved)
      for (float reach : {0.05f, 0.5f, 3.f, 12.f, 1e4f}) {
        const check::Where where(name_of(dtype) +
                                 numbers(" activation, reach", static_cast<int>(activation), reach));
        Grid grad{1, columns, std::vector<float>(columns, 1)}, pre = grad;
        for (int i = 0; i < columns; ++i)
          pre.at(0, i) = stored(dtype, reach * (static_cast<float>(i) / (columns / 2) - 1));
        check_slope(dtype, activation, grad, pre, {{1, columns}}, {0, 0});
      }
}

/// All gradients of expand; more rows than are summed at a time where `rows` is large.
void check_expand_backward(Random& random, DType dtype, Activation activation,
                           const std::vector<Block>& blocks, int more, Space space) {
  const std::vector<int> extents = extents_of(blocks);
  const auto rows = static_cast<int64_t>(extents.size());
  const int widest = largest_of(extents), all = widest + more, depth = 5;
  const Grid grad = random_grid(random, dtype, rows, widest),
             pre = random_grid(random, dtype, rows, widest, 2),
             x = random_grid(random, dtype, rows, depth, 1, 2),
             weight = random_grid(random, dtype, all, depth, 1, 2);
  const Tensor grad_in(dtype, grad, extents, space), pre_in(dtype, pre, extents, {0, 3}),
      x_in(dtype, x, space), weight_in(dtype, weight, space);
  auto inner = [&](int64_t r, int i) {
    const float at = pre.at(r, i);
    if (activation == Activation::kNone) return std::pair<float, double>(grad.at(r, i), grad.at(r, i));
    return std::pair<float, double>(stored(dtype, grad.at(r, i) * slope_at(at, activation)),
                                    grad.at(r, i) * slope_at(static_cast<double>(at), activation));
  };
  Expected of_x(rows, depth), of_weight(all, depth), of_bias(1, all);
  std::vector<float> plain(all * (depth + 1));
  std::vector<double> truth(all * (depth + 1));
  for (int64_t r = 0; r < rows; ++r) {
    float x_plain[depth] = {};
    double x_truth[depth] = {};
    for (int i = 0; i < extents[r]; ++i) {
      const auto [rounded, exact] = inner(r, i);
      for (int n = 0; n < depth; ++n) {
        x_plain[n] += rounded * weight.at(i, n), x_truth[n] += exact * weight.at(i, n);
        plain[i * (depth + 1) + n] += rounded * x.at(r, n), truth[i * (depth + 1) + n] += exact * x.at(r, n);
      }
      plain[i * (depth + 1) + depth] += rounded, truth[i * (depth + 1) + depth] += exact;
    }
    for (int n = 0; n < depth; ++n) of_x.set(r, n, stored(dtype, x_plain[n]), x_truth[n]);
  }
  for (int i = 0; i < all; ++i) {
    for (int n = 0; n < depth; ++n)
      of_weight.set(i, n, stored(dtype, plain[i * (depth + 1) + n]), truth[i * (depth + 1) + n]);
    of_bias.set(0, i, plain[i * (depth + 1) + depth], truth[i * (depth + 1) + depth]);
  }
  const std::vector<int> whole_rows(rows, depth), whole(all, depth);
  everywhere(
      [&] {
        return tensors(std::move(Tensor(dtype, rows, depth, space).expect(whole_rows)),
                       std::move(Tensor(dtype, all, depth, space).expect(whole)),
                       std::move(Tensor(DType::kF32, 1, all).expect(0, all)));
      },
      [&](Ops& ops, const Tensors& to) {
        ops.expand_backward(dtype, activation, grad_in.view(), pre_in.view(), x_in.view(), weight_in.view(),
                            depth, blocks, all, to[0].view(), to[1].view(), to[2].floats());
      },
      [&](const Tensors& got) {
        CHECK_GOOD(wrong(dtype, got[0], of_x, whole_rows));
        CHECK_GOOD(wrong(dtype, got[1], of_weight, whole));
        CHECK_GOOD(wrong(DType::kF32, got[2], of_bias, {all}));
      });
}

TEST(expand_backward) {
  Random random(52);
  constexpr Activation activations[] = {Activation::kNone, Activation::kGelu, Activation::kRelu};
  constexpr int more[] = {0, 3};
  for (const Choice& choice : pairs_among(kTypes, kColumns, kRows, kStaircases, activations, more, kSpaces)) {
    Chosen chosen(choice);
    const DType dtype = chosen.from(kTypes);
    const int extent = chosen.from(kColumns), rows = chosen.from(kRows);
    const auto blocks = staircase(chosen.from(kStaircases), rows, extent);
    const Activation activation = chosen.from(activations);
    const int beyond = chosen.from(more);
    const Space space = chosen.from(kSpaces);
    const check::Where where(name_of(dtype) +
                             numbers(" activation, more", static_cast<int>(activation), beyond) +
                             numbers(", space", space.before, space.between) + ", " + describe(blocks));
    check_expand_backward(random, dtype, activation, blocks, beyond, space);
  }
}

TEST(expand_backward_in_several_sums) {
  Random random(53);
  for (DType dtype : kTypes)
    for (Activation activation : {Activation::kNone, Activation::kGelu}) {
      const int64_t sum = 2048 * group_of(dtype);
      for (const std::vector<Block>& blocks : {std::vector<Block>{{sum - 3, 4}, {1, 9}, {sum + 5, 18}},
                                               std::vector<Block>{{7, 6}, {2 * sum + 3, 2}}}) {
        const check::Where where(name_of(dtype) + numbers(" activation", static_cast<int>(activation)) + " " +
                                 describe(blocks));
        check_expand_backward(random, dtype, activation, blocks, 1, {0, 3});
      }
    }
}

// ---- dropout ----

/// One step of the hash; all arithmetic is modulo 2^32.
uint64_t scramble(uint64_t h) {
  h = (h ^ h / 65536) * 0x7feb352d % 0x100000000;
  h = (h ^ h / 32768) * 0x846ca68b % 0x100000000;
  return h ^ h / 65536;
}

/// reference.keep_mask, again.
bool kept(const Dropout& dropout, uint64_t row, uint64_t column) {
  if (dropout.scale == 1) return true;
  const uint64_t high = dropout.seed >> 32, low = dropout.seed % 0x100000000;
  const uint64_t of_row = scramble(row ^ scramble(low ^ scramble(high)));
  const uint64_t of_column = (column * 0x9e3779b9 + high) % 0x100000000;
  return scramble(of_row ^ of_column) >= dropout.threshold;
}

Dropout dropout_of(double p, uint64_t seed) {
  if (p == 0) return {};
  return {seed, static_cast<uint32_t>(std::llround(p * 0x1p32)), static_cast<float>(1 / (1 - p))};
}

constexpr double kDropouts[] = {0, 0.1, 0.5};

TEST(the_mask_is_that_of_the_reference) {
  // reference.keep_mask for rows 0, 1 and 70000 and 32 columns from 0 and from 131075: bits of a word each.
  const struct {
    uint64_t seed;
    double p;
    uint32_t words[2][3];
  } known[] = {
      {0x123456789abcdef0, 0.5, {{0x19f2a54e, 0x1c9a95b7, 0xf912046d}, {0x0a4dc67e, 0x55adba75, 0xa071af4e}}},
      {0x123456789abcdef0, 0.1, {{0xfff7bdcf, 0xffbfbfff, 0xfff7f77f}, {0xbfffd77f, 0xfffdffff, 0xbefdffff}}},
      {0xfffffffffffffffe, 0.5, {{0x525b451d, 0x832488ae, 0x27db5cba}, {0xfd7ba862, 0x388693f9, 0xf1e97bc8}}},
      {5, 0.5, {{0xe55f7084, 0x4404215f, 0xad32bfc7}, {0x2625f7e2, 0xe24526d0, 0x6e9e2ed7}}},
  };
  const uint64_t rows[] = {0, 1, 70000}, columns[] = {0, 131075};
  for (const auto& k : known)
    for (int c = 0; c < 2; ++c)
      for (int r = 0; r < 3; ++r) {
        uint32_t word = 0;
        for (int i = 0; i < 32; ++i)
          word |= static_cast<uint32_t>(kept(dropout_of(k.p, k.seed), rows[r], columns[c] + i)) << i;
        CHECK(word == k.words[c][r]);
      }
}

// ---- attention ----

struct AttentionCase {
  DType dtype;
  int head_size;
  std::vector<int> lengths;   // of each sequence
  std::vector<Block> blocks;  // of sequences; extents are heads
  double p;
  float sharpness;
  Space space;
};

/// What a case computes on, and each row's place in it.
struct Packed {
  std::vector<int64_t> offsets{0};
  std::vector<int> heads;      // of each row
  std::vector<int> mask_rows;  // of each row: counted from its block's first
  int most = 0;                // heads
  Dropout dropout;
  int d;
  Grid qkv, grad;

  Packed(Random& random, const AttentionCase& c) : d(c.head_size) {
    size_t sequence = 0;
    for (const Block& b : c.blocks)
      for (int64_t i = 0, first = static_cast<int64_t>(heads.size()); i < b.rows; ++i, ++sequence) {
        for (int r = 0; r < c.lengths[sequence]; ++r) {
          mask_rows.push_back(static_cast<int>(static_cast<int64_t>(heads.size()) - first));
          heads.push_back(b.extent);
        }
        offsets.push_back(static_cast<int64_t>(heads.size()));
      }
    most = largest_of(heads);
    dropout = dropout_of(c.p, random.bits());
    qkv = random_grid(random, c.dtype, rows(), most * 3 * d);
    for (int64_t r = 0; r < rows(); ++r)
      for (int i = 0; i < qkv.columns; ++i)
        if (i / d % 3 != 2) qkv.at(r, i) *= c.sharpness;  // a power of 2
    grad = random_grid(random, c.dtype, rows(), most * d);
  }
  int64_t rows() const { return static_cast<int64_t>(heads.size()); }
  std::vector<int> times(int columns) const {
    std::vector<int> counts = heads;
    for (int& n : counts) n *= columns;
    return counts;
  }
};

/// Attention and its gradient in one type, bf16 where a tensor would be.
template <class T>
struct Attended {
  std::vector<T> out, lse, grad;  // [T][H * d], [T][H], [T][H * 3 * d]
  // Log-sum-exp of scores that were rounded to bf16: plain torch has them in a tensor of that type.
  std::vector<T> stored_lse;
};

template <class T>
Attended<T> attend(const Packed& p, bool narrow) {
  const int d = p.d, width = p.most * 3 * d;
  const T scale = 1 / std::sqrt(static_cast<T>(d)), dropout_scale = static_cast<T>(p.dropout.scale);
  Attended<T> a{std::vector<T>(p.rows() * p.most * d), std::vector<T>(p.rows() * p.most),
                std::vector<T>(p.rows() * width), std::vector<T>(p.rows() * p.most)};
  auto round = [&](T value) {
    return narrow ? static_cast<T>(round_bf16(static_cast<float>(value))) : value;
  };
  auto dot = [&](const float* x, const float* y) {
    T sum = 0;
    for (int i = 0; i < d; ++i) sum += static_cast<T>(x[i]) * static_cast<T>(y[i]);
    return sum;
  };
  auto log_sum = [](const std::vector<T>& scores) {
    const T top = *std::max_element(scores.begin(), scores.end());
    T sum = 0;
    for (T s : scores) sum += std::exp(s - top);
    return top + std::log(sum);
  };
  for (size_t s = 0; s + 1 < p.offsets.size(); ++s)
    for (int64_t q = p.offsets[s]; q < p.offsets[s + 1]; ++q)
      for (int head = 0; head < p.heads[q]; ++head) {
        const int keys = static_cast<int>(p.offsets[s + 1] - p.offsets[s]), at = head * 3 * d;
        const float *query = &p.qkv.values[q * width + at], *grad = &p.grad.values[(q * p.most + head) * d];
        T *out = &a.out[(q * p.most + head) * d], *grad_q = &a.grad[q * width + at];
        std::vector<T> scores(keys), stored_scores(keys);
        for (int k = 0; k < keys; ++k) {
          const T score = dot(query, &p.qkv.values[(p.offsets[s] + k) * width + at + d]);
          scores[k] = score * scale;
          stored_scores[k] = round(score) * scale;
        }
        const T lse = a.lse[q * p.most + head] = log_sum(scores);
        a.stored_lse[q * p.most + head] = log_sum(stored_scores);
        std::vector<T> kept_scale(keys);
        for (int k = 0; k < keys; ++k) {
          const bool keeps = kept(p.dropout, p.mask_rows[q], int64_t{head} * 65536 + k);
          kept_scale[k] = keeps ? dropout_scale : 0;
          const float* value = &p.qkv.values[(p.offsets[s] + k) * width + at + 2 * d];
          const T weight = round(std::exp(scores[k] - lse) * kept_scale[k]);
          for (int i = 0; i < d; ++i) out[i] += weight * static_cast<T>(value[i]);
        }
        T delta = 0;
        for (int i = 0; i < d; ++i) {
          out[i] = round(out[i]);
          delta += out[i] * static_cast<T>(grad[i]);
        }
        for (int k = 0; k < keys; ++k) {
          const float* key = &p.qkv.values[(p.offsets[s] + k) * width + at + d];
          T* grad_k = &a.grad[(p.offsets[s] + k) * width + at + d];
          const T probability = std::exp(scores[k] - lse);
          const T change = round(probability * (dot(grad, key + d) * kept_scale[k] - delta) * scale);
          const T weight = round(probability * kept_scale[k]);
          for (int i = 0; i < d; ++i) {
            grad_q[i] += change * static_cast<T>(key[i]);
            grad_k[i] += change * static_cast<T>(query[i]);
            grad_k[d + i] += weight * static_cast<T>(grad[i]);
          }
        }
      }
  for (T& v : a.grad) v = round(v);
  return a;
}

void check_attention(Random& random, const AttentionCase& c) {
  const Packed p(random, c);
  const bool narrow = c.dtype == DType::kBf16;
  const Attended<float> plain = attend<float>(p, narrow);
  const Attended<double> truth = attend<double>(p, false);
  // The only token of a sequence has no gradient of query and key: all of a `term` cancels.
  double term = 0;
  std::vector<int> alone(p.rows(), 0), others = p.times(3 * p.d);
  for (size_t s = 0; s + 1 < p.offsets.size(); ++s) {
    const int64_t row = p.offsets[s];
    if (p.offsets[s + 1] - row != 1) continue;
    std::swap(alone[row], others[row]);
    for (int head = 0; head < p.heads[row]; ++head) {
      double change = 0, most = 0;
      for (int i = 0; i < p.d; ++i) {
        auto part = [&](int which) {
          return std::abs(static_cast<double>(p.qkv.at(row, (3 * head + which) * p.d + i)));
        };
        change += std::abs(p.grad.at(row, head * p.d + i)) * part(2) * p.dropout.scale;
        most = std::max({most, part(0), part(1)});
      }
      term = std::max(term, change * most / std::sqrt(static_cast<double>(p.d)));
    }
  }
  const auto values = p.times(p.d), triples = p.times(3 * p.d);
  auto expected = [&](int columns, const std::vector<float>& in_type, const std::vector<double>& exact) {
    Expected e(0, columns);
    e.plain = in_type;
    e.truth = exact;
    return e;
  };
  const Expected out = expected(p.most * p.d, plain.out, truth.out),
                 lse = expected(p.most, plain.stored_lse, truth.lse),
                 grad_qkv = expected(p.most * 3 * p.d, plain.grad, truth.grad);
  const Tensor qkv_in(c.dtype, p.qkv, triples, c.space), grad_in(c.dtype, p.grad, values, {0, 2});
  everywhere(
      [&] {
        return tensors(std::move(Tensor(c.dtype, p.rows(), p.most * p.d, c.space).expect(values)),
                       std::move(Tensor(DType::kF32, p.rows(), p.most, {0, 2}).expect(p.heads)),
                       std::move(Tensor(c.dtype, p.rows(), p.most * 3 * p.d, c.space).expect(triples)));
      },
      [&](Ops& ops, const Tensors& to) {
        AttentionOp task{};
        task.dtype = c.dtype;
        task.head_size = p.d;
        task.dropout = p.dropout;
        task.qkv = qkv_in.view();
        task.out = to[0].view();
        task.lse = to[1].floats();
        task.lse_stride = to[1].view().stride;
        ops.attention(task, p.offsets, c.blocks);
        // Backward takes what forward wrote: the rounding of scores and of their log-sum-exp cancels.
        task.grad = grad_in.view();
        task.grad_qkv = to[2].view();
        ops.attention(task, p.offsets, c.blocks);
      },
      [&](const Tensors& got) {
        CHECK_GOOD(wrong(c.dtype, got[0], out, values));
        CHECK_GOOD(wrong(DType::kF32, got[1], lse, p.heads));
        CHECK_GOOD(wrong(c.dtype, got[2], grad_qkv, others));
        CHECK_GOOD(wrong(c.dtype, got[2], grad_qkv, alone, term));
      });
}

TEST(attention) {
  Random random(61);
  constexpr int head_sizes[] = {1, 3, 32, 64, 65, 80};
  const std::vector<int> lengths[] = {{33, 1},    {0, 7, 64, 0, 1}, {65, 0, 6, 12},
                                      {97, 5, 1}, {0, 0},           {200, 3}};
  constexpr Staircase staircases[] = {kOne, kDown, kUp, kEqual, kEmptyBlocks, kSingleRows};
  constexpr float sharpness[] = {1, 2};
  constexpr int heads[] = {1, 2, 3};
  for (const Choice& choice :
       pairs_among(kTypes, head_sizes, lengths, staircases, kDropouts, sharpness, kSpaces, heads)) {
    Chosen chosen(choice);
    AttentionCase c;
    c.dtype = chosen.from(kTypes);
    c.head_size = chosen.from(head_sizes);
    c.lengths = chosen.from(lengths);
    const Staircase kind = chosen.from(staircases);
    c.p = chosen.from(kDropouts);
    c.sharpness = chosen.from(sharpness);
    c.space = chosen.from(kSpaces);
    c.blocks = staircase(kind, static_cast<int64_t>(c.lengths.size()), chosen.from(heads));
    std::string text =
        name_of(c.dtype) + numbers(" head size, dropout, sharpness", c.head_size, c.p, c.sharpness) +
        numbers(", space", c.space.before, c.space.between) + ", " + describe(c.blocks) + ", lengths";
    for (int length : c.lengths) text += " " + std::to_string(length);
    const check::Where where(text);
    check_attention(random, c);
  }
}

TEST(attention_of_one_token) {
  Random random(63);
  for (DType dtype : kTypes)
    for (int d : {1, 3, 64, 65})
      for (double p : kDropouts) {
        const check::Where where(name_of(dtype) + numbers(" head size, dropout", d, p));
        check_attention(random, {dtype, d, {1}, {{1, 3}}, p, 2, {0, 0}});
      }
}

TEST(no_sequences) {
  for (DType dtype : kTypes)
    for (bool backward : kEither)
      everywhere([&] { return tensors(Tensor(dtype, 2, 6)); },
                 [&](Ops& ops, const Tensors& to) {
                   AttentionOp task{};
                   task.dtype = dtype;
                   task.head_size = 2;
                   task.qkv = task.out = to[0].view();
                   if (backward) task.grad = task.grad_qkv = to[0].view();
                   ops.attention(task, {0}, {{0, 1}});
                 },
                 [&](const Tensors& got) { CHECK_GOOD(stray(got)); });
}

TEST(attention_stays_inside_its_scratch) {
  Random random(62);
  for (DType dtype : kTypes)
    for (int length : {1, 63, 64, 65, 97, 130})
      for (int d : {1, 3, 64, 65}) {
        const check::Where where(name_of(dtype) + numbers(" length, head size", length, d));
        const Packed p(random, {dtype, d, {length}, {{1, 1}}, 0.1, 1, {0, 0}});
        const Tensor qkv(dtype, p.qkv), grad(dtype, p.grad),
            lse(DType::kF32, Grid{length, 1, std::vector<float>(length, 3)}), out(dtype, p.grad),
            grad_qkv(dtype, length, 3 * d);
        for (const Kernels* kernels : available_kernels())
          for (bool backward : kEither) {
            const check::Where isa(kernels->name);
            const AttentionOp task{dtype,
                                   d,
                                   p.dropout,
                                   qkv.view(),
                                   out.view(),
                                   lse.floats(),
                                   1,
                                   backward ? grad.view() : View{},
                                   backward ? grad_qkv.view() : View{}};
            const int64_t bytes =
                backward ? attention_backward_scratch(length, d) : attention_scratch(length, d);
            Memory scratch(bytes + 4096);
            scratch.expect(0, bytes);
            kernels->attention_op(task, 0, 0, length, 0, scratch.data());
            CHECK_GOOD(scratch.stray());
          }
      }
}

// ---- LayerNorm and embeddings ----

constexpr int kHidden[] = {1, 3, 15, 16, 17, 63, 64, 65, 67, 129, 130};
constexpr int kNormRows[] = {0, 1, 5, 16, 17, 64, 65, 200};
constexpr float kEps = 1e-5f;
/// Results of rows of fewer values are judged beside the terms that they are the rest of: with so few, no
/// plain loop's error says what rounding does.
constexpr int kFew = 8;

struct NormCase {
  DType dtype;
  bool embeds;
  int hidden;
  int64_t rows;
  Dropout dropout;
  float mean;
  Space space;
};

struct Moments {
  double mean = 0, rstd = 0;
};

/// A row's mean and 1/std in one type throughout.
template <class T>
Moments moments(const Grid& z, int64_t row) {
  T mean = 0, variance = 0;
  for (int i = 0; i < z.columns; ++i) mean += static_cast<T>(z.at(row, i));
  mean /= static_cast<T>(z.columns);
  for (int i = 0; i < z.columns; ++i) {
    const T difference = static_cast<T>(z.at(row, i)) - mean;
    variance += difference * difference;
  }
  return {static_cast<double>(mean),
          static_cast<double>(1 / std::sqrt(variance / static_cast<T>(z.columns) + static_cast<T>(kEps)))};
}

/// What is saved is what is normalised: z is judged by itself, and the rest by the z that was stored.
void verify_norm(const NormCase& c, const Expected& zs, const Grid& weight, const Grid& bias,
                 const Tensors& got) {
  const std::vector<int> whole(c.rows, c.hidden), single(c.rows, 1);
  CHECK_GOOD(wrong(c.dtype, got[0], zs, whole));
  Grid z{c.rows, c.hidden, std::vector<float>(c.rows * c.hidden)};
  Expected outs(c.rows, c.hidden), means(c.rows, 1), rstds(c.rows, 1);
  double term = 0;  // three values may be nearly the same: what is left of them is magnified
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int i = 0; i < c.hidden; ++i) z.at(r, i) = got[0].at(r, i);
    const Moments plain = moments<float>(z, r), truth = moments<double>(z, r);
    means.set(r, 0, static_cast<float>(plain.mean), truth.mean);
    rstds.set(r, 0, static_cast<float>(plain.rstd), truth.rstd);
    for (int i = 0; i < c.hidden; ++i) {
      const float y =
          (z.at(r, i) - static_cast<float>(plain.mean)) * static_cast<float>(plain.rstd) * weight.at(0, i) +
          bias.at(0, i);
      const double exact = (z.at(r, i) - truth.mean) * truth.rstd * weight.at(0, i) + bias.at(0, i);
      const float scale = !c.embeds ? 1 : kept(c.dropout, r, i) ? c.dropout.scale : 0;
      if (c.hidden < kFew) term = std::max(term, std::abs(truth.mean * truth.rstd * weight.at(0, i)) * scale);
      outs.set(r, i, stored(c.dtype, y * scale), exact * scale);
    }
  }
  CHECK_GOOD(wrong(c.hidden < kFew ? DType::kF32 : c.dtype, got[1], outs, whole, term));
  CHECK_GOOD(wrong(DType::kF32, got[2], means, single));
  CHECK_GOOD(wrong(DType::kF32, got[3], rstds, single));
}

void check_norm(Random& random, const NormCase& c) {
  const Grid weight = random_grid(random, c.dtype, 1, c.hidden, 1, 1),
             bias = random_grid(random, c.dtype, 1, c.hidden);
  const Tensor weight_in(c.dtype, weight), bias_in(c.dtype, bias);
  NormOp task{};
  task.dtype = c.dtype;
  task.embeds = c.embeds;
  task.hidden = c.hidden;
  task.eps = kEps;
  task.dropout = c.dropout;
  task.weight = weight_in.data();
  task.bias = bias_in.data();
  Expected zs(c.rows, c.hidden);
  // Inputs of one or the other; what a table holds for ids that nobody has is poison.
  constexpr int counts[] = {13, 2, 11};
  const Grid x = random_grid(random, c.dtype, c.embeds ? 0 : c.rows, c.hidden, 1, c.mean),
             residual = random_grid(random, c.dtype, c.embeds ? 0 : c.rows, c.hidden);
  std::vector<Grid> tables;
  std::vector<Tensor> table_tensors;
  std::vector<int64_t> ids[3];
  for (int t = 0; t < 3; ++t) {
    tables.push_back(random_grid(random, c.dtype, counts[t], c.hidden, 1, t ? 0 : c.mean));
    std::vector<int> used(counts[t], 0);
    for (int64_t r = 0; r < c.rows; ++r) {
      ids[t].push_back(random.below(counts[t]));
      used[ids[t].back()] = c.hidden;
    }
    table_tensors.emplace_back(c.dtype, tables[t], used, t ? c.space : Space{0, 0});
    task.tables[t] = table_tensors[t].view();
    task.ids[t] = ids[t].data();
  }
  const Tensor x_in(c.dtype, x, c.space), residual_in(c.dtype, residual, {0, 3});
  if (!c.embeds) {
    task.x = x_in.view();
    task.residual = residual_in.view();
  }
  for (int64_t r = 0; r < c.rows; ++r)
    for (int i = 0; i < c.hidden; ++i) {
      float plain;
      double truth;
      if (c.embeds) {
        const float a = tables[0].at(ids[0][r], i), b = tables[1].at(ids[1][r], i),
                    d = tables[2].at(ids[2][r], i);
        plain = a + b + d;
        truth = static_cast<double>(a) + b + d;
      } else {
        const float scale = kept(c.dropout, r, i) ? c.dropout.scale : 0;
        plain = x.at(r, i) * scale + residual.at(r, i);
        truth = static_cast<double>(x.at(r, i)) * scale + residual.at(r, i);
      }
      zs.set(r, i, stored(c.dtype, plain), truth);
    }
  const std::vector<int> whole(c.rows, c.hidden), single(c.rows, 1);
  everywhere(
      [&] {
        return tensors(std::move(Tensor(c.dtype, c.rows, c.hidden, c.space).expect(whole)),
                       std::move(Tensor(c.dtype, c.rows, c.hidden, {1, 2}).expect(whole)),
                       std::move(Tensor(DType::kF32, c.rows, 1).expect(single)),
                       std::move(Tensor(DType::kF32, c.rows, 1).expect(single)));
      },
      [&](Ops& ops, const Tensors& to) {
        NormOp here = task;
        here.z = to[0].view();
        here.out = to[1].view();
        here.mean = to[2].floats();
        here.rstd = to[3].floats();
        ops.norm(here, c.rows);
      },
      [&](const Tensors& got) { verify_norm(c, zs, weight, bias, got); });
}

void check_norm_backward(Random& random, const NormCase& c) {
  const Grid z = random_grid(random, c.dtype, c.rows, c.hidden, 1, c.mean),
             grad = random_grid(random, c.dtype, c.rows, c.hidden),
             weight = random_grid(random, c.dtype, 1, c.hidden, 1, 1);
  Grid means{c.rows, 1, std::vector<float>(c.rows)}, rstds = means;
  Expected grad_z(c.rows, c.hidden), grad_x(c.rows, c.hidden), grad_weight(1, c.hidden),
      grad_bias(1, c.hidden);
  std::vector<Sum> weights(c.hidden), biases(c.hidden);
  const bool few = c.hidden < kFew;
  double term = 0;  // of one value's gradient nothing is left, of three one part
  for (int64_t r = 0; r < c.rows; ++r) {
    const Moments exact = moments<double>(z, r);
    const float mean = means.at(r, 0) = static_cast<float>(exact.mean);
    const float rstd = rstds.at(r, 0) = static_cast<float>(exact.rstd);
    std::vector<Sum> g(c.hidden), normal(c.hidden);
    Sum all, scaled;
    for (int i = 0; i < c.hidden; ++i) {
      const float scale = !c.embeds ? 1 : kept(c.dropout, r, i) ? c.dropout.scale : 0;
      g[i].add(grad.at(r, i), scale);
      normal[i] = {(z.at(r, i) - mean) * rstd, (z.at(r, i) - exact.mean) * exact.rstd};
      const float w = weight.at(0, i);
      if (few) term = std::max(term, std::abs(g[i].truth * w * exact.rstd) * c.dropout.scale);
      weights[i].plain += g[i].plain * normal[i].plain;
      weights[i].truth += g[i].truth * normal[i].truth;
      biases[i].plain += g[i].plain;
      biases[i].truth += g[i].truth;
      all.plain += g[i].plain * w;
      all.truth += g[i].truth * w;
      scaled.plain += g[i].plain * w * normal[i].plain;
      scaled.truth += g[i].truth * w * normal[i].truth;
    }
    const float count = static_cast<float>(c.hidden);
    for (int i = 0; i < c.hidden; ++i) {
      const float w = weight.at(0, i);
      const float plain =
          (g[i].plain * w - all.plain / count - normal[i].plain * (scaled.plain / count)) * rstd;
      const double truth =
          (g[i].truth * w - all.truth / count - normal[i].truth * (scaled.truth / count)) * exact.rstd;
      const float scale = kept(c.dropout, r, i) ? c.dropout.scale : 0;
      grad_z.set(r, i, stored(c.dtype, plain), truth);
      grad_x.set(r, i, stored(c.dtype, plain * scale), truth * scale);
    }
  }
  for (int i = 0; i < c.hidden; ++i) {
    grad_weight.set(0, i, stored(c.dtype, weights[i].plain), weights[i].truth);
    grad_bias.set(0, i, stored(c.dtype, biases[i].plain), biases[i].truth);
  }
  const Tensor z_in(c.dtype, z, c.space), grad_in(c.dtype, grad, {0, 5}), weight_in(c.dtype, weight),
      mean_in(DType::kF32, means), rstd_in(DType::kF32, rstds);
  const std::vector<int> whole(c.rows, c.hidden);
  everywhere(
      [&] {
        Tensor of_x(c.dtype, c.rows, c.hidden, {1, 2});
        if (!c.embeds) of_x.expect(whole);
        return tensors(std::move(Tensor(c.dtype, c.rows, c.hidden, c.space).expect(whole)), std::move(of_x),
                       std::move(Tensor(c.dtype, 1, c.hidden).expect(0, c.hidden)),
                       std::move(Tensor(c.dtype, 1, c.hidden).expect(0, c.hidden)));
      },
      [&](Ops& ops, const Tensors& to) {
        NormOp task{};
        task.dtype = c.dtype;
        task.embeds = c.embeds;
        task.hidden = c.hidden;
        task.dropout = c.dropout;
        task.weight = weight_in.data();
        if (!c.embeds) task.x = to[1].view();
        task.residual = to[0].view();
        task.z = z_in.view();
        task.out = grad_in.view();
        task.mean = mean_in.floats();
        task.rstd = rstd_in.floats();
        ops.norm_backward(task, c.rows, to[2].data(), to[3].data());
      },
      [&](const Tensors& got) {
        const DType judged = few ? DType::kF32 : c.dtype;
        CHECK_GOOD(wrong(judged, got[0], grad_z, whole, term));
        if (!c.embeds) CHECK_GOOD(wrong(judged, got[1], grad_x, whole, term));
        CHECK_GOOD(wrong(c.dtype, got[2], grad_weight, {c.hidden}));
        CHECK_GOOD(wrong(c.dtype, got[3], grad_bias, {c.hidden}));
      });
}

void for_each_norm(Random& random, void (*check_case)(Random&, const NormCase&)) {
  constexpr float means[] = {2, 5};  // a row's mean is not what is left of larger values
  for (const Choice& choice : pairs_among(kTypes, kEither, kHidden, kNormRows, kDropouts, means, kSpaces)) {
    Chosen chosen(choice);
    NormCase c;
    c.dtype = chosen.from(kTypes);
    c.embeds = chosen.from(kEither);
    c.hidden = chosen.from(kHidden);
    c.rows = chosen.from(kNormRows);
    const double p = chosen.from(kDropouts);
    c.dropout = dropout_of(p, random.bits());
    c.mean = chosen.from(means);
    c.space = chosen.from(kSpaces);
    const check::Where where(
        name_of(c.dtype) +
        numbers(c.embeds ? " embed hidden, rows, dropout, mean" : " residual hidden, rows, dropout, mean",
                c.hidden, c.rows, p, c.mean) +
        numbers(", space", c.space.before, c.space.between));
    check_case(random, c);
  }
}

TEST(norm_and_embed) {
  Random random(71);
  for_each_norm(random, check_norm);
}

TEST(norm_backward) {
  Random random(72);
  for_each_norm(random, check_norm_backward);
}

TEST(scatter) {
  // Rows are added one after the other in the table's type, so that the bits are known.
  Random random(73);
  constexpr int words = 7;
  for (const Choice& choice : pairs_among(kTypes, kColumns, kRows, kSpaces)) {
    Chosen chosen(choice);
    const DType dtype = chosen.from(kTypes);
    const int columns = chosen.from(kColumns), rows = chosen.from(kRows);
    const Space space = chosen.from(kSpaces);
    const check::Where where(name_of(dtype) + numbers(" columns, rows", columns, rows) +
                             numbers(", space", space.before, space.between));
    const Grid grad = random_grid(random, dtype, rows, columns);
    const Tensor grad_in(dtype, grad, space);
    Grid table = random_grid(random, dtype, words, columns);
    std::vector<int64_t> ids;
    std::vector<int> used(words, 0);
    for (int r = 0; r < rows; ++r) {
      ids.push_back(random.below(words - 1) + 1);  // nobody has word 0
      used[ids.back()] = columns;
    }
    const Grid before = table;
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < columns; ++i) {
        float& sum = table.at(ids[r], i);
        sum = stored(dtype, sum + grad.at(r, i));
      }
    everywhere([&] { return tensors(std::move(Tensor(dtype, before, used, {0, 0}).expect(used))); },
               [&](Ops& ops, const Tensors& to) {
                 ops.scatter(dtype, grad_in.view(), ids.data(), rows, to[0].data(), columns);
               },
               [&](const Tensors& got) {
                 bool same = true;
                 for (int w = 0; w < words; ++w)
                   for (int i = 0; i < used[w]; ++i) same = same && got[0].at(w, i) == table.at(w, i);
                 CHECK(same);
               });
  }
}

// ---- losses ----

/// A row's softmax in one type.
template <class T>
std::vector<T> softmax(const Grid& x, int64_t row, T* log_sum) {
  std::vector<T> values(x.columns);
  T top = -INFINITY, sum = 0;
  for (int i = 0; i < x.columns; ++i) top = std::max(top, static_cast<T>(x.at(row, i)));
  for (int i = 0; i < x.columns; ++i) sum += values[i] = std::exp(static_cast<T>(x.at(row, i)) - top);
  for (T& v : values) v /= sum;
  *log_sum = top + std::log(sum);
  return values;
}

/// The loss and its gradient times `scale`, in one type.
template <class T>
T loss_of(bool cross_entropy, const Grid& student, const Grid& teacher, T scale, std::vector<T>& grad) {
  const T count =
      static_cast<T>(cross_entropy ? student.rows : student.rows * static_cast<int64_t>(student.columns));
  T total = 0;
  for (int64_t r = 0; r < student.rows; ++r) {
    std::vector<T> s, t;
    T log_sum = 0, unused;
    if (cross_entropy) {
      s = softmax<T>(student, r, &log_sum);
      t = softmax<T>(teacher, r, &unused);
    }
    for (int i = 0; i < student.columns; ++i) {
      const T a = static_cast<T>(student.at(r, i)), difference = a - static_cast<T>(teacher.at(r, i));
      total += cross_entropy ? t[i] * (log_sum - a) : difference * difference;
      grad.push_back((cross_entropy ? s[i] - t[i] : 2 * difference) * (scale / count));
    }
  }
  return total / count;
}

TEST(losses) {
  Random random(75);
  constexpr int rows_of_losses[] = {1, 5, 64, 65, 200};
  for (const Choice& choice : pairs_among(kTypes, kEither, kColumns, rows_of_losses, kSpaces)) {
    Chosen chosen(choice);
    const DType dtype = chosen.from(kTypes);
    const bool cross_entropy = chosen.from(kEither);
    const int columns = chosen.from(kColumns), rows = chosen.from(rows_of_losses);
    const Space space = chosen.from(kSpaces);
    const check::Where where(name_of(dtype) +
                             numbers(" cross entropy, columns, rows", cross_entropy, columns, rows) +
                             numbers(", space", space.before, space.between));
    const Grid student = random_grid(random, dtype, rows, columns, 2),
               teacher = random_grid(random, dtype, rows, columns, 2);
    const Tensor student_in(dtype, student, space), teacher_in(dtype, teacher, {0, 3});
    constexpr float scale = 0.75f;
    Expected grads(0, columns);
    const float plain = loss_of<float>(cross_entropy, student, teacher, scale, grads.plain);
    const double truth = loss_of<double>(cross_entropy, student, teacher, scale, grads.truth);
    for (float& v : grads.plain) v = stored(dtype, v);
    const std::vector<int> whole(rows, columns);
    const LossOp task{dtype, cross_entropy, columns, student_in.view(), teacher_in.view(), {}, 0};
    everywhere(
        [&] {
          return tensors(std::move(Tensor(dtype, rows, columns, space).expect(whole)),
                         std::move(Tensor(DType::kF32, 1, 2).expect(0, 2)));  // holds a double
        },
        [&](Ops& ops, const Tensors& to) {
          const double loss = ops.loss(task, rows);
          std::memcpy(to[1].data(), &loss, sizeof loss);
          LossOp backward = task;
          backward.out = to[0].view();
          backward.scale = scale;
          ops.loss_backward(backward, rows);
        },
        [&](const Tensors& got) {
          double loss;
          std::memcpy(&loss, got[1].data(), sizeof loss);
          Judge judge(kFloatEps);
          judge.add(loss, plain, truth);
          CHECK_GOOD(judge.verdict());
          CHECK_GOOD(wrong(dtype, got[0], grads, whole));
        });
  }
}

// ---- threads ----

/// An OpenMP runtime that gives one thread, whatever it is asked for.
void one_thread(void (*function)(void*), void* data, unsigned, unsigned) { function(data); }

/// One that starts what it is asked for.
void own_threads(void (*function)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < count; ++i) threads.emplace_back(function, data);
  function(data);
  for (std::thread& t : threads) t.join();
}

struct Product {
  static constexpr int depth = 67, columns = 130, rows = 50;
  const std::vector<Block> blocks{{20, 65}, {30, columns}};
  Tensor x, weight;

  Product(Random& random, DType dtype)
      : x(dtype, random_grid(random, dtype, rows, depth)),
        weight(dtype, random_grid(random, dtype, columns, depth)) {}
  Tensor run(Ops& ops, DType dtype) const {
    Tensor out(dtype, rows, columns);
    ops.expand(dtype, x.view(), weight.view(), nullptr, depth, blocks, Activation::kGelu, out.view(), {});
    return out;
  }
};

TEST(a_runtime_of_somebody_else) {
  Random random(81);
  for (DType dtype : kTypes) {
    const Product product(random, dtype);
    for (const Kernels* kernels : available_kernels()) {
      const check::Where where(std::string(kernels->name) + " " + name_of(dtype));
      const Tensor expected = product.run(ops_of(*kernels, 1), dtype);
      for (OpenMpParallel parallel : {one_thread, own_threads})
        for (int threads : {1, 3}) {
          Ops ops(threads, *kernels, parallel);
          CHECK(ops.threads() == threads);
          CHECK(product.run(ops, dtype).same_bytes(expected));
        }
    }
  }
}

TEST(two_callers_at_once) {
  Random random(82);
  const Product products[] = {Product(random, DType::kF32), Product(random, DType::kBf16)};
  for (const Kernels* kernels : available_kernels()) {
    const check::Where where(kernels->name);
    Ops& ops = ops_of(*kernels, 2);
    Tensors expected;
    for (int i : {0, 1}) expected.push_back(products[i].run(ops_of(*kernels, 1), kTypes[i]));
    std::atomic<int> wrong_results{0}, here{0};
    auto call = [&](int i) {
      for (++here; here < 2;) std::this_thread::yield();
      for (int repeat = 0; repeat < 20; ++repeat)
        wrong_results += !products[i].run(ops, kTypes[i]).same_bytes(expected[i]);
    };
    std::thread other(call, 1);
    call(0);
    other.join();
    CHECK(wrong_results == 0);
  }
}

}  // namespace
