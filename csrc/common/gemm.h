#pragma once
// The one product under all kernels: C(n, m) += B(n, k) A(k, m), small enough to stay in cache.
// The lanes of a vector run along m, the elements of B are broadcast; so nothing is packed that lies in whole vectors,
// and B may lie either way (b_n and b_k are its two strides).  Each call sums its k terms from zero, in order,
// and adds the sum to C once: as exact as a blocked sum, and the same whatever else is computed.
// The elements of A and B are floats, or pairs of bfloat16 along k (PAIRS): the same 32 bits to everything but `dot`.
#include "common/amx.h"

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
  // Room for amx_room(n, k) floats, or none.  With it pairs are multiplied in tile registers, which an Amx must hold
  // ready: k is whole tiles then, and rows of B behind the last are readable where b_k is not 1.  Without mask and top.
  float* tiles = nullptr;
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

static inline int64_t amx_row_of(int64_t k) { return (k / SIDE | 1) * SIDE; }  // an odd number of cache lines
static inline int64_t amx_room(int64_t n, int64_t k) { return whole_tiles(n) * amx_row_of(k); }

static inline void amx_product(const Product& p) {
  AmxProduct whole{.vectors = p.vectors, .n = p.n, .k = p.k / SIDE, .a = p.a, .a_k = p.a_k, .a_v = p.a_v, .b = p.b,
                   .b_n = p.b_n, .c = p.c, .c_n = p.c_n, .c_v = p.c_v, .add = p.add,
                   .ahead = p.ahead};
  const int64_t row = amx_row_of(p.k);
  if (p.b_k == 1) {  // as it lies; the last rows, behind which there may be no memory, from a copy
    const int rest = p.n % SIDE;
    whole.n -= rest;
    amx_gemm(whole);
    if (rest == 0) return;
    for (int r = 0; r < rest; ++r)
      std::memcpy(p.tiles + r * row, p.b + (whole.n + r) * p.b_n, p.k * sizeof(float));
    whole.b = p.tiles, whole.b_n = row, whole.c += whole.n * p.c_n, whole.n = rest;
    return amx_gemm(whole);
  }
  for (int n = 0; n < p.n; n += SIDE)  // transposed
    for (int k = 0; k < p.k; k += SIDE) {
      Vec x[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) x[i] = load(p.b + n * p.b_n + (k + i) * p.b_k);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) store(p.tiles + (n + i) * row + k, x[i]);
    }
  whole.b = p.tiles, whole.b_n = row;
  amx_gemm(whole);
}

template <bool PAIRS = false>
static void gemm(Product p) {
  if constexpr (PAIRS && WIDTH == SIDE)
    if (p.tiles) return amx_product(p);
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
