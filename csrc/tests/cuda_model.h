// A model for tests of the GPU's encoder: random weights, and what any sub-network computes in plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../cuda/schedule.h"

namespace dynabert::cuda {

struct Sizes {
  int hidden, head_size, heads, neurons, layers;
};

inline Bf16 round_bf16(double value) { return static_cast<Bf16>(pack_bf16(static_cast<float>(value), 0)); }

struct alignas(16) Vector {
  std::vector<Word4> memory;
  std::size_t count = 0;

  Vector() = default;
  explicit Vector(std::size_t n) : memory((n + 7) / 8, Word4{{~0u, ~0u, ~0u, ~0u}}), count(n) {}
  Bf16* data() { return reinterpret_cast<Bf16*>(memory.data()); }
  const Bf16* data() const { return reinterpret_cast<const Bf16*>(memory.data()); }
  double operator[](std::size_t i) const { return from_bf16(data()[i]); }
};

/// A weight of a product, [columns, depth], and how the kernel has it.
struct Weight {
  int columns, depth;
  std::vector<float> values;
  std::vector<Word4> packed;

  double operator()(int column, int index) const {
    return values[static_cast<std::size_t>(column) * depth + index];
  }
  const char* data() const { return reinterpret_cast<const char*>(packed.data()); }
  std::size_t bytes() const { return packed.size() * sizeof(Word4); }

  /// Packs element by element. The values of int8 become what is packed.
  void pack(bool int8) {
    const int64_t size = scale_bytes(int8, columns) + ceil_div(columns, 8) * run_stride(int8, depth);
    packed.assign(size / sizeof(Word4), Word4{});
    char* to = reinterpret_cast<char*>(packed.data());
    for (int c = 0; c < columns; ++c) {
      float* row = &values[static_cast<std::size_t>(c) * depth];
      float most = 0;
      for (int i = 0; i < depth; ++i) most = std::max(most, std::fabs(row[i]));
      const float scale = most / 127;
      if (int8) std::memcpy(to + c * sizeof scale, &scale, sizeof scale);
      for (int i = 0; i < depth; ++i) {
        char* at = to + packed_offset(int8, columns, depth, c, i);
        if (int8) {
          const int8_t step = static_cast<int8_t>(scale > 0 ? std::nearbyint(row[i] / scale) : 0);
          *reinterpret_cast<int8_t*>(at) = step;
          row[i] = scale * step;
        } else {
          const Bf16 value = round_bf16(row[i]);
          std::memcpy(at, &value, sizeof value);
        }
      }
    }
  }
};

struct LayerWeights {
  Weight qkv;
  Vector qkv_bias;
  Weight out;
  Vector out_bias, norm1, norm1_bias;
  Weight up;
  Vector up_bias;
  Weight down;
  Vector down_bias, norm2, norm2_bias;
};

struct Model {
  Sizes s;
  bool int8;
  std::vector<LayerWeights> layers;

