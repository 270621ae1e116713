// Any processor: vectors of 4, which are SSE2 on x86-64.
#include "kernels.h"

#define ISA portable
#define ISA_NAME "portable"
namespace dynabert::portable {
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
}  // namespace dynabert::portable

#include "kernels.inl"
