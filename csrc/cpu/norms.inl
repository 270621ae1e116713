// Kernels of residual_norm and embed on ordinary tensors, forward and backward.
// Included by kernels.inl inside the anonymous namespace of one instruction set.

/// What LayerNorm's passes share: z as float32 in `row`, its mean and 1/std.
template <DType dtype>
INLINE void norm_row(const NormOp& task, float* row, int at) {
  constexpr int element = 4 / group_of(dtype);
  const int hidden = task.hidden;
  float mean = 0, variance = 0;
  F32 all{};
  for (int i = 0; i < hidden; i += kLanes) all = all + load_values<DType::kF32>(row + i, hidden - i);
  mean = sum(all) / static_cast<float>(hidden);
  all = F32{};
  for (int i = 0; i < hidden; i += kLanes) {
    F32 d = load_values<DType::kF32>(row + i, hidden - i) - mean;
    if (hidden - i < kLanes)  // beyond the end, 0 - mean would count
      for (int j = hidden - i; j < kLanes; ++j) d[j] = 0;
    all = all + d * d;
  }
  variance = sum(all) / static_cast<float>(hidden);
  const float rstd = 1.f / __builtin_sqrtf(variance + task.eps);
  task.mean[at] = mean;
  task.rstd[at] = rstd;
  const KeepRow mask(task.dropout, at);
  for (int i = 0; i < hidden; i += kLanes) {
    const int left = hidden - i;
    F32 y = (load_values<DType::kF32>(row + i, left) - mean) * rstd *
                load_values<dtype>(task.weight + i * element, left) +
            load_values<dtype>(task.bias + i * element, left);
    if (task.embeds && mask.on) y = mask.keep(y, static_cast<uint32_t>(i)) * task.dropout.scale;
    store_values<dtype>(task.out.data + (at * task.out.stride + i) * element, y, left);
  }
}

template <DType dtype>
void norm_rows(const NormOp& task, int begin, int end, float* row) {
  constexpr int element = 4 / group_of(dtype);
  for (int at = begin; at < end; ++at) {
    const KeepRow mask(task.dropout, at);
    char* z = task.z.data + at * task.z.stride * element;
    for (int i = 0; i < task.hidden; i += kLanes) {
      const int left = task.hidden - i;
      F32 value;
      if (task.embeds) {
        value = F32{};
        for (int table = 0; table < 3; ++table)
          value =
              value + load_values<dtype>(task.tables[table].data +
                                             (task.ids[table][at] * task.tables[table].stride + i) * element,
                                         left);
      } else {
        value = load_values<dtype>(task.x.data + (at * task.x.stride + i) * element, left);
        if (mask.on) value = mask.keep(value, static_cast<uint32_t>(i)) * task.dropout.scale;
        value =
            value + load_values<dtype>(task.residual.data + (at * task.residual.stride + i) * element, left);
      }
      store_values<dtype>(z + i * element, value, left);
      // What is saved is what is normalised.
      store_values<DType::kF32>(row + i, load_values<dtype>(z + i * element, left), left);
    }
    norm_row<dtype>(task, row, at);
  }
}

void norm_op(const NormOp& task, int begin, int end, float* row) {
  if (task.dtype == DType::kBf16) norm_rows<DType::kBf16>(task, begin, end, row);
  else norm_rows<DType::kF32>(task, begin, end, row);
}

template <DType dtype>
void norm_backward_rows(const NormOp& task, int begin, int end, float* grad_weight, float* grad_bias) {
  constexpr int element = 4 / group_of(dtype);
  const int hidden = task.hidden;
  for (int at = begin; at < end; ++at) {
    const KeepRow mask(task.dropout, at);
    const char* grad = task.out.data + at * task.out.stride * element;
    const char* z = task.z.data + at * task.z.stride * element;
    const float mean = task.mean[at], rstd = task.rstd[at];
    auto gradient = [&](int i, int left) {
      F32 g = load_values<dtype>(grad + i * element, left);
      if (task.embeds && mask.on) g = mask.keep(g, static_cast<uint32_t>(i)) * task.dropout.scale;
      return g;
    };
    F32 plain{}, scaled{};  // sums of g w and of g w x^
    for (int i = 0; i < hidden; i += kLanes) {
      const int left = hidden - i;
      const F32 g = gradient(i, left);  // zero beyond the end
      const F32 normal = (load_values<dtype>(z + i * element, left) - mean) * rstd;
      const F32 gw = g * load_values<dtype>(task.weight + i * element, left);
      plain = plain + gw;
      scaled = scaled + gw * normal;
      store_values<DType::kF32>(grad_weight + i, load_values<DType::kF32>(grad_weight + i, left) + g * normal,
                                left);
      store_values<DType::kF32>(grad_bias + i, load_values<DType::kF32>(grad_bias + i, left) + g, left);
    }
    const float mean_plain = sum(plain) / static_cast<float>(hidden);
    const float mean_scaled = sum(scaled) / static_cast<float>(hidden);
    for (int i = 0; i < hidden; i += kLanes) {
      const int left = hidden - i;
      const F32 normal = (load_values<dtype>(z + i * element, left) - mean) * rstd;
      const F32 gw = gradient(i, left) * load_values<dtype>(task.weight + i * element, left);
      const F32 grad_z = (gw - mean_plain - normal * mean_scaled) * rstd;
      store_values<dtype>(task.residual.data + (at * task.residual.stride + i) * element, grad_z, left);
      if (task.x.data) {
        const F32 grad_x =
            mask.on ? mask.keep(grad_z, static_cast<uint32_t>(i)) * task.dropout.scale : grad_z;
        store_values<dtype>(task.x.data + (at * task.x.stride + i) * element, grad_x, left);
      }
    }
  }
}

void norm_backward_op(const NormOp& task, int begin, int end, float* grad_weight, float* grad_bias) {
  if (task.dtype == DType::kBf16) norm_backward_rows<DType::kBf16>(task, begin, end, grad_weight, grad_bias);
  else norm_backward_rows<DType::kF32>(task, begin, end, grad_weight, grad_bias);
}

void narrow(DType dtype, const float* from, char* to, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const F32 value = load_values<DType::kF32>(from + i, count - i);
    if (dtype == DType::kBf16) store_values<DType::kBf16>(to + 2 * i, value, count - i);
    else store_values<DType::kF32>(to + 4 * i, value, count - i);
  }
}

/// table[ids[r]] += grad[r] for all rows, in their order, for columns [begin, end).
template <DType dtype>
void scatter_columns(const char* grad, int64_t stride, const int64_t* ids, int64_t rows, char* table,
                     int64_t columns, int begin, int end) {
  constexpr int element = 4 / group_of(dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = grad + r * stride * element;
    char* to = table + ids[r] * columns * element;
    for (int i = begin; i < end; i += kLanes) {
      const int left = end - i;
      store_values<dtype>(
          to + i * element,
          load_values<dtype>(to + i * element, left) + load_values<dtype>(from + i * element, left), left);
    }
  }
}

void scatter(DType dtype, const char* grad, int64_t stride, const int64_t* ids, int64_t rows, char* table,
             int64_t columns, int begin, int end) {
  if (dtype == DType::kBf16)
    scatter_columns<DType::kBf16>(grad, stride, ids, rows, table, columns, begin, end);
  else scatter_columns<DType::kF32>(grad, stride, ids, rows, table, columns, begin, end);
}