  explicit Model(const Sizes& sizes, bool quantised = false) : s(sizes), int8(quantised) {
    std::mt19937 random(1);
    auto draw = [&](std::size_t n, double mean, double deviation) {
      std::normal_distribution<double> normal(mean, deviation);
      Vector v(n);
      for (std::size_t i = 0; i < n; ++i) v.data()[i] = round_bf16(normal(random));
      return v;
    };
    auto weight = [&](int columns, int depth, double deviation) {
      std::normal_distribution<double> normal(0, deviation);
      Weight w{columns, depth, std::vector<float>(static_cast<std::size_t>(columns) * depth), {}};
      for (float& value : w.values) value = from_bf16(round_bf16(normal(random)));
      w.pack(int8);
      return w;
    };
    const int d = s.hidden, wide = s.heads * s.head_size;
    for (int i = 0; i < s.layers; ++i) {
      const double narrow = 1 / std::sqrt(d);
      layers.push_back({weight(3 * wide, d, 1.5 * narrow), draw(3 * wide, 0, 0.2), weight(d, wide, narrow),
                        draw(d, 0, 0.2), draw(d, 1, 0.1), draw(d, 0, 0.1), weight(s.neurons, d, narrow),
                        draw(s.neurons, 0, 0.2), weight(d, s.neurons, narrow), draw(d, 0, 0.2),
                        draw(d, 1, 0.1), draw(d, 0, 0.1)});
    }
  }
};

struct Subnet {
  std::vector<int> layers, heads, neurons;
};

/// The paper's rule, as subnet.py has it.
inline Subnet subnet(const Sizes& s, double width, double depth) {
  Subnet result;
  const int kept = static_cast<int>(std::nearbyint(depth * s.layers));
  for (int i = 0; i < kept; ++i) {
    const int heads = static_cast<int>(std::nearbyint(s.heads * width));
    result.layers.push_back(static_cast<int>(std::floor(i / depth)));
    result.heads.push_back(heads);
    result.neurons.push_back(heads * s.neurons / s.heads);
  }
  return result;
}

inline double activation_of(Activation a, double x) {
  if (a == Activation::kGelu) return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
  if (a == Activation::kGeluTanh)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return a == Activation::kRelu ? std::max(x, 0.0) : x;
}

/// In double; or `rounded`, as torch computes in bfloat16: weights and each op's result are rounded.
inline std::vector<double> plain(const Model& model, const Subnet& net, const Vector& input,
                                 const std::vector<int64_t>& offsets, Activation activation, double eps,
                                 bool rounded) {
  const int d = model.s.hidden, h = model.s.head_size, tokens = static_cast<int>(input.count) / d;
  auto r = [&](double v) { return rounded ? from_bf16(round_bf16(v)) : v; };
  std::vector<double> x(input.count);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = input[i];
  auto norm = [&](const std::vector<double>& y, const Vector& w, const Vector& b) {
    for (int row = 0; row < tokens; ++row) {
      std::vector<double> z(d);
      double mean = 0, variance = 0;
      for (int c = 0; c < d; ++c) mean += z[c] = r(y[row * d + c] + x[row * d + c]);
      mean /= d;
      for (int c = 0; c < d; ++c) variance += (z[c] - mean) * (z[c] - mean);
      for (int c = 0; c < d; ++c)
        x[row * d + c] = r((z[c] - mean) / std::sqrt(variance / d + eps) * w[c] + b[c]);
    }
  };
  auto values = [&](const Weight& w) {
    std::vector<double> all(w.values.begin(), w.values.end());
    for (double& v : all) v = r(v);
    return all;
  };
  auto contract = [&](const std::vector<double>& a, int k, const Weight& weight, const Vector& b) {
    const std::vector<double> w = values(weight);
    std::vector<double> y(tokens * d);
    for (int row = 0; row < tokens; ++row) {
      for (int c = 0; c < d; ++c) {
        double sum = 0;
        for (int i = 0; i < k; ++i) sum += a[row * k + i] * w[c * weight.depth + i];
        y[row * d + c] = r(sum + b[c]);
      }
    }
    return y;
  };
  auto expand = [&](int k, const Weight& weight, const Vector& b, Activation act) {
    const std::vector<double> w = values(weight);
    std::vector<double> y(tokens * k);
    for (int row = 0; row < tokens; ++row) {
      for (int n = 0; n < k; ++n) {
        double sum = 0;
        for (int i = 0; i < d; ++i) sum += x[row * d + i] * w[n * d + i];
        y[row * k + n] = r(activation_of(act, r(sum + b[n])));
      }
    }
    return y;
  };
  for (std::size_t layer = 0; layer < net.layers.size(); ++layer) {
    const LayerWeights& l = model.layers[net.layers[layer]];
    const int heads = net.heads[layer], wide = heads * h, neurons = net.neurons[layer];
    const std::vector<double> qkv = expand(3 * wide, l.qkv, l.qkv_bias, Activation::kNone);
    std::vector<double> context(tokens * wide);
    for (std::size_t b = 0; b + 1 < offsets.size(); ++b) {
      for (int head = 0; head < heads; ++head) {
        for (int64_t row = offsets[b]; row < offsets[b + 1]; ++row) {
          const double* q = &qkv[row * 3 * wide + head * 3 * h];
          std::vector<double> p;
          double most = -INFINITY, total = 0;
          for (int64_t key = offsets[b]; key < offsets[b + 1]; ++key) {
            const double* k = &qkv[key * 3 * wide + head * 3 * h + h];
            double score = 0;
            for (int i = 0; i < h; ++i) score += q[i] * k[i];
            p.push_back(score / std::sqrt(h));
            most = std::max(most, p.back());
          }
          for (double& v : p) total += v = std::exp(v - most);
          for (int i = 0; i < h; ++i) {
            double sum = 0;
            for (std::size_t key = 0; key < p.size(); ++key)
              sum += r(p[key] / total) * qkv[(offsets[b] + key) * 3 * wide + head * 3 * h + 2 * h + i];
            context[row * wide + head * h + i] = r(sum);
          }
        }
      }
    }
    norm(contract(context, wide, l.out, l.out_bias), l.norm1, l.norm1_bias);
    const std::vector<double> inner = expand(neurons, l.up, l.up_bias, activation);
    norm(contract(inner, neurons, l.down, l.down_bias), l.norm2, l.norm2_bias);
  }
  return x;
}

/// Arguments of the kernel, without memory or tilings.
inline Encoder encoder_of(const Model& model, const Subnet& net, int tokens) {
  Encoder e{};
  e.tokens = tokens, e.hidden = model.s.hidden, e.head_size = model.s.head_size;
  e.heads = model.s.heads, e.neurons = model.s.neurons, e.int8 = model.int8;
  e.layers = static_cast<int>(net.layers.size());
  e.eps = 1e-5f;
  e.scale = static_cast<float>(M_LOG2E / std::sqrt(model.s.head_size));
  for (int i = 0; i < e.layers; ++i) {
    const LayerWeights& l = model.layers[net.layers[i]];
    e.layer[i] = {l.qkv.data(),
                  l.qkv_bias.data(),
                  l.out.data(),
                  l.out_bias.data(),
                  l.norm1.data(),
                  l.norm1_bias.data(),
                  l.up.data(),
                  l.up_bias.data(),
                  l.down.data(),
                  l.down_bias.data(),
                  l.norm2.data(),
                  l.norm2_bias.data(),
                  net.heads[i],
                  net.neurons[i],
                  {},
                  {},
                  {},
                  {}};
  }
  return e;
}

/// The largest error of values in bfloat16, NaN if one is.
inline double largest_error(const Bf16* values, const std::vector<double>& exact) {
  double most = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double off = std::fabs(from_bf16(values[i]) - exact[i]);
    if (!(off <= most)) most = off;
  }
  return most;
}

}  // namespace dynabert::cuda
