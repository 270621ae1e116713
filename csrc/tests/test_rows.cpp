// What works on rows: LayerNorm, embeddings, quantisation, conversion, tanh.
#include <algorithm>

#include "support.h"

using namespace dynabert;

namespace {

constexpr int kHidden[] = {1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 67, 100, 257};
// A vector may store its whole length into an operand, whose rows have room for that.
constexpr int kLongestVector = 16;

int padded_to_word(DType dtype, int columns) { return static_cast<int>(round_up(columns, group_of(dtype))); }

/// Operands of some rows in poisoned memory.
struct OperandMemory {
  int64_t stride;
  Memory data, scales;

  OperandMemory(DType dtype, int rows, int columns)
      : stride((columns + 2 * kLongestVector) * size_of(dtype)), data(rows * stride), scales(rows * 4) {}
  Operand operand() const { return {data.data(), stride, scales.as<float>()}; }
  /// Rows [begin, end) may be written.
  void expect(DType dtype, int begin, int end, int64_t columns) {
    for (int r = begin; r < end; ++r) {
      data.expect(r * stride, columns * size_of(dtype));
      if (dtype == DType::kS8) scales.expect(r * 4, 4);
    }
  }
  std::string stray() const { return data.stray() + scales.stray(); }
};

/// LayerNorm in one type throughout.
template <class T>
std::vector<T> normalised(const std::vector<T>& x, const float* weight, const float* bias, float eps) {
  const T count = static_cast<T>(x.size());
  T mean = 0, variance = 0;
  for (T v : x) mean += v;
  mean /= count;
  for (T v : x) variance += (v - mean) * (v - mean);
  const T inverse = 1 / std::sqrt(variance / count + static_cast<T>(eps));
  std::vector<T> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
  return out;
}

TEST(residual_norm) {
  constexpr int rows = 9, begin = 2, end = 7;
  constexpr float eps = 1e-5f;
  Random random(11);
  for (int hidden : kHidden)
    for (float mean : {0.f, 3.f}) {
      const int64_t stride = hidden + 5;
      const auto x = random.normals(rows * stride, 1, mean), y = random.normals(rows * stride);
      const auto weight = random.normals(hidden, 1, 1), bias = random.normals(hidden);
      const Norm norm{weight.data(), bias.data()};
      for (DType dtype : kDTypes)
        for (const Kernels* kernels : available_kernels()) {
          const check::Where where(std::string(kernels->name) + " " + name_of(dtype) + " hidden " +
                                   std::to_string(hidden));
          Memory in_out(rows * stride * 4), added(rows * stride * 4);
          OperandMemory out(dtype, rows, hidden);
          for (int r = begin; r < end; ++r) {
            std::memcpy(in_out.as<float>() + r * stride, &x[r * stride], hidden * 4);
            std::memcpy(added.as<float>() + r * stride, &y[r * stride], hidden * 4);
            in_out.expect(r * stride * 4, hidden * 4);
          }
          if (dtype != DType::kF32) out.expect(dtype, begin, end, round_up(hidden, kLongestVector));
          const NormTask task{dtype,  &norm,        hidden, eps, added.as<float>(), in_out.as<float>(),
                              stride, out.operand()};
          kernels->residual_norm(task, begin, end);
          Judge judge(kFloatEps);
          for (int r = begin; r < end; ++r) {
            std::vector<float> plain(hidden);
            std::vector<double> truth(hidden);
            for (int i = 0; i < hidden; ++i) {
              plain[i] = x[r * stride + i] + y[r * stride + i];
              truth[i] = static_cast<double>(x[r * stride + i]) + y[r * stride + i];
            }
            plain = normalised(plain, weight.data(), bias.data(), eps);
            truth = normalised(truth, weight.data(), bias.data(), eps);
            const float* got = in_out.as<float>() + r * stride;
            for (int i = 0; i < hidden; ++i) judge.add(got[i], plain[i], truth[i]);
            if (dtype != DType::kF32)
              CHECK_GOOD(wrong_operand(dtype, out.operand(), r, got, hidden, padded_to_word(dtype, hidden)));
          }
          CHECK_GOOD(judge.verdict());
          CHECK_GOOD(in_out.stray());
          CHECK_GOOD(out.stray());
        }
    }
}

TEST(a_constant_row_becomes_the_bias) {
  for (int hidden : {1, 4, 16, 64, 256})  // the mean of equal numbers is exact
    for (const Kernels* kernels : available_kernels()) {
      const check::Where where(kernels->name);
      std::vector<float> x(hidden, 1.5f), weight(hidden, 3), bias(hidden);
      const std::vector<float> y(hidden, 0.5f);
      for (int i = 0; i < hidden; ++i) bias[i] = static_cast<float>(i) - 7;
      const Norm norm{weight.data(), bias.data()};
      kernels->residual_norm({DType::kF32, &norm, hidden, 1e-12f, y.data(), x.data(), hidden, {}}, 0, 1);
      CHECK(x == bias);
    }
}

TEST(embed) {
  constexpr int words = 23, positions = 11, types = 3, rows = 8, begin = 1, end = 7;
  Random random(12);
  for (int hidden : kHidden)
    for (DType dtype : kDTypes) {
      const int64_t stride = hidden + 3;
      const auto weight = random.normals(hidden, 1, 1), bias = random.normals(hidden);
      Model model;
      model.shape.dtype = dtype;
      model.shape.hidden = hidden;
      model.shape.eps = 1e-5f;
      model.embedding_norm = {weight.data(), bias.data()};
      // Tables, each with its stored numbers, in memory that ends with the last row.
      struct Stored {
        Rows rows;
        Memory data;
      };
      std::vector<Stored> tables;
      for (int count : {words, positions, types}) {
        tables.push_back({make_rows(dtype, count, hidden, random.normals(int64_t{count} * hidden)),
                          Memory(int64_t{count} * hidden * size_of(dtype))});
        const Stored& t = tables.back();
        for (int64_t i = 0; i < int64_t{count} * hidden; ++i) put(dtype, t.data.data(), i, t.rows.stored[i]);
      }
      auto view = [&](int i) {
        return Table{tables[i].data.data(), dtype == DType::kS8 ? tables[i].rows.scale.data() : nullptr};
      };
      model.word = view(0);
      model.position = view(1);
      model.token_type = view(2);
      const std::vector<int32_t> ids = {-1, words - 1, 0, 5, 7, 22, 3, -1},
                                 token_types = {-1, 2, 0, 1, 1, 2, 0, -1},
                                 places = {-1, 0, 10, 4, 3, 2, 1, -1};
      for (const Kernels* kernels : available_kernels()) {
        const check::Where where(std::string(kernels->name) + " " + name_of(dtype) + " hidden " +
                                 std::to_string(hidden));
        Memory x(rows * stride * 4);
        OperandMemory out(dtype, rows, hidden);
        for (int r = begin; r < end; ++r) x.expect(r * stride * 4, hidden * 4);
        if (dtype != DType::kF32) out.expect(dtype, begin, end, round_up(hidden, kLongestVector));
        kernels->embed({dtype, &model, ids.data(), token_types.data(), places.data(), x.as<float>(), stride,
                        out.operand()},
                       begin, end);
        Judge judge(kFloatEps);
        for (int r = begin; r < end; ++r) {
          std::vector<float> plain(hidden);
          std::vector<double> truth(hidden);
          for (int i = 0; i < hidden; ++i)
            for (int t = 0; t < 3; ++t) {
              const int from = (t == 0 ? ids : t == 1 ? places : token_types)[r];
              const Rows& table = tables[t].rows;
              plain[i] += table.at(from, i) * table.scale[from];
              truth[i] += static_cast<double>(table.at(from, i)) * table.scale[from];
            }
          plain = normalised(plain, weight.data(), bias.data(), model.shape.eps);
          truth = normalised(truth, weight.data(), bias.data(), model.shape.eps);
          const float* got = x.as<float>() + r * stride;
          for (int i = 0; i < hidden; ++i) judge.add(got[i], plain[i], truth[i]);
          if (dtype != DType::kF32)
            CHECK_GOOD(wrong_operand(dtype, out.operand(), r, got, hidden, padded_to_word(dtype, hidden)));
        }
        CHECK_GOOD(judge.verdict());
        CHECK_GOOD(x.stray());
        CHECK_GOOD(out.stray());
      }
    }
}

/// Rows that are hard to quantise: zeros, ties, wide ranges, the largest and the smallest numbers.
std::vector<float> hard_rows(Random& random, int rows, int columns) {
  std::vector<float> values;
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < columns; ++i) {
      const float normal = random.normal();
      switch (r % 6) {
        case 0: values.push_back(normal); break;
        case 1: values.push_back(0); break;
        case 2:
          values.push_back(i == columns / 2 ? 127.f : static_cast<float>(random.below(20)) - 9.5f);
          break;
        case 3: values.push_back(normal * 1e30f); break;
        case 4: values.push_back(normal * 1e-30f); break;
        default: values.push_back(i == columns - 1 ? -50.f : normal); break;
      }
    }
  return values;
}

