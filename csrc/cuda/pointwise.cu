// Activations, and their gradients, of matrices that a product left: where the library fuses another form
// (its GELU is the tanh one) or none.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "encoder.h"

namespace dynabert::cuda {

namespace {

constexpr int kEach = 8;  // values of a thread: 16 bytes

template <class T>
struct Eight {
  alignas(16) T value[kEach];
};

/// `kWide`: rows are whole groups of eight, 16 bytes apart; else each value is loaded by itself.
template <class T, bool kWide>
__global__ void __launch_bounds__(256) apply(const __grid_constant__ Pointwise p) {
  const int64_t across = (p.columns + kEach - 1) / kEach, total = p.rows * across;
  const T *pre = static_cast<const T*>(p.pre), *grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.out);
  for (int64_t item = blockIdx.x * int64_t{256} + threadIdx.x; item < total;
       item += gridDim.x * int64_t{256}) {
    const int64_t row = item / across, column = item % across * kEach;
    const int count = kWide ? kEach : static_cast<int>(min(int64_t{kEach}, p.columns - column));
    const T* from = pre + row * p.pre_stride + column;
    const T* slope = grad + row * p.grad_stride + column;
    Eight<T> x{}, g{}, y;
    if constexpr (kWide) {
      *reinterpret_cast<uint4*>(x.value) = *reinterpret_cast<const uint4*>(from);
      if (grad) *reinterpret_cast<uint4*>(g.value) = *reinterpret_cast<const uint4*>(slope);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i < count) {
          x.value[i] = from[i];
          if (grad) g.value[i] = slope[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float v = static_cast<float>(x.value[i]);
      y.value[i] = static_cast<T>(grad ? static_cast<float>(g.value[i]) * activation_slope(p.activation, v)
                                       : activate(p.activation, v));
    }
    T* to = out + row * p.out_stride + column;
    if constexpr (kWide) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(y.value);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i < count) to[i] = y.value[i];
      }
    }
  }
}

template <class T>
void launch(const Pointwise& p, bool wide, int blocks, cudaStream_t stream) {
  if (wide) {
    apply<T, true><<<blocks, 256, 0, stream>>>(p);
  } else {
    apply<T, false><<<blocks, 256, 0, stream>>>(p);
  }
}

}  // namespace

void pointwise(const Pointwise& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  auto whole = [](const void* data, int64_t stride) {
    return stride % kEach == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  const bool wide = p.columns % kEach == 0 && whole(p.pre, p.pre_stride) && whole(p.out, p.out_stride) &&
                    (!p.grad || whole(p.grad, p.grad_stride));
  const int64_t items = p.rows * ((p.columns + kEach - 1) / kEach);
  const int blocks = static_cast<int>(std::min<int64_t>((items + 255) / 256, 132 * 16));
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.bf16) {
    launch<__nv_bfloat16>(p, wide, blocks, on);
  } else {
    launch<__half>(p, wide, blocks, on);
  }
  if (const cudaError_t code = cudaGetLastError(); code != cudaSuccess)
    throw CudaError(std::string("pointwise: ") + cudaGetErrorString(code));
}

}  // namespace dynabert::cuda
