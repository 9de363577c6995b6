#pragma once
// What forward and backward share: how tokens are cut into tiles, and weights in the order in which products read them.
// LayerNorm's weight and bias are folded into w1 and b1.  With PAIRS the factors of products are bfloat16, two terms of
// the sum in 32 bits.
#include <type_traits>
#include "common/gemm.h"
#include "token_learner/kernel.h"

namespace mirasol::MIRASOL_ISA {

using token_learner::Call;
using token_learner::Source;

constexpr int64_t TILE_BYTES = 208 << 10;  // beside weights and sums a tile stays in a second-level cache
constexpr int AHEAD = 8;                   // rows of a tile that are on their way from memory
constexpr int64_t DEPTH = 128;             // terms of a product at a time: its panels stay in a first-level cache
constexpr int64_t BLOCK_ROW = DEPTH + 16;  // an odd number of cache lines, as is Sizes::row

// Of pairs, in tile registers.
static inline bool in_tiles(const Call& call) { return WIDTH == SIDE && call.products == Products::amx; }

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
    // In tile registers whole ones, of pairs of tokens; twice as many, since sums of k c and h c are then read and
    // written half as often, and chips that have them have a cache of 2 MB.
    const bool tiles = in_tiles(call);
    const int64_t step = tiles ? 2 * SIDE : 8, bytes = tiles ? 2 * TILE_BYTES : TILE_BYTES;
    const int64_t fit = bytes / (row * int64_t(sizeof(float))) / step * step, few = tiles ? step : 16;
    rows = int(fit < few ? few : fit > 128 ? 128 : fit);
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
    const int64_t step = tiles ? whole_tiles((n + tiles - 1) / tiles) : 0;
    const auto begins = [&](int64_t t) { return !in_tiles(call) ? t * n / tiles : t * step < n ? t * step : n; };
    int64_t valid = call.valid ? call.valid[batch * call.count + i] : n;
    valid = valid < 0 ? 0 : valid > n ? n : valid;
    for (int64_t t = begin > before ? begin - before : 0; t < tiles && before + t < end; ++t) {
      const int64_t first = begins(t), last = begins(t + 1);  // of nearly the same size
      const int real = valid <= first ? 0 : least(last - first, valid - first);
      const int64_t next = t + 1 < tiles && before + t + 1 < end && valid > last ? begins(t + 2) - last : 0;
      each(Tile{i, batch, first, int(last - first), real, int(next)});
    }
    before += tiles;
  }
}

struct Prepared {
  float* w1_terms;  // (h / WIDTH, c, WIDTH): w1 norm_weight, for the sum over channels
  float* w1_rows;   // (c / WIDTH, h, WIDTH): the same, for the sum over hidden units; of backward, as w2_rows is
  float* b1;        // (h) b1 + w1 norm_bias
  float* w1_mean;   // (h) of w1 norm_weight over channels
  float* w2_terms;  // (h, k), of floats always
  float* w2_rows;   // (k, h)
  float* b2;        // (k)
};

// Rows, or pairs of them, of w2 as the factor of a product.
static inline int64_t w2_rows_of(const Call& call) { return in_tiles(call) ? whole_tiles(terms<true>(call.k)) : call.k; }

static Prepared prepared(const Call& call, float* at, int64_t* floats = nullptr) {
  const Sizes size(call);
  Space space{at};
  Prepared p;
  p.w1_terms = space.take(size.h * call.c), p.w1_rows = space.take(size.c * call.h), p.b1 = space.take(size.h);
  p.w1_mean = space.take(size.h);
  p.w2_terms = space.take(call.h * size.k), p.w2_rows = space.take(w2_rows_of(call) * size.h);
  p.b2 = space.take(size.k);
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
      if (call.products == Products::single) return each(bfloat16{}, std::false_type{});
      return each(bfloat16{}, std::true_type{});
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
    if (call.gradients) store_terms<PAIRS>(x, rows, p.w1_rows + c * terms<PAIRS>(call.h) + terms<PAIRS>(h) * WIDTH);
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
  if (call.gradients && in_tiles(call)) zero(p.w2_rows, w2_rows_of(call) * size.h);
  for (int64_t k = 0; k < call.k; k += WIDTH) {
    for (int64_t h = 0; h < call.h; h += WIDTH) {
      const int n = least(WIDTH, call.h - h);
      const int rows = least(WIDTH, call.k - k);
      Vec x[WIDTH] = {};
      for (int i = 0; i < rows; ++i) x[i] = load_part(w2 + (k + i) * call.h + h, n);
      if (call.gradients) store_terms<PAIRS>(x, rows, p.w2_rows + terms<PAIRS>(k) * size.h + h, size.h);
      transpose(x);
      store_terms<false>(x, n, p.w2_terms + h * size.k + k, size.k);
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

}  // namespace mirasol::MIRASOL_ISA
