// Vectors in the compiler's own vector types: arithmetic is plain C++ on every instruction set, and
// only what has no operator (inner products, bf16) is written per set. Included by kernels.inl alone,
// inside the namespace of one instruction set: nothing here may be shared between two of them.

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef int8_t S8 __attribute__((vector_size(kLanes)));
typedef uint8_t U8 __attribute__((vector_size(kLanes)));

#define INLINE static inline __attribute__((always_inline))

#if defined(ISA_NEON)
// GCC 12 would copy 16 bytes in two general registers, and keep sums there or on the stack.
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};

template <class V>
INLINE V load(const void* p) {
  return static_cast<const Unaligned<V>*>(p)->v;
}

template <class V>
INLINE void store(void* p, V v) {
  static_cast<Unaligned<V>*>(p)->v = v;
}
#else
template <class V>
INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
#endif

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &v, sizeof to);
  return to;
}

INLINE F32 broadcast(float v) { return v - F32{}; }  // v - 0 keeps -0 and is one broadcast
INLINE U32 broadcast_word(const char* p) { return load<uint32_t>(p) | U32{}; }

// Where b is NaN, so is the result: what may be NaN stands second.
#if defined(__AVX512F__)
INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
#elif defined(ISA_NEON)
INLINE F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
INLINE F32 min(F32 a, F32 b) { return vminq_f32(a, b); }
#else
INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
#endif

INLINE F32 abs(F32 a) { return bits<F32>(bits<U32>(a) & 0x7fffffffu); }
INLINE I32 max(I32 a, I32 b) { return a > b ? a : b; }

/// Nearest integers (ties to even) of values below 2^22 in magnitude.
INLINE I32 round_to_int(F32 a) {
  const float magic = 12582912.f;  // 1.5 * 2^23: the sum's low mantissa bits are the integer
  return bits<I32>(a + magic) - bits<int32_t>(magic);
}

INLINE F32 to_float(I32 a) { return __builtin_convertvector(a, F32); }

/// bf16 of a float, rounded to nearest even; NaN stays NaN.
INLINE uint16_t to_bf16(float value) {
  const uint32_t u = bits<uint32_t>(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE U16 to_bf16(F32 a) {
#if defined(__AVX512BF16__)
  return bits<U16>(_mm512_cvtneps_pbh(a));
#elif defined(ISA_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return bits<U16>(vcvt_bf16_f32(a));
#else
  const U32 u = bits<U32>(a);
  const U32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return __builtin_convertvector(a == a ? rounded : (U32{} | 0x7fc0u), U16);
#endif
}

INLINE F32 from_bf16(U16 a) { return bits<F32>(__builtin_convertvector(a, U32) << 16); }
INLINE float from_bf16(uint16_t a) { return bits<float>(static_cast<uint32_t>(a) << 16); }

/// Sums and maxima of all lanes, in a fixed order.
INLINE float sum(F32 a) {
  float v[kLanes];
  store(v, a);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  return v[0];
}

template <class T, class V>
INLINE T maximum(V a) {
  T v[kLanes];
  store(v, a);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
  return v[0];
}

/// 2^f for f in [-0.5, 0.5], fitted for the least largest relative error: below what rounding leaves where
/// `precise`. What is rounded to bf16 needs 2^-10; four terms leave 7.5e-5.
template <bool precise>
INLINE F32 power_of_2(F32 f) {
  F32 p;
  if constexpr (precise) {
    p = broadcast(0.000152523062f);
    p = p * f + 0.00133859122f;
    p = p * f + 0.0096185049f;
    p = p * f + 0.0555037111f;
    p = p * f + 0.240226507f;
    p = p * f + 0.693147182f;
    return p * f + 1.f;
  }
  p = broadcast(0.0551716691f);
  p = p * f + 0.242611122f;
  p = p * f + 0.693260986f;
  return p * f + 0.999928074f;
}

/// a log2(e) - n with one rounding (where the processor multiplies and adds in one step), so that what is far
/// from zero keeps its digits: the product alone would be off by |a| units in the last place of the result.
template <bool precise>
INLINE F32 fraction(F32 a, I32 n) {
  if constexpr (precise) return (a * 1.44269502f - to_float(n)) + a * 1.92596300e-8f;
  return a * 1.44269504f - to_float(n);
}

/// e^a to 2 ulp. Below -87 it is 1.2e-38; above 88.8 infinite.
INLINE F32 exp(F32 a) {
  const F32 x = max(broadcast(-87.3f), min(broadcast(88.8f), a));
  const I32 n = round_to_int(x * 1.44269504f);
  // Two factors: 2^n itself may be out of range where the product is not.
  const I32 half = n >> 1;
  return power_of_2<true>(fraction<true>(x, n)) * bits<F32>((half + 127) << 23) *
         bits<F32>((n - half + 127) << 23);
}

/// e^a for a <= 0, for the softmax. Below -87 it is 1.2e-38, which no sum of float32 notices.
template <bool precise>
INLINE F32 exp_of_negative(F32 a) {
  const F32 x = max(broadcast(-87.3f), a);
  const I32 n = round_to_int(x * 1.44269504f);
  return bits<F32>(bits<I32>(power_of_2<precise>(fraction<precise>(x, n))) + (n << 23));
}
