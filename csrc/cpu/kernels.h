// The inner loops of the encoder, once for each instruction set; `kernels.inl` is their one source.
#pragma once

#include <cstdint>

#include "model.h"

namespace dynabert {

/// Rows of A that one register block computes; 6 x 64 fills the 32 registers of AVX-512.
constexpr int kTileRows = 6;

/// Consecutive packed rows with one extent. `extent` is of columns (expand) or of K (contract).
struct Tile {
  int row, rows, extent;
};

/// Rows of activations as a matrix product reads them: words of 32 bits along K.
/// int8 activations are stored as value + 128, so that VPDPBUSD takes them; zero is 128.
struct Operand {
  char* data = nullptr;
  int64_t stride = 0;      // bytes
  float* scale = nullptr;  // int8: of each row
};

struct LinearTask {
  DType dtype;
  const Matrix* matrix;
  Operand input;
  // Exactly one is set. Columns beyond an extent are written as zeros up to the panel's end.
  float* out_f32 = nullptr;
  uint16_t* out_bf16 = nullptr;
  int64_t out_stride = 0;  // elements
  Activation activation = Activation::kNone;
};

struct NormTask {
  DType dtype;
  const Norm* norm;
  int hidden;
  float eps;
  const float* y;  // added to x, [T, stride]
  float* x;        // in: residual; out: result
  int64_t stride;  // elements, of x and y
  Operand out;     // the result as the next product's operand; unused for float32
};

struct EmbedTask {
  DType dtype;
  const Model* model;
  const int32_t *ids, *token_types, *positions;  // [T]
  float* x;
  int64_t stride;
  Operand out;
};

struct AttentionTask {
  bool bf16;        // type of qkv and context; float32 otherwise
  const char* qkv;  // [T, stride]: q, k, v of head 0, then of head 1, ...
  int64_t qkv_stride;
  char* context;
  int64_t context_stride;  // elements
  int head_size;
};

// ---- ops on ordinary tensors: float32 or bf16, rows of adjacent values ----

/// Rows of A and what becomes of them: `words` of K are summed, `columns` of C are written.
struct ProductTile {
  int row, rows, words, columns;
  int shift = 0;  // from A's rows to those of C
};

/// One panel of C = A x B + bias.
struct ProductTask {
  DType dtype;
  const char* a;      // rows of words along K
  int64_t a_stride;   // bytes
  const char* panel;  // of B
  const float* bias;  // of the panel's 64 columns; null for none
  char* out;
  int64_t out_stride;  // elements
  char* pre;           // the sums before the activation; null where not wanted
  int64_t pre_stride;
  int column;  // of C, the panel's first
  Activation activation;
  const char* next;  // a panel of the same size that is fetched meanwhile; null for none
  // Where set, the result is not written but kept here in float32, or added to what is there.
  float* sums = nullptr;
  int64_t sums_stride = 0;  // elements
  bool add = false;
};

/// out = grad * activation'(pre)
struct SlopeTask {
  DType dtype;
  Activation activation;
  const char *grad, *pre;
  char* out;
  int64_t grad_stride, pre_stride, out_stride;  // elements
  int columns;
};

/// reference.keep_mask: kept where the hash of (seed, row, column) reaches the threshold.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // p * 2^32
  float scale = 1;         // 1 / (1 - p); 1 for none
};

/// float32 or bf16 values, adjacent in a row, rows `stride` elements apart.
struct View {
  char* data = nullptr;
  int64_t stride = 0;
};

struct AttentionOp {
  DType dtype;
  int head_size;
  Dropout dropout;
  View qkv, out;  // [T, >= 3 H d], [T, >= H d]
  float* lse;     // [T, lse_stride]: log-sum-exp of each row and head
  int64_t lse_stride;
  View grad, grad_qkv;  // backward only: of out and of qkv
};

/// residual_norm, or embed where `embeds`: y = LayerNorm(z), z = dropout(x) + residual or the sum of three
/// tables' rows; embed drops out y. Backward reads `out` as the gradient of y and writes those of z into
/// `residual` and of x into `x` (null for embed).
struct NormOp {
  DType dtype;
  bool embeds;
  int hidden;
  float eps;
  Dropout dropout;
  const char *weight, *bias;
  View x, residual, z, out;
  float *mean, *rstd;     // [T]
  View tables[3];         // word, token type, position
  const int64_t* ids[3];  // [T] each
};

