// Products through cuBLASLt: epilogues, leading dimensions instead of copies, one search for an algorithm per
// shape.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cublaslt.h"

namespace dynabert::cuda {

/// cuBLASLt is not there, or refuses a call.
struct MatmulError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Epilogue : int { kNone, kBias, kReluBias, kGeluTanhBias, kSumsOfA, kSumsOfB };

/// D [m, n] = op(A) op(B), column-major as cuBLASLt has it: a row-major [T, k] is a column-major [k, T].
/// A is [m, k] or, transposed, [k, m]; B is [k, n] or [n, k].
struct Matmul {
  int64_t m, n, k;
  bool transpose_a, transpose_b;
  int64_t a_stride, b_stride, d_stride;
  bool bf16;  // or float16; sums are float32
  Epilogue epilogue;
  bool tokens_inside;  // k counts tokens, else n does: that size is rounded up in the cache's key
  const void *a, *b;
  void* d;
  void* bias;  // read [m]; written [m] by kSumsOfA, [n] by kSumsOfB
  void* pre;   // written: what GELU is applied to, or null
  int64_t pre_stride;
};

/// The tokens that share an algorithm: at most an eighth more.
int64_t token_bucket(int64_t tokens);

/// Where the library was found, or throws `MatmulError`. `paths` are tried after what the process has loaded.
std::string load_cublaslt(const std::vector<std::string>& paths);

/// False where cuBLASLt has no algorithm for the call; throws `MatmulError` where it fails.
/// Stream is a cudaStream_t of device number `device`, the current one.
bool matmul(const Matmul& call, int device, void* workspace, size_t workspace_bytes, void* stream);

/// Searches made so far, and calls: for tests of the cache.
struct MatmulCounts {
  long searches, calls;
};
MatmulCounts matmul_counts();

}  // namespace dynabert::cuda
