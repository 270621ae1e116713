// The kernels of one instruction set. A file that includes this defines ISA (its namespace), kLanes
// (floats in a vector) and kTileVectors (vectors of columns in a register block), and is compiled with
// that set's flags. Nothing outside the namespace is instantiated here, so that the linker can never
// put this set's code where another processor would run it.

namespace dynabert {
namespace ISA {
namespace {

#include "simd.h"

constexpr int kPanelVectors = kPanelColumns / kLanes;

// ---- inner products: one 32-bit word of A times one of B, for each column ----

struct DotF32 {
  typedef F32 Acc;
  typedef F32 Word;
  INLINE Word spread(const char* a) { return broadcast(load<float>(a)); }
  INLINE Acc step(Acc acc, Word a, U32 b) { return acc + a * bits<F32>(b); }
};

struct DotBf16 {
  typedef F32 Acc;
#if defined(__AVX512BF16__)
  typedef U32 Word;
  INLINE Word spread(const char* a) { return broadcast_word(a); }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    return _mm512_dpbf16_ps(acc, bits<__m512bh>(a), bits<__m512bh>(b));
  }
#elif defined(ISA_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  typedef bfloat16x4_t Word;  // lane 0, which the instruction spreads
  INLINE Word spread(const char* a) { return bits<Word>(uint32x2_t{load<uint32_t>(a), 0}); }
  INLINE Acc step(Acc acc, Word a, U32 b) { return vbfdotq_lane_f32(acc, bits<bfloat16x8_t>(b), a, 0); }
#elif defined(ISA_NEON)
  typedef F32 Word;  // lanes 0 and 1 are the two values
  INLINE Word spread(const char* a) {
    return bits<F32>(vshll_n_u16(bits<uint16x4_t>(uint32x2_t{load<uint32_t>(a), 0}), 16));
  }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    acc = vfmaq_laneq_f32(acc, bits<F32>(b << 16), a, 0);
    return vfmaq_laneq_f32(acc, bits<F32>(b & 0xffff0000u), a, 1);
  }
#else
  struct Word {
    F32 low, high;
  };
  INLINE Word spread(const char* a) {
    const uint32_t w = load<uint32_t>(a);
    return {broadcast(bits<float>(w << 16)), broadcast(bits<float>(w & 0xffff0000u))};
  }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    acc = acc + a.low * bits<F32>(b << 16);
    return acc + a.high * bits<F32>(b & 0xffff0000u);
  }
#endif
};

// A is unsigned (value + 128), B signed; the sum is exact in 32 bits for K up to 2^16.
struct DotS8 {
  typedef I32 Acc;
#if defined(ISA_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr bool kCompensates = true;  // takes the 128 from A itself
#else
  static constexpr bool kCompensates = false;
#endif
#if defined(__AVX512VNNI__)
  typedef U32 Word;
  INLINE Word spread(const char* a) { return broadcast_word(a); }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    return bits<I32>(_mm512_dpbusd_epi32(bits<__m512i>(acc), bits<__m512i>(a), bits<__m512i>(b)));
  }
#elif defined(__AVX2__)
  // VPMADDUBSW would saturate. Even and odd bytes as 16-bit numbers are multiplied exactly.
  struct Word {
    U32 even, odd;
  };
  INLINE Word spread(const char* a) {
    const uint32_t w = load<uint32_t>(a);
    return {(w & 0x00ff00ffu) | U32{}, (w >> 8 & 0x00ff00ffu) | U32{}};
  }
  INLINE Acc step(Acc acc, Word a, U32 b) {
#if defined(__AVX512BW__)
    const __m512i odd = _mm512_srai_epi16(bits<__m512i>(b), 8);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(bits<__m512i>(b), 8), 8);
    return acc + bits<I32>(_mm512_madd_epi16(bits<__m512i>(a.even), even)) +
           bits<I32>(_mm512_madd_epi16(bits<__m512i>(a.odd), odd));
#else
    const __m256i odd = _mm256_srai_epi16(bits<__m256i>(b), 8);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bits<__m256i>(b), 8), 8);
    return acc + bits<I32>(_mm256_madd_epi16(bits<__m256i>(a.even), even)) +
           bits<I32>(_mm256_madd_epi16(bits<__m256i>(a.odd), odd));
#endif
  }
#elif defined(ISA_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
  typedef uint8x8_t Word;
  INLINE Word spread(const char* a) { return bits<Word>(uint32x2_t{load<uint32_t>(a), 0}); }
  INLINE Acc step(Acc acc, Word a, U32 b) { return vsudotq_lane_s32(acc, bits<int8x16_t>(b), a, 0); }
