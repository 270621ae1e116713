// A library with the names of cuBLASLt that multiplies bfloat16 matrices on a CPU, so that what asks it is
// tested.
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "../cuda/cublaslt.h"
#include "../cuda/portable.h"

using namespace dynabert::cuda;
using namespace dynabert::cuda::lt;

namespace {

struct Desc {
  int transpose_a = kNo, transpose_b = kNo, epilogue = kDefault;
  void *bias = nullptr, *pre = nullptr;
  int64_t pre_stride = 0;
};
struct Layout {
  int64_t rows, columns, stride;
};

double get(const void* data, int64_t at) { return from_bf16(static_cast<const Bf16*>(data)[at]); }
void put(void* data, int64_t at, double value) {
  static_cast<Bf16*>(data)[at] = static_cast<Bf16>(pack_bf16(static_cast<float>(value), 0));
}

}  // namespace

extern "C" {

/// Larger products have no algorithm.
constexpr int64_t kMostRows = 1000;

Status cublasLtCreate(Handle* handle) {
  static int one;
  *handle = &one;
  return kSuccess;
}
Status cublasLtMatmulDescCreate(MatmulDesc* desc, ComputeType compute, DataType scale) {
  *desc = new Desc;
  return compute == kCompute32F && scale == kFloat32 ? kSuccess : 7;
}
Status cublasLtMatmulDescDestroy(MatmulDesc desc) {
  delete static_cast<Desc*>(desc);
  return kSuccess;
}
Status cublasLtMatmulDescSetAttribute(MatmulDesc desc, DescAttribute attribute, const void* value,
                                      size_t size) {
  Desc& d = *static_cast<Desc*>(desc);
  const std::map<DescAttribute, std::pair<void*, size_t>> places = {
      {kTransA, {&d.transpose_a, 4}}, {kTransB, {&d.transpose_b, 4}}, {kEpilogue, {&d.epilogue, 4}},
      {kBiasPointer, {&d.bias, 8}},   {kAuxPointer, {&d.pre, 8}},     {kAuxLeading, {&d.pre_stride, 8}},
  };
  const auto found = places.find(attribute);
  if (found == places.end() || found->second.second != size) return 7;
  std::memcpy(found->second.first, value, size);
  return kSuccess;
}
Status cublasLtMatrixLayoutCreate(MatrixLayout* layout, DataType type, uint64_t rows, uint64_t columns,
                                  int64_t stride) {
  *layout = new Layout{static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride};
  return type == kBfloat16 && stride >= static_cast<int64_t>(rows) ? kSuccess : 7;
}
Status cublasLtMatrixLayoutDestroy(MatrixLayout layout) {
  delete static_cast<Layout*>(layout);
  return kSuccess;
}
Status cublasLtMatmulPreferenceCreate(Preference* preference) {
  *preference = new int(0);
  return kSuccess;
}
Status cublasLtMatmulPreferenceDestroy(Preference preference) {
  delete static_cast<int*>(preference);
  return kSuccess;
}
Status cublasLtMatmulPreferenceSetAttribute(Preference, PreferenceAttribute attribute, const void*,
                                            size_t size) {
  return size == (attribute == kMaxWorkspace ? 8u : 4u) ? kSuccess : 7;
}
/// The algorithm remembers the columns it was searched for: it serves as many, and fewer.
Status cublasLtMatmulAlgoGetHeuristic(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout,
                                      MatrixLayout d, Preference, int count, HeuristicResult* results,
                                      int* found) {
  const Layout& layout = *static_cast<Layout*>(d);
  *found = 0;
  if (layout.rows > kMostRows || count < 1) return kNotSupported;
  results[0] = {};
  results[0].algo.data[0] = 42;
  *found = 1;
  return kSuccess;
}
Status cublasLtMatmulAlgoCheck(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,
                               const Algo* algo, HeuristicResult* result) {
  result->workspace = 0;
  return algo->data[0] == 42 ? kSuccess : kNotSupported;
}
Status cublasLtMatmul(Handle, MatmulDesc desc, const void* alpha, const void* a, MatrixLayout a_layout,
                      const void* b, MatrixLayout b_layout, const void* beta, const void*, MatrixLayout,
                      void* out, MatrixLayout out_layout, const Algo* algo, void*, size_t, void*) {
  const Desc& d = *static_cast<Desc*>(desc);
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout),
               &lo = *static_cast<Layout*>(out_layout);
  const int64_t m = lo.rows, n = lo.columns, k = d.transpose_a ? la.rows : la.columns;
  const bool good = algo->data[0] == 42 && *static_cast<const float*>(alpha) == 1 &&
                    *static_cast<const float*>(beta) == 0 && (d.transpose_a ? la.columns : la.rows) == m &&
                    (d.transpose_b ? lb.columns : lb.rows) == k &&
                    (d.transpose_b ? lb.rows : lb.columns) == n;
  if (!good) return 7;
  auto left = [&](int64_t row, int64_t i) {
    return get(a, d.transpose_a ? row * la.stride + i : i * la.stride + row);
  };
  auto right = [&](int64_t i, int64_t c) {
    return get(b, d.transpose_b ? i * lb.stride + c : c * lb.stride + i);
  };
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t row = 0; row < m; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += left(row, i) * right(i, c);
      if (d.epilogue & kBias) sum += get(d.bias, row);
      if (d.epilogue & 32) {
        if (d.epilogue & 128) put(d.pre, c * d.pre_stride + row, sum);
        sum = 0.5 * sum * (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
      }
      if (d.epilogue & 2) sum = sum > 0 ? sum : 0;
      put(out, c * lo.stride + row, sum);
    }
  }
  for (int64_t row = 0; d.epilogue == kGradientA && row < m; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += left(row, i);
    put(d.bias, row, sum);
  }
  for (int64_t c = 0; d.epilogue == kGradientB && c < n; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += right(i, c);
    put(d.bias, c, sum);
  }
  return kSuccess;
}
size_t cublasLtGetVersion() { return 130000; }
}