TEST(quantise) {
  constexpr int rows = 8, begin = 1, end = 7;
  Random random(13);
  for (int columns : {1, 2, 3, 4, 7, 15, 16, 17, 33, 63, 64, 65, 255, 256, 300})
    for (int step : {4, 80, 256}) {
      const int padded = static_cast<int>(round_up(columns, step));
      const int64_t in_stride = columns + 3;
      const auto values = hard_rows(random, rows, columns);
      const Memory in(rows * in_stride * 2);
      std::vector<float> rounded(values.size());
      for (int r = begin; r < end; ++r)
        for (int i = 0; i < columns; ++i) {
          put(DType::kBf16, in.data(), r * in_stride + i, values[r * columns + i]);
          rounded[r * columns + i] = round_bf16(values[r * columns + i]);
        }
      for (const Kernels* kernels : available_kernels()) {
        const check::Where where(std::string(kernels->name) + " " + std::to_string(columns) + " to " +
                                 std::to_string(padded));
        OperandMemory out(DType::kS8, rows, padded);
        out.expect(DType::kS8, begin, end, padded);
        kernels->quantise(in.as<uint16_t>(), in_stride, out.operand(), columns, padded, begin, end);
        for (int r = begin; r < end; ++r)
          CHECK_GOOD(wrong_operand(DType::kS8, out.operand(), r, &rounded[r * columns], columns, padded));
        CHECK_GOOD(out.stray());
      }
    }
}

