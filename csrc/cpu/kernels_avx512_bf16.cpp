// AVX-512 with BF16 and VNNI (Cooper Lake, Sapphire Rapids, Zen 4): inner products of 2 bf16 or 4 int8.
#include <immintrin.h>

#include "kernels.h"

#define ISA avx512_bf16
#define ISA_NAME "avx512_bf16"
namespace dynabert::avx512_bf16 {
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
}  // namespace dynabert::avx512_bf16

#include "kernels.inl"
