// Arm with BF16 and I8MM (Neoverse N2 and V1, Apple M2): inner products of 2 bf16 or 4 int8.
#include <arm_neon.h>

#include "kernels.h"

#if !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile this file with bf16 and i8mm, or it is kernels_neon.cpp again"
#endif

#define ISA neon_bf16
#define ISA_NAME "neon_bf16"
#define ISA_NEON
namespace dynabert::neon_bf16 {
constexpr int kLanes = 4;
constexpr int kTileVectors = 4;
}  // namespace dynabert::neon_bf16

#include "kernels.inl"
