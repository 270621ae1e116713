// AVX2 and FMA (Haswell, Zen): 16 registers hold a block of 6 x 16.
#include <immintrin.h>

#include "kernels.h"

#define ISA avx2
#define ISA_NAME "avx2"
namespace dynabert::avx2 {
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;
}  // namespace dynabert::avx2

#include "kernels.inl"
