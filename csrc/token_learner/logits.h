#pragma once
// A tile of tokens from memory, and its logits.
// A tile holds the raw tokens as floats, read from memory once.  Normalised tokens exist for some channels at a time,
// as one factor of a product.  With PAIRS there is no tile of floats: factors are the raw tokens where they lie, and
// the same as pairs of tokens.
#include <algorithm>
#include "common/gelu.h"
#include "token_learner/tile.h"

namespace mirasol::MIRASOL_ISA {

struct Tokens {  // of a tile
  float* x;                 // (rows, row), whole vectors of c; or (rows / 2, row) pairs of tokens
  float *mean, *inverse;    // (rows): (x - mean) inverse is normalised
  float* block;             // (rows, BLOCK_ROW): of some channels, as a product wants them
  float* room;              // of a product in tile registers, or none
};

static Tokens tokens(const Call& call, const Sizes& size, Space& space) {
  const int64_t columns = amx_room(SIDE, size.c + size.h + size.k);
  const int64_t rows = amx_room(std::max(call.h, call.k), size.rows / 2);
  return {space.take(size.rows * size.row), space.take(size.rows), space.take(size.rows),
          space.take(size.rows * BLOCK_ROW), in_tiles(call) ? space.take(std::max(columns, rows)) : nullptr};
}

// What a product over tokens takes more of, in tile registers: zeros.
static inline void fill(const Call& call, float* pairs, int tokens, int64_t row) {
  const int64_t first = terms<true>(tokens);
  if (in_tiles(call)) zero(pairs + first * row, (whole_tiles(first) - first) * row);
}

// The mean over channels of what add(c, Vec{}) gives; add(c, sum) adds it to a sum.
template <class Add>
static inline float mean_of(const Call& call, const Sizes& size, Add add) {
  constexpr int SUMS = 4;  // at a time: one alone would wait for each addition
  const int64_t whole = size.c - WIDTH;
  Vec sums[SUMS] = {};
  int64_t c = 0;
  for (; c + (SUMS - 1) * WIDTH < whole; c += SUMS * WIDTH)
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) sums[i] = add(c + i * WIDTH, sums[i]);
  for (; c < whole; c += WIDTH) sums[0] = add(c, sums[0]);
  sums[1] += keep(lanes_between(0, int(call.c - whole)), add(whole, Vec{}));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(call.c);
}

// Two rows of a tile at a time: while the sum of one is on its way, the other has work to do.  With `level` (rows)
// their means go there, and are taken away from the tile: `mean` is 0.
template <class T>
static void fetch_floats(const Call& call, const Tile& tile, const Sizes& size, const Tokens& to,
                         float* level = nullptr) {
  const Source& source = call.sources[tile.source];
  const T* const x = static_cast<const T*>(source.data) + tile.batch * source.batch + tile.token * source.row;
  const T* const table = source.table ? static_cast<const T*>(source.table) + tile.token * call.c : nullptr;
  const auto mean = [&](int r) {
    float* const row = to.x + r * size.row;
    to.mean[r] = mean_of(call, size, [&](int64_t c, Vec sum) {
      const int n = least(WIDTH, call.c - c);
      Vec value = load_part(x + r * source.row + c, n);
      if (table) value += load_part(table + r * call.c + c, n);
      store(row + c, value);
      return sum + value;
    });
  };
  const auto inverse = [&](int r) {
    float *const row = to.x + r * size.row, mean = to.mean[r];
    const float variance = mean_of(call, size, [&](int64_t c, Vec sum) {
      const Vec centred = load(row + c) - mean;
      if (level) store(row + c, centred);
      return fma(centred, centred, sum);
    });
    to.inverse[r] = 1 / __builtin_sqrtf(variance + call.eps);
    if (level) level[r] = mean, to.mean[r] = 0;
  };
  for (int r = 0; r < tile.real; r += 2) {
    const bool both = r + 1 < tile.real;
    mean(r);
    if (both) mean(r + 1);
    inverse(r);
    if (both) inverse(r + 1);
  }
}

