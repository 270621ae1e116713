// `wgmma` of 64 rows with A in registers: an instruction for each width, for its registers are its operands.
#pragma once

#include "phases.h"

namespace dynabert::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;

#define SUMS(j)                                                                             \
  "+f"(sums[j].value.value[0]), "+f"(sums[j].value.value[1]), "+f"(sums[j].value.value[2]), \
      "+f"(sums[j].value.value[3])
#define SUMS_1 SUMS(0)
#define SUMS_2 SUMS_1, SUMS(1)
#define SUMS_3 SUMS_2, SUMS(2)
#define SUMS_4 SUMS_3, SUMS(3)
#define SUMS_5 SUMS_4, SUMS(4)
#define SUMS_6 SUMS_5, SUMS(5)
#define SUMS_7 SUMS_6, SUMS(6)
#define SUMS_8 SUMS_7, SUMS(7)
#define NAMES_1 "%0, %1, %2, %3"
#define NAMES_2 NAMES_1 ", %4, %5, %6, %7"
#define NAMES_3 NAMES_2 ", %8, %9, %10, %11"
#define NAMES_4 NAMES_3 ", %12, %13, %14, %15"
#define NAMES_5 NAMES_4 ", %16, %17, %18, %19"
#define NAMES_6 NAMES_5 ", %20, %21, %22, %23"
#define NAMES_7 NAMES_6 ", %24, %25, %26, %27"
#define NAMES_8 NAMES_7 ", %28, %29, %30, %31"
// sums += a b: added to, neither operand negated, B's indices of the sum adjacent.
#define WGMMA(blocks, columns, a_and_b)                                                          \
  if constexpr (kBlocks == blocks)                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" NAMES_##blocks \
               "}, " a_and_b ", 1, 1, 1, 0;"                                                     \
               : SUMS_##blocks                                                                   \
               : "r"(a.a[0]), "r"(a.a[1]), "r"(a.a[2]), "r"(a.a[3]), "l"(b)                      \
               : "memory")

/// Begins; `b` is of `describe`. Registers may be touched again when its group has been waited for.
template <int kBlocks>
__device__ __forceinline__ void wgmma(PerLane<Float4> (&sums)[8], const Fragment& a, uint64_t b) {
  WGMMA(1, 8, "{%4, %5, %6, %7}, %8");
  WGMMA(2, 16, "{%8, %9, %10, %11}, %12");
  WGMMA(3, 24, "{%12, %13, %14, %15}, %16");
  WGMMA(4, 32, "{%16, %17, %18, %19}, %20");
  WGMMA(5, 40, "{%20, %21, %22, %23}, %24");
  WGMMA(6, 48, "{%24, %25, %26, %27}, %28");
  WGMMA(7, 56, "{%28, %29, %30, %31}, %32");
  WGMMA(8, 64, "{%32, %33, %34, %35}, %36");
}
/// What was written to registers before is seen by what begins behind.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most so many groups are under way.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#undef WGMMA
#undef SUMS
#else
constexpr bool kHasWgmma = false;
template <int kBlocks>
__device__ __forceinline__ void wgmma(PerLane<Float4> (&)[8], const Fragment&, uint64_t) {}
__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit() {}
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {}
#endif

}  // namespace dynabert::cuda
