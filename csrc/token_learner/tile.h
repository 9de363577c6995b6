#pragma once
// What forward and backward share: tiles of tokens and their logits.
// A tile holds the raw tokens as floats, read from memory once.  Normalised tokens exist for some channels at a time,
// as one factor of a product; LayerNorm's weight and bias are folded into w1 and b1.
// With PAIRS there is no tile of floats: the factors of the large products, those that have channels on a side, are raw
// tokens and other bfloat16, two terms of the sum in 32 bits.  The small ones between hidden units and learned tokens
// stay floats.
#include <type_traits>
#include "common/gemm.h"
#include "common/gelu.h"
#include "token_learner/kernel.h"

namespace mirasol::MIRASOL_ISA {

using token_learner::Call;
using token_learner::Source;

constexpr int64_t TILE_BYTES = 208 << 10;  // beside weights and sums a tile stays in a second-level cache
constexpr int AHEAD = 8;                   // rows of a tile that are on their way from memory
constexpr int64_t DEPTH = 128;             // terms of a product at a time: its panels stay in a first-level cache
constexpr int64_t BLOCK_ROW = DEPTH + 16;  // an odd number of cache lines, as is Sizes::row

// Of so many terms, how many to sum from zero before they join the rest: a short sum is summed in two halves, for its
// rounding.
static inline int64_t depth_of(int64_t terms) {
  const int64_t half = (terms / 2 + 15) / 16 * 16;
  return half < 16 ? 16 : half < DEPTH ? half : DEPTH;
}

template <bool PAIRS>
static constexpr int64_t terms(int64_t n) { return PAIRS ? (n + 1) / 2 : n; }

// Whole vectors of everything; rows of c are an odd number of cache lines apart, so that a column of them spreads over
// all sets of a cache.
struct Sizes {
  int64_t c, h, k, row;
  int rows;  // tokens of a tile, at most
  explicit Sizes(const Call& call) : c(padded(call.c)), h(padded(call.h)), k(padded(call.k)) {
    row = ((call.c + 15) / 16 | 1) * 16;
    const int64_t fit = TILE_BYTES / (row * int64_t(sizeof(float))) / 8 * 8;
    rows = int(fit < 16 ? 16 : fit > 128 ? 128 : fit);
  }
};

// Hands out consecutive pieces of a workspace.
struct Space {
  float* next;
  float* take(int64_t floats) {
    float* const taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
  }
};

static inline int64_t tiles_of(const Source& source, const Sizes& size) {
  return (source.tokens + size.rows - 1) / size.rows;
}

static inline int64_t tiles_of(const Call& call, const Sizes& size) {  // of a row of the batch
  int64_t tiles = 0;
  for (int64_t i = 0; i < call.count; ++i) tiles += tiles_of(call.sources[i], size);
  return tiles;
}

static inline int64_t tokens_of(const Call& call) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < call.count; ++i) tokens += call.sources[i].tokens;
  return tokens;
}

// Parts of a row of the batch, an item each: 64 items if each has `enough` tokens, and up to 8 already if it has 48,
// for which what a part costs beyond its tokens is a tenth.
static inline int64_t parts_of(const Call& call, int64_t enough) {
  const auto fit = [&](int64_t items, int64_t least) {
    const int64_t want = call.batch ? items / call.batch : 1, most = tokens_of(call) / least;
    return want < most ? want : most;
  };
  const int64_t many = fit(64, enough), few = fit(8, 48), parts = many > few ? many : few;
  const int64_t tiles = tiles_of(call, Sizes(call));
  return parts <= 1 ? 1 : parts < tiles ? parts : tiles;
}

struct Tile {
  int64_t source, batch, token;
  int rows, real;  // tokens, and how many of them count
  int next;        // tokens of the tile that follows it in memory and in turn, or 0
};

