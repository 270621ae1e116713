// The encoder of a sub-network as one kernel whose blocks stay: phases of schedule.h, a grid's barrier
// between two.
//
// Why so. At batch 1 a phase takes one to four microseconds. As kernels of their own, phases would each wait
// for the one before to end, for their launch, and then for their first weights. Here a block fetches the
// weights of its next product while it computes, and across barriers: they need nothing that is computed. All
// weights come from memory once, as a steady stream; behind a barrier a block waits for activations only,
// which lie in the L2 cache.
//
// Why `mma.sync`, not wgmma: 16 to 128 rows are bound by the weights' bytes (170 MB of BERT-base at 4.8 TB/s:
// 35 us; its products at 128 tokens, at two thirds of `mma.sync`'s rate on 132 multiprocessors: 50 us), and
// its operands may come from registers in any order of the sum (tile.h), so that A never passes through
// shared memory. It is also the same code on sm_80. Why `cp.async`, not bulk copies: those write rows as they
// lie in memory, which would have to be padded or swizzled, transposed on reading, and fenced; 16 bytes a
// lane land where they are read, by the generic proxy.
#pragma once

#include "body.h"

namespace dynabert::cuda {

/// `M` of phases.h and body.h on a GPU.
struct Gpu {
  int warp, block, grid;
  char* shared;
  uint32_t* barrier;

  __device__ __forceinline__ Word4 activations(const Bf16* p) const {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  }
  __device__ __forceinline__ void half_activations(const Bf16* p, uint32_t* to) const {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(p));
    to[0] = v.x, to[1] = v.y;
  }
  __device__ __forceinline__ void weights(const Bf16* p, uint32_t* to) const {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    to[0] = v.x, to[1] = v.y;
  }
  __device__ __forceinline__ Float4 sums(const float* p) const {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  }
  __device__ __forceinline__ void copy(int to, const Bf16* from, bool inside) const {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared + to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void store(Bf16* p, uint32_t low, uint32_t high) const {
    *reinterpret_cast<uint2*>(p) = make_uint2(low, high);
  }
  __device__ __forceinline__ void store(float* p, const Float4& v) const {
    *reinterpret_cast<float4*>(p) = make_float4(v.value[0], v.value[1], v.value[2], v.value[3]);
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void copies_arrive() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  __device__ __forceinline__ void leave() const {
    if (threadIdx.x != 0) return;
    // Releases what the whole block wrote: its other threads' writes come before __syncthreads.
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(barrier), "r"(barrier_share(block, grid))
                 : "memory");
  }
  __device__ __forceinline__ void meet(int number) const {
    __syncthreads();
    leave();
    if (threadIdx.x == 0) {
      uint32_t now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
      } while (!barrier_passed(now, number));
    }
    __syncthreads();
  }
};

template <int kRowGroups, int kFragments>
__global__ void __launch_bounds__(kThreads, 1) encode(const __grid_constant__ Encoder e) {
  extern __shared__ __align__(128) char memory[];
  Gpu m{static_cast<int>(threadIdx.x) / kLanes, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
        memory, e.barrier};
  encode_block<Gpu, kRowGroups, kFragments>(m, e);
}

}  // namespace dynabert::cuda
