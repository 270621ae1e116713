// The encoder of a sub-network as one kernel whose blocks stay: phases of schedule.h, a grid's barrier
// between two.
//
// Why so. At batch 1 a phase takes one to four microseconds. As kernels of their own, phases would each wait
// for the one before to end, for their launch, and then for their first weights. Here a block fetches the
// weights of its next product while it computes, and across barriers: they need nothing that is computed. All
// weights come from memory once, as a steady stream; behind a barrier a block waits for activations only,
// which lie in the L2 cache.
//
// One source, three ways, chosen where it is compiled: from compute capability 9.0 on weights come by bulk
// copies, on 8.0 by `cp.async` of 16 bytes a lane; tiles of 64 rows are multiplied by wgmma on sm_90a, all
// others by `mma.sync`. All of them read the packed weights as they lie (tile.h), and A from registers, so
// that it never passes through shared memory.
#pragma once

#include "body.h"
#include "wgmma.cuh"

namespace dynabert::cuda {

/// `M` of phases.h and body.h on a GPU.
struct Gpu {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kBulk = true;
#else
  static constexpr bool kBulk = false;
#endif
  static constexpr bool kWgmma = kHasWgmma;

  int warp, block, grid;
  char* shared;
  uint32_t base;  // of `shared`, in the window of shared memory
  uint32_t* barrier;

  __device__ __forceinline__ Word4 activations(const Bf16* p) const {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  }
  __device__ __forceinline__ void half_activations(const Bf16* p, uint32_t* to) const {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(p));
    to[0] = v.x, to[1] = v.y;
  }
  __device__ __forceinline__ void constants(const void* p, uint32_t* to) const {
    const uint2 v = __ldg(static_cast<const uint2*>(p));
    to[0] = v.x, to[1] = v.y;
  }
  __device__ __forceinline__ Float4 sums(const float* p) const {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  }
  template <class T>
  __device__ __forceinline__ void put(float* p, const T& value) const {
    *reinterpret_cast<T*>(p) = value;
  }

  __device__ __forceinline__ uint32_t mbarrier(int buffer) const {
    return base + kSmallBarriers * static_cast<uint32_t>(sizeof(float)) + 8 * buffer;
  }
  __device__ __forceinline__ void prepare() const {
    if constexpr (kBulk) {
      if (threadIdx.x != 0) return;
      for (int b = 0; b < 2; ++b)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(mbarrier(b)) : "memory");
      // For the copies, which come by another way than this thread's writes.
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      give_back();
    }
  }
  __device__ __forceinline__ void expect(int buffer, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier(buffer)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void copy_run(int buffer, int to, const char* from, int bytes) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(base +
                                                                                                        to),
        "l"(from), "r"(bytes), "r"(mbarrier(buffer))
        : "memory");
  }
  __device__ __forceinline__ void copy(int to, const char* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + to), "l"(from) : "memory");
  }
  __device__ __forceinline__ void arrived(int buffer, int parity) const {
    if constexpr (kBulk) {
      uint32_t done;
      do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(mbarrier(buffer)), "r"(parity)
            : "memory");
      } while (!done);
    } else {
      asm volatile("cp.async.wait_all;" ::: "memory");
    }
  }
  __device__ __forceinline__ void give_back() const {
    if constexpr (kBulk) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  __device__ __forceinline__ void matrices(int at, PerLane<Word4>& b) const {
    uint32_t* w = b[0].word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(base + at + threadIdx.x % kLanes * 16)
                 : "memory");
  }
  __device__ __forceinline__ void bytes(int at, PerLane<Pair>& b) const {
    const uint2 v = *reinterpret_cast<const uint2*>(shared + at + threadIdx.x % kLanes * 8);
    b[0].b[0] = v.x, b[0].b[1] = v.y;
  }

  template <int kBlocks>
  __device__ __forceinline__ void wgmma(PerLane<Float4> (&sums)[8], const PerLane<Fragment>& a, int at,
                                        int run) const {
    cuda::wgmma<kBlocks>(sums, a[0], describe(base + at, run));
  }
  __device__ __forceinline__ void wgmma_fence() const { cuda::wgmma_fence(); }
  __device__ __forceinline__ void wgmma_commit() const { cuda::wgmma_commit(); }
  template <int kGroups>
  __device__ __forceinline__ void wgmma_wait() const {
    cuda::wgmma_wait<kGroups>();
  }

  __device__ __forceinline__ void store(Bf16* p, uint32_t low, uint32_t high) const {
    *reinterpret_cast<uint2*>(p) = make_uint2(low, high);
  }
  __device__ __forceinline__ void store(float* p, const Float4& v) const {
    *reinterpret_cast<float4*>(p) = make_float4(v.value[0], v.value[1], v.value[2], v.value[3]);
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
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

template <int kTileRows, bool kInt8>
__global__ void __launch_bounds__(kThreads, 1) encode(const __grid_constant__ Encoder e) {
  extern __shared__ __align__(128) char memory[];
  Gpu m{static_cast<int>(threadIdx.x) / kLanes,
        static_cast<int>(blockIdx.x),
        static_cast<int>(gridDim.x),
        memory,
        static_cast<uint32_t>(__cvta_generic_to_shared(memory)),
        e.barrier};
  encode_block<Gpu, kTileRows, kInt8>(m, e);
}

}  // namespace dynabert::cuda
