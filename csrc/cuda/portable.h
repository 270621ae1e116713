// What lets one source be a kernel and its simulation: on a GPU a function's variables are those of one
// thread; on a CPU it computes the 32 lanes of a warp one after the other, between points at which a warp
// works together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif
#if defined(__CUDA_ARCH__)
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#else
#define UNROLL
#define UNROLL_4
#endif

namespace dynabert::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // of a block: two for each of an SM's four schedulers
constexpr int kThreads = kWarps * kLanes;

/// Bits of a bfloat16.
using Bf16 = uint16_t;

/// 16 bytes: what one lane moves at a time.
struct alignas(16) Word4 {
  uint32_t word[4];
};
struct alignas(8) Float2 {
  float value[2];
};
struct alignas(16) Float4 {
  float value[4];
};

HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
HD int smaller(int a, int b) { return a < b ? a : b; }
HD int larger(int a, int b) { return a > b ? a : b; }

/// A variable that every lane of a warp has.
template <class T>
struct PerLane {
#if defined(__CUDA_ARCH__)
  T value;
  HD T& operator[](int) { return value; }
  HD const T& operator[](int) const { return value; }
#else
  T values[kLanes] = {};
  HD T& operator[](int lane) { return values[lane]; }
  HD const T& operator[](int lane) const { return values[lane]; }
#endif
};

/// Calls f(lane) for every lane of a warp.
template <class F>
HD void each_lane(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x) % kLanes);
#else
  for (int lane = 0; lane < kLanes; ++lane) f(lane);
#endif
}

/// Calls f() in one lane of a warp; the others wait, as what follows may need all.
template <class F>
HD void one_lane(F f) {
#if defined(__CUDA_ARCH__)
  if (threadIdx.x % kLanes == 0) f();
  __syncwarp();
#else
  f();
#endif
}

HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HD float low_bf16(uint32_t pair) { return bits_to_float(pair << 16); }
HD float high_bf16(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
HD float from_bf16(Bf16 bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

/// Two numbers rounded to bfloat16, to nearest even; `low` has the lower address.
HD uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  auto round = [](float value) -> uint32_t {
    uint32_t u;
    std::memcpy(&u, &value, sizeof u);
    return value == value ? (u + 0x7fffu + (u >> 16 & 1u)) >> 16 : 0x7fc0u;
  };
  return round(low) | round(high) << 16;
#endif
}

/// The lower, or the upper, two bytes of a word, each in a half.
HD uint32_t spread_bytes(uint32_t four, bool upper) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(four, 0, upper ? 0x4342 : 0x4140);
#else
  const uint32_t two = upper ? four >> 16 : four & 0xffffu;
  return (two & 0xffu) | (two & 0xff00u) << 8;
#endif
}

/// Sums of two pairs.
HD uint32_t add_bf16(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t sum;  // sm_80 has no addition of bfloat16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
#else
  return pack_bf16(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
#endif
}

/// The lower, or the upper, halves of two words.
HD uint32_t pick_halves(uint32_t first, uint32_t second, bool upper) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, upper ? 0x7632 : 0x5410);
#else
  return upper ? (first >> 16 | (second & 0xffff0000u)) : ((first & 0xffffu) | second << 16);
#endif
}

HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // 2 units in the last place; -inf gives 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

enum class Activation : int { kNone, kGelu, kGeluTanh, kRelu };

/// As `activate` in kernels/triton/common.py.
HD float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu: return x * 0.5f * (1.0f + erff(x * 0.7071067811865476f));
    case Activation::kGeluTanh: {
      const float u = 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
      return x / (1.0f + expf(-u));
    }
    case Activation::kRelu: return x > 0 ? x : 0;
    default: return x;
  }
}

/// The derivative of `activate` at x.
HD float activation_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    case Activation::kGeluTanh: {
      const float u = 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
      const float s = 1.0f / (1.0f + expf(-u));
      // 1 / (1 + exp(u)) is 1 - s with all its digits.
      return s + x * s * (1.0f / (1.0f + expf(u))) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    }
    case Activation::kRelu: return x > 0 ? 1.0f : 0.0f;
    default: return 1.0f;
  }
}

}  // namespace dynabert::cuda