struct Raw {  // tokens of bfloat16 where they lie
  const bfloat16* x;
  int64_t row;
  const Element* pairs() const { return reinterpret_cast<const Element*>(x); }  // of channels; rows are row / 2 apart
};

// Tokens as pairs of tokens, for sums over them, and their statistics.  As pairs of channels, for sums over these, they
// lie in memory already, unless a table is added: the sum is rounded, as the definition in bfloat16 has it.
static Raw fetch_pairs(const Call& call, const Tile& tile, const Sizes& size, const Tokens& to) {
  const Source& source = call.sources[tile.source];
  Raw raw{static_cast<const bfloat16*>(source.data) + tile.batch * source.batch + tile.token * source.row, source.row};
  if (source.table || raw.row % 2) {
    bfloat16* const copy = reinterpret_cast<bfloat16*>(to.x + size.rows / 2 * size.row);
    const bfloat16* const table =
        source.table ? static_cast<const bfloat16*>(source.table) + tile.token * call.c : nullptr;
    for (int r = 0; r < tile.real; ++r)
      for (int64_t c = 0; c < call.c; c += WIDTH) {
        const int n = least(WIDTH, call.c - c);
        Vec x = load_part(raw.x + r * raw.row + c, n);
        if (table) x += load_part(table + r * call.c + c, n);
        store_part(copy + r * size.row + c, x, n);
      }
    raw = {copy, size.row};
  }
  const auto words = [&](int r) { return raw.pairs() + r * raw.row / 2; };
  const int64_t terms = call.c / 2, whole = terms / WIDTH * WIDTH;
  const Vec ones = (Vec)(Words{} + 0x3f803f80u);
  struct Moments {
    Vec level[2], square[2];  // sums of x and of x x, which are exact in float, in two chains
    void add(int i, Vec x, Vec ones) { level[i] = dot(x, ones, level[i]), square[i] = dot(x, x, square[i]); }
  };
  const auto statistics = [&](int r, const Moments& m) {
    const float mean = sum(m.level[0] + m.level[1]) / float(call.c);
    float variance = sum(m.square[0] + m.square[1]) / float(call.c) - mean * mean;
    if (!(variance * 64 > mean * mean)) {  // they cancel: again, from deviations
      Vec total{};
      for (int64_t t = 0; t < terms; t += WIDTH) {
        const int n = least(WIDTH, terms - t);
        const Vec x = load_part(words(r) + t, n), first = (Vec)((Words)x << 16) - mean;
        const Vec second = (Vec)((Words)x & 0xffff0000u) - mean;
        total += keep(lanes_between(0, n), fma(second, second, first * first));
      }
      variance = sum(total) / float(call.c);
    }
    to.mean[r] = mean, to.inverse[r] = 1 / __builtin_sqrtf(variance + call.eps);
  };
  for (int r = 0; r < tile.real; r += 2) {
    for (int64_t ahead = r + AHEAD; ahead < r + AHEAD + 2; ++ahead)
      for (int64_t c = 0; c < call.c; c += 32) __builtin_prefetch(raw.x + ahead * raw.row + c);
    const bool both = r + 1 < tile.real;
    const Element *const x = words(r), *const y = both ? words(r + 1) : x;
    float* const pairs = to.x + r / 2 * size.row;
    Moments m[2] = {};
    const auto add = [&](int i, Vec a, Vec b) { m[0].add(i, a, ones), m[1].add(i, b, ones); };
    const auto each = [&](auto both) {
      const auto partner = [&](Vec b) { return both ? b : Vec{}; };
      int64_t t = 0;
      for (; t + WIDTH < whole; t += 2 * WIDTH)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const Vec a = load(x + t + i * WIDTH), b = load(y + t + i * WIDTH);
          add(i, a, b);
          const Interleaved two = interleave(a, partner(b));
          store(pairs + 2 * (t + i * WIDTH), two.low), store(pairs + 2 * (t + i * WIDTH) + WIDTH, two.high);
        }
      for (; t < terms; t += WIDTH) {
        const int n = least(WIDTH, terms - t);
        const Vec a = load_part(x + t, n), b = load_part(y + t, n);
        add(0, a, b);
        const Interleaved two = interleave(a, partner(b));
        store(pairs + 2 * t, two.low);
        if (2 * t + WIDTH < size.c) store(pairs + 2 * t + WIDTH, two.high);
      }
    };
    both ? each(std::true_type{}) : each(std::false_type{});
    statistics(r, m[0]);
    if (both) statistics(r + 1, m[1]);
  }
  fill(call, to.x, tile.real, size.row);
  return raw;
}

