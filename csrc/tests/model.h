// Random models for the tests: float parameters, their packed bytes, and forward passes in plain loops.
#pragma once

#include <algorithm>
#include <map>

#include "../cpu/encoder.h"
#include "support.h"

namespace dynabert {

/// A model's numbers as they are stored, by the names of its sections without their endings.
struct Parameters {
  Shape shape;
  std::map<std::string, Rows> tables;
  std::map<std::string, Weights> matrices;
  std::map<std::string, std::vector<float>> vectors;  // norms and the classifier

  const Weights& matrix(int layer, const char* name) const {
    return matrices.at("layer." + std::to_string(layer) + "." + name);
  }
};

inline Parameters random_parameters(const Shape& shape, uint64_t seed) {
  Random random(seed);
  Parameters p{shape, {}, {}, {}};
  const int hidden = shape.hidden;
  auto table = [&](const char* name, int rows) {
    p.tables[name] = make_rows(shape.dtype, rows, hidden, random.normals(int64_t{rows} * hidden));
  };
  auto norm = [&](const std::string& name) {
    p.vectors[name + ".weight"] = random.normals(hidden, 0.2f, 1);
    p.vectors[name + ".bias"] = random.normals(hidden, 0.2f);
  };
  auto matrix = [&](const std::string& name, int columns, int rows, float scale) {
    auto bias = random.normals(columns, 0.3f);
    p.matrices[name] =
        make_weights(shape.dtype, columns, rows,
                     random.normals(int64_t{columns} * rows, scale / std::sqrt(static_cast<float>(rows))),
                     std::move(bias));
  };
  table("word", shape.vocabulary);
  table("position", shape.positions);
  table("token_type", shape.token_types);
  norm("embedding_norm");
  for (int i = 0; i < shape.layers(); ++i) {
    const std::string name = "layer." + std::to_string(i) + ".";
    const int heads = shape.heads[i] * shape.head_size;
    matrix(name + "qkv", 3 * heads, hidden, 1.5f);
    matrix(name + "out", hidden, heads, 1);
    norm(name + "attention_norm");
    matrix(name + "up", shape.neurons[i], hidden, 1.5f);
    matrix(name + "down", hidden, shape.neurons[i], 1);
    norm(name + "ffn_norm");
  }
  matrix("pooler", hidden, hidden, 1);
  if (shape.labels) {
    p.vectors["classifier.weight"] = random.normals(int64_t{shape.labels} * hidden, 0.2f);
    p.vectors["classifier.bias"] = random.normals(shape.labels);
  }
  return p;
}

/// The bytes of an engine's file. What no section covers, or a section's padding, stays zero.
inline std::unique_ptr<Memory> pack(const Parameters& p) {
  auto memory = std::make_unique<Memory>(packed_bytes(p.shape));
  char* data = memory->data();
  std::memset(data, 0, static_cast<size_t>(memory->size()));
  std::map<std::string, Section> sections;
  for (const Section& s : layout(p.shape)) sections[s.name] = s;
  auto at = [&](const std::string& name) { return data + sections.at(name).offset; };
  const bool s8 = p.shape.dtype == DType::kS8;
  for (const auto& [name, rows] : p.tables) {
    for (size_t i = 0; i < rows.stored.size(); ++i)
      put(p.shape.dtype, at(name + ".rows"), static_cast<int64_t>(i), rows.stored[i]);
    if (s8) std::memcpy(at(name + ".scale"), rows.scale.data(), rows.scale.size() * 4);
  }
  for (const auto& [name, values] : p.vectors) std::memcpy(at(name), values.data(), values.size() * 4);
  for (const auto& [name, weights] : p.matrices) {
    Places places{at(name + ".panels"), reinterpret_cast<float*>(at(name + ".bias")), nullptr, nullptr};
    int block = 1;
    if (s8) {
      places.scale = reinterpret_cast<float*>(at(name + ".scale"));
      places.compensation = reinterpret_cast<int32_t*>(at(name + ".compensation"));
      block = sections.at(name + ".compensation").block;
    }
    pack(weights, block, places);
  }
  return memory;
}

/// Real tokens of one sequence, at explicit positions.
struct Sequence {
  std::vector<int> ids, token_types, positions;

  int length() const { return static_cast<int>(ids.size()); }
};

/// What a pass gives for one sequence.
template <class T>
struct Result {
  std::vector<std::vector<T>> states;  // after the embeddings and after each kept layer, [S, D]
  std::vector<T> pooled, logits;
};

/// The forward pass of one sequence in plain loops. In float it rounds where the engine's types say so;
/// in double it does not round activations at all.
template <class T>
class Forward {
 public:
  explicit Forward(const Parameters& p)
      : p_(p), s_(p.shape), rounds_(sizeof(T) == 4 && p.shape.dtype != DType::kF32) {}

