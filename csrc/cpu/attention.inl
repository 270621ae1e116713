// Attention of the ops: forward with the row-wise log-sum-exp, and backward, for one head of one sequence.
// Included by kernels.inl inside the anonymous namespace of one instruction set.

// ---- dropout: reference.keep_mask, a function of (seed, row, column) ----

INLINE U32 mix(U32 h) {  // C. Wellons' lowbias32
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

INLINE uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

/// The mask of one row; `columns` are counted from a first one.
struct KeepRow {
  uint32_t row, high, threshold;
  bool on;

  KeepRow(const Dropout& dropout, int64_t at)
      : row(mix(static_cast<uint32_t>(at) ^ mix_low(dropout.seed))),
        high(static_cast<uint32_t>(dropout.seed >> 32)),
        threshold(dropout.threshold),
        on(dropout.scale != 1.f) {}

  static uint32_t mix_low(uint64_t seed) {
    return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32)));
  }

  /// `value` where columns first + lane are kept, zero elsewhere.
  F32 keep(F32 value, uint32_t first) const {
    U32 column;
    for (int i = 0; i < kLanes; ++i) column[i] = static_cast<uint32_t>(i);
    const U32 hash = mix(((column + first) * 0x9e3779b9u + high) ^ row);
    return hash >= (U32{} | threshold) ? value : F32{};
  }
};

// ---- one head of one sequence ----

template <bool bf16>
struct HeadViews {
  static constexpr int element = bf16 ? 2 : 4, group = bf16 ? 2 : 1;
  typedef typename DotOf<bf16 ? DType::kBf16 : DType::kF32>::type Dot;
};

/// Rows of `d` values, contiguous words; copied (with zeros) where the last word is not whole.
template <bool bf16>
INLINE const char* whole_words(const char* from, int64_t& stride, int rows, int d, char* copy) {
  constexpr int element = bf16 ? 2 : 4, group = bf16 ? 2 : 1;
  if (d % group == 0) return from;
  const int64_t packed = (d + group - 1) / group * int64_t{kWordBytes};
  __builtin_memset(copy, 0, rows * packed);
  for (int r = 0; r < rows; ++r) __builtin_memcpy(copy + r * packed, from + r * stride, d * element);
  stride = packed;
  return copy;
}

