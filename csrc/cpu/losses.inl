// Kernels of the distillation losses on ordinary tensors, forward and backward.
// Included by kernels.inl inside the anonymous namespace of one instruction set.

/// What softmax needs of a row of logits: p_i = exp(x_i - top) / sum.
struct Softmax {
  float top, sum;
};

template <DType dtype>
INLINE Softmax softmax_of(const char* row, int columns) {
  constexpr int element = 4 / group_of(dtype);
  F32 most = broadcast(-__builtin_inff());
  for (int i = 0; i < columns; i += kLanes) {
    F32 x = load_values<dtype>(row + i * element, columns - i);
    for (int j = columns - i; j < kLanes; ++j) x[j] = -__builtin_inff();
    most = max(most, x);
  }
  const float top = maximum<float>(most);
  F32 all{};
  for (int i = 0; i < columns; i += kLanes) {
    F32 e = exp(load_values<dtype>(row + i * element, columns - i) - top);
    for (int j = columns - i; j < kLanes; ++j) e[j] = 0;
    all = all + e;
  }
  return {top, sum(all)};
}

template <DType dtype>
double loss_rows(const LossOp& task, int64_t begin, int64_t end) {
  constexpr int element = 4 / group_of(dtype);
  double total = 0;
  for (int64_t at = begin; at < end; ++at) {
    const char* student = task.student.data + at * task.student.stride * element;
    const char* teacher = task.teacher.data + at * task.teacher.stride * element;
    Softmax s{}, t{};
    float offset = 0;
    if (task.cross_entropy) {
      s = softmax_of<dtype>(student, task.columns);
      t = softmax_of<dtype>(teacher, task.columns);
      offset = s.top + __builtin_logf(s.sum);
    }
    F32 part{};
    for (int i = 0; i < task.columns; i += kLanes) {
      const int left = task.columns - i;  // values beyond the end are zero
      const F32 a = load_values<dtype>(student + i * element, left);
      const F32 b = load_values<dtype>(teacher + i * element, left);
      F32 value = (a - b) * (a - b);
      if (task.cross_entropy) {
        value = exp(b - t.top) * (offset - a);
        for (int j = left; j < kLanes; ++j) value[j] = 0;
      }
      part = part + value;
    }
    total += static_cast<double>(sum(part)) / (task.cross_entropy ? t.sum : 1.f);
  }
  return total;
}

double loss(const LossOp& task, int64_t begin, int64_t end) {
  return task.dtype == DType::kBf16 ? loss_rows<DType::kBf16>(task, begin, end)
                                    : loss_rows<DType::kF32>(task, begin, end);
}

template <DType dtype>
void loss_backward_rows(const LossOp& task, int64_t begin, int64_t end) {
  constexpr int element = 4 / group_of(dtype);
  for (int64_t at = begin; at < end; ++at) {
    const char* student = task.student.data + at * task.student.stride * element;
    const char* teacher = task.teacher.data + at * task.teacher.stride * element;
    char* out = task.out.data + at * task.out.stride * element;
    Softmax s{}, t{};
    if (task.cross_entropy) {
      s = softmax_of<dtype>(student, task.columns);
      t = softmax_of<dtype>(teacher, task.columns);
    }
    for (int i = 0; i < task.columns; i += kLanes) {
      const int left = task.columns - i;
      const F32 a = load_values<dtype>(student + i * element, left);
      const F32 b = load_values<dtype>(teacher + i * element, left);
      const F32 slope = task.cross_entropy ? exp(a - s.top) / s.sum - exp(b - t.top) / t.sum : (a - b) * 2.f;
      store_values<dtype>(out + i * element, slope * task.scale, left);
    }
  }
}

void loss_backward(const LossOp& task, int64_t begin, int64_t end) {
  if (task.dtype == DType::kBf16) loss_backward_rows<DType::kBf16>(task, begin, end);
  else loss_backward_rows<DType::kF32>(task, begin, end);
}