  Result<T> run(const Subnet& subnet, const Sequence& sequence) const {
    const int length = sequence.length(), hidden = s_.hidden, d = s_.head_size;
    std::vector<T> x(int64_t{length} * hidden);
    for (int t = 0; t < length; ++t) {
      const std::pair<const char*, int> sources[] = {{"word", sequence.ids[t]},
                                                     {"token_type", sequence.token_types[t]},
                                                     {"position", sequence.positions[t]}};
      for (const auto& [name, row] : sources) {
        const Rows& table = p_.tables.at(name);
        for (int i = 0; i < hidden; ++i)
          x[t * hidden + i] += static_cast<T>(table.at(row, i)) * static_cast<T>(table.scale[row]);
      }
    }
    norm(x, "embedding_norm");
    Result<T> result;
    result.states.push_back(x);
    for (size_t k = 0; k < subnet.layers.size(); ++k) {
      const int layer = subnet.layers[k], width = subnet.heads[k] * d, neurons = subnet.neurons[k];
      const std::string name = "layer." + std::to_string(layer);
      const auto qkv =
          narrow(linear(operand(x, hidden), p_.matrix(layer, "qkv"), 3 * width, Activation::kNone));
      const auto context = narrow(attend(qkv, length, subnet.heads[k]));
      add(x, linear(operand(context, width), p_.matrix(layer, "out"), hidden, Activation::kNone));
      norm(x, name + ".attention_norm");
      const auto middle = narrow(linear(operand(x, hidden), p_.matrix(layer, "up"), neurons, s_.activation));
      add(x, linear(operand(middle, neurons), p_.matrix(layer, "down"), hidden, Activation::kNone));
      norm(x, name + ".ffn_norm");
      result.states.push_back(x);
    }
    const std::vector<T> first(x.begin(), x.begin() + hidden);
    result.pooled = linear(operand(first, hidden), p_.matrices.at("pooler"), hidden, Activation::kNone);
    for (T& v : result.pooled) v = std::tanh(v);
    for (int c = 0; c < s_.labels; ++c) {
      T sum = p_.vectors.at("classifier.bias")[c];
      for (int i = 0; i < hidden; ++i)
        sum += result.pooled[i] * static_cast<T>(p_.vectors.at("classifier.weight")[int64_t{c} * hidden + i]);
      result.logits.push_back(sum);
    }
    return result;
  }

 private:
  struct Input {
    int rows, columns;
    std::vector<T> values, scale;
  };

  Input operand(const std::vector<T>& x, int columns) const {
    Input in{static_cast<int>(x.size()) / columns, columns, x, {}};
    in.scale.assign(in.rows, 1);
    if (!rounds_) return in;
    for (int r = 0; r < in.rows; ++r) {
      std::vector<float> row(x.begin() + int64_t{r} * columns, x.begin() + int64_t{r + 1} * columns),
          stored(columns);
      in.scale[r] = store_row(s_.dtype, row.data(), columns, stored.data());
      std::copy(stored.begin(), stored.end(), in.values.begin() + int64_t{r} * columns);
    }
    return in;
  }

  std::vector<T> linear(const Input& in, const Weights& w, int columns, Activation activation) const {
    std::vector<T> out(int64_t{in.rows} * columns);
    const bool exact = s_.dtype == DType::kS8 && rounds_;  // sums of integers
    for (int r = 0; r < in.rows; ++r)
      for (int n = 0; n < columns; ++n) {
        T sum = 0;
        double whole = 0;
        for (int k = 0; k < in.columns; ++k) {
          const T a = in.values[int64_t{r} * in.columns + k], b = static_cast<T>(w.at(n, k));
          if (exact) whole += static_cast<double>(a) * static_cast<double>(b);
          else sum += a * b;
        }
        if (exact) sum = static_cast<T>(whole);
        out[int64_t{r} * columns + n] = activated(
            sum * (static_cast<T>(w.scale[n]) * in.scale[r]) + static_cast<T>(w.bias[n]), activation);
      }
    return out;
  }

  std::vector<T> attend(const std::vector<T>& qkv, int length, int heads) const {
    const int d = s_.head_size;
    std::vector<T> out(int64_t{length} * heads * d);
    auto at = [&](int row, int head, int part, int i) {
      return qkv[((int64_t{row} * heads + head) * 3 + part) * d + i];
    };
    for (int head = 0; head < heads; ++head)
      for (int q = 0; q < length; ++q) {
        std::vector<T> weights(length);
        T most = -INFINITY, sum = 0;
        for (int k = 0; k < length; ++k) {
          for (int i = 0; i < d; ++i) weights[k] += at(q, head, 0, i) * at(k, head, 1, i);
          weights[k] /= std::sqrt(static_cast<T>(d));
          most = std::max(most, weights[k]);
        }
        for (T& v : weights) sum += v = std::exp(v - most);
        for (T& v : weights) v /= sum;
        weights = narrow(std::move(weights));
        for (int k = 0; k < length; ++k)
          for (int i = 0; i < d; ++i)
            out[(int64_t{q} * heads + head) * d + i] += weights[k] * at(k, head, 2, i);
      }
    return out;
  }

  /// As stored between two products.
  std::vector<T> narrow(std::vector<T> values) const {
    if (rounds_)
      for (T& v : values) v = round_bf16(static_cast<float>(v));
    return values;
  }

  static void add(std::vector<T>& x, const std::vector<T>& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  void norm(std::vector<T>& x, const std::string& name) const {
    const auto &weight = p_.vectors.at(name + ".weight"), &bias = p_.vectors.at(name + ".bias");
    const int hidden = s_.hidden;
    for (size_t row = 0; row < x.size(); row += hidden) {
      T mean = 0, variance = 0;
      for (int i = 0; i < hidden; ++i) mean += x[row + i];
      mean /= static_cast<T>(hidden);
      for (int i = 0; i < hidden; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean);
      const T inverse = 1 / std::sqrt(variance / static_cast<T>(hidden) + static_cast<T>(s_.eps));
      for (int i = 0; i < hidden; ++i)
        x[row + i] = (x[row + i] - mean) * inverse * static_cast<T>(weight[i]) + static_cast<T>(bias[i]);
    }
  }

  const Parameters& p_;
  const Shape& s_;
  bool rounds_;
};

}  // namespace dynabert
