#pragma once
// bfloat16 and float16 in memory, float in registers; and pairs of bfloat16, two to a 32-bit lane, for products that
// the chip does two at a time.
#include <cstring>
#include "common/vec.h"

namespace mirasol::MIRASOL_ISA {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

static inline Halves load_halves(const void* p, int n) {
  Halves x{};
  if (n >= WIDTH) std::memcpy(&x, p, sizeof x);
  else for (int i = 0; i < n; ++i) x[i] = static_cast<const uint16_t*>(p)[i];
  return x;
}
static inline void store_halves(void* p, Halves x, int n) {
  if (n >= WIDTH) std::memcpy(p, &x, sizeof x);
  else for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = x[i];
}

#if defined(__AVX512F__)
static inline Words widen(Halves x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
static inline Halves narrow(Words x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
static inline Words widen(Halves x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
static inline Halves narrow(Words x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // of each half twice
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
static inline Words widen(Halves x) { return __builtin_convertvector(x, Words); }
static inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
#endif

// Rounded to nearest even in the upper half of each lane; the lower half is not meant.  NaN stays NaN.
static inline Words round_bfloat16(Vec x) {
#if defined(__AVX512BF16__)
  return widen((Halves)_mm512_cvtneps_pbh((__m512)x)) << 16;
#else
  const Words bits = (Words)x;
  return (Words)select(x == x, (Vec)(bits + 0x7fffu + ((bits >> 16) & 1u)), (Vec)(bits | 0x400000u));
#endif
}

static inline Vec to_float(bfloat16, Halves x) { return (Vec)(widen(x) << 16); }
static inline Halves from_float(bfloat16, Vec x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return narrow(round_bfloat16(x) >> 16);
#endif
}

#if defined(__AVX512F__)
static inline Vec to_float(float16, Halves x) { return (Vec)_mm512_cvtph_ps((__m256i)x); }
static inline Halves from_float(float16, Vec x) {
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
static inline Vec to_float(float16, Halves x) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
static inline Halves from_float(float16, Vec x) {
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
static inline Vec to_float(float16, Halves x) {
  const Words bits = widen(x), sign = (bits & 0x8000u) << 16;
  const Words magnitude = (bits & 0x7fffu) << 13;  // a product with 2^112 moves the exponent, of subnormals too
  const Vec finite = (Vec)magnitude * broadcast(0x1p112f);
  const Words value = (Words)select(magnitude >= (0x7c00u << 13), (Vec)(magnitude | 0x7f800000u), finite);
  return (Vec)(sign | value);
}
static inline Halves from_float(float16, Vec x) {
  const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u;
  const Vec size = (Vec)(bits & 0x7fffffffu);
  // Subnormal: the sum with 0.5 rounds to multiples of 2^-24.  Normal: round the lower 13 bits, then move the exponent.
  const Words small = (Words)(size + 0.5f) - 0x3f000000u;
  const Words normal = ((Words)size + 0xfffu + (((Words)size >> 13) & 1u) - (112u << 23)) >> 13;
  Words value = (Words)select(size < 0x1p-14f, (Vec)small, (Vec)normal);
  value = (Words)select(size >= 65520.0f, (Vec)(value * 0u + 0x7c00u), (Vec)value);  // rounds to infinity
  value = (Words)select(size == size, (Vec)value, (Vec)(value * 0u + 0x7e00u));
  return narrow(sign | value);
}
#endif

// Like load_part and store_part of floats.
static inline Vec load_part(const bfloat16* p, int n) { return to_float(bfloat16{}, load_halves(p, n)); }
static inline Vec load_part(const float16* p, int n) { return to_float(float16{}, load_halves(p, n)); }
static inline void store_part(bfloat16* p, Vec x, int n) { store_halves(p, from_float(bfloat16{}, x), n); }
static inline void store_part(float16* p, Vec x, int n) { store_halves(p, from_float(float16{}, x), n); }

// Two bfloat16 in each lane, the first in the lower half: a Vec of bits, not of floats.
#if defined(__AVX512BF16__)
static inline Vec interleave(__m512i halves) {  // the lower 16 of them and the upper 16
  const Words lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (Vec)_mm512_permutexvar_epi16((__m512i)(lane * 0x10001u + 0x100000u), halves);
}
static inline Vec pair(Vec first, Vec second) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
static inline Vec pair(Halves first, Halves second) {
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1));
}
#else
static inline Vec pair(Vec first, Vec second) {
  return (Vec)((round_bfloat16(first) >> 16) | (round_bfloat16(second) & 0xffff0000u));
}
static inline Vec pair(Halves first, Halves second) { return (Vec)(widen(first) | (widen(second) << 16)); }
#endif

// e^x of what becomes a bfloat16, for x <= 88: within (1 + |x| / 4) ulp of float.  AVX-512 takes x / ln 2 apart, and
// puts 2^r and the power of two together, in an instruction each; 2^r, 0 <= r < 1, by a polynomial within 9e-8.
static inline Vec exp_for_bfloat16(Vec x) {
#if defined(__AVX512DQ__)
  const Vec y = x * broadcast(1.44269504f), r = (Vec)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF);
  Vec p = fma(r, broadcast(0.00186713017f), broadcast(0.00901702978f));
  p = fma(p, r, broadcast(0.0557999127f));
  p = fma(p, r, broadcast(0.240164444f));
  p = fma(p, r, broadcast(0.693151295f));
  p = fma(p, r, broadcast(1.0f));
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
  return exp(x);
#endif
}

// e^x of weights of halves: as of what becomes a bfloat16, several side by side, but 0 below -87.3 as `exp` has it, since
// a product of floats takes far longer with a subnormal factor.
template <int N>
static inline void exp_for_halves(Vec (&x)[N]) {
#if defined(__AVX512DQ__)
  for (Vec& each : x) each = keep(~(each < -87.336544f), exp_for_bfloat16(each));
#else
  exp(x);
#endif
}

// Of rows of bfloat16, 2 WIDTH elements each: one after the other the pairs of the elements that stand below each other.
struct Interleaved { Vec low, high; };
static inline Interleaved interleave(Vec a, Vec b) {
#if defined(__AVX512F__)
  Words low;
  for (int i = 0; i < WIDTH; ++i) low[i] = uint32_t(i | (i + 2 * WIDTH) << 16);
  const __m512i x = (__m512i)a, y = (__m512i)b, high = (__m512i)(low + (WIDTH << 16 | WIDTH));
  return {(Vec)_mm512_permutex2var_epi16(x, (__m512i)low, y), (Vec)_mm512_permutex2var_epi16(x, high, y)};
#else
  Halves x[2], y[2];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b);
  return {pair(x[0], y[0]), pair(x[1], y[1])};
#endif
}

static inline void negate_pairs(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) store(x + i, (Vec)((Words)load(x + i) ^ 0x80008000u));
}

// c + a.first * b.first + a.second * b.second
static inline Vec dot(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const Vec seconds = fma((Vec)((Words)a & 0xffff0000u), (Vec)((Words)b & 0xffff0000u), c);
  return fma((Vec)((Words)a << 16), (Vec)((Words)b << 16), seconds);
#endif
}

}  // namespace mirasol::MIRASOL_ISA
