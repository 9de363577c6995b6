#pragma once
// What a step is made of: products of rows with a weight as torch's Linear holds it, and LayerNorm, a row at a time.
#include "common/gelu.h"
#include "common/gemm.h"
#include "latent_recurrence/kernel.h"

namespace mirasol::MIRASOL_ISA {

using latent_recurrence::Linear;
using latent_recurrence::Norm;

#if defined(__AVX512F__)
constexpr int OUTS = 6;  // 24 sums of 32 registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int OUTS = 3;  // 12 of 16
#else
constexpr int OUTS = 2;
#endif
constexpr int ROWS = 4;

struct Rows {  // y (n, m) = x (n, k) w (m, k)^T; strides in floats
  int n, m, k;
  const float* x;
  int64_t x_row;
  const float* w;
  int64_t w_row;
  float* y;
  int64_t y_row;
};

// N rows by M outputs in registers, vectors along k: w is read as it lies, so that a single step need not pack it.
template <int N, int M>
static inline void rows_block(const Rows& p) {
  Vec sum[N][M] = {};
  for (int i = 0; i < p.k; i += WIDTH) {
    Vec w[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) w[m] = load(p.w + m * p.w_row + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec x = load(p.x + n * p.x_row + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[n][m] = fma(x, w[m], sum[n][m]);
    }
  }
#pragma GCC unroll 24
  for (int first = 0; first < N * M; first += WIDTH) {
    Vec some[WIDTH] = {};
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i)
      if (first + i < N * M) some[i] = sum[(first + i) / M][(first + i) % M];
    const Vec done = sums(some);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i)
      if (first + i < N * M) p.y[(first + i) / M * p.y_row + (first + i) % M] = done[i];
  }
}

template <int N, int M>
static inline void rows_rest(const Rows& p) {  // the outputs left over, at most M
  if constexpr (M > 0) {
    if (p.m == M) return rows_block<N, M>(p);
    rows_rest<N, M - 1>(p);
  }
}

template <int N>
static void rows_of(Rows p) {
  for (; p.m >= OUTS; p.m -= OUTS, p.w += OUTS * p.w_row, p.y += OUTS) rows_block<N, OUTS>(p);
  rows_rest<N, OUTS - 1>(p);
}

template <int N>
static void rows_last(const Rows& p) {  // the rows left over, at most N
  if constexpr (N > 0) {
    if (p.n == N) return rows_of<N>(p);
    rows_last<N - 1>(p);
  }
}

// Rows outside: a few of them stay in a first-level cache while w passes by.
static void rows_times(Rows p) {
  for (; p.n >= ROWS; p.n -= ROWS, p.x += ROWS * p.x_row, p.y += ROWS * p.y_row) rows_of<ROWS>(p);
  rows_last<ROWS - 1>(p);
}

constexpr float EPS = 1e-6f;

// y = norm(x) of one row; its mean and 1 / deviation.
static void normalise(const float* x, int64_t c, const Norm& norm, float* mean, float* inverse, float* y) {
  const auto average = [&](auto value) {
    Vec total[2] = {};
    for (int64_t i = 0; i < c; i += 2 * WIDTH) {
      total[0] += value(i);
      if (i + WIDTH < c) total[1] += value(i + WIDTH);
    }
    return sum(total[0] + total[1]) / float(c);
  };
  const float centre = average([&](int64_t i) { return load(x + i); });
  const float variance = average([&](int64_t i) {
    const Vec away = load(x + i) - centre;
    return away * away;
  });
  const float scale = 1 / __builtin_sqrtf(variance + EPS);
  for (int64_t i = 0; i < c; i += WIDTH)
    store(y + i, fma((load(x + i) - centre) * scale, load(norm.weight + i), load(norm.bias + i)));
  *mean = centre, *inverse = scale;
}

}  // namespace mirasol::MIRASOL_ISA
