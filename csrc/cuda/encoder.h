// Launching the kernels; no CUDA header is needed to include this.
#pragma once

#include <string>

#include "plan.h"

namespace dynabert::cuda {

/// A call of CUDA that failed.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What the current device has for the encoder's kernels. Throws `CudaError`.
Device current_device();

/// The encoder, planned, on a stream (a cudaStream_t) of the current device. All blocks run at once.
void encode(const Encoder& e, const Plan& plan, void* stream);

/// Matrices of 2-byte floats [rows, columns], strides in elements: out = activate(pre), or out = grad
/// activate'(pre) where there is a gradient.
struct Pointwise {
  const void *pre, *grad;
  void* out;
  int64_t rows, columns, pre_stride, grad_stride, out_stride;
  bool bf16;  // or float16
  Activation activation;
};
void pointwise(const Pointwise& p, void* stream);

}  // namespace dynabert::cuda
