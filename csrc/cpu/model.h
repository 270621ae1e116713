// What an encoder is made of: its shape, where each packed array lies in one buffer, and views of them.
// Letters: T packed tokens, D hidden size, H heads, d head size, N neurons, B sequences, L layers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dynabert {

enum class DType { kF32, kBf16, kS8 };
enum class Activation { kNone, kGelu, kGeluTanh, kRelu };

/// Columns of a panel. A panel is K-major inside: one row of a panel is 64 words of 32 bits.
constexpr int kPanelColumns = 64;
constexpr int kWordBytes = 4;
constexpr int kPanelRowBytes = kPanelColumns * kWordBytes;

/// Matrix elements in one 32-bit word, the step of the inner product: 1 float, 2 bf16 or 4 int8.
constexpr int group_of(DType dtype) { return dtype == DType::kF32 ? 1 : dtype == DType::kBf16 ? 2 : 4; }

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Shape {
  DType dtype = DType::kF32;
  Activation activation = Activation::kGelu;
  int vocabulary = 0, positions = 0, token_types = 0;
  int hidden = 0, head_size = 0;
  int labels = 0;          // 0: no classification head
  int first_position = 0;  // RoBERTa: padding id + 1; BERT: 0
  int padding_id = -1;     // RoBERTa counts the tokens that are not this one; BERT: -1
  float eps = 0;
  std::vector<int> heads, neurons;  // of each layer, [L]

  int layers() const { return static_cast<int>(heads.size()); }
  /// Throws std::invalid_argument unless every dimension is one that the kernels can compute.
  void check() const;
};

/// One array inside the packed buffer.
struct Section {
  std::string name;
  char type;  // 'f' float32, 'h' bf16, 'b' int8, 'i' int32
  std::vector<int64_t> shape;
  int block;  // of a compensation: rows of K under each of its sums; 0 elsewhere
  int64_t offset, bytes;
};

/// A map of K inputs onto columns, as panels of 64 columns: [P][K / group][64][group].
/// A prefix of the columns is the first panels; a prefix of K the first rows of each panel.
struct Matrix {
  const char* panels = nullptr;
  int64_t panel_bytes = 0;
  const float* bias = nullptr;            // [P * 64]
  const float* scale = nullptr;           // int8: of each column, [P * 64]
  const int32_t* compensation = nullptr;  // int8: -128 * sums over the first blocks of K, [blocks][P * 64]
  int columns = 0, rows = 0;              // columns = outputs, rows = K
  int block = 0;                          // rows of K that one row of `compensation` adds
  bool contracts = false;                 // whether K, not the columns, is cut to a prefix

  int padded_columns() const { return static_cast<int>(round_up(columns, kPanelColumns)); }
  int panel_count() const { return padded_columns() / kPanelColumns; }
};

/// Rows that are looked up: [rows][D] in the model's type, int8 with one scale a row.
struct Table {
  const char* data = nullptr;
  const float* scale = nullptr;  // int8: [rows]
};

struct Norm {
  const float *weight = nullptr, *bias = nullptr;  // [D]
};

struct Layer {
  Matrix qkv, out, up, down;
  Norm attention_norm, ffn_norm;
};

/// The whole model as views into one buffer, which the owner keeps alive.
struct Model {
  Shape shape;
  Table word, position, token_type;
  Norm embedding_norm;
  std::vector<Layer> layers;
  Matrix pooler;
  const float *classifier_weight = nullptr, *classifier_bias = nullptr;  // [C][D], [C]
};

/// Where every array lies; a function of the shape alone. The last section's end is the buffer's size.
std::vector<Section> layout(const Shape& shape);
int64_t packed_bytes(const Shape& shape);

/// Views of a buffer of `packed_bytes(shape)` bytes, aligned to 64.
Model view(const Shape& shape, const char* buffer);

}  // namespace dynabert
