#pragma once
// Vec: as many floats as one register of the instruction set this file is compiled for holds, and what kernels need of
// it.  Everything is static and lives in the namespace of the instruction set, so that no AVX-512 code can be linked
// into the baseline build under a shared name.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if (defined(__GNUC__) && __GNUC__ >= 12) || defined(__clang__)
#define MIRASOL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIRASOL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

namespace mirasol::MIRASOL_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));  // as a mask: -1 in a lane that is on, 0 in others
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));
typedef float Element __attribute__((aligned(2), may_alias));  // 32 bits at any even address: a float or two halves

static inline Vec load(const Element* p) { return *reinterpret_cast<const Unaligned*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<Unaligned*>(p) = x; }
static inline Vec select(Bits mask, Vec yes, Vec no) { return mask ? yes : no; }
static inline Vec keep(Bits mask, Vec x) { return (Vec)(mask & (Bits)x); }  // 0 in a lane that is off, also for NaN

static inline bool any(Bits mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// max gives b where a or b is NaN.
#if defined(__AVX512F__)
static inline Vec broadcast(float x) { return (Vec)_mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline Vec broadcast(float x) { return (Vec)_mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
static inline Vec broadcast(float x) { return (Vec)_mm_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec max(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
#else
static inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
#if defined(__aarch64__)
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
static inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
#endif

// The first n floats at p, zeros after them; nothing past p[n] is read (or, by store_part, written).
static inline Vec load_part(const Element* p, int n) {
  if (n >= WIDTH) return load(p);
  Vec x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
static inline void store_part(float* p, Vec x, int n) {
  if (n >= WIDTH) return store(p, x);
  for (int i = 0; i < n; ++i) p[i] = x[i];
}

static inline void zero(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) store(x + i, Vec{});
}

static inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }
static inline int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

static inline float sum(Vec x) {  // of halves, which are added until one is left
#if defined(__AVX512F__)
  x += MIRASOL_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += MIRASOL_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += MIRASOL_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif defined(__AVX2__)
  x += MIRASOL_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += MIRASOL_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  x += MIRASOL_SHUFFLE(x, x, 2, 3, 0, 1);
#endif
  return x[0] + x[1];
}

// Lanes first <= i < last.
static inline Bits lanes_between(int first, int last) {
  Bits i;
  for (int j = 0; j < WIDTH; ++j) i[j] = j;
  return (i >= first) & (i < last);
}

// e^x within 1.1 ulp for x <= 88.3, which is not checked; 0 below -87.3 (the result would be subnormal), NaN for NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r by a polynomial fitted for the least relative error, 4e-9 before rounding.
// Several vectors side by side, a step at a time: their chains overlap without the processor looking far ahead.
template <int N>
static inline void exp(Vec (&x)[N]) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: a sum with it keeps n, rounded, in its lowest bits
  Vec shifted[N], r[N], p[N];
#define MIRASOL_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  MIRASOL_EACH shifted[i] = fma(x[i], broadcast(1.44269504f), magic);
  MIRASOL_EACH p[i] = shifted[i] - magic;
  MIRASOL_EACH r[i] = fma(p[i], broadcast(-0.693359375f), x[i]);  // nine bits of ln 2: exact, fused or not
  MIRASOL_EACH r[i] = fma(p[i], broadcast(2.12194440e-4f), r[i]);
  MIRASOL_EACH p[i] = fma(r[i], broadcast(0.00138145394f), broadcast(0.00836874545f));
  MIRASOL_EACH p[i] = fma(p[i], r[i], broadcast(0.0416683890f));
  MIRASOL_EACH p[i] = fma(p[i], r[i], broadcast(0.166665211f));
  MIRASOL_EACH p[i] = fma(p[i], r[i], broadcast(0.499999940f));
  MIRASOL_EACH p[i] = fma(p[i], r[i] * r[i], r[i]) + 1.0f;
  MIRASOL_EACH p[i] = p[i] * (Vec)(((Words)shifted[i] << 23) + 0x3f800000u);
  MIRASOL_EACH x[i] = select(x[i] < -87.336544f, Vec{}, p[i]);
#undef MIRASOL_EACH
}
static inline Vec exp(Vec x) {
  Vec one[] = {x};
  exp(one);
  return one[0];
}

// 1 / x within 1 ulp, where 1 / x is no subnormal; such a result may be 0.
static inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return fma(guess, fma(-x, guess, broadcast(1.0f)), guess);
#else
  return 1.0f / x;
#endif
}

// x[i][j] and x[j][i] change places: the first half of the rows is interleaved with the second, log2(WIDTH) times.
static inline void transpose(Vec (&x)[WIDTH]) {
#pragma GCC unroll 16
  for (int step = 1; step < WIDTH; step *= 2) {
    Vec y[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH / 2; ++i) {
      const Vec a = x[i], b = x[i + WIDTH / 2];
#if defined(__AVX512F__)
      y[2 * i] = MIRASOL_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] = MIRASOL_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      y[2 * i] = MIRASOL_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = MIRASOL_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      y[2 * i] = MIRASOL_SHUFFLE(a, b, 0, 4, 1, 5);
      y[2 * i + 1] = MIRASOL_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) x[i] = y[i];
  }
}

// Lane i is the sum of x[i]: the steps of a transposition, each halving the vectors by adding what it interleaves.
static inline Vec sums(Vec (&x)[WIDTH]) {
#pragma GCC unroll 16
  for (int half = WIDTH / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      const Vec a = x[i], b = x[i + half];
#if defined(__AVX512F__)
      x[i] = MIRASOL_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             MIRASOL_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      x[i] = MIRASOL_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11) + MIRASOL_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      x[i] = MIRASOL_SHUFFLE(a, b, 0, 4, 1, 5) + MIRASOL_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
    }
  return x[0];
}

}  // namespace mirasol::MIRASOL_ISA
