// Linear maps of every instruction set: prefixes of columns (expand) and of K (contract).
#include <algorithm>
#include <numeric>

#include "support.h"

using namespace dynabert;

namespace {

struct Case {
  DType dtype;
  bool bf16_out;
  Activation activation;
  int columns, rows;
  bool contracts;
  int block;  // int8: rows of K under one sum
  std::vector<Tile> tiles;
};

std::string describe(const Case& c) {
  std::string text = std::string(name_of(c.dtype)) + (c.bf16_out ? " to bf16" : " to fp32") +
                     ", activation " + std::to_string(static_cast<int>(c.activation)) +
                     (c.contracts ? ", contract K " : ", expand K ") + std::to_string(c.rows) + " to " +
                     std::to_string(c.columns) + ", tiles";
  for (const Tile& t : c.tiles)
    text += " " + std::to_string(t.row) + "+" + std::to_string(t.rows) + ":" + std::to_string(t.extent);
  return text;
}

int round_up_to(int value, int step) { return (value + step - 1) / step * step; }

/// Rows of K that a product over `extent` of them reads.
int used_rows(const Case& c, int extent) {
  const int group = group_of(c.dtype), all = round_up_to(c.rows, group);
  if (!c.contracts) return all;
  return std::min(round_up_to(extent, c.dtype == DType::kS8 ? c.block : group), all);
}

/// Operand memory in which a row's values end at its extent, zeros follow up to what is read, then poison.
struct Input {
  Memory data, scales;
  Operand operand;

  Input(const Case& c, const Rows& rows)
      : data(rows.count * stride(c)),
        scales(rows.count * 4),
        operand{data.data(), stride(c), scales.as<float>()} {
    for (const Tile& t : c.tiles)
      for (int r = t.row; r < t.row + t.rows; ++r) {
        char* row = data.data() + r * stride(c);
        const int extent = c.contracts ? t.extent : c.rows;
        for (int k = 0; k < used_rows(c, extent); ++k) {
          const float value = k < extent ? rows.at(r, k) : 0;
          if (c.dtype == DType::kS8) row[k] = static_cast<char>(static_cast<int>(value) + 128);
          else put(c.dtype, row, k, value);
        }
        scales.as<float>()[r] = rows.scale[r];
      }
  }
  static int64_t stride(const Case& c) {
    return (int64_t{round_up_to(c.rows, std::max(c.block, 4))} * size_of(c.dtype) + 63) / 64 * 64 + 64;
  }
};

struct Expected {
  std::vector<float> plain;  // [rows][columns], accumulated in float32
  std::vector<double> truth;
};

Expected expected(const Case& c, const Weights& w, const Rows& a) {
  Expected e{std::vector<float>(int64_t{a.count} * c.columns),
             std::vector<double>(int64_t{a.count} * c.columns)};
  for (const Tile& t : c.tiles)
    for (int r = t.row; r < t.row + t.rows; ++r)
      for (int n = 0; n < (c.contracts ? c.columns : t.extent); ++n) {
        const int last = c.contracts ? t.extent : c.rows;
        float sum = 0;
        double exact = 0;
        int64_t whole = 0;
        for (int k = 0; k < last; ++k) {
          const float x = a.at(r, k), y = w.at(n, k);
          if (c.dtype == DType::kS8) {
            whole += static_cast<int64_t>(x) * static_cast<int64_t>(y);
          } else {
            sum += x * y;
            exact += static_cast<double>(x) * y;
          }
        }
        if (c.dtype == DType::kS8) {
          sum = static_cast<float>(whole) * (w.scale[n] * a.scale[r]);
          exact = static_cast<double>(whole) * w.scale[n] * a.scale[r];
        }
        sum = activated(sum + w.bias[n], c.activation);
        e.plain[int64_t{r} * c.columns + n] = c.bf16_out ? round_bf16(sum) : sum;
        e.truth[int64_t{r} * c.columns + n] = activated(exact + w.bias[n], c.activation);
      }
  return e;
}

/// Poisoned rows of outputs, one before and one behind those of the tiles.
struct Result {
  int64_t stride;
  int element;
  Memory data;

