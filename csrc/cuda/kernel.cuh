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
//
// Shared memory: `kSmallBytes`, then two buffers. One holds the weights of the unit being computed, then its
// sums; the other receives the weights of the next. Attention has the first when no product needs it.
#pragma once

#include "phases.h"
#include "plan.h"

namespace dynabert::cuda {

/// `M` of phases.h on a GPU.
struct Gpu {
  int warp;
  char* shared;

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
};

/// One thread of each block, behind a barrier of its block: releases what the whole block wrote.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  const uint32_t share = barrier_share(blockIdx.x, gridDim.x);
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(share) : "memory");
}

/// All blocks have come, and see what each wrote before.
__device__ __forceinline__ void grid_barrier(uint32_t* counter, int number) {
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive(counter);
    uint32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (!barrier_passed(now, number));
  }
  __syncthreads();
}

__device__ __forceinline__ void fetch(Gpu& m, const Encoder& e, const Cursor& c, int tile_rows, int to) {
  if (c.phase < phases(e)) {
    const Product p = product(e, c.phase);
    fetch_weights(m, e, p, product_unit(p, e.tokens, tile_rows, c.number), to);
  }
}

template <int kHead>
__device__ __forceinline__ void attention_phase(Gpu& m, const Encoder& e, int heads, int scratch) {
  const int count = attention_units(e, heads);
  for (int number = blockIdx.x; number < count; number += gridDim.x) {
    const AttentionUnit u = attention_unit(e, heads, number);
    AttentionTile<Gpu, kHead> tile;
    __syncthreads();  // the unit before has been merged
    tile.attend(m, e, heads, u, scratch);
    __syncthreads();
    tile.merge(m, e, heads, u, scratch);
  }
}

__device__ __forceinline__ void norm_phase(Gpu& m, const Encoder& e, const Product& before, const Bf16* bias,
                                           const Bf16* weight, const Bf16* shift, float* small) {
  const int parts = splits(before);
  for (int row = blockIdx.x; row < e.tokens; row += gridDim.x) {
    NormRow<Gpu> norm;
    norm.gather(m, e, bias, weight, shift, parts, row, small);
    __syncthreads();
    norm.centre(m, e, small);
    __syncthreads();
    norm.store(m, e, row, small);
  }
}

template <int kRowGroups, int kFragments>
__global__ void __launch_bounds__(kThreads, 1) encode(const __grid_constant__ Encoder e) {
  extern __shared__ __align__(128) char memory[];
  using Tile = ProductTile<Gpu, kRowGroups, kFragments>;
  Gpu m{static_cast<int>(threadIdx.x) / kLanes, memory};
  float* const small = reinterpret_cast<float*>(memory);
  const int block = blockIdx.x, grid = gridDim.x;
  int full = kSmallBytes, empty = kSmallBytes + e.buffer_bytes;  // `full`: the next product's weights
  keep_offsets(m, e);
  Cursor next = settle(e, {0, block}, block, Tile::kRows);
  fetch(m, e, next, Tile::kRows, full);
  for (int phase = 0; phase < phases(e); ++phase) {
    const Layer& l = e.layer[phase / kSteps];
    const Step step = step_of(phase);
    if (is_product(step)) {
      const Product p = product(e, phase);
      const int count = product_units(p, e.tokens, Tile::kRows);
      for (int number = block; number < count; number += grid) {
        const Unit u = product_unit(p, e.tokens, Tile::kRows, number);
        Tile tile;
        tile.begin(m, e, p, u);
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();  // all have their share of the weights; nobody reads the sums of the unit before
        fetch_bias(m, p, u, small);
        next = after(e, next, block, grid, Tile::kRows);
        fetch(m, e, next, Tile::kRows, empty);
        tile.multiply(m, e, p, u, full);
        __syncthreads();
        tile.spill(m, p, full);
        __syncthreads();
        tile.finish(m, e, p, u, full, small);
        const int done = full;
        full = empty, empty = done;
      }
    } else if (step == Step::kAttention) {
      if (e.head_size == 64) {
        attention_phase<64>(m, e, l.heads, empty);
      } else {
        attention_phase<32>(m, e, l.heads, empty);
      }
    } else {
      const bool first = step == Step::kNorm1;
      norm_phase(m, e, product(e, phase - 1), first ? l.out_bias : l.down_bias,
                 first ? l.norm1_weight : l.norm2_weight, first ? l.norm1_bias : l.norm2_bias,
                 small + kSmallSums);
    }
    if (phase < barriers(e)) grid_barrier(e.barrier, phase);
  }
  if (barriers(e) % 2 && threadIdx.x == 0) arrive(e.barrier);
}

}  // namespace dynabert::cuda