// Calls each(tile) for tiles [begin, end) of a row of the batch.
template <class Each>
static inline void for_tiles(const Call& call, const Sizes& size, int64_t batch, int64_t begin, int64_t end,
                             Each each) {
  int64_t before = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t n = call.sources[i].tokens, tiles = tiles_of(call.sources[i], size);
    int64_t valid = call.valid ? call.valid[batch * call.count + i] : n;
    valid = valid < 0 ? 0 : valid > n ? n : valid;
    for (int64_t t = begin > before ? begin - before : 0; t < tiles && before + t < end; ++t) {
      const int64_t first = t * n / tiles, last = (t + 1) * n / tiles;  // of nearly the same size
      const int real = valid <= first ? 0 : least(last - first, valid - first);
      const int64_t next = t + 1 < tiles && before + t + 1 < end && valid > last ? (t + 2) * n / tiles - last : 0;
      each(Tile{i, batch, first, int(last - first), real, int(next)});
    }
    before += tiles;
  }
}

struct Prepared {
  float* w1_terms;  // (h / WIDTH, c, WIDTH): w1 norm_weight, for the sum over channels
  float* w1_rows;   // (c / WIDTH, h, WIDTH): the same, for the sum over hidden units
  float* b1;        // (h) b1 + w1 norm_bias
  float* w1_mean;   // (h) of w1 norm_weight over channels
  float* w2_terms;  // (h, k)
  float* w2_rows;   // (k, h)
  float* b2;        // (k)
};

static Prepared prepared(const Call& call, float* at, int64_t* floats = nullptr) {
  const Sizes size(call);
  Space space{at};
  Prepared p;
  p.w1_terms = space.take(size.h * call.c), p.w1_rows = space.take(size.c * call.h), p.b1 = space.take(size.h);
  p.w1_mean = space.take(size.h);
  p.w2_terms = space.take(call.h * size.k), p.w2_rows = space.take(call.k * size.h), p.b2 = space.take(size.k);
  if (floats) *floats = space.next - at;
  return p;
}

int64_t token_learner_prepared(const Call& call) {
  int64_t floats;
  prepared(call, nullptr, &floats);
  return floats;
}

// Kernels are written once and compiled for each dtype: each(T{}, pairs).
template <class Do>
static inline void for_dtype(const Call& call, Do each) {
  switch (call.dtype) {
    case Dtype::float32: return each(float{}, std::false_type{});
    case Dtype::float16: return each(float16{}, std::false_type{});
    case Dtype::bfloat16:
      return call.pairs ? each(bfloat16{}, std::true_type{}) : each(bfloat16{}, std::false_type{});
  }
}

// Vectors x[0 .. n) to `to`, `row` apart; or half as many, of pairs (0 is the partner of an odd last one).
template <bool PAIRS>
static inline void store_terms(const Vec (&x)[WIDTH], int n, float* to, int64_t row = WIDTH) {
  for (int i = 0; i < n; i += PAIRS ? 2 : 1, to += row) {
    if constexpr (PAIRS) store(to, pair(x[i], x[i + 1]));
    else store(to, x[i]);
  }
}

int64_t token_learner_prepare_items(const Call& call) { return Sizes(call).h / WIDTH + 1; }

