// What the tests share: numbers, poisoned memory, the judge, and a packer of their own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"

namespace dynabert {

// ---- numbers ----

/// The same numbers on every machine (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// [0, count)
  int below(int count) { return static_cast<int>(bits() % static_cast<uint64_t>(count)); }
  /// [-1, 1)
  float uniform() { return static_cast<float>(static_cast<int64_t>(bits()) >> 40) * 0x1p-23f; }
  /// Nearly normal: the sum of twelve.
  float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum * 0.5f;
  }
  std::vector<float> normals(int64_t count, float scale = 1, float mean = 0) {
    std::vector<float> values(count);
    for (float& v : values) v = normal() * scale + mean;
    return values;
  }

 private:
  uint64_t state_;
};

inline float from_bits(uint32_t u) {
  float value;
  std::memcpy(&value, &u, 4);
  return value;
}

inline float bf16_value(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

/// Nearest bf16, ties to even.
inline uint16_t bf16_bits(float value) {
  if (value != value) return 0x7fc0;
  uint32_t u;
  std::memcpy(&u, &value, 4);
  const uint32_t low = u & 0xffff;
  u >>= 16;
  if (low > 0x8000 || (low == 0x8000 && (u & 1))) ++u;
  return static_cast<uint16_t>(u);
}

inline float round_bf16(float value) { return bf16_value(bf16_bits(value)); }

inline double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu: return x > 0 ? x : 0;
    default: return x;
  }
}

inline float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return 0.5f * x * (1 + std::erf(x * static_cast<float>(std::sqrt(0.5))));
    case Activation::kGeluTanh:
      return 0.5f * x *
             (1 + std::tanh(static_cast<float>(std::sqrt(2 / M_PI)) * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x > 0 ? x : 0;
    default: return x;
  }
}

inline const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "fp32" : dtype == DType::kBf16 ? "bf16" : "int8";
}

/// Bytes of one stored element.
inline int size_of(DType dtype) { return kWordBytes / group_of(dtype); }

constexpr DType kDTypes[] = {DType::kF32, DType::kBf16, DType::kS8};
constexpr Activation kActivations[] = {Activation::kNone, Activation::kGelu, Activation::kGeluTanh,
                                       Activation::kRelu};

// ---- the judge ----

constexpr double kFloatEps = 0x1p-23, kBf16Eps = 0x1p-7;

/// An error may be twice that of a plain loop in the same types, plus two units in the last place of the
/// largest value. The truth is the same inputs in double.
class Judge {
 public:
  explicit Judge(double eps) : eps_(eps) {}

  void add(double got, double plain, double truth) {
    ++count_;
    const double error = std::abs(got - truth);
    if (!(error <= worst_)) worst_ = std::isfinite(error) ? error : INFINITY;
    plain_ = std::max(plain_, std::abs(plain - truth));
    largest_ = std::max(largest_, std::abs(truth));
  }

  /// What is wrong; empty if nothing is.
  std::string verdict() const {
    if (count_ == 0) return "nothing was compared";
    if (!std::isfinite(plain_)) return "the plain loop is not finite";
    const double allowed = 2 * plain_ + 2 * eps_ * largest_;
    if (worst_ <= allowed) return "";
    char text[160];
    std::snprintf(text, sizeof text, "error %.3g, allowed %.3g (plain %.3g, largest value %.3g, %ld values)",
                  worst_, allowed, plain_, largest_, count_);
    return text;
  }

 private:
  double eps_, worst_ = 0, plain_ = 0, largest_ = 0;
  long count_ = 0;
};

// ---- memory ----

/// Bytes on a boundary of 64, all ones: NaN as floats and as bf16, 127 as an activation in int8. Nothing
/// is allocated behind the last one, so that AddressSanitizer sees the first access beyond.
class Memory {
 public:
  explicit Memory(int64_t bytes) : size_(bytes), touched_(bytes, false) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<char*>(data));
    poison();
  }

  char* data() const { return data_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  int64_t size() const { return size_; }

  void poison() {
    std::memset(data_.get(), kPoison, static_cast<size_t>(size_));
    touched_.assign(size_, false);
  }
  /// Bytes that may differ from the poison.
  void expect(int64_t at, int64_t bytes) {
    if (at < 0 || at + bytes > size_) throw std::logic_error("the test expects bytes outside of its memory");
    std::fill_n(touched_.begin() + at, bytes, true);
  }
  /// What is wrong: a byte that differs and may not.
  std::string stray() const {
    for (int64_t i = 0; i < size_; ++i)
      if (!touched_[i] && data_.get()[i] != static_cast<char>(kPoison))
        return "byte " + std::to_string(i) + " of " + std::to_string(size_) + " was written";
    return "";
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr int kPoison = 0xff;
  int64_t size_;
  std::vector<bool> touched_;
  std::unique_ptr<char, Free> data_;
};

// ---- weights ----

/// A map [columns][rows of K] as stored numbers and a scale for each column: weight = stored * scale.
struct Weights {
  DType dtype = DType::kF32;
  int columns = 0, rows = 0;
  std::vector<float> stored, scale, bias;

  float at(int column, int row) const { return stored[int64_t{column} * rows + row]; }
};

/// Stored numbers of one row of values, and their scale (1 unless int8).
inline float store_row(DType dtype, const float* values, int count, float* stored) {
  float top = 0;
  for (int i = 0; i < count; ++i) top = std::max(top, std::abs(values[i]));
  const float scale = dtype == DType::kS8 ? top / 127 : 1;
  for (int i = 0; i < count; ++i)
    stored[i] = dtype == DType::kF32    ? values[i]
                : dtype == DType::kBf16 ? round_bf16(values[i])
                                        : (top > 0 ? std::nearbyint(values[i] / scale) : 0);
  return scale;
}

inline Weights make_weights(DType dtype, int columns, int rows, const std::vector<float>& values,
                            std::vector<float> bias) {
  Weights w{dtype,          columns, rows, std::vector<float>(values.size()), std::vector<float>(columns),
            std::move(bias)};
  for (int c = 0; c < columns; ++c)
    w.scale[c] = store_row(dtype, &values[int64_t{c} * rows], rows, &w.stored[int64_t{c} * rows]);
  return w;
}

inline void put(DType dtype, char* data, int64_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(data + index * 4, &value, 4);
  } else if (dtype == DType::kBf16) {
    const uint16_t bits = bf16_bits(value);
    std::memcpy(data + index * 2, &bits, 2);
  } else {
    data[index] = static_cast<char>(static_cast<int8_t>(value));
  }
}