#elif defined(ISA_NEON)
  // Products of signed bytes: two of them fit 16 bits, as B is at least -127.
  typedef U32 Word;
  INLINE Word spread(const char* a) { return broadcast_word(a) ^ 0x80808080u; }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    const int8x16_t signed_a = bits<int8x16_t>(a), signed_b = bits<int8x16_t>(b);
    const int16x8_t low = vmull_s8(vget_low_s8(signed_a), vget_low_s8(signed_b));
    const int16x8_t high = vmull_high_s8(signed_a, signed_b);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
  }
#else
  struct Word {
    int32_t v[4];
  };
  INLINE Word spread(const char* a) {
    const uint8_t* u = reinterpret_cast<const uint8_t*>(a);
    return {{u[0], u[1], u[2], u[3]}};
  }
  INLINE Acc step(Acc acc, Word a, U32 b) {
    const I32 s = bits<I32>(b);
    acc = acc + a.v[0] * ((s << 24) >> 24) + a.v[1] * ((s << 16) >> 24);
    return acc + a.v[2] * ((s << 8) >> 24) + a.v[3] * (s >> 24);
  }
#endif
};

// ---- the register block ----

// Where the register block starts, and what it fetches for later while it computes.
template <class Acc>
struct Start {
  const Acc* first;  // of each column, added to every row's sum; null for zero
  const char* next;  // cache lines [from, to) of each of its panel rows are fetched; null for none
  int from = 0, to = 0;
};

/// Tile t of `count` fetches its part of the panel at `next`, unless that is null: some lines of each row.
template <class Acc>
INLINE void share_fetching(Start<Acc>& start, const char* next, int t, int count) {
  constexpr int lines = kPanelRowBytes / 64;
  const int sharers = count < lines ? count : lines;
  if (!next || t >= sharers) return;
  start.next = next;
  start.from = lines * t / sharers;
  start.to = lines * (t + 1) / sharers;
}