// Hidden units [h, h + WIDTH) of w1.
template <class T, bool PAIRS>
static void prepare_w1(const Call& call, int64_t h) {
  const Prepared p = prepared(call, call.prepared);
  const T *w1 = static_cast<const T*>(call.weights.w1), *weight = static_cast<const T*>(call.weights.norm_weight);
  const T *bias = static_cast<const T*>(call.weights.norm_bias), *b1 = static_cast<const T*>(call.weights.b1);
  const int rows = least(WIDTH, call.h - h);
  Vec moved[WIDTH] = {}, level[WIDTH] = {};
  for (int64_t c = 0; c < call.c; c += WIDTH) {
    const int n = least(WIDTH, call.c - c);
    const Vec gamma = load_part(weight + c, n), beta = load_part(bias + c, n);
    Vec x[WIDTH] = {};
    for (int i = 0; i < rows; ++i) {
      x[i] = load_part(w1 + (h + i) * call.c + c, n);
      moved[i] = fma(x[i], beta, moved[i]);
      x[i] *= gamma;
      if constexpr (PAIRS) x[i] = (Vec)(round_bfloat16(x[i]) & 0xffff0000u);  // level: of what products see
      level[i] += x[i];
    }
    store_terms<PAIRS>(x, rows, p.w1_rows + c * terms<PAIRS>(call.h) + terms<PAIRS>(h) * WIDTH);
    transpose(x);
    store_terms<PAIRS>(x, n, p.w1_terms + h * terms<PAIRS>(call.c) + terms<PAIRS>(c) * WIDTH);
  }
  store(p.b1 + h, sums(moved) + load_part(b1 + h, rows));
  store(p.w1_mean + h, sums(level) / float(call.c));
}

template <class T, bool PAIRS>
static void prepare_w2(const Call& call) {
  const Prepared p = prepared(call, call.prepared);
  const Sizes size(call);
  const T *w2 = static_cast<const T*>(call.weights.w2), *b2 = static_cast<const T*>(call.weights.b2);
  for (int64_t k = 0; k < call.k; k += WIDTH) {
    for (int64_t h = 0; h < call.h; h += WIDTH) {
      const int n = least(WIDTH, call.h - h);
      const int rows = least(WIDTH, call.k - k);
      Vec x[WIDTH] = {};
      for (int i = 0; i < rows; ++i) x[i] = load_part(w2 + (k + i) * call.h + h, n);
      store_terms<PAIRS>(x, rows, p.w2_rows + terms<PAIRS>(k) * size.h + h, size.h);
      transpose(x);
      store_terms<PAIRS>(x, n, p.w2_terms + terms<PAIRS>(h) * size.k + k, size.k);
    }
    store(p.b2 + k, load_part(b2 + k, least(WIDTH, call.k - k)));
  }
}

void token_learner_prepare(const Call& call, int64_t begin, int64_t end) {
  for_dtype(call, [&](auto type, auto pairs) {
    for (int64_t item = begin; item < end; ++item)
      if (item == 0) prepare_w2<decltype(type), pairs>(call);
      else prepare_w1<decltype(type), pairs>(call, (item - 1) * WIDTH);
  });
}

struct Tokens {  // of a tile
  float* x;                 // (rows, row), zeros from c to the next whole vector; or (rows / 2, row) pairs of tokens
  float *mean, *inverse;    // (rows): (x - mean) inverse is normalised
  float* block;             // (rows, BLOCK_ROW): of some channels, as a product wants them
};

static Tokens tokens(const Sizes& size, Space& space) {
  return {space.take(size.rows * size.row), space.take(size.rows), space.take(size.rows),
          space.take(size.rows * BLOCK_ROW)};
}

