#pragma once
// What AMX changes: rows are padded to whole tile registers, and what ends in a query is a product with values that are
// transposed, (value_dim, keys), since both factors of a tile register are read along the sum.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

// In elements: terms of a product are whole tile registers, of pairs.
static inline int64_t amx_dim(int64_t dim) { return whole_tiles((dim + 1) / 2) * 2; }
// Of transposed rows: an odd number of lines, so that they use all sets of a first-level cache.
static inline int64_t amx_keys(int64_t keys) { return (amx_dim(keys) / 32 | 1) * 32; }

// to (rows, amx_dim) = the rows, and zeros behind each.
template <class T>
static inline void amx_rows(const T* from, int64_t stride, int rows, int64_t dim, float* to) {
  const int64_t row = amx_dim(dim) / 2, bytes = dim * sizeof(T);
  for (int r = 0; r < rows; ++r, to += row) {
    fetch(from + (r + AHEAD) * stride, dim);
    if (2 * row != dim) store(to + row - WIDTH, Vec{});
    std::memcpy(to, from + r * stride, bytes);
  }
}

// to (padded dim, row) = the rows transposed, as pairs of rows, and zeros up to a whole tile register.
template <class T>
static inline void amx_columns(const T* from, int64_t stride, int rows, int64_t dim, float* to, int64_t row) {
  for (int r = 0; r < rows; r += 2 * SIDE)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      const auto halves = [&](int i) { return i < rows ? load_halves(from + i * stride + d, n) : Halves{}; };
      Vec x[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) x[i] = pair(halves(r + 2 * i), halves(r + 2 * i + 1));
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j) store(to + (d + j) * row + r / 2, x[j]);
    }
}

// Whether all of (rows, columns), pairs, are finite; what is not becomes 0.
static inline bool amx_finite(float* x, int64_t rows, int64_t columns, int64_t row) {
  typedef uint16_t All __attribute__((vector_size(4 * WIDTH)));
  const auto each = [&](auto use) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; i += WIDTH) {
        const All y = (All)load(x + r * row + i);
        use(x + r * row + i, y, (y & 0x7f80) == 0x7f80);
      }
  };
  Bits bad{};
  each([&](float*, All, auto infinite) { bad |= (Bits)infinite; });
  if (!any(bad != 0)) return true;
  each([&](float* at, All y, auto infinite) { store(at, (Vec)(y & ~(All)infinite)); });
  return false;
}

constexpr int AMX_KEYS = 192;  // of a block, at most

struct AmxSeen {  // of a block of keys
  uint64_t by[AMX_KEYS];  // the rows of a tile that see a key
  int first, last;        // keys that some row sees, from a whole tile register on: transposed, whole lines
};

// The keys between `key` and `end`; false if no row sees one.  The sweep ends where it is.
static inline bool amx_seen(Pieces& sweep, int64_t key, int64_t end, AmxSeen& seen) {
  Piece piece;
  seen.first = AMX_KEYS, seen.last = 0, sweep.end = end;
  while (next(sweep, AMX_KEYS, piece)) {
    if (!seen.last) std::memset(seen.by, 0, sizeof seen.by);
    const int from = int(piece.key - key), to = from + piece.keys;
    for (int i = from; i < to; ++i) seen.by[i] |= bits(piece.row, piece.row + piece.rows);
    if (from < seen.first) seen.first = from / (2 * SIDE) * (2 * SIDE);
    if (to > seen.last) seen.last = to;
  }
  return seen.last;
}

// Keys and the vectors of rows that see one of them.  All are multiplied: what a row does not see has a weight of 0, and
// factors are finite.  Where pieces are short, as in text, products would hardly do more than begin.
struct AmxStep {
  const uint64_t* seen;  // by which rows, of each key
  int key, keys;         // the first, in its block, and how many
  int first, count;      // vectors
  bool masked;           // not every row of these, of `rows`, sees every key
};

static inline AmxStep amx_step(const AmxSeen& seen, int from, int to, uint64_t rows) {
  uint64_t some = 0, each = rows;
  for (int i = from; i < to; ++i) some |= seen.by[i], each &= seen.by[i];
  const int first = some ? __builtin_ctzll(some) / WIDTH : 0;
  const int end = some ? (TILE - __builtin_clzll(some) + WIDTH - 1) / WIDTH : 0;
  const bool masked = each != (rows & bits(first * WIDTH, end * WIDTH));
  return {seen.by + from, from, to - from, first, end - first, masked};
}

static inline Bits amx_mask(uint64_t rows, int v) {
  Words lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = 1u << i;
  return (Bits)((lane & uint32_t(rows >> (v * WIDTH))) != 0u);
}

