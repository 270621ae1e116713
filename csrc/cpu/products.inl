// Kernels of the ops on ordinary tensors: panels packed on the fly, products, their epilogues.
// Included by kernels.inl inside the anonymous namespace of one instruction set.

/// Word w of kLanes columns from `column`: elements group * w .. of K, where rows of the source are K.
template <bool bf16>
INLINE U32 words_at(const char* from, int64_t stride, int k, int count, int column, int columns) {
  constexpr int element = bf16 ? 2 : 4;
  const char* first = from + k * stride + column * int64_t{element};
  const bool pair = bf16 && k + 1 < count;
  if (column + kLanes <= columns) {
    if constexpr (!bf16) return load<U32>(first);
    U32 word = __builtin_convertvector(load<U16>(first), U32);
    if (pair) word = word | __builtin_convertvector(load<U16>(first + stride), U32) << 16;
    return word;
  }
  uint32_t words[kLanes] = {};
  for (int i = 0; column + i < columns; ++i) {
    __builtin_memcpy(words + i, first + i * element, element);
    if (pair) words[i] |= static_cast<uint32_t>(load<uint16_t>(first + stride + i * element)) << 16;
  }
  return load<U32>(words);
}

/// One panel from `count` rows along K of `columns` <= 64 adjacent values each.
void panel_from_rows(DType dtype, const char* from, int64_t stride, int count, int columns, char* to) {
  const int group = group_of(dtype);
  for (int k = 0; k < count; k += group)
    for (int c = 0; c < kPanelColumns; c += kLanes) {
      const U32 word = dtype == DType::kBf16 ? words_at<true>(from, stride, k, count, c, columns)
                                             : words_at<false>(from, stride, k, count, c, columns);
      store(to + k / group * int64_t{kPanelRowBytes} + c * kWordBytes, word);
    }
}

/// One panel from `columns` <= 64 rows of `count` values along K each.
void panel_from_columns(DType dtype, const char* from, int64_t stride, int count, int columns, char* to) {
  pack_keys(from, stride, columns, count, dtype == DType::kBf16 ? 2 : 4, to);
}

/// The transpose of `count` rows of `columns` values, as rows of words along `count`.
template <bool bf16>
void rows_from_columns_of(const char* from, int64_t stride, int count, int columns, char* to,
                          int64_t to_stride) {
  constexpr int group = bf16 ? 2 : 1;
  const int words = (count + group - 1) / group;
  for (int c = 0; c < columns; c += kLanes)
    for (int w = 0; w < words; w += kLanes) {
      U32 square[kLanes];
      if (c + kLanes <= columns && (w + kLanes) * group <= count) {
        const char* first = from + w * group * stride + c * int64_t{bf16 ? 2 : 4};
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i, first += group * stride) {
          if constexpr (bf16)
            square[i] = __builtin_convertvector(load<U16>(first), U32) |
                        __builtin_convertvector(load<U16>(first + stride), U32) << 16;
          else square[i] = load<U32>(first);
        }
        transpose_words(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + w * int64_t{kWordBytes}, square[i]);
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        square[i] = w + i < words ? words_at<bf16>(from, stride, (w + i) * group, count, c, columns) : U32{};
      transpose_words(square);
      const int left = words - w < kLanes ? words - w : kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (c + i >= columns) break;
        char* target = to + (c + i) * to_stride + w * int64_t{kWordBytes};
        if (left == kLanes) store(target, square[i]);
        else __builtin_memcpy(target, &square[i], left * kWordBytes);
      }
    }
}

void rows_from_columns(DType dtype, const char* from, int64_t stride, int count, int columns, char* to,
                       int64_t to_stride) {
  if (dtype == DType::kBf16) rows_from_columns_of<true>(from, stride, count, columns, to, to_stride);
  else rows_from_columns_of<false>(from, stride, count, columns, to, to_stride);
}