template <bool bf16>
void attend_op(const AttentionOp& task, int head, int begin, int end, int64_t mask_row, char* scratch) {
  typedef typename HeadViews<bf16>::Dot Dot;
  constexpr int element = HeadViews<bf16>::element, group = HeadViews<bf16>::group;
  constexpr DType dtype = bf16 ? DType::kBf16 : DType::kF32;
  const int d = task.head_size, keys = end - begin;
  const int key_panels = (keys + kPanelColumns - 1) / kPanelColumns, padded = key_panels * kPanelColumns;
  const int head_words = (d + group - 1) / group, key_words = (keys + group - 1) / group;
  const int value_panels = (d + kPanelColumns - 1) / kPanelColumns;
  const int64_t stride = task.qkv.stride * element;
  const char* qkv = task.qkv.data + begin * stride + int64_t{head} * 3 * d * element;
  char* k_panels = scratch;
  char* v_panels = k_panels + static_cast<int64_t>(key_panels) * head_words * kPanelRowBytes;
  float* scores =
      reinterpret_cast<float*>(v_panels + static_cast<int64_t>(value_panels) * key_words * kPanelRowBytes);
  char* weights = reinterpret_cast<char*>(scores + kTileRows * padded);
  char* query = weights + kTileRows * padded * element;
  pack_keys(qkv + d * element, stride, keys, d, element, k_panels);
  pack_values<bf16>(qkv + 2 * d * element, stride, keys, d, v_panels);
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(d));
  F32 acc[kTileRows * kPanelVectors];
  for (int q = 0; q < keys; q += kTileRows) {
    const int rows = keys - q < kTileRows ? keys - q : kTileRows;
    int64_t from_stride = stride;
    const char* from = whole_words<bf16>(qkv + q * stride, from_stride, rows, d, query);
    for (int p = 0; p < key_panels; ++p) {
      const int columns = keys - p * kPanelColumns < kPanelColumns ? keys - p * kPanelColumns : kPanelColumns;
      multiply<Dot>(rows, from, from_stride, k_panels + static_cast<int64_t>(p) * head_words * kPanelRowBytes,
                    head_words, columns, Start<F32>{}, reinterpret_cast<F32*>(scores + p * kPanelColumns),
                    padded / kLanes);
    }
    float inverse[kTileRows];
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * padded;
      for (int i = keys; i < padded; ++i) row[i] = -3.0e38f;
      const float top = maximum<float>(largest_from(row, padded)) * scale;
      F32 sums{};
      const KeepRow mask(task.dropout, mask_row + q + r);
      for (int i = 0; i < padded; i += kLanes) {
        F32 e = exp_of_negative<!bf16>(load<F32>(row + i) * scale - top);
        if (i + kLanes > keys) {
          float lanes[kLanes];
          store(lanes, e);
          for (int j = keys > i ? keys - i : 0; j < kLanes; ++j) lanes[j] = 0;
          e = load<F32>(lanes);
        }
        sums = sums + e;
        if (mask.on) e = mask.keep(e, static_cast<uint32_t>(head) * 65536u + static_cast<uint32_t>(i));
        store_values<dtype>(weights + (r * padded + i) * element, e, kLanes);
      }
      const float all = sum(sums);
      inverse[r] = task.dropout.scale / all;
      task.lse[(begin + q + r) * task.lse_stride + head] = top + __builtin_logf(all);
    }
    for (int p = 0; p < value_panels; ++p) {
      const int columns = d - p * kPanelColumns < kPanelColumns ? d - p * kPanelColumns : kPanelColumns;
      multiply<Dot>(rows, weights, padded * int64_t{element},
                    v_panels + static_cast<int64_t>(p) * key_words * kPanelRowBytes, key_words, columns,
                    Start<F32>{}, acc, kPanelVectors);
      for (int r = 0; r < rows; ++r) {
        char* to = task.out.data +
                   ((begin + q + r) * task.out.stride + head * int64_t{d} + p * kPanelColumns) * element;
        for (int c = 0; c < columns; c += kLanes)
          store_values<dtype>(to + c * element, acc[r * kPanelVectors + c / kLanes] * inverse[r],
                              columns - c);
      }
    }
  }
}

/// Adds A^T B to float32 sums [A's columns, 64 a panel]: a product whose rows are words of `at`.
template <class Dot>
INLINE void accumulate(int count, const char* at, int64_t at_stride, const char* panels, int words, int d,
                       float* sums, int64_t sums_stride) {
  F32 acc[kTileRows * kPanelVectors];
  for (int p = 0; p * kPanelColumns < d; ++p) {
    const int columns = d - p * kPanelColumns < kPanelColumns ? d - p * kPanelColumns : kPanelColumns;
    for (int k = 0; k < count; k += kTileRows) {
      const int rows = count - k < kTileRows ? count - k : kTileRows;
      multiply<Dot>(rows, at + k * at_stride, at_stride,
                    panels + static_cast<int64_t>(p) * words * kPanelRowBytes, words, columns, Start<F32>{},
                    acc, kPanelVectors);
      for (int r = 0; r < rows; ++r) {
        float* to = sums + (k + r) * sums_stride + p * kPanelColumns;
        for (int c = 0; c < columns; c += kLanes)
          store(to + c, load<F32>(to + c) + acc[r * kPanelVectors + c / kLanes]);
      }
    }
  }
}