/// Where the parts of a matrix are written; null where the type has none.
struct Places {
  char* panels;
  float *bias, *scale;
  int32_t* compensation;
};

/// The layout that model.h describes, one element at a time.
inline void pack(const Weights& w, int block, const Places& to) {
  const int group = group_of(w.dtype);
  const int words = (w.rows + group - 1) / group;
  const int padded = (w.columns + 63) / 64 * 64;
  for (int c = 0; c < w.columns; ++c) {
    to.bias[c] = w.bias[c];
    for (int k = 0; k < words * group; ++k) {
      const int64_t word = (int64_t{c / 64} * words + k / group) * 64 + c % 64;
      put(w.dtype, to.panels, word * group + k % group, k < w.rows ? w.at(c, k) : 0);
    }
    if (w.dtype != DType::kS8) continue;
    to.scale[c] = w.scale[c];
    int sum = 0;
    for (int k = 0; k < w.rows; ++k) {
      sum += static_cast<int>(w.at(c, k));
      to.compensation[int64_t{k / block} * padded + c] = -128 * sum;
    }
  }
}

/// One matrix in memory of its own. What lies beside the last column is poison, as other columns would be.
class PackedMatrix {
 public:
  PackedMatrix(const Weights& w, bool contracts, int block)
      : blocks_((w.rows + block - 1) / block),
        words_((w.rows + group_of(w.dtype) - 1) / group_of(w.dtype)),
        padded_((w.columns + 63) / 64 * 64),
        panels_(int64_t{padded_} * words_ * 4),
        bias_(padded_ * 4),
        scale_(padded_ * 4),
        compensation_(int64_t{padded_} * blocks_ * 4) {
    const bool s8 = w.dtype == DType::kS8;
    pack(w, block, {panels_.data(), bias_.as<float>(), scale_.as<float>(), compensation_.as<int32_t>()});
    matrix.panels = panels_.data();
    matrix.panel_bytes = int64_t{words_} * kPanelRowBytes;
    matrix.bias = bias_.as<float>();
    matrix.scale = s8 ? scale_.as<float>() : nullptr;
    matrix.compensation = s8 ? compensation_.as<int32_t>() : nullptr;
    matrix.columns = w.columns;
    matrix.rows = w.rows;
    matrix.block = block;
    matrix.contracts = contracts;
  }

 private:
  int blocks_, words_, padded_;
  Memory panels_, bias_, scale_, compensation_;

 public:
  Matrix matrix;
};

// ---- activations ----

/// Rows of stored numbers and a scale for each: value = stored * scale.
struct Rows {
  DType dtype = DType::kF32;
  int count = 0, columns = 0;
  std::vector<float> stored, scale;

  float at(int row, int column) const { return stored[int64_t{row} * columns + column]; }
};

inline Rows make_rows(DType dtype, int count, int columns, const std::vector<float>& values) {
  Rows rows{dtype, count, columns, std::vector<float>(values.size()), std::vector<float>(count)};
  for (int r = 0; r < count; ++r)
    rows.scale[r] =
        store_row(dtype, &values[int64_t{r} * columns], columns, &rows.stored[int64_t{r} * columns]);
  return rows;
}

/// What a kernel wrote as the operand of the next product, against the float32 row that it is made of:
/// rounded to nearest, zeros up to a whole word or to `padded`.
inline std::string wrong_operand(DType dtype, const Operand& operand, int row, const float* values,
                                 int columns, int padded) {
  const char* data = operand.data + row * operand.stride;
  auto at = [&](int i) { return " at row " + std::to_string(row) + " column " + std::to_string(i); };
  float top = 0;
  for (int i = 0; i < columns; ++i) top = std::max(top, std::abs(values[i]));
  const float scale = dtype == DType::kS8 ? operand.scale[row] : 1;
  if (dtype == DType::kS8 && !(std::abs(scale - top / 127) <= kFloatEps * scale))
    return "wrong scale" + at(0);
  for (int i = 0; i < padded; ++i) {
    const float value = i < columns ? values[i] : 0;
    if (dtype == DType::kF32) {
      float found;
      std::memcpy(&found, data + 4 * i, 4);
      if (found != value) return "not the value" + at(i);
    } else if (dtype == DType::kBf16) {
      uint16_t found;
      std::memcpy(&found, data + 2 * i, 2);
      // Processors differ in whether a denormal is kept.
      if (found != bf16_bits(value) && !(std::abs(value) < 0x1p-126f && (found & 0x7fff) == 0))
        return "not the nearest bf16" + at(i);
    } else {
      const int found = static_cast<uint8_t>(data[i]) - 128;
      const double exact = scale > 0 ? value / static_cast<double>(scale) : 0;
      // value * (127 / top) is rounded twice before it is rounded to an integer.
      if (!(std::abs(found - exact) <= 0.5 + 127 * 4 * kFloatEps)) return "not the nearest int8" + at(i);
    }
  }
  return "";
}

}  // namespace dynabert
