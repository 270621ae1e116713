// Any 64-bit Arm: 32 registers of 4 floats hold a block of 6 x 16.
#include <arm_neon.h>

#include "kernels.h"

#define ISA neon
#define ISA_NAME "neon"
#define ISA_NEON
namespace dynabert::neon {
constexpr int kLanes = 4;
constexpr int kTileVectors = 4;
}  // namespace dynabert::neon

#include "kernels.inl"