template <DType dtype>
INLINE void store_values(void* to, F32 value, int count) {
  if constexpr (dtype == DType::kBf16) {
    const U16 narrow = to_bf16(value);
    if (count >= kLanes) store(to, narrow);
    else __builtin_memcpy(to, &narrow, 2 * count);
  } else {
    if (count >= kLanes) store(to, value);
    else __builtin_memcpy(to, &value, 4 * count);
  }
}

template <DType dtype>
INLINE F32 load_values(const void* from, int count) {
  if constexpr (dtype == DType::kBf16) {
    if (count >= kLanes) return from_bf16(load<U16>(from));
    U16 narrow{};
    __builtin_memcpy(&narrow, from, 2 * count);
    return from_bf16(narrow);
  } else {
    if (count >= kLanes) return load<F32>(from);
    F32 value{};
    __builtin_memcpy(&value, from, 4 * count);
    return value;
  }
}

template <DType dtype, Activation activation>
void product_of(const ProductTask& task, const ProductTile* tiles, int count) {
  typedef typename DotOf<dtype>::type Dot;
  constexpr int element = 4 / group_of(dtype);
  F32 acc[kTileRows * kPanelVectors];
  for (int t = 0; t < count; ++t) {
    const ProductTile& tile = tiles[t];
    const int left = tile.columns - task.column;
    const int active = left < kPanelColumns ? left : kPanelColumns;
    if (active <= 0) continue;
    Start<F32> start{reinterpret_cast<const F32*>(task.bias), nullptr};
    share_fetching(start, task.next, t, count);
    multiply<Dot>(tile.rows, task.a + tile.row * task.a_stride, task.a_stride, task.panel, tile.words, active,
                  start, acc, kPanelVectors);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + tile.shift + r;
#pragma GCC unroll 16
      for (int v = 0; v < kPanelVectors; ++v) {
        const int here = active - v * kLanes;
        if (here <= 0) break;
        const int64_t at = task.column + v * kLanes;
        F32 value = acc[r * kPanelVectors + v];
        if (task.sums) {
          float* sum = task.sums + row * task.sums_stride + at;
          if (task.add) value = value + load_values<DType::kF32>(sum, here);
          store_values<DType::kF32>(sum, value, here);
          continue;
        }
        if (activation != Activation::kNone && task.pre)
          store_values<dtype>(task.pre + (row * task.pre_stride + at) * element, value, here);
        value = activate<dtype == DType::kF32>(value, activation);
        store_values<dtype>(task.out + (row * task.out_stride + at) * element, value, here);
      }
    }
  }
}

template <DType dtype>
void product_in(const ProductTask& task, const ProductTile* tiles, int count) {
  switch (task.activation) {
    case Activation::kNone: return product_of<dtype, Activation::kNone>(task, tiles, count);
    case Activation::kGelu: return product_of<dtype, Activation::kGelu>(task, tiles, count);
    case Activation::kGeluTanh: return product_of<dtype, Activation::kGeluTanh>(task, tiles, count);
    case Activation::kRelu: return product_of<dtype, Activation::kRelu>(task, tiles, count);
  }
}

void product(const ProductTask& task, const ProductTile* tiles, int count) {
  if (task.dtype == DType::kBf16) product_in<DType::kBf16>(task, tiles, count);
  else product_in<DType::kF32>(task, tiles, count);
}

// ---- the activations' gradients ----