// For the step of an Ahead.
static inline int64_t steps_of_blocks(const Call& call, int64_t vectors, int64_t n, int64_t k) {
  return in_tiles(call) ? amx_steps(vectors, n, k) : terms_of_blocks(vectors, n, k);
}

// The next tile of pairs, for as many terms of blocks as there will be until then.
template <bool PAIRS>
static inline Ahead next_tile(const Call& call, const Tile& tile, int64_t terms) {
  const Source& source = call.sources[tile.source];
  if (!PAIRS || !tile.next || source.row != call.c) return {};  // rows that are apart: `fetch_pairs` knows where
  const int64_t first = tile.batch * source.batch + (tile.token + tile.rows) * source.row;
  return {static_cast<const char*>(source.data) + 2 * first, (2 * tile.next * call.c + terms - 1) / terms};
}

template <class T, bool PAIRS>
static inline Raw fetch(const Call& call, const Tile& tile, const Sizes& size, const Tokens& to,
                        float* level = nullptr) {
  if constexpr (PAIRS) return fetch_pairs(call, tile, size, to);
  fetch_floats<T>(call, tile, size, to, level);
  return {};
}

// Normalised channels [c, c + WIDTH) of a token.
static inline Vec normalised(const Sizes& size, const Tokens& t, int token, int64_t c) {
  return (load(t.x + token * size.row + c) - t.mean[token]) * t.inverse[token];
}

// Rows of floats 2 i and 2 i + 1 as pairs in row i, in place.
static inline void pair_rows(float* x, int rows, int64_t row, int64_t columns) {
  for (int r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += WIDTH)
      store(x + r / 2 * row + c, pair(load(x + r * row + c), r + 1 < rows ? load(x + (r + 1) * row + c) : Vec{}));
}

// to (rows / 2, row): rows of bfloat16, each in the first half of `row` floats, as pairs of rows.
static inline void pair_tokens(const float* x, int rows, int64_t row, float* to) {
  for (int r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < row; i += WIDTH) {
      const auto halves = [&](int of) { return load_halves(x + of * row + i / 2, WIDTH); };
      store(to + r / 2 * row + i, pair(halves(r), r + 1 < rows ? halves(r + 1) : Halves{}));
    }
}

// to (n, m) = A (n, terms) B, with B in panels (m / WIDTH, terms, WIDTH), `depth` terms at a time; with PAIRS terms are
// pairs, of both.
template <bool PAIRS>
static inline void product(int n, int64_t terms, int64_t depth, const Element* a, int64_t a_row, const float* panels,
                           int64_t m, float* to, int64_t to_row, float* room, Ahead* ahead = nullptr) {
  for (int64_t t = 0; t < terms; t += depth)
    gemm<PAIRS>({.vectors = int(m / WIDTH), .n = n, .k = least(depth, terms - t), .a = panels + t * WIDTH, .a_k = WIDTH,
                 .a_v = terms * WIDTH, .b = a + t, .b_n = a_row, .b_k = 1, .c = to, .c_n = to_row, .c_v = WIDTH,
                 .add = t > 0, .ahead = ahead, .tiles = room});
}

// to (rows, m) = X B over the channels, in floats, with B in panels (m / WIDTH, c, WIDTH); value(row, c): of X.
template <class Value>
static inline void product_of_channels(const Call& call, int rows, Value value, float* block, const float* panels,
                                       int64_t m, float* to) {
  const int64_t channels = depth_of(call.c);
  for (int64_t c = 0; c < call.c; c += channels) {
    const int n = least(channels, call.c - c);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < n; i += WIDTH) store(block + r * BLOCK_ROW + i, value(r, c + i));
    gemm({.vectors = int(m / WIDTH), .n = rows, .k = n, .a = panels + c * WIDTH, .a_k = WIDTH, .a_v = call.c * WIDTH,
          .b = block, .b_n = BLOCK_ROW, .b_k = 1, .c = to, .c_n = m, .c_v = WIDTH, .add = c > 0});
  }
}