  Result(const Case& c, int rows)
      : stride(round_up_to(c.columns, 64) + 24),
        element(c.bf16_out ? 2 : 4),
        data((rows + 2) * stride * element) {}
  void aim(LinearTask& task) const {
    char* first = data.data() + stride * element;
    task.out_f32 = element == 4 ? reinterpret_cast<float*>(first) : nullptr;
    task.out_bf16 = element == 2 ? reinterpret_cast<uint16_t*>(first) : nullptr;
    task.out_stride = stride;
  }
  int64_t offset(int row, int column) const { return ((row + 1) * stride + column) * element; }
  float at(int row, int column) const {
    const char* p = data.data() + offset(row, column);
    return element == 4 ? *reinterpret_cast<const float*>(p)
                        : bf16_value(*reinterpret_cast<const uint16_t*>(p));
  }
};

void compute(const Kernels& kernels, const Case& c, const Matrix& matrix, const Input& input,
             const Result& result) {
  LinearTask task{c.dtype, &matrix, input.operand};
  task.activation = c.activation;
  result.aim(task);
  const int count = static_cast<int>(c.tiles.size()), panels = matrix.panel_count();
  for (int p = 0; p < panels; ++p)
    kernels.linear(task, c.tiles.data(), count, p,
                   p % 2 ? nullptr : matrix.panels + (p + 1) % panels * matrix.panel_bytes);
}

int rows_of(const Case& c) {
  int rows = 0;
  for (const Tile& t : c.tiles) rows = std::max(rows, t.row + t.rows);
  return rows;
}

void check_case(const Case& c, const Weights& w, const Rows& a) {
  const check::Where where(describe(c));
  const PackedMatrix packed(w, c.contracts, c.block);
  const Input input(c, a);
  const Expected e = expected(c, w, a);
  for (const Kernels* kernels : available_kernels()) {
    const check::Where isa(kernels->name);
    Result result(c, a.count);
    compute(*kernels, c, packed.matrix, input, result);
    Judge judge(c.bf16_out ? kBf16Eps : kFloatEps);
    bool zeros = true;
    for (const Tile& t : c.tiles)
      for (int r = t.row; r < t.row + t.rows; ++r) {
        const int extent = c.contracts ? c.columns : t.extent, end = round_up_to(extent, 64);
        result.data.expect(result.offset(r, 0), int64_t{end} * result.element);
        for (int n = 0; n < extent; ++n) {
          const int64_t i = int64_t{r} * c.columns + n;
          judge.add(result.at(r, n), e.plain[i], e.truth[i]);
        }
        for (int n = extent; n < end; ++n) zeros = zeros && result.at(r, n) == 0;
      }
    CHECK_GOOD(judge.verdict());
    CHECK(zeros);
    CHECK_GOOD(result.data.stray());
  }
}

/// Rows in tiles of at most 6, of one extent.
std::vector<Tile> tiles_of(int rows, int extent) {
  std::vector<Tile> tiles;
  for (int r = 0; r < rows; r += kTileRows) tiles.push_back({r, std::min(kTileRows, rows - r), extent});
  return tiles;
}

/// Weights of about 1 / sqrt(K), so that sums are about 1 whatever K is.
Weights random_weights(Random& random, DType dtype, int columns, int rows, float scale = 1) {
  auto bias = random.normals(columns, 0.5f);
  return make_weights(dtype, columns, rows,
                      random.normals(int64_t{columns} * rows, scale / std::sqrt(static_cast<float>(rows))),
                      std::move(bias));
}

void check_random(Random& random, const Case& c) {
  const Weights w = random_weights(random, c.dtype, c.columns, c.rows);
  const int rows = rows_of(c);
  check_case(c, w, make_rows(c.dtype, rows, c.rows, random.normals(int64_t{rows} * c.rows)));
}

/// Float32 goes to float32; the others to either.
std::vector<bool> outputs_of(DType dtype) {
  return dtype == DType::kF32 ? std::vector<bool>{false} : std::vector<bool>{false, true};
}

int whole_block(DType dtype, int rows) { return round_up_to(rows, group_of(dtype)); }

TEST(instruction_sets) {
  // The others of this file run on each of these.
  std::vector<std::string> names;
  std::printf("this processor has");
  for (const Kernels* kernels : available_kernels()) {
    CHECK(std::find(names.begin(), names.end(), kernels->name) == names.end());
    names.push_back(kernels->name);
    std::printf(" %s", kernels->name);
  }
  std::printf("\n");
  CHECK(!names.empty() && names.back() == "portable");
}

TEST(expand_each_extent) {
  Random random(1);
  for (DType dtype : kDTypes)
    for (bool bf16 : outputs_of(dtype))
      for (int columns : {1, 5, 64, 131, 192})
        for (int rows : {1, 2, 3, 7, 37}) {
          // Each extent is a tile of one row, so that all stand in one call.
          Case c{dtype, bf16, Activation::kNone, columns, rows, false, whole_block(dtype, rows), {}};
          for (int extent = 1; extent <= columns; extent += extent < 66 ? 1 : 7)
            c.tiles.push_back({static_cast<int>(c.tiles.size()), 1, extent});
          c.tiles.push_back({static_cast<int>(c.tiles.size()), 2, columns});
          check_random(random, c);
        }
}

TEST(expand_each_number_of_rows) {
  Random random(2);
  for (DType dtype : kDTypes)
    for (int rows = 1; rows <= 13; ++rows)
      for (int columns : {47, 128})
        check_random(random, {dtype, dtype != DType::kF32, Activation::kNone, columns, 101, false,
                              whole_block(dtype, 101), tiles_of(rows, columns)});
}

TEST(expand_activations) {
  Random random(3);
  for (DType dtype : kDTypes)
    for (Activation activation : kActivations)  // to bf16 unless all is float32, and as exact as that needs
      check_random(random,
                   {dtype,
                    dtype != DType::kF32,
                    activation,
                    131,
                    61,
                    false,
                    whole_block(dtype, 61),
                    {{0, 6, 131}, {6, 3, 70}, {10, 1, 1}, {12, 4, 20}}});  // no tile has rows 9 and 11
}

TEST(contract_each_prefix) {
  Random random(4);
  // Of an FFN-out matrix (blocks of 256) and of attention-out ones (a head, in whole words).
  const struct {
    int rows, block, columns;
    std::vector<int> extents;
  } shapes[] = {
      {600, 256, 67, {1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 257, 300, 511, 512, 513, 599, 600}},
      {257, 256, 5, {1, 7, 255, 256, 257}},
      {3, 256, 64, {1, 2, 3}},
      {5, 4, 131, {1, 2, 3, 4, 5}},
      {21, 4, 3, {3, 6, 9, 12, 15, 18, 21}},  // heads of 3
      {192, 64, 192, {64, 128, 192}},
      {160, 80, 80, {80, 160}},
      {30, 8, 66, {10, 20, 30}},  // heads of 10
  };
  for (DType dtype : kDTypes)
    for (bool bf16 : outputs_of(dtype))
      for (const auto& shape : shapes) {
        Case c{dtype, bf16, Activation::kNone, shape.columns, shape.rows, true, shape.block, {}};
        for (int extent : shape.extents) c.tiles.push_back({2 * static_cast<int>(c.tiles.size()), 2, extent});
        check_random(random, c);
      }
}

TEST(contract_each_number_of_rows) {
  Random random(5);
  for (DType dtype : kDTypes)
    for (int rows = 1; rows <= 13; ++rows)
      check_random(random, {dtype, false, Activation::kNone, 71, 300, true, 256, tiles_of(rows, 259)});
}

TEST(activations_from_end_to_end) {
  // K = 1 and an input of 1: every column is its own argument, rounded to the type and no further.
  constexpr int columns = 4096;
  for (DType dtype : {DType::kF32, DType::kBf16})
    for (Activation activation : kActivations)
      for (float reach : {0.05f, 0.5f, 3.f, 12.f, 1e4f}) {
        std::vector<float> values(columns);
        for (int i = 0; i < columns; ++i) values[i] = reach * (static_cast<float>(i) / (columns / 2) - 1);
        const Weights w = make_weights(dtype, columns, 1, values, std::vector<float>(columns));
        check_case({dtype, dtype == DType::kBf16, activation, columns, 1, false, whole_block(dtype, 1),
                    tiles_of(1, columns)},
                   w, make_rows(dtype, 1, 1, {1.f}));
      }
}

/// int8 without scales: float32 outputs are the accumulators.
void check_exact(const Case& c, const Weights& w, const Rows& a) {
  const check::Where where(describe(c));
  const PackedMatrix packed(w, c.contracts, c.block);
  const Input input(c, a);
  for (const Kernels* kernels : available_kernels()) {
    const check::Where isa(kernels->name);
    const Result result(c, a.count);
    compute(*kernels, c, packed.matrix, input, result);
    bool same = true;
    for (const Tile& t : c.tiles)
      for (int r = t.row; r < t.row + t.rows; ++r)
        for (int n = 0; n < (c.contracts ? c.columns : t.extent); ++n) {
          int64_t sum = 0;
          for (int k = 0; k < (c.contracts ? t.extent : c.rows); ++k)
            sum += static_cast<int64_t>(a.at(r, k)) * static_cast<int64_t>(w.at(n, k));
          same = same && result.at(r, n) == static_cast<float>(sum);
        }
    CHECK(same);
  }
}

TEST(int8_sums_are_exact) {
  Random random(6);
  enum { kRandom, kBothMost, kOpposite, kAlternating };
  for (int kind : {kRandom, kBothMost, kOpposite, kAlternating})
    for (bool contracts : {false, true})
      for (int rows : {1, 4, 67, 1000}) {
        const int columns = 70, count = 7;
        Weights w{
            DType::kS8, columns, rows, {}, std::vector<float>(columns, 1), std::vector<float>(columns, 0)};
        Rows a{DType::kS8, count, rows, {}, std::vector<float>(count, 1)};
        auto value = [&](int i, float sign) {
          if (kind == kRandom) return static_cast<float>(random.below(255) - 127);
          return kind == kAlternating && i % 2 ? 127 * -sign : 127 * sign;
        };
        for (int i = 0; i < columns * rows; ++i) w.stored.push_back(value(i % rows, 1));
        for (int i = 0; i < count * rows; ++i)
          a.stored.push_back(value(i % rows, kind == kBothMost ? 1.f : -1.f));
        const Case c{DType::kS8,
                     false,
                     Activation::kNone,
                     columns,
                     rows,
                     contracts,
                     contracts ? 64 : whole_block(DType::kS8, rows),
                     tiles_of(count, contracts ? std::max(1, rows * 2 / 3) : columns)};
        check_exact(c, w, a);
      }
}

TEST(a_result_does_not_depend_on_its_neighbours) {
  // The same rows alone, in tiles of every height, and with every extent that includes the column.
  Random random(7);
  for (DType dtype : kDTypes)
    for (bool contracts : {false, true}) {
      const int rows = 12, columns = 128, depth = 77;
      const check::Where where(std::string(name_of(dtype)) + (contracts ? " contract" : " expand"));
      const Weights w = random_weights(random, dtype, columns, depth);
      const Rows a = make_rows(dtype, rows, depth, random.normals(rows * depth));
      const PackedMatrix packed(w, contracts, contracts ? 64 : whole_block(dtype, depth));
      for (const Kernels* kernels : available_kernels()) {
        const check::Where isa(kernels->name);
        auto run = [&](int height, int extent) {
          Case c{dtype, false, Activation::kGelu, columns, depth, contracts, packed.matrix.block, {}};
          for (int r = 0; r < rows; r += height) c.tiles.push_back({r, std::min(height, rows - r), extent});
          Result result(c, rows);
          compute(*kernels, c, packed.matrix, Input(c, a), result);
          std::vector<float> values;
          for (int r = 0; r < rows; ++r)
            for (int n = 0; n < (contracts ? columns : extent); ++n) values.push_back(result.at(r, n));
          return values;
        };
        const int whole = contracts ? depth : columns;
        const std::vector<float> alone = run(1, whole);
        for (int height = 2; height <= kTileRows; ++height)
          CHECK(std::memcmp(alone.data(), run(height, whole).data(), alone.size() * 4) == 0);
        for (int extent = 1; !contracts && extent < columns; extent += 9) {
          const std::vector<float> narrow = run(kTileRows, extent);
          bool same = true;
          for (int r = 0; r < rows; ++r)
            same = same && std::memcmp(&narrow[r * extent], &alone[r * columns], extent * 4) == 0;
          CHECK(same);
        }
      }
    }
}

TEST(nan_is_not_lost) {
  // A value that is no number makes every output of its row, and of no other row, no number.
  Random random(8);
  for (DType dtype : kDTypes)
    for (Activation activation : kActivations) {
      const check::Where where(std::string(name_of(dtype)) + ", activation " +
                               std::to_string(static_cast<int>(activation)));
      const Case c{dtype, dtype != DType::kF32,  activation,  70, 9,
                   false, whole_block(dtype, 9), {{0, 3, 70}}};
      const PackedMatrix packed(random_weights(random, dtype, c.columns, c.rows), false, c.block);
      Rows a = make_rows(dtype, 3, c.rows, random.normals(3 * c.rows));
      if (dtype == DType::kS8) a.scale[1] = NAN;
      else a.stored[c.rows + 4] = NAN;
      for (const Kernels* kernels : available_kernels()) {
        const check::Where isa(kernels->name);
        const Result result(c, 3);
        compute(*kernels, c, packed.matrix, Input(c, a), result);
        bool good = true;
        for (int n = 0; n < c.columns; ++n)
          good = good && std::isnan(result.at(1, n)) && std::isfinite(result.at(0, n)) &&
                 std::isfinite(result.at(2, n));
        CHECK(good);
      }
    }
}

TEST(the_peak_counts_its_operations) {
  for (const Kernels* kernels : available_kernels())
    for (DType dtype : kDTypes) {
      const int64_t once = kernels->peak(dtype, 1);
      CHECK(once > 0);
      CHECK(kernels->peak(dtype, 3) == 3 * once);
    }
}

}  // namespace