/// d gelu = Phi(x) + x phi(x). bf16: h'(|x|), fitted like gelu's h; the error is below 1.2e-5. float32: the
/// normal tail is phi's exponential times a polynomial in 1 / (1 + 0.3 |x|), fitted to 1e-9.
template <bool precise>
INLINE F32 gelu_slope(F32 x) {
  if constexpr (precise) {
    const F32 a = min(broadcast(13.f), abs(x));
    const F32 bell = exp(a * a * -0.5f), t = 1.f / (a * 0.3f + 1.f);
    constexpr float tail[] = {-0.000837752188f, 0.130049601f,   0.0646851808f, 0.270189732f, -0.190356091f,
                              0.323243767f,     -0.0680263937f, -0.044766821f, 0.0158188101f};
    F32 p = broadcast(tail[8]);
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) p = p * t + tail[i];
    const F32 below = bell * (p - a * 0.398942280f);  // Q(a) - a phi(a)
    return x > F32{} ? 1.f - below : below;
  }
  const F32 s = min(broadcast(5.f), abs(x)) * 0.4f - 1.f;
  constexpr float low[] = {-0.0376052484f, 0.186095968f,  -0.308667481f, -0.0268842485f, 0.842038691f,
                           -1.1840688f,    0.197024807f,  1.12118042f,   -0.864165485f,  -0.388688654f,
                           0.539521515f,   0.0423499681f, -0.118150353f};
  F32 p = broadcast(low[12]);
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) p = p * s + low[i];
  return x > F32{} ? 1.f - p : p;
}

INLINE F32 gelu_tanh_slope(F32 input) {
  const F32 x = min(broadcast(20.f), max(broadcast(-20.f), input));  // 0 or 1 beyond; squares overflow
  const F32 square = x * x;
  const F32 u = x * (square * 0.044715f + 1.f) * 1.5957691216f;
  const F32 e = exp(-max(broadcast(-80.f), u));
  const F32 g = 1.f / (e + 1.f);  // gelu_tanh = x g, and 1 - g = e g without cancellation
  return g + x * g * (e * g) * (square * 0.134145f + 1.f) * 1.5957691216f;
}

template <DType dtype>
void slope_rows(const SlopeTask& task, int begin, int end) {
  constexpr int element = 4 / group_of(dtype);
  for (int row = begin; row < end; ++row) {
    const char* grad = task.grad + row * task.grad_stride * element;
    const char* pre = task.pre + row * task.pre_stride * element;
    char* out = task.out + row * task.out_stride * element;
    for (int i = 0; i < task.columns; i += kLanes) {
      const int left = task.columns - i;
      const F32 x = load_values<dtype>(pre + i * element, left);
      F32 slope;
      if (task.activation == Activation::kGelu) slope = gelu_slope<dtype == DType::kF32>(x);
      else if (task.activation == Activation::kGeluTanh) slope = gelu_tanh_slope(x);
      else slope = x > F32{} ? broadcast(1.f) : F32{};
      store_values<dtype>(out + i * element, load_values<dtype>(grad + i * element, left) * slope, left);
    }
  }
}

void slope(const SlopeTask& task, int begin, int end) {
  if (task.dtype == DType::kBf16) slope_rows<DType::kBf16>(task, begin, end);
  else slope_rows<DType::kF32>(task, begin, end);
}

/// Adds `rows` rows of up to 64 columns to float32 sums: sums of 64 rows, then of those, so that the error
/// grows with the rows' number much slower than in one long sum.
void add_rows(DType dtype, const char* from, int64_t stride, int rows, int columns, float* sums) {
  constexpr int kRun = 64;
  const int element = dtype == DType::kBf16 ? 2 : 4;
  for (int c = 0; c < columns; c += kLanes) {
    const int left = columns - c;
    F32 all{};
    for (int first = 0; first < rows; first += kRun) {
      const int end = rows - first < kRun ? rows : first + kRun;
      F32 part[kStrands] = {};
      for (int r = first; r < end; ++r) {
        const char* at = from + r * stride + c * element;
        part[r % kStrands] =
            part[r % kStrands] + (dtype == DType::kBf16 ? load_values<DType::kBf16>(at, left)
                                                        : load_values<DType::kF32>(at, left));
      }
      all = all + ((part[0] + part[1]) + (part[2] + part[3]));
    }
    store_values<DType::kF32>(sums + c, load_values<DType::kF32>(sums + c, left) + all, left);
  }
}