// to (n, m) = A (n, terms) B with B as rows (terms, m): the small products.
template <bool PAIRS>
static inline void product_of_rows(int n, int64_t terms, int64_t depth, const float* a, int64_t a_row,
                                   const float* rows, int64_t m, float* to, float* room = nullptr) {
  for (int64_t t = 0; t < terms; t += depth)
    gemm<PAIRS>({.vectors = int(m / WIDTH), .n = n, .k = least(depth, terms - t), .a = rows + t * m, .a_k = m,
                 .a_v = WIDTH, .b = a + t, .b_n = a_row, .b_k = 1, .c = to, .c_n = m, .c_v = WIDTH, .add = t > 0,
                 .tiles = room});
}

// sum (n, m) += or = A^T B over the tokens, or pairs of them, with A (tokens, n) and B (tokens, m), filled.
template <bool PAIRS>
static inline void gather(int tokens, int64_t n, const float* a, int64_t a_row, const float* b, int64_t b_row,
                          int64_t m, float* sum, int64_t sum_row, bool add, float* room, Ahead* ahead = nullptr) {
  const int64_t all = terms<PAIRS>(tokens);
  gemm<PAIRS>({.vectors = int(m / WIDTH), .n = int(n), .k = int(room ? whole_tiles(all) : all), .a = b, .a_k = b_row,
               .a_v = WIDTH, .b = a, .b_n = 1, .b_k = a_row, .c = sum, .c_n = sum_row, .c_v = WIDTH, .add = add,
               .ahead = ahead, .tiles = room});
}

// A vector of what a small product takes, floats or half as many bytes of bfloat16; x may start where the row of floats
// does that it is made from, from the left to the right.
template <bool PAIRS>
static inline void store_factor(float* row, int64_t at, Vec x) {
  if constexpr (PAIRS) store_part(reinterpret_cast<bfloat16*>(row) + at, x, WIDTH);
  else store(row + at, x);
}

// z (rows, h) without b1; hidden (rows, h), which may be z; logits (rows, k) without b2; if asked for, slopes of the
// GELU.  Hidden units stay floats here: logits leave as floats, in the state.
// Pairs are of raw tokens, normalised afterwards: with w = w1 norm_weight, w (x - mean) inverse = (w x - mean sum(w))
// inverse.  A mean cancels there in float, from products of bfloat16 that are exact.
template <bool PAIRS>
static void logits(const Call& call, const Sizes& size, const Prepared& p, int rows, const Tokens& x, const Raw& raw,
                   float* z, float* hidden, float* slope, float* to, Ahead* ahead) {
  if constexpr (PAIRS)
    product<PAIRS>(rows, call.c / 2, depth_of(call.c / 2), raw.pairs(), raw.row / 2, p.w1_terms, size.h, z, size.h,
                   x.room, ahead);
  else
    product_of_channels(call, rows, [&](int r, int64_t c) { return normalised(size, x, r, c); }, x.block, p.w1_terms,
                        size.h, z);
  const auto each = [&](auto gelu) {
    for (int64_t h = 0; h < size.h; h += WIDTH) {
      const Vec bias = load(p.b1 + h), level = load(p.w1_mean + h) * float(call.c);
      for (int r = 0; r < rows; ++r) {
        const int64_t at = r * size.h + h;
        Vec rise{}, sum = load(z + at);
        if constexpr (PAIRS) sum = fma(level, broadcast(-x.mean[r]), sum) * x.inverse[r];
        if (slope) store(z + at, sum);
        store(hidden + at, gelu(sum + bias, slope ? &rise : nullptr));
        if (slope) store(slope + at, rise);
      }
    }
  };
  call.erf ? each(gelu_erf<PAIRS>) : each(gelu_tanh<PAIRS>);
  product_of_rows<false>(rows, call.h, depth_of(call.h), hidden, size.h, p.w2_terms, size.k, to);
}

}  // namespace mirasol::MIRASOL_ISA
