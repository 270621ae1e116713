// AVX-512 F, BW, DQ, VL (Skylake-X): 32 registers hold a block of 6 x 64.
#include <immintrin.h>

#include "kernels.h"

#define ISA avx512
#define ISA_NAME "avx512"
namespace dynabert::avx512 {
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
}  // namespace dynabert::avx512

#include "kernels.inl"
