// The part of cuBLASLt's C interface that `matmul.cpp` uses, found when the program runs.
//
// Declared here, so that the module is built where there is no cuBLASLt (its wheel, library and all, is half
// a gigabyte) and imported where there is none. The interface is stable since CUDA 11;
// `tests/test_cuda_matmul.cpp` compares with <cublasLt.h> where the compiler finds it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynabert::cuda::lt {

using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;
using Status = int;

constexpr Status kSuccess = 0, kNotSupported = 15;

enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };
enum ComputeType : int { kCompute32F = 68 };
enum Operation : int { kNo = 0, kTransposed = 1 };
enum DescAttribute : int {
  kTransA = 3,
  kTransB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLeading = 12
};
enum PreferenceAttribute : int { kMaxWorkspace = 1, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8 };
enum EpilogueKind : int {
  kDefault = 1,
  kBias = 4,
  kReluBias = 6,
  kGeluBias = 36,      // the tanh form of GELU
  kGeluAuxBias = 164,  // and its input is stored too
  kGradientA = 256,    // sums of A over the product's inner dimension
  kGradientB = 512     // likewise of B
};

struct Algo {
  uint64_t data[8];
};
struct HeuristicResult {
  Algo algo;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

/// cuBLASLt's functions by name.
struct Library {
  Status (*create)(Handle*);
  Status (*desc_create)(MatmulDesc*, ComputeType, DataType);
  Status (*desc_destroy)(MatmulDesc);
  Status (*desc_set)(MatmulDesc, DescAttribute, const void*, size_t);
  Status (*layout_create)(MatrixLayout*, DataType, uint64_t, uint64_t, int64_t);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*heuristic)(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout, Preference,
                      int, HeuristicResult*, int*);
  Status (*algo_check)(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,
                       const Algo*, HeuristicResult*);
  Status (*matmul)(Handle, MatmulDesc, const void*, const void*, MatrixLayout, const void*, MatrixLayout,
                   const void*, const void*, MatrixLayout, void*, MatrixLayout, const Algo*, void*, size_t,
                   void*);
  size_t (*version)();
};

}  // namespace dynabert::cuda::lt