/// Compares logits or hidden states: rows of `columns` values. `out` (backward only) gets the gradient of the
/// student times `scale`.
struct LossOp {
  DType dtype;
  bool cross_entropy;  // -sum softmax(teacher) log_softmax(student); else sum (student - teacher)^2
  int columns;
  View student, teacher, out;
  float scale;
};

/// Queries that backward handles at a time: what it keeps of P and dS is this many rows.
constexpr int kQueryBlock = 96;

/// Everything an instruction set computes. `scratch` is 64-byte aligned, `attention_scratch` bytes.
struct Kernels {
  const char* name;
  /// One panel of outputs for some tiles; meanwhile the panel at `next` (unless null) is fetched.
  void (*linear)(const LinearTask&, const Tile* tiles, int count, int panel, const char* next);
  /// x = LayerNorm(x + y), and the operand of it, for rows [begin, end).
  void (*residual_norm)(const NormTask&, int begin, int end);
  void (*embed)(const EmbedTask&, int begin, int end);
  /// Rows of bf16 [columns] to int8 with a scale a row, zeros (128) up to `padded`.
  void (*quantise)(const uint16_t* in, int64_t in_stride, const Operand& out, int columns, int padded,
                   int begin, int end);
  /// Queries [query_begin, query_end) of one head over the keys of rows [begin, end).
  void (*attention)(const AttentionTask&, int head, int begin, int end, int query_begin, int query_end,
                    char* scratch);
  /// float32 rows [rows, columns] as an operand (the pooler's input).
  void (*convert)(DType dtype, const float* in, int64_t in_stride, const Operand& out, int columns, int rows);
  void (*tanh)(float* values, int64_t count);
  /// Multiply-adds of a register block on data in L1, to measure the peak: returns operations done.
  int64_t (*peak)(DType dtype, int64_t repeats);

  /// One panel of B from `count` rows along K, of `columns` <= 64 values each (strides in bytes).
  void (*panel_from_rows)(DType, const char* from, int64_t stride, int count, int columns, char* to);
  /// One panel of B from its `columns` <= 64 columns, each a row of `count` values along K.
  void (*panel_from_columns)(DType, const char* from, int64_t stride, int count, int columns, char* to);
  /// Rows of A from `count` rows along K of `columns` values each: the transpose, in words along K.
  void (*rows_from_columns)(DType, const char* from, int64_t stride, int count, int columns, char* to,
                            int64_t to_stride);
  void (*product)(const ProductTask&, const ProductTile* tiles, int count);
  void (*slope)(const SlopeTask&, int begin, int end);
  /// sums[columns <= 64] += the sum over rows, in a fixed order.
  void (*add_rows)(DType, const char* from, int64_t stride, int rows, int columns, float* sums);
  /// Rows [begin, end) of one head, forward, or backward where `grad` is set. `mask_row` is dropout's row of
  /// the first token.
  void (*attention_op)(const AttentionOp&, int head, int begin, int end, int64_t mask_row, char* scratch);
  /// Rows [begin, end); `row` is scratch of `hidden` floats.
  void (*norm_op)(const NormOp&, int begin, int end, float* row);
  /// Adds the rows' part of the gradients of weight and bias.
  void (*norm_backward_op)(const NormOp&, int begin, int end, float* grad_weight, float* grad_bias);
  /// float32 values in a type.
  void (*narrow)(DType, const float* from, char* to, int count);
  /// table[ids[r], c] += grad[r, c] for all rows in order and columns [begin, end).
  void (*scatter)(DType, const char* grad, int64_t stride, const int64_t* ids, int64_t rows, char* table,
                  int64_t columns, int begin, int end);
  /// The sum over rows [begin, end).
  double (*loss)(const LossOp&, int64_t begin, int64_t end);
  void (*loss_backward)(const LossOp&, int64_t begin, int64_t end);
};

/// Bytes of scratch that `attention` needs for a sequence of that length.
int64_t attention_scratch(int length, int head_size);
int64_t attention_backward_scratch(int length, int head_size);

namespace portable { const Kernels& kernels(); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }
#elif defined(__aarch64__)
namespace neon { const Kernels& kernels(); }
namespace neon_bf16 { const Kernels& kernels(); }
#endif

/// The instruction sets that this processor has, best first.
std::vector<const Kernels*> available_kernels();

}  // namespace dynabert