// As scores, gather and scatter of tile.h and backward.h, of a step.
static inline void amx_scores(const AmxStep& step, const float* tile, int64_t dim, const Factor& k, const Scores& to) {
  const int64_t terms = amx_dim(dim) / 2;
  amx_gemm({.vectors = step.count, .n = int(whole_tiles(step.keys)), .k = int(terms / SIDE),
            .a = tile + step.first * WIDTH * terms, .a_k = WIDTH, .a_v = WIDTH * terms, .b = k.data, .b_n = k.row,
            .c = to.at(0, step.first), .c_n = to.key, .c_v = to.vector});
}

static inline void amx_gather(const AmxStep& step, const Scores& p, const float* x, int64_t row, int64_t dim,
                              float* tile) {
  amx_gemm({.vectors = step.count, .n = int(dim), .k = int(amx_dim(step.keys) / (2 * SIDE)), .a = p.at(0, step.first),
            .a_k = p.key, .a_v = p.vector, .b = reinterpret_cast<const Element*>(x), .b_n = row,
            .c = tile + step.first * WIDTH * dim, .c_n = WIDTH, .c_v = WIDTH * dim, .add = true});
}

static inline void amx_scatter(const AmxStep& step, float* p, const float* x, int64_t dim, float* to) {
  constexpr int TWO = 2 * SIDE / WIDTH;  // vectors of a tile register of lanes
  const int end = step.first + step.count, first = step.first / TWO * TWO, last = (end + TWO - 1) / TWO * TWO;
  const int64_t width = padded(dim);
  for (int key = 0; key < step.keys; ++key) {
    float* const row = p + key * TILE;
    for (int v = first; v < step.first; ++v) store_halves(row + v * WIDTH / 2, Halves{}, WIDTH);
    for (int v = end; v < last; ++v) store_halves(row + v * WIDTH / 2, Halves{}, WIDTH);
  }
  const int64_t lanes = first * WIDTH / 2;  // in pairs
  amx_gemm({.vectors = int(width / WIDTH), .n = step.keys, .k = (last - first) / TWO, .a = x + lanes * width,
            .a_k = width, .a_v = WIDTH, .b = reinterpret_cast<const Element*>(p + lanes), .b_n = TILE, .c = to,
            .c_n = width, .c_v = WIDTH, .add = true});
}

// What amx_finite took from keys or values, to the rows that see them.
template <class T>
static void amx_rest(const AmxStep& step, const Scores& s, const T* from, int64_t stride, int64_t dim, float* tile) {
  for (int key = 0; key < step.keys; ++key)
    for (int64_t d = 0; d < dim; ++d) {
      const uint32_t bits = from[key * stride + d].bits;
      if ((bits & 0x7f80u) != 0x7f80u) continue;
      const Vec value = (Vec)(Words{} + (bits << 16));
      for (int v = step.first; v < step.first + step.count; ++v) {
        const Words two = (Words)load(s.at(key / 2, v));
        const Vec p = (Vec)(key % 2 ? two & 0xffff0000u : two << 16);
        float* const to = tile + v * WIDTH * dim + d * WIDTH;
        store(to, load(to) + keep(amx_mask(step.seen[key], v), p * value));
      }
    }
}

// And from rows, to the keys that they see.
template <class T>
static void amx_rest_of_rows(const AmxStep& step, const float* p, const Lanes<const T>& from, int lanes, int64_t dim,
                             float* to) {
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t d = 0; d < dim; ++d) {
      const T value = from(lane)[d];
      if ((value.bits & 0x7f80u) != 0x7f80u) continue;
      for (int key = 0; key < step.keys; ++key)
        if (step.seen[key] >> lane & 1) {
          const Halves two = {reinterpret_cast<const T*>(p + key * TILE)[lane].bits, value.bits};
          const Vec x = to_float(value, two);
          to[key * padded(dim) + d] += x[0] * x[1];
        }
    }
}

// Sums of products of pairs, n <= SIDE of them, in the order in which a tile register sums them.
static inline Vec amx_sum(const Vec (&x)[WIDTH], const Vec (&y)[WIDTH], int n) {
  Vec firsts{}, seconds{};
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if (i < n) {
      firsts = fma((Vec)((Words)x[i] << 16), (Vec)((Words)y[i] << 16), firsts);
      seconds = fma((Vec)((Words)x[i] & 0xffff0000u), (Vec)((Words)y[i] & 0xffff0000u), seconds);
    }
  return firsts + seconds;
}

}  // namespace mirasol::MIRASOL_ISA