// Two rows of a tile at a time: while the sum of one is on its way, the other has work to do.
template <class T>
static void fetch_floats(const Call& call, const Tile& tile, const Sizes& size, const Tokens& to) {
  const Source& source = call.sources[tile.source];
  const T* const x = static_cast<const T*>(source.data) + tile.batch * source.batch + tile.token * source.row;
  const T* const table = source.table ? static_cast<const T*>(source.table) + tile.token * call.c : nullptr;
  const Bits last = lanes_between(0, int(call.c - size.c + WIDTH));  // of the last vector
  const int64_t whole = size.c - WIDTH;
  constexpr int SUMS = 4;  // at a time: one alone would wait for each addition
  // The mean over channels of what add(c, Vec{}) gives; add(c, sum) adds it to a sum.
  const auto average = [&](auto add) {
    Vec sums[SUMS] = {};
    int64_t c = 0;
    for (; c + (SUMS - 1) * WIDTH < whole; c += SUMS * WIDTH)
#pragma GCC unroll 4
      for (int i = 0; i < SUMS; ++i) sums[i] = add(c + i * WIDTH, sums[i]);
    for (; c < whole; c += WIDTH) sums[0] = add(c, sums[0]);
    sums[1] += keep(last, add(whole, Vec{}));
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(call.c);
  };
  const auto mean = [&](int r) {
    float* const row = to.x + r * size.row;
    to.mean[r] = average([&](int64_t c, Vec sum) {
      const int n = least(WIDTH, call.c - c);
      Vec value = load_part(x + r * source.row + c, n);
      if (table) value += load_part(table + r * call.c + c, n);
      store(row + c, value);
      return sum + value;
    });
  };
  const auto inverse = [&](int r) {
    const float *const row = to.x + r * size.row, mean = to.mean[r];
    const float variance = average([&](int64_t c, Vec sum) {
      const Vec centred = load(row + c) - mean;
      return fma(centred, centred, sum);
    });
    to.inverse[r] = 1 / __builtin_sqrtf(variance + call.eps);
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
  return raw;
}

// The next tile, for as many terms of blocks as there will be until then.
static inline Ahead next_tile(const Call& call, const Tile& tile, int64_t terms) {
  const Source& source = call.sources[tile.source];
  if (!tile.next || source.row != call.c) return {};  // rows that are apart: `fetch_pairs` knows where
  const int64_t first = tile.batch * source.batch + (tile.token + tile.rows) * source.row, bytes = 2 * tile.next * call.c;
  return {static_cast<const char*>(source.data) + 2 * first, (bytes + terms - 1) / terms};
}

template <class T, bool PAIRS>
static inline Raw fetch(const Call& call, const Tile& tile, const Sizes& size, const Tokens& to) {
  if constexpr (PAIRS) return fetch_pairs(call, tile, size, to);
  fetch_floats<T>(call, tile, size, to);
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

// to (n, m) = A (n, terms) B, with B in panels (m / WIDTH, terms, WIDTH), `depth` terms at a time; with PAIRS terms are
// pairs, of both.
template <bool PAIRS>
static inline void product(int n, int64_t terms, int64_t depth, const Element* a, int64_t a_row, const float* panels,
                           int64_t m, float* to, int64_t to_row, Ahead* ahead = nullptr) {
  for (int64_t t = 0; t < terms; t += depth)
    gemm<PAIRS>({.vectors = int(m / WIDTH), .n = n, .k = least(depth, terms - t), .a = panels + t * WIDTH, .a_k = WIDTH,
                 .a_v = terms * WIDTH, .b = a + t, .b_n = a_row, .b_k = 1, .c = to, .c_n = to_row, .c_v = WIDTH,
                 .add = t > 0, .ahead = ahead});
}

// to (rows, m) = X B over the channels, with B in panels (m / WIDTH, terms of c, WIDTH); value(row, c): a vector of X.
template <bool PAIRS, class Value>
static inline void product_of_channels(const Call& call, int rows, Value value, float* block, const float* panels,
                                       int64_t m, float* to) {
  const int64_t channels = (PAIRS ? 2 : 1) * depth_of(terms<PAIRS>(call.c));
  for (int64_t c = 0; c < call.c; c += channels) {
    const int n = least(channels, call.c - c);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < n; i += WIDTH) {
        const Vec x = value(r, c + i);
        float* const at = block + r * BLOCK_ROW;
        if constexpr (PAIRS) store_part(reinterpret_cast<bfloat16*>(at) + i, x, WIDTH);
        else store(at + i, x);
      }
    gemm<PAIRS>({.vectors = int(m / WIDTH), .n = rows, .k = int(terms<PAIRS>(n)), .a = panels + terms<PAIRS>(c) * WIDTH,
                 .a_k = WIDTH, .a_v = terms<PAIRS>(call.c) * WIDTH, .b = block, .b_n = BLOCK_ROW, .b_k = 1, .c = to,
                 .c_n = m, .c_v = WIDTH, .add = c > 0});
  }
}

// to (n, m) = A (n, terms) B with B as rows (terms, m): the small products.
template <bool PAIRS>
static inline void product_of_rows(int n, int64_t terms, int64_t depth, const float* a, int64_t a_row,
                                   const float* rows, int64_t m, float* to) {
  for (int64_t t = 0; t < terms; t += depth)
    gemm<PAIRS>({.vectors = int(m / WIDTH), .n = n, .k = least(depth, terms - t), .a = rows + t * m, .a_k = m,
                 .a_v = WIDTH, .b = a + t, .b_n = a_row, .b_k = 1, .c = to, .c_n = m, .c_v = WIDTH, .add = t > 0});
}

// sum (n, m) += or = A^T B over the tokens, or pairs of them, with A (tokens, n) and B (tokens, m).
template <bool PAIRS>
static inline void gather(int tokens, int64_t n, const float* a, int64_t a_row, const float* b, int64_t b_row,
                          int64_t m, float* sum, int64_t sum_row, bool add, Ahead* ahead = nullptr) {
  gemm<PAIRS>({.vectors = int(m / WIDTH), .n = int(n), .k = int(terms<PAIRS>(tokens)), .a = b, .a_k = b_row,
               .a_v = WIDTH, .b = a, .b_n = 1, .b_k = a_row, .c = sum, .c_n = sum_row, .c_v = WIDTH, .add = add,
               .ahead = ahead});
}

// A vector of what a small product takes, floats or half as many bytes of bfloat16; x may start where the row of floats
// does that it is made from, from the left to the right.
template <bool PAIRS>
static inline void store_factor(float* row, int64_t at, Vec x) {
  if constexpr (PAIRS) store_part(reinterpret_cast<bfloat16*>(row) + at, x, WIDTH);
  else store(row + at, x);
}

// z (rows, h) without b1; hidden (rows, h), as a factor, and it may be z; logits (rows, k) without b2; if asked for,
// slopes of the GELU.
// Pairs are of raw tokens, normalised afterwards: with w = w1 norm_weight, w (x - mean) inverse = (w x - mean sum(w))
// inverse.  A mean cancels there in float, from products of bfloat16 that are exact.
template <bool PAIRS>
static void logits(const Call& call, const Sizes& size, const Prepared& p, int rows, const Tokens& x, const Raw& raw,
                   float* z, float* hidden, float* slope, float* to, Ahead* ahead) {
  if constexpr (PAIRS)
    product<PAIRS>(rows, call.c / 2, depth_of(call.c / 2), raw.pairs(), raw.row / 2, p.w1_terms, size.h, z, size.h,
                   ahead);
  else
    product_of_channels<PAIRS>(call, rows, [&](int r, int64_t c) { return normalised(size, x, r, c); }, x.block,
                               p.w1_terms, size.h, z);
  const auto each = [&](auto gelu) {
    for (int64_t h = 0; h < size.h; h += WIDTH) {
      const Vec bias = load(p.b1 + h), level = load(p.w1_mean + h) * float(call.c);
      for (int r = 0; r < rows; ++r) {
        const int64_t at = r * size.h + h;
        Vec rise{}, sum = load(z + at);
        if constexpr (PAIRS) sum = fma(level, broadcast(-x.mean[r]), sum) * x.inverse[r];
        if (slope) store(z + at, sum);
        store_factor<PAIRS>(hidden + r * size.h, h, gelu(sum + bias, slope ? &rise : nullptr));
        if (slope) store(slope + at, rise);
      }
    }
  };
  call.erf ? each(gelu_erf<PAIRS>) : each(gelu_tanh<PAIRS>);
  const int64_t units = terms<PAIRS>(call.h);
  product_of_rows<PAIRS>(rows, units, depth_of(units), hidden, size.h, p.w2_terms, size.k, to);
}

}  // namespace mirasol::MIRASOL_ISA