template <bool bf16>
void attend_backward(const AttentionOp& task, int head, int begin, int end, int64_t mask_row, char* scratch) {
  typedef typename HeadViews<bf16>::Dot Dot;
  constexpr int element = HeadViews<bf16>::element, group = HeadViews<bf16>::group;
  constexpr DType dtype = bf16 ? DType::kBf16 : DType::kF32;
  const int d = task.head_size, keys = end - begin;
  const int key_panels = (keys + kPanelColumns - 1) / kPanelColumns, padded = key_panels * kPanelColumns;
  const int head_words = (d + group - 1) / group, key_words = (keys + group - 1) / group;
  const int head_panels = (d + kPanelColumns - 1) / kPanelColumns, wide = head_panels * kPanelColumns;
  const int64_t stride = task.qkv.stride * element;
  const char* qkv = task.qkv.data + begin * stride + int64_t{head} * 3 * d * element;
  const int64_t grad_stride = task.grad.stride * element, out_stride = task.out.stride * element;
  const char* grad = task.grad.data + begin * grad_stride + int64_t{head} * d * element;
  const char* out = task.out.data + begin * out_stride + int64_t{head} * d * element;
  char* at = scratch;
  auto take = [&](int64_t bytes) {
    char* here = at;
    at += round_up(bytes, 64);
    return here;
  };
  const int block = kQueryBlock, block_words = block / group;
  char* k_columns = take(static_cast<int64_t>(key_panels) * head_words * kPanelRowBytes);    // for Q K^T
  char* v_columns = take(static_cast<int64_t>(key_panels) * head_words * kPanelRowBytes);    // for dO V^T
  char* k_rows = take(static_cast<int64_t>(head_panels) * key_words * kPanelRowBytes);       // for dS K
  char* q_rows = take(static_cast<int64_t>(head_panels) * block_words * kPanelRowBytes);     // for dS^T Q
  char* grad_rows = take(static_cast<int64_t>(head_panels) * block_words * kPanelRowBytes);  // for P^T dO
  char* weights = take(int64_t{block} * padded * element);                                   // P, dropped out
  char* slopes = take(int64_t{block} * padded * element);                                    // dS
  char* flipped = take(int64_t{padded} * block * element);  // their transposes, one after the other
  float* scores = reinterpret_cast<float*>(take(int64_t{kTileRows} * padded * 4));
  float* changes = reinterpret_cast<float*>(take(int64_t{kTileRows} * padded * 4));
  float* grad_k = reinterpret_cast<float*>(take(int64_t{padded} * wide * 4));
  float* grad_v = reinterpret_cast<float*>(take(int64_t{padded} * wide * 4));
  char* query = take(kTileRows * head_words * int64_t{kWordBytes});
  char* change = take(kTileRows * head_words * int64_t{kWordBytes});
  pack_keys(qkv + d * element, stride, keys, d, element, k_columns);
  pack_keys(qkv + 2 * d * element, stride, keys, d, element, v_columns);
  pack_values<bf16>(qkv + d * element, stride, keys, d, k_rows);
  __builtin_memset(grad_k, 0, int64_t{keys} * wide * 4);
  __builtin_memset(grad_v, 0, int64_t{keys} * wide * 4);
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(d));
  const int64_t target_stride = task.grad_qkv.stride * element;
  char* target = task.grad_qkv.data + begin * target_stride + int64_t{head} * 3 * d * element;
  F32 acc[kTileRows * kPanelVectors];
  for (int first = 0; first < keys; first += block) {
    const int here = keys - first < block ? keys - first : block;
    const int words = (here + group - 1) / group;
    for (int q = first; q < first + here; q += kTileRows) {
      const int rows = first + here - q < kTileRows ? first + here - q : kTileRows;
      int64_t q_stride = stride, g_stride = grad_stride;
      const char* q_from = whole_words<bf16>(qkv + q * stride, q_stride, rows, d, query);
      const char* g_from = whole_words<bf16>(grad + q * grad_stride, g_stride, rows, d, change);
      for (int p = 0; p < key_panels; ++p) {
        const int columns =
            keys - p * kPanelColumns < kPanelColumns ? keys - p * kPanelColumns : kPanelColumns;
        const int64_t panel = static_cast<int64_t>(p) * head_words * kPanelRowBytes;
        multiply<Dot>(rows, q_from, q_stride, k_columns + panel, head_words, columns, Start<F32>{},
                      reinterpret_cast<F32*>(scores + p * kPanelColumns), padded / kLanes);
        multiply<Dot>(rows, g_from, g_stride, v_columns + panel, head_words, columns, Start<F32>{},
                      reinterpret_cast<F32*>(changes + p * kPanelColumns), padded / kLanes);
      }
      for (int r = 0; r < rows; ++r) {
        const float lse = task.lse[(begin + q + r) * task.lse_stride + head];
        float delta = 0;  // dO . O
        F32 products{};
        for (int c = 0; c < d; c += kLanes)
          products = products + load_values<dtype>(grad + (q + r) * grad_stride + c * element, d - c) *
                                    load_values<dtype>(out + (q + r) * out_stride + c * element, d - c);
        delta = sum(products);
        const KeepRow mask(task.dropout, mask_row + q + r);
        const int64_t row = (q - first + r) * int64_t{padded};
        for (int i = 0; i < padded; i += kLanes) {
          F32 p = exp_of_negative<true>(min(F32{}, load<F32>(scores + r * padded + i) * scale - lse));
          F32 change_p = load<F32>(changes + r * padded + i);
          if (i + kLanes > keys) {  // what lies there is not initialised
            float lanes[2][kLanes];
            store(lanes[0], p);
            store(lanes[1], change_p);
            for (int j = keys > i ? keys - i : 0; j < kLanes; ++j) lanes[0][j] = lanes[1][j] = 0;
            p = load<F32>(lanes[0]);
            change_p = load<F32>(lanes[1]);
          }
          F32 kept = p;
          if (mask.on) {
            const uint32_t column = static_cast<uint32_t>(head) * 65536u + static_cast<uint32_t>(i);
            kept = mask.keep(p, column) * task.dropout.scale;
            change_p = mask.keep(change_p, column) * task.dropout.scale;
          }
          store_values<dtype>(weights + (row + i) * element, kept, kLanes);
          store_values<dtype>(slopes + (row + i) * element, p * (change_p - delta) * scale, kLanes);
        }
      }
      // dQ = dS K
      for (int p = 0; p < head_panels; ++p) {
        const int columns = d - p * kPanelColumns < kPanelColumns ? d - p * kPanelColumns : kPanelColumns;
        multiply<Dot>(rows, slopes + (q - first) * int64_t{padded} * element, padded * int64_t{element},
                      k_rows + static_cast<int64_t>(p) * key_words * kPanelRowBytes, key_words, columns,
                      Start<F32>{}, acc, kPanelVectors);
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < columns; c += kLanes)
            store_values<dtype>(target + (q + r) * target_stride + (p * kPanelColumns + c) * element,
                                acc[r * kPanelVectors + c / kLanes], columns - c);
      }
    }
    // dK += dS^T Q, dV += P^T dO over this block of queries
    const int64_t flipped_stride = words * int64_t{kWordBytes};
    pack_values<bf16>(qkv + first * stride, stride, here, d, q_rows);
    rows_from_columns_of<bf16>(slopes, padded * int64_t{element}, here, keys, flipped, flipped_stride);
    accumulate<Dot>(keys, flipped, flipped_stride, q_rows, words, d, grad_k, wide);
    pack_values<bf16>(grad + first * grad_stride, grad_stride, here, d, grad_rows);
    rows_from_columns_of<bf16>(weights, padded * int64_t{element}, here, keys, flipped, flipped_stride);
    accumulate<Dot>(keys, flipped, flipped_stride, grad_rows, words, d, grad_v, wide);
  }
  for (int k = 0; k < keys; ++k)
    for (int c = 0; c < d; c += kLanes) {
      char* to = target + k * target_stride + (d + c) * element;
      store_values<dtype>(to, load<F32>(grad_k + k * int64_t{wide} + c), d - c);
      store_values<dtype>(to + d * element, load<F32>(grad_v + k * int64_t{wide} + c), d - c);
    }
}

void attention_op(const AttentionOp& task, int head, int begin, int end, int64_t mask_row, char* scratch) {
  const bool bf16 = task.dtype == DType::kBf16;
  if (task.grad.data) {
    if (bf16) attend_backward<true>(task, head, begin, end, mask_row, scratch);
    else attend_backward<false>(task, head, begin, end, mask_row, scratch);
  } else {
    if (bf16) attend_op<true>(task, head, begin, end, mask_row, scratch);
    else attend_op<false>(task, head, begin, end, mask_row, scratch);
  }
}