// out[MR rows, out_stride vectors apart][NV] = start + A[MR, words] x B[words, NV vectors]. Every output
// sums its K terms in one order, whatever MR and NV are: a result does not depend on its neighbours.
template <class Dot, int MR, int NV>
INLINE void block(const char* a, int64_t stride, const char* b, int words, Start<typename Dot::Acc> start,
                  typename Dot::Acc* out, int64_t out_stride) {
  typedef typename Dot::Acc Acc;
  Acc acc[MR][NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const Acc first = start.first ? load<Acc>(start.first + v) : Acc{};
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) acc[r][v] = first;
  }
  for (int w = 0; w < words; ++w) {
    U32 column[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
      column[v] = load<U32>(b + w * int64_t{kPanelRowBytes} + v * int64_t{sizeof(U32)});
    for (int line = start.from; line < start.to; ++line)
      __builtin_prefetch(start.next + w * int64_t{kPanelRowBytes} + line * 64, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const typename Dot::Word word = Dot::spread(a + r * stride + w * int64_t{kWordBytes});
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = Dot::step(acc[r][v], word, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + r * out_stride + v, acc[r][v]);
}

template <class Dot, int NV>
INLINE void block_rows(int rows, const char* a, int64_t stride, const char* b, int words,
                       Start<typename Dot::Acc> start, typename Dot::Acc* out, int64_t out_stride) {
  switch (rows) {
    case 1: return block<Dot, 1, NV>(a, stride, b, words, start, out, out_stride);
    case 2: return block<Dot, 2, NV>(a, stride, b, words, start, out, out_stride);
    case 3: return block<Dot, 3, NV>(a, stride, b, words, start, out, out_stride);
    case 4: return block<Dot, 4, NV>(a, stride, b, words, start, out, out_stride);
    case 5: return block<Dot, 5, NV>(a, stride, b, words, start, out, out_stride);
    default: return block<Dot, 6, NV>(a, stride, b, words, start, out, out_stride);
  }
}

/// The first `columns` columns of a panel (more may be computed), for up to 6 rows.
template <class Dot>
__attribute__((noinline)) void multiply(int rows, const char* a, int64_t stride, const char* b, int words,
                                        int columns, Start<typename Dot::Acc> start, typename Dot::Acc* out,
                                        int64_t out_stride) {
  const int vectors = (columns + kLanes - 1) / kLanes;
  int v = 0;
  for (; vectors - v > kTileVectors / 2; v += kTileVectors) {
    block_rows<Dot, kTileVectors>(rows, a, stride, b + v * int64_t{sizeof(U32)}, words, start, out + v,
                                  out_stride);
    if (start.first) start.first += kTileVectors;
    start.to = start.from;  // once is enough
  }
  if (v < vectors)
    block_rows<Dot, kTileVectors / 2>(rows, a, stride, b + v * int64_t{sizeof(U32)}, words, start, out + v,
                                      out_stride);
}

// ---- activations ----

/// max(x, 0) - |x| Q(|x|), where Q is the normal tail: a polynomial fitted on [0, c], constant beyond. What
/// it is off by is weighted with |x| from 3 (0.5) on and is small beside Q below, so that small x keep their
/// digits: errors below 1.5e-5 |and 1e-4 x|, and 6e-7 |and 7e-7 x|.
template <bool precise>
INLINE F32 gelu(F32 x) {
  constexpr float c = precise ? 5.5f : 4.5f;
  constexpr float low[] = {0.0122211389f, -0.0713438466f, 0.180923596f,  -0.246457368f, 0.156451643f,
                           0.0372457132f, -0.129077181f,  0.0500025898f, 0.0294686798f, -0.0194349028f};
  constexpr float high[] = {0.00297971582f, -0.0250081979f, 0.0945634842f,  -0.206804305f,
                            0.271789134f,   -0.177163064f,  -0.0506843664f, 0.218165264f,
                            -0.165474176f,  -0.0335356854f, 0.137380496f,   -0.0519714691f,
                            -0.0470546521f, 0.0328606144f,  0.00650030421f, -0.00654311106f};
  const F32 a = min(broadcast(c), abs(x)), s = a * (2 / c) - 1.f;
  F32 p = broadcast(precise ? high[15] : low[9]);
#pragma GCC unroll 15
  for (int i = precise ? 14 : 8; i >= 0; --i) p = p * s + (precise ? high[i] : low[i]);
  return max(F32{}, x) - a * p;
}

INLINE F32 gelu_tanh(F32 x) {
  const F32 u = x * (x * x * 0.044715f + 1.f) * 1.5957691216f;  // 2 sqrt(2 / pi)
  return x / (exp(-u) + 1.f);
}

template <bool precise>
INLINE F32 activate(F32 x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return gelu<precise>(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: return max(F32{}, x);
    default: return x;
  }
}

// ---- linear maps ----

INLINE int words_of(DType dtype, const Matrix& m, int rows) {
  const int group = group_of(dtype);
  const int padded = static_cast<int>(round_up(m.rows, group));
  // int8 reads whole blocks, whose sums are known; the input holds zeros there.
  const int step = dtype == DType::kS8 && m.contracts ? m.block : group;
  const int used = static_cast<int>(round_up(rows, step));
  return (used < padded ? used : padded) / group;
}

template <DType dtype>
struct DotOf {
  typedef DotF32 type;
};
template <>
struct DotOf<DType::kBf16> {
  typedef DotBf16 type;
};
template <>
struct DotOf<DType::kS8> {
  typedef DotS8 type;
};

/// Scales, activation and store of the sums of a tile in one panel, which include the bias (int8: the
/// compensation). Columns from `active` on are stored as zeros.
template <DType dtype, Activation activation, bool bf16>
INLINE void finish(const LinearTask& task, const typename DotOf<dtype>::type::Acc* acc, const Tile& tile,
                   int column, int active) {
  const Matrix& m = *task.matrix;
#pragma GCC unroll 16
  for (int v = 0; v < kPanelVectors; ++v) {
    const int at = column + v * kLanes;
    F32 scale{}, bias{};
    if constexpr (dtype == DType::kS8) {
      scale = load<F32>(m.scale + at);
      bias = load<F32>(m.bias + at);
    }
    const int valid = active - v * kLanes;
    for (int r = 0; r < tile.rows; ++r) {
      F32 value;
      if constexpr (dtype == DType::kS8)
        value = to_float(acc[r * kPanelVectors + v]) * scale * task.input.scale[tile.row + r] + bias;
      else value = acc[r * kPanelVectors + v];
      value = activate<dtype == DType::kF32>(value, activation);
      if (__builtin_expect(valid < kLanes, 0)) {
        float lanes[kLanes];
        store(lanes, value);
        for (int i = valid > 0 ? valid : 0; i < kLanes; ++i) lanes[i] = 0;
        value = load<F32>(lanes);
      }
      const int64_t to = (tile.row + r) * task.out_stride + at;
      if constexpr (bf16) store(task.out_bf16 + to, to_bf16(value));
      else store(task.out_f32 + to, value);
    }
  }
}

template <DType dtype, Activation activation, bool bf16>
void linear_panel(const LinearTask& task, const Tile* tiles, int count, int panel, const char* next) {
  typedef typename DotOf<dtype>::type Dot;
  typedef typename Dot::Acc Acc;
  const Matrix& m = *task.matrix;
  const char* b = m.panels + panel * m.panel_bytes;
  const int column = panel * kPanelColumns;
  Acc acc[kTileRows * kPanelVectors];
  for (int t = 0; t < count; ++t) {
    const Tile& tile = tiles[t];
    const int columns = m.contracts ? m.columns : tile.extent;
    if (columns <= column) continue;
    const int active = columns - column < kPanelColumns ? columns - column : kPanelColumns;
    const int rows = m.contracts ? tile.extent : m.rows;
    const int words = words_of(dtype, m, rows);
    Start<Acc> start{};
    if constexpr (dtype != DType::kS8) start.first = reinterpret_cast<const Acc*>(m.bias + column);
    else if constexpr (!Dot::kCompensates)
      start.first = reinterpret_cast<const Acc*>(
          m.compensation + ((rows + m.block - 1) / m.block - 1) * int64_t{m.padded_columns()} + column);
    share_fetching(start, next, t, count);
    multiply<Dot>(tile.rows, task.input.data + tile.row * task.input.stride, task.input.stride, b, words,
                  active, start, acc, kPanelVectors);
    finish<dtype, activation, bf16>(task, acc, tile, column, active);
  }
}

template <DType dtype, bool bf16>
void linear_of(const LinearTask& task, const Tile* tiles, int count, int panel, const char* next) {
  switch (task.activation) {
    case Activation::kNone:
      return linear_panel<dtype, Activation::kNone, bf16>(task, tiles, count, panel, next);
    case Activation::kGelu:
      return linear_panel<dtype, Activation::kGelu, bf16>(task, tiles, count, panel, next);
    case Activation::kGeluTanh:
      return linear_panel<dtype, Activation::kGeluTanh, bf16>(task, tiles, count, panel, next);
    case Activation::kRelu:
      return linear_panel<dtype, Activation::kRelu, bf16>(task, tiles, count, panel, next);
  }
}

void linear(const LinearTask& task, const Tile* tiles, int count, int panel, const char* next) {
  if (task.dtype == DType::kF32) return linear_of<DType::kF32, false>(task, tiles, count, panel, next);
  if (task.dtype == DType::kBf16) {
    if (task.out_bf16) return linear_of<DType::kBf16, true>(task, tiles, count, panel, next);
    return linear_of<DType::kBf16, false>(task, tiles, count, panel, next);
  }
  if (task.out_bf16) return linear_of<DType::kS8, true>(task, tiles, count, panel, next);
  return linear_of<DType::kS8, false>(task, tiles, count, panel, next);
}

// ---- rows: LayerNorm, quantisation, embeddings ----

// Rows are reduced in four independent sums or maxima: one would wait for itself, 4 cycles a step.
constexpr int kStrands = 4;

/// Of value(i), the vector at column i, over the whole vectors of a row; as integers.
template <class Value>
INLINE I32 largest(int columns, Value value) {
  I32 most[kStrands] = {};
  int i = 0;
  for (; i + kStrands * kLanes <= columns; i += kStrands * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kStrands; ++k) most[k] = max(most[k], value(i + k * kLanes));
  for (; i + kLanes <= columns; i += kLanes) most[0] = max(most[0], value(i));
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

INLINE F32 largest_from(const float* row, int count) {
  F32 most = broadcast(-3.0e38f);
  for (int i = 0; i < count; i += kLanes) most = max(load<F32>(row + i), most);
  return most;
}

template <class Value>
INLINE float total(int columns, Value value) {
  F32 part[kStrands] = {};
  int i = 0;
  for (; i + kStrands * kLanes <= columns; i += kStrands * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kStrands; ++k) part[k] = part[k] + value(i + k * kLanes);
  for (; i + kLanes <= columns; i += kLanes) part[0] = part[0] + value(i);
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

INLINE float as_float(float v) { return v; }
INLINE float as_float(uint16_t v) { return from_bf16(v); }
INLINE F32 load_floats(const float* p) { return load<F32>(p); }
INLINE F32 load_floats(const uint16_t* p) { return from_bf16(load<U16>(p)); }

/// A row to int8 + 128 with one scale; 128 (zero) from `columns` up to `padded`.
template <class T>
INLINE void quantise_row(const T* in, const Operand& out, int row, int columns, int padded) {
  const int whole = columns / kLanes * kLanes;
  // Magnitudes are compared as integers: there NaN is the largest, and is not lost.
  int32_t most =
      maximum<int32_t>(largest(columns, [&](int i) { return bits<I32>(abs(load_floats(in + i))); }));
  for (int j = whole; j < columns; ++j) {
    const int32_t v = bits<int32_t>(__builtin_fabsf(as_float(in[j])));
    most = most > v ? most : v;
  }
  float top = bits<float>(most);
  if (!(top <= 3.0e38f)) top = __builtin_nanf("");  // not finite: so is everything that it scales
  out.scale[row] = top / 127.f;
  const float inverse = top > 0 ? 127.f / top : 0.f;
  uint8_t* to = reinterpret_cast<uint8_t*>(out.data + row * out.stride);
  for (int i = 0; i < whole; i += kLanes)
    store(to + i, __builtin_convertvector(round_to_int(load_floats(in + i) * inverse) + 128, U8));
  for (int i = whole; i < columns; ++i) {
    const float shifted = as_float(in[i]) * inverse + 12582912.f;
    to[i] = static_cast<uint8_t>(bits<int32_t>(shifted) - 0x4b400000 + 128);
  }
  for (int i = columns; i < padded; ++i) to[i] = 128;
}

/// A row of floats as the operand of a product over `columns` values.
INLINE void operand_row(DType dtype, const float* in, const Operand& out, int row, int columns) {
  const int padded = static_cast<int>(round_up(columns, kLanes > 4 ? kLanes : 4));
  if (dtype == DType::kS8) return quantise_row(in, out, row, columns, padded);
  char* to = out.data + row * out.stride;
  int i = 0;
  if (dtype == DType::kBf16) {
    for (; i + kLanes <= columns; i += kLanes) store(to + 2 * i, to_bf16(load<F32>(in + i)));
    for (; i < padded; ++i) store(to + 2 * i, i < columns ? to_bf16(in[i]) : uint16_t{0});
  } else {
    for (; i < padded; ++i) store(to + 4 * i, i < columns ? in[i] : 0.f);
  }
}

/// x = LayerNorm(x) over `columns` values whose sum is known; the variance is of the differences.
INLINE void normalise(float* x, int columns, float all, const Norm& norm, float eps) {
  const int whole = columns / kLanes * kLanes;
  const float mean = all / columns;
  float variance = total(columns, [&](int i) {
    const F32 d = load<F32>(x + i) - mean;
    return d * d;
  });
  for (int j = whole; j < columns; ++j) variance += (x[j] - mean) * (x[j] - mean);
  const float inverse = 1.f / __builtin_sqrtf(variance / columns + eps);
  for (int i = 0; i < whole; i += kLanes)
    store(x + i, (load<F32>(x + i) - mean) * inverse * load<F32>(norm.weight + i) + load<F32>(norm.bias + i));
  for (int i = whole; i < columns; ++i) x[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
}

void residual_norm(const NormTask& task, int begin, int end) {
  const int whole = task.hidden / kLanes * kLanes;
  for (int row = begin; row < end; ++row) {
    float* x = task.x + row * task.stride;
    const float* y = task.y + row * task.stride;
    float all = total(task.hidden, [&](int i) {
      const F32 v = load<F32>(x + i) + load<F32>(y + i);
      store(x + i, v);
      return v;
    });
    for (int i = whole; i < task.hidden; ++i) all += x[i] += y[i];
    normalise(x, task.hidden, all, *task.norm, task.eps);
    if (task.dtype != DType::kF32) operand_row(task.dtype, x, task.out, row, task.hidden);
  }
}

struct TableRow {
  const char* data;
  float scale;  // int8
};

template <DType dtype>
INLINE TableRow table_row(const Table& table, int64_t row, int columns) {
  constexpr int element = 4 / group_of(dtype);
  return {table.data + row * columns * element, dtype == DType::kS8 ? table.scale[row] : 1.f};
}

template <DType dtype>
INLINE F32 vector_at(const TableRow& row, int i) {
  if constexpr (dtype == DType::kF32) return load<F32>(row.data + 4 * i);
  else if constexpr (dtype == DType::kBf16) return from_bf16(load<U16>(row.data + 2 * i));
  else return __builtin_convertvector(load<S8>(row.data + i), F32) * row.scale;
}

template <DType dtype>
INLINE float value_at(const TableRow& row, int i) {
  if constexpr (dtype == DType::kF32) return load<float>(row.data + 4 * i);
  else if constexpr (dtype == DType::kBf16) return from_bf16(load<uint16_t>(row.data + 2 * i));
  else return load<int8_t>(row.data + i) * row.scale;
}

template <DType dtype>
void embed_rows(const EmbedTask& task, int begin, int end) {
  const Model& m = *task.model;
  const int hidden = m.shape.hidden;
  constexpr int element = 4 / group_of(dtype);
  for (int row = begin; row < end; ++row) {
    float* x = task.x + row * task.stride;
    const TableRow word = table_row<dtype>(m.word, task.ids[row], hidden);
    const TableRow type = table_row<dtype>(m.token_type, task.token_types[row], hidden);
    const TableRow position = table_row<dtype>(m.position, task.positions[row], hidden);
    if (row + 1 < end) {  // words lie anywhere in memory
      const char* next = m.word.data + int64_t{task.ids[row + 1]} * hidden * element;
      for (int i = 0; i < hidden * element; i += 64) __builtin_prefetch(next + i);
    }
    float all = total(hidden, [&](int i) {
      const F32 v = vector_at<dtype>(word, i) + vector_at<dtype>(type, i) + vector_at<dtype>(position, i);
      store(x + i, v);
      return v;
    });
    for (int i = hidden / kLanes * kLanes; i < hidden; ++i)
      all += x[i] = value_at<dtype>(word, i) + value_at<dtype>(type, i) + value_at<dtype>(position, i);
    normalise(x, hidden, all, m.embedding_norm, m.shape.eps);
    if (dtype != DType::kF32) operand_row(dtype, x, task.out, row, hidden);
  }
}

void embed(const EmbedTask& task, int begin, int end) {
  switch (task.dtype) {
    case DType::kF32: return embed_rows<DType::kF32>(task, begin, end);
    case DType::kBf16: return embed_rows<DType::kBf16>(task, begin, end);
    case DType::kS8: return embed_rows<DType::kS8>(task, begin, end);
  }
}

void quantise(const uint16_t* in, int64_t in_stride, const Operand& out, int columns, int padded, int begin,
              int end) {
  for (int row = begin; row < end; ++row) quantise_row(in + row * in_stride, out, row, columns, padded);
}

void convert(DType dtype, const float* in, int64_t in_stride, const Operand& out, int columns, int rows) {
  for (int row = 0; row < rows; ++row) operand_row(dtype, in + row * in_stride, out, row, columns);
}

void hyperbolic_tangent(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {  // the buffer is padded to whole vectors
    const F32 a = abs(load<F32>(values + i));
    const F32 e = exp(a * -2.f);
    const U32 sign = bits<U32>(load<F32>(values + i)) & 0x80000000u;
    store(values + i, bits<F32>(bits<U32>((1.f - e) / (e + 1.f)) | sign));
  }
}

// ---- attention of one head of one sequence ----

/// kLanes rows of words in registers to kLanes columns.
INLINE void transpose_words(U32 (&row)[kLanes]) {
  // Butterflies: step s exchanges what lies s apart in row and column.
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    U32 low, high;  // lanes of the lower and the higher row of a pair
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & s ? kLanes + i - s : i;
      high[i] = i & s ? kLanes + i : i + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const U32 a = row[i], b = row[i + s];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

/// `rows` rows of kLanes words, zeros for the rest, to columns.
INLINE void transpose(const char* from, int64_t stride, int rows, char* to) {
  U32 row[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) row[i] = i < rows ? load<U32>(from + i * stride) : U32{};
  transpose_words(row);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * int64_t{kPanelRowBytes}, row[i]);
}

/// K, given as rows of words, as panels: panel p, word j, column c = word j of key 64 p + c. Columns beyond
/// the last key are left as they are: nobody reads the scores there.
INLINE void pack_keys(const char* k, int64_t stride, int keys, int size, int element, char* to) {
  const int words = (size * element + kWordBytes - 1) / kWordBytes;
  const int whole = size * element / kWordBytes / kLanes * kLanes;  // words that squares cover
  for (int p = 0; p * kPanelColumns < keys; ++p) {
    char* panel = to + static_cast<int64_t>(p) * words * kPanelRowBytes;
    const int columns = keys - p * kPanelColumns < kPanelColumns ? keys - p * kPanelColumns : kPanelColumns;
    for (int c = 0; c < columns; c += kLanes) {
      const char* from = k + (p * int64_t{kPanelColumns} + c) * stride;
      char* here = panel + c * kWordBytes;
      const int rows = columns - c < kLanes ? columns - c : kLanes;
      for (int j = 0; j < whole; j += kLanes)
        transpose(from + j * kWordBytes, stride, rows, here + j * int64_t{kPanelRowBytes});
      for (int i = 0; i < rows; ++i)
        for (int j = whole; j < words; ++j) {
          const int left = size * element - j * kWordBytes;
          uint32_t word = 0;
          __builtin_memcpy(&word, from + i * stride + j * kWordBytes, left < kWordBytes ? left : kWordBytes);
          store(here + j * int64_t{kPanelRowBytes} + i * kWordBytes, word);
        }
    }
  }
}

/// V as panels over its columns: panel p, word j, column c = V[group * j + .., 64 p + c].
template <bool bf16>
INLINE void pack_values(const char* v, int64_t stride, int keys, int size, char* to) {
  constexpr int group = bf16 ? 2 : 1;
  const int words = (keys + group - 1) / group;
  for (int p = 0; p * kPanelColumns < size; ++p) {
    const int columns = size - p * kPanelColumns < kPanelColumns ? size - p * kPanelColumns : kPanelColumns;
    for (int j = 0; j < words; ++j) {
      char* row = to + (static_cast<int64_t>(p) * words + j) * kPanelRowBytes;
      const char* from = v + j * group * stride + p * int64_t{kPanelColumns} * (bf16 ? 2 : 4);
      const bool pair = bf16 && j * group + 1 < keys;
      int c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        U32 word;
        if constexpr (bf16) {
          word = __builtin_convertvector(load<U16>(from + 2 * c), U32);
          if (pair) word = word | __builtin_convertvector(load<U16>(from + stride + 2 * c), U32) << 16;
        } else {
          word = load<U32>(from + 4 * c);
        }
        store(row + c * kWordBytes, word);
      }
      for (; c < kPanelColumns; ++c) {
        uint32_t word = 0;
        if (c < columns) {
          __builtin_memcpy(&word, from + c * (bf16 ? 2 : 4), bf16 ? 2 : 4);
          if (pair) word |= static_cast<uint32_t>(load<uint16_t>(from + stride + 2 * c)) << 16;
        }
        store(row + c * kWordBytes, word);
      }
    }
  }
}

/// Scores of one query to probabilities, not yet divided by the sum, which it returns.
template <bool bf16>
INLINE float soften(float* scores, char* out, int keys, float scale) {
  const int padded = static_cast<int>(round_up(keys, kLanes));
  for (int i = keys; i < padded; ++i) scores[i] = -3.0e38f;
  F32 most = broadcast(-3.0e38f);
  for (int i = 0; i < padded; i += kLanes) most = max(most, load<F32>(scores + i));
  const float top = maximum<float>(most) * scale;
  F32 total{};
  for (int i = 0; i < padded; i += kLanes) {
    F32 e = exp_of_negative<!bf16>(load<F32>(scores + i) * scale - top);
    if (i + kLanes > keys) {  // exp does not reach 0
      float lanes[kLanes];
      store(lanes, e);
      for (int j = keys > i ? keys - i : 0; j < kLanes; ++j) lanes[j] = 0;
      e = load<F32>(lanes);
    }
    if constexpr (bf16) {
      const U16 narrow = to_bf16(e);
      store(out + 2 * i, narrow);
      total = total + from_bf16(narrow);  // of what is multiplied, so that the weights sum to 1
    } else {
      store(out + 4 * i, e);
      total = total + e;
    }
  }
  return sum(total);
}

template <bool bf16>
void attend(const AttentionTask& task, int head, int begin, int end, int query_begin, int query_end,
            char* scratch) {
  typedef typename DotOf<bf16 ? DType::kBf16 : DType::kF32>::type Dot;
  constexpr int element = bf16 ? 2 : 4, group = bf16 ? 2 : 1;
  const int d = task.head_size, keys = end - begin;
  const int key_panels = (keys + kPanelColumns - 1) / kPanelColumns;
  const int padded = key_panels * kPanelColumns;
  const int head_words = (d + group - 1) / group, key_words = (keys + group - 1) / group;
  const int value_panels = (d + kPanelColumns - 1) / kPanelColumns;
  const int64_t stride = task.qkv_stride * element;
  const char* qkv = task.qkv + begin * stride + int64_t{head} * 3 * d * element;
  char* k_panels = scratch;
  char* v_panels = k_panels + static_cast<int64_t>(key_panels) * head_words * kPanelRowBytes;
  float* scores =
      reinterpret_cast<float*>(v_panels + static_cast<int64_t>(value_panels) * key_words * kPanelRowBytes);
  char* weights = reinterpret_cast<char*>(scores + kTileRows * padded);
  char* query = weights + kTileRows * padded * element;
  pack_keys(qkv + d * element, stride, keys, d, element, k_panels);
  pack_values<bf16>(qkv + 2 * d * element, stride, keys, d, v_panels);
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(d));
  typename Dot::Acc acc[kTileRows * kPanelVectors];
  for (int q = query_begin; q < query_end; q += kTileRows) {
    const int rows = query_end - q < kTileRows ? query_end - q : kTileRows;
    const char* from = qkv + q * stride;
    int64_t from_stride = stride;
    if (d % group) {  // the last word of a query would reach into its key
      from_stride = head_words * int64_t{kWordBytes};
      __builtin_memset(query, 0, rows * from_stride);
      for (int r = 0; r < rows; ++r)
        __builtin_memcpy(query + r * from_stride, from + r * stride, d * element);
      from = query;
    }
    for (int p = 0; p < key_panels; ++p) {
      const int columns = keys - p * kPanelColumns < kPanelColumns ? keys - p * kPanelColumns : kPanelColumns;
      multiply<Dot>(rows, from, from_stride, k_panels + static_cast<int64_t>(p) * head_words * kPanelRowBytes,
                    head_words, columns, Start<F32>{}, reinterpret_cast<F32*>(scores + p * kPanelColumns),
                    padded / kLanes);
    }
    float inverse[kTileRows];
    for (int r = 0; r < rows; ++r)
      inverse[r] =
          1.f / soften<bf16>(scores + r * padded, weights + r * padded * int64_t{element}, keys, scale);
    for (int p = 0; p < value_panels; ++p) {
      const int columns = d - p * kPanelColumns < kPanelColumns ? d - p * kPanelColumns : kPanelColumns;
      multiply<Dot>(rows, weights, padded * int64_t{element},
                    v_panels + static_cast<int64_t>(p) * key_words * kPanelRowBytes, key_words, columns,
                    Start<F32>{}, acc, kPanelVectors);
      for (int r = 0; r < rows; ++r) {
        char* to = task.context +
                   ((begin + q + r) * task.context_stride + head * int64_t{d} + p * kPanelColumns) * element;
        const float* value = reinterpret_cast<const float*>(acc + r * kPanelVectors);
        int c = 0;
        for (; c + kLanes <= columns; c += kLanes) {
          const F32 out = load<F32>(value + c) * inverse[r];
          if constexpr (bf16) store(to + 2 * c, to_bf16(out));
          else store(to + 4 * c, out);
        }
        for (; c < columns; ++c) {
          if constexpr (bf16) store(to + 2 * c, to_bf16(value[c] * inverse[r]));
          else store(to + 4 * c, value[c] * inverse[r]);
        }
      }
    }
  }
}

void attention(const AttentionTask& task, int head, int begin, int end, int query_begin, int query_end,
               char* scratch) {
  if (task.bf16) attend<true>(task, head, begin, end, query_begin, query_end, scratch);
  else attend<false>(task, head, begin, end, query_begin, query_end, scratch);
}

#include "products.inl"

#include "attention.inl"

#include "norms.inl"

#include "losses.inl"

// ---- the peak of the register block ----

template <class Dot>
int64_t peak_of(int64_t repeats, int group) {
  constexpr int words = 48;  // B: 12 KiB, A: 1 KiB: both in L1
  alignas(64) static const char a[kTileRows * words * kWordBytes] = {};
  alignas(64) static const char b[words * kPanelRowBytes] = {};
  typename Dot::Acc acc[kTileRows * kPanelVectors];
  for (int64_t i = 0; i < repeats; ++i) {
    multiply<Dot>(kTileRows, a, words * kWordBytes, b, words, kPanelColumns, Start<typename Dot::Acc>{}, acc,
                  kPanelVectors);
    __asm__ volatile("" : : "r"(acc) : "memory");
  }
  return repeats * 2 * kTileRows * kPanelColumns * words * group;
}

int64_t peak(DType dtype, int64_t repeats) {
  switch (dtype) {
    case DType::kF32: return peak_of<DotF32>(repeats, 1);
    case DType::kBf16: return peak_of<DotBf16>(repeats, 2);
    default: return peak_of<DotS8>(repeats, 4);
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {ISA_NAME,
                                linear,
                                residual_norm,
                                embed,
                                quantise,
                                attention,
                                convert,
                                hyperbolic_tangent,
                                peak,
                                panel_from_rows,
                                panel_from_columns,
                                rows_from_columns,
                                product,
                                slope,
                                add_rows,
                                attention_op,
                                norm_op,
                                norm_backward_op,
                                narrow,
                                scatter,
                                loss,
                                loss_backward};
  return table;
}

}  // namespace ISA
}  // namespace dynabert
