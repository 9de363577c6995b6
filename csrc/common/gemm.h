#pragma once
// The one product under all kernels: C(n, m) += B(n, k) A(k, m), small enough to stay in cache.
// The lanes of a vector run along m, the elements of B are broadcast; so nothing is packed that lies in whole vectors,
// and B may lie either way (b_n and b_k are its two strides).  Each call sums its k terms from zero, in order,
// and adds the sum to C once: as exact as a blocked sum, and the same whatever else is computed.
// The elements of A and B are floats, or pairs of bfloat16 along k (PAIRS): the same 32 bits to everything but `dot`.
#include "common/half.h"

namespace mirasol::MIRASOL_ISA {

#if defined(__AVX512F__)
constexpr int MAX_VECTORS = 6;  // 32 registers
constexpr int BLOCK[] = {0, 8, 8, 8, 6, 4, 4};
#elif defined(__AVX2__)
constexpr int MAX_VECTORS = 3;  // 16 registers
constexpr int BLOCK[] = {0, 8, 6, 4};
#elif defined(__aarch64__)
constexpr int MAX_VECTORS = 4;  // 32 registers
constexpr int BLOCK[] = {0, 8, 8, 6, 4};
#else
constexpr int MAX_VECTORS = 3;  // 16 registers, one of them for the product that is not fused
constexpr int BLOCK[] = {0, 8, 4, 3};
#endif

// Memory that is on its way to a cache while something is computed, `step` bytes for each term of a block of C: at the
// pace of a product, where a loop of its own would have to wait for it.
struct Ahead {
  const char* next;
  int64_t step;
};

struct Product {
  int vectors, n, k;  // m is `vectors` whole vectors
  const float* a;
  int64_t a_k, a_v;  // strides; a_v and c_v from vector to vector
  const Element* b;
  int64_t b_n, b_k;
  float* c;
  int64_t c_n, c_v;
  bool add = false;            // C += B A, else C = B A
  const Bits* mask = nullptr;  // one per vector, or none: C of a lane that is off gets nothing, not even 0 * NaN
  float* top = nullptr;        // (m), or none: becomes the largest of itself and its column of C, NaN passed over,
  const Bits* on = nullptr;    // in lanes that are on (one per vector, or none: in all)
  Ahead* ahead = nullptr;      // or none; of pairs only
};

template <bool PAIRS>
static inline Vec step(Vec a, Vec b, Vec c) {
  return PAIRS ? dot(a, b, c) : fma(a, b, c);
}

// How many terms of its blocks a product has: for the step of an Ahead.
static inline int64_t terms_of_blocks(int64_t vectors, int64_t n, int64_t k) {
  const int64_t passes = (vectors + MAX_VECTORS - 1) / MAX_VECTORS, rows = BLOCK[(vectors + passes - 1) / passes];
  return passes * ((n + rows - 1) / rows) * k;
}

// N rows of V vectors of C in registers.
template <bool PAIRS, int V, int N, bool AHEAD>
static inline void gemm_block(Product p) {
  Vec sum[N][V] = {};
  Ahead ahead = AHEAD ? *p.ahead : Ahead{};
  for (int i = 0; i < p.k; ++i, p.a += p.a_k, p.b += p.b_k) {
    if constexpr (AHEAD) __builtin_prefetch(ahead.next), ahead.next += ahead.step;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec factor = broadcast(p.b[n * p.b_n]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sum[n][v] = step<PAIRS>(load(p.a + v * p.a_v), factor, sum[n][v]);
    }
  }
  if constexpr (AHEAD) p.ahead->next = ahead.next;
  if (p.mask) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[n][v] = keep(p.mask[v], sum[n][v]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* c = p.c + n * p.c_n + v * p.c_v;
      store(c, p.add ? load(c) + sum[n][v] : sum[n][v]);
    }
  if (!p.top) return;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Vec top = sum[0][v];
#pragma GCC unroll 8
    for (int n = 1; n < N; ++n) top = max(sum[n][v], top);
    float* to = p.top + v * WIDTH;
    if (p.on) top = select(p.on[v], top, load(to));
    store(to, max(top, load(to)));
  }
}

// The rows left over after whole blocks, in one block of their number, at most N.
template <bool PAIRS, int V, int N, bool AHEAD>
static inline void gemm_rest(const Product& p) {
  if constexpr (N > 0) {
    if (p.n == N) return gemm_block<PAIRS, V, N, AHEAD>(p);
    gemm_rest<PAIRS, V, N - 1, AHEAD>(p);
  }
}

template <bool PAIRS, int V, bool AHEAD>
static void gemm_rows(Product p) {
  constexpr int N = BLOCK[V];
  for (; p.n >= N; p.n -= N, p.b += N * p.b_n, p.c += N * p.c_n) gemm_block<PAIRS, V, N, AHEAD>(p);
  gemm_rest<PAIRS, V, N - 1, AHEAD>(p);
}

template <bool PAIRS, int V>
static void gemm_width(const Product& p) {
  if constexpr (V > 0) {
    if (p.vectors != V) return gemm_width<PAIRS, V - 1>(p);
    if constexpr (PAIRS)
      if (p.ahead) return gemm_rows<PAIRS, V, true>(p);
    gemm_rows<PAIRS, V, false>(p);
  }
}

template <bool PAIRS = false>
static void gemm(Product p) {
  int left = p.vectors;
  for (int blocks = (left + MAX_VECTORS - 1) / MAX_VECTORS; blocks > 0; --blocks) {
    p.vectors = (left + blocks - 1) / blocks;  // of nearly the same width: 8 is 4 + 4, not 6 + 2
    gemm_width<PAIRS, MAX_VECTORS>(p);
    left -= p.vectors;
    p.a += p.vectors * p.a_v, p.c += p.vectors * p.c_v;
    if (p.mask) p.mask += p.vectors;
    if (p.top) p.top += p.vectors * WIDTH;
    if (p.on) p.on += p.vectors;
  }
}

}  // namespace mirasol::MIRASOL_ISA
