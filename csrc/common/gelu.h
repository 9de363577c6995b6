#pragma once
// GELU and its slope, a vector at a time; HALF: of what becomes a bfloat16, with the cheaper exponential.
#include "common/half.h"

namespace mirasol::MIRASOL_ISA {

template <bool HALF>
static inline Vec exp_of(Vec x) { return HALF ? exp_for_bfloat16(x) : exp(x); }

// e^-x for x >= 0 or NaN.
template <bool HALF>
static inline Vec fade(Vec x) { return exp_of<HALF>(-max(x, Vec{})); }

// z Phi(z).  erfc(|x|) = t (polynomial in t) e^(-x^2) with t = 1 / (1 + |x| / 2), within 1.5e-8, fitted for that.
template <bool HALF = false>
static inline Vec gelu_erf(Vec z, Vec* slope) {
  const Vec a = max(z, -z) * 0.707106781f, d = fma(a, broadcast(0.5f), broadcast(1.0f));
  const Vec t = HALF ? reciprocal(d) : 1.0f / d;
  Vec p = fma(t, broadcast(0.0587974265f), broadcast(-0.218218401f));
  p = fma(p, t, broadcast(0.122140959f));
  p = fma(p, t, broadcast(0.307718247f));
  p = fma(p, t, broadcast(0.130822539f));
  p = fma(p, t, broadcast(0.321704954f));
  p = fma(p, t, broadcast(0.277034283f));
  const Vec bell = fade<HALF>(a * a), tail = p * t * bell * 0.5f, area = select(z < 0.0f, tail, 1.0f - tail);
  if (slope) *slope = fma(z * 0.398942280f, bell, area);
  return z * area;
}

// z / (1 + e^(-2 u)) with u = sqrt(2 / pi) (z + 0.044715 z^3), which is z (1 + tanh u) / 2.
template <bool HALF = false>
static inline Vec gelu_tanh(Vec z, Vec* slope) {
  constexpr float root = 0.797884561f, cubic = 0.044715f;
  const Vec square = z * z, twice = 2 * root * z * fma(square, broadcast(cubic), broadcast(1.0f));
  const Vec power = exp_of<HALF>(-max(twice, broadcast(-88.0f)));
  const Vec area = HALF ? reciprocal(1.0f + power) : 1.0f / (1.0f + power);
  if (slope) {  // 1 - area is power * area, without the cancellation
    const Vec rise = 2 * root * fma(square, broadcast(3 * cubic), broadcast(1.0f));
    *slope = fma(z * area * (power * area), rise, area);
  }
  return z * area;
}

}  // namespace mirasol::MIRASOL_ISA
