#pragma once
// For the C++ tests of every op: numbers drawn, halves by their definition, errors and their budget, work shared among
// threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>
#include "common/dtype.h"
#include "common/isa.h"
#include "common/run.h"

namespace mirasol::testing {

using std::vector;

// Under sanitizers kernels run and nothing is compared with the definition, whose index arithmetic would take most of
// the time: the same tests do that without them.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool JUDGED = false;
#else
constexpr bool JUDGED = true;
#endif

constexpr float NaN = std::numeric_limits<float>::quiet_NaN();
inline std::mt19937 generator(2026);
inline int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Rounded to nearest, ties to even.  `bits`: of the mantissa; exponents from `least` on.
inline float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::float32 || !std::isfinite(x) || x == 0) return x;
  const int bits = dtype == Dtype::bfloat16 ? 7 : 10, least = dtype == Dtype::bfloat16 ? -126 : -14;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), least) - bits), y = std::nearbyint(x / unit) * unit;
  return dtype == Dtype::float16 && std::abs(y) > 65504 ? std::copysign(std::numeric_limits<float>::infinity(), x) : y;
}

inline uint16_t encoded(float x, Dtype dtype) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0, bits = dtype == Dtype::bfloat16 ? 7 : 10;
  const int bias = dtype == Dtype::bfloat16 ? 127 : 15;
  const uint16_t infinite = uint16_t((2 * bias + 1) << bits);
  x = rounded(std::abs(x), dtype);
  if (std::isnan(x)) return infinite | 1;
  if (std::isinf(x)) return sign | infinite;
  const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
  const int mantissa = int(std::ldexp(double(x), bits - exponent));  // with the leading 1, which subnormals lack
  return sign | uint16_t(((exponent + bias - 1) << bits) + mantissa);
}

inline float decoded(uint16_t x, Dtype dtype) {
  const int bits = dtype == Dtype::bfloat16 ? 7 : 10, bias = dtype == Dtype::bfloat16 ? 127 : 15;
  const int exponent = (x & 0x7fff) >> bits, mantissa = x & ((1 << bits) - 1);
  const float sign = x & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) return mantissa ? NaN : sign * std::numeric_limits<float>::infinity();
  return sign * float(std::ldexp(exponent ? mantissa + (1 << bits) : mantissa, std::max(exponent, 1) - bias - bits));
}

struct Way {
  const char* name;
  Dtype dtype;
  Products products;
};

// bfloat16 in all ways, whichever this chip would take.  The build of avx512 spells out what tile registers do, that of
// avx512bf16 has them or has not, narrower ones know none.
inline vector<Way> ways_of_halves() {
  vector<Way> ways = {{", float16", Dtype::float16, Products::single},
                      {", bfloat16", Dtype::bfloat16, Products::single},
                      {", bfloat16 in pairs", Dtype::bfloat16, Products::pairs}};
  if (isa() == Isa::avx512 || isa() == Isa::amx)
    ways.push_back({", bfloat16 in tiles", Dtype::bfloat16, Products::amx});
  return ways;
}

// The error of `got` as a share of its budget: twice `unavoidable`, that of the definition in float32 rounded to the
// dtype, plus four ulps of the largest value.
inline double excess(const vector<double>& got, const vector<double>& exact, double unavoidable, Dtype dtype) {
  const double ulp = dtype == Dtype::float32 ? 0x1p-23 : dtype == Dtype::float16 ? 0x1p-10 : 0x1p-7;
  double error = 0, largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isinf(exact[i]) ? got[i] != exact[i] : !std::isfinite(got[i])) return INFINITY;
    if (std::isinf(exact[i])) continue;
    error = std::max(error, std::abs(got[i] - exact[i])), largest = std::max(largest, std::abs(exact[i]));
  }
  return error == 0 ? 0 : error / (2 * unavoidable + 4 * ulp * largest);
}

// common/run.h with NaN in every workspace.
template <class Each>
void run(int64_t threads, int64_t items, int64_t workspace, const Each& each) {
  share(OwnThreads{}, threads, items, workspace, [&](float* space, int64_t begin, int64_t end) {
    std::fill(space, space + workspace, NaN);
    each(space, begin, end);
  });
}

}  // namespace mirasol::testing