TEST(convert) {
  constexpr int rows = 6;
  Random random(14);
  for (int columns : kHidden)
    for (DType dtype : kDTypes) {
      const int64_t stride = columns + 2;
      const auto values = hard_rows(random, rows, columns);
      const Memory in(rows * stride * 4);
      for (int r = 0; r < rows; ++r)
        std::memcpy(in.as<float>() + r * stride, &values[r * columns], columns * 4);
      for (const Kernels* kernels : available_kernels()) {
        const check::Where where(std::string(kernels->name) + " " + name_of(dtype) + " columns " +
                                 std::to_string(columns));
        OperandMemory out(dtype, rows, columns);
        out.expect(dtype, 0, rows, round_up(columns, kLongestVector));
        kernels->convert(dtype, in.as<float>(), stride, out.operand(), columns, rows);
        for (int r = 0; r < rows; ++r)
          CHECK_GOOD(wrong_operand(dtype, out.operand(), r, &values[r * columns], columns,
                                   padded_to_word(dtype, columns)));
        CHECK_GOOD(out.stray());
      }
    }
}

TEST(what_is_not_finite_quantises_to_a_scale_that_is_not) {
  for (float bad : {NAN, INFINITY, -INFINITY, -NAN})
    for (int columns : {1, 5, 16, 40, 67})
      for (int at = 0; at < columns; ++at)
        for (const Kernels* kernels : available_kernels()) {
          const check::Where where(std::string(kernels->name) + " " + std::to_string(bad) + " at " +
                                   std::to_string(at) + " of " + std::to_string(columns));
          std::vector<float> values(columns, 1);
          std::vector<uint16_t> narrow(columns, bf16_bits(1));
          values[at] = bad;
          narrow[at] = bf16_bits(bad);
          const OperandMemory converted(DType::kS8, 1, columns), quantised(DType::kS8, 1, columns);
          kernels->convert(DType::kS8, values.data(), columns, converted.operand(), columns, 1);
          kernels->quantise(narrow.data(), columns, quantised.operand(), columns, columns, 0, 1);
          CHECK(!std::isfinite(converted.operand().scale[0]));
          CHECK(!std::isfinite(quantised.operand().scale[0]));
        }
}

TEST(hyperbolic_tangent) {
  for (int count : {1, 3, 16, 17, 1000})
    for (float reach : {2.f, 12.f, 1e30f})
      for (const Kernels* kernels : available_kernels()) {
        const check::Where where(std::string(kernels->name) + " " + std::to_string(count) + " up to " +
                                 std::to_string(reach));
        const int padded = static_cast<int>(round_up(count, kLongestVector));
        Memory values(padded * 4 + 64);
        values.expect(0, padded * 4);  // the contract: the buffer has whole vectors
        std::vector<float> in(count);
        for (int i = 0; i < count; ++i) in[i] = reach * (2 * (static_cast<float>(i) + 0.5f) / count - 1);
        std::memcpy(values.data(), in.data(), count * 4);
        kernels->tanh(values.as<float>(), count);
        Judge judge(kFloatEps);
        for (int i = 0; i < count; ++i)
          judge.add(values.as<float>()[i], std::tanh(in[i]), std::tanh(static_cast<double>(in[i])));
        CHECK_GOOD(judge.verdict());
        CHECK_GOOD(values.stray());
      }
}

TEST(hyperbolic_tangent_of_what_is_special) {
  for (const Kernels* kernels : available_kernels()) {
    const check::Where where(kernels->name);
    float values[kLongestVector] = {0.f, -0.f, INFINITY, -INFINITY, NAN, -NAN, 100, -100};
    kernels->tanh(values, kLongestVector);
    CHECK(values[0] == 0 && !std::signbit(values[0]));
    CHECK(values[1] == 0 && std::signbit(values[1]));
    CHECK(values[2] == 1 && values[3] == -1 && values[6] == 1 && values[7] == -1);
    CHECK(std::isnan(values[4]) && std::isnan(values[5]));
  }
}

}  // namespace
