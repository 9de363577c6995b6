#pragma once
// Forward: one item is a tile of query rows, walked once over the keys it sees with an online softmax.  Where there are
// few tiles, as in decoding, the keys are cut into splits, an item each, and their results merged in a second pass.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

using attention::Forward;
using attention::PARALLEL;
using attention::SPLIT_KEYS;

constexpr int FORWARD_KEYS = 64;  // keys of a softmax step
constexpr int CONVERTED_KEYS = 64;  // of these, at a time, made floats where they are not: they stay in the first cache

struct Running {  // of the softmax, per lane of the tile
  alignas(64) float top[TILE];    // largest score so far
  alignas(64) float total[TILE];  // sum of exp(score - top)
};

struct Placed {  // a piece of the current step and where its scores stand
  Piece piece;
  Span span;
  int slot;
};

// Scores of one vector of lanes become exp(scale * score - top), and top, total and `out` (value_dim, TILE) follow.  As
// pairs, those of keys 2 i and 2 i + 1 of a piece stand in its row i.
template <bool PAIRS>
static void softmax_step(const Shape& shape, float* scores, const Placed* placed, int count, int v, Running& run,
                         float* out) {
  const Vec scale = broadcast(shape.scale), hidden = broadcast(-__builtin_inff()), old = load(run.top + v * WIDTH);
  Vec top = old;
  bool touched = false;
  for (const Placed* x = placed; x < placed + count; ++x) {
    const int i = v - x->span.first;
    if (i < 0 || i >= x->span.count) continue;
    touched = true;
    const float* s = scores + x->slot * TILE + v * WIDTH;
    for (int key = 0; key < x->piece.keys; ++key) {
      const Vec score = load(s + key * TILE) * scale;
      top = max(x->span.masked ? select(x->span.mask[i], score, hidden) : score, top);  // passes over NaN
    }
  }
  if (!touched) return;
  const Vec base = select(top == hidden, Vec{}, top);  // a row that has seen nothing yet: exp(-inf) is 0
  const Vec shrink = exp(old - base);
  Vec total{};
  for (const Placed* x = placed; x < placed + count; ++x) {
    const int i = v - x->span.first;
    if (i < 0 || i >= x->span.count) continue;
    float* s = scores + x->slot * TILE + v * WIDTH;
    const auto weight = [&](int key) {
      Vec p = exp(fma(load(s + key * TILE), scale, -base));
      if (x->span.masked) p = keep(x->span.mask[i], p);
      total += p;
      return p;
    };
    if constexpr (PAIRS) {
      for (int key = 0; key < x->piece.keys; key += 2) {
        const Vec first = weight(key), second = key + 1 < x->piece.keys ? weight(key + 1) : Vec{};
        store(s + key / 2 * TILE, pair(first, second));
      }
    } else {
      for (int key = 0; key < x->piece.keys; ++key) store(s + key * TILE, weight(key));
    }
  }
  store(run.total + v * WIDTH, fma(load(run.total + v * WIDTH), shrink, total));
  store(run.top + v * WIDTH, top);
  for (float* o = out + v * WIDTH; o < out + shape.value_dim * TILE; o += TILE) store(o, load(o) * shrink);
}

// lse and lse_low of a row from the largest score and the sum of exp(score - top): top + log(total) in two floats.
static void store_lse(const Forward& f, int64_t row, float top, float total) {
  const float log_total = __builtin_logf(total), lse = top + log_total;  // -inf where nothing was seen
  const float moved = lse - top;
  f.lse[row] = lse;
  f.lse_low[row] = __builtin_isfinite(lse) ? (top - (lse - moved)) + (log_total - moved) : 0;
}

// What a split has found for a row: value_dim sums, top, total.
static float* part_of(const Forward& f, int64_t split, int64_t row) {
  const Shape& s = f.shape;
  return f.parts + (split * s.batch * s.q_heads * s.q_len + row) * (s.value_dim + 2);
}

template <bool PAIRS, class T>
static void forward_tile(const Forward& f, const Tile& t, int64_t split, int64_t splits, float* workspace) {
  const Shape& shape = f.shape;
  const int lanes = t.lanes();
  float* q = workspace;                          // (dim, TILE)
  float* out = q + shape.dim * TILE;             // (value_dim, TILE)
  float* s = out + shape.value_dim * TILE;       // (FORWARD_KEYS, TILE)
  float* converted = s + FORWARD_KEYS * TILE;    // (CONVERTED_KEYS, padded dim)
  constexpr int AT_A_TIME = sizeof(T) == sizeof(float) ? FORWARD_KEYS : CONVERTED_KEYS;
  pack_transposed<PAIRS>(lanes_of<const T>(f.q, t), lanes, shape.dim, q);
  zero(out, shape.value_dim * TILE);
  Running run;
  for (int i = 0; i < TILE; ++i) run.top[i] = -__builtin_inff(), run.total[i] = 0;

  Pieces sweep = pieces(f.seen, t.batch, t.row, t.rows, t.heads, shape.k_len * split / splits,
                        shape.k_len * (split + 1) / splits);
  Placed placed[FORWARD_KEYS];
  Piece piece;
  bool more = next(sweep, FORWARD_KEYS, piece);
  while (more) {
    int count = 0;
    for (int slot = 0; more && slot + piece.keys <= FORWARD_KEYS; more = next(sweep, FORWARD_KEYS, piece)) {
      Placed& x = placed[count++] = {piece, span(piece, lanes), slot};
      const T* k = at<const T>(f.k, t.batch, t.kv_head, piece.key);
      for (int key = 0; key < piece.keys; key += AT_A_TIME) {
        const int keys = least(AT_A_TIME, piece.keys - key);
        const Factor factor = rows_of<PAIRS>(k + key * f.k.row, f.k.row, keys, shape.dim, converted);
        scores<PAIRS>(keys, x.span, q, shape.dim, factor, s + (slot + key) * TILE);
      }
      slot += piece.keys;
    }
    for (int v = 0; v * WIDTH < lanes; ++v) softmax_step<PAIRS>(shape, s, placed, count, v, run, out);
    for (const Placed* x = placed; x < placed + count; ++x) {
      const T* value = at<const T>(f.v, t.batch, t.kv_head, x->piece.key);
      for (int key = 0; key < x->piece.keys; key += AT_A_TIME) {
        const int keys = least(AT_A_TIME, x->piece.keys - key);
        const Factor factor = terms_of<PAIRS>(value + key * f.v.row, f.v.row, keys, shape.value_dim, converted);
        gather<PAIRS>(keys, x->span, s + (x->slot + (PAIRS ? key / 2 : key)) * TILE, factor, shape.value_dim, out);
      }
    }
  }

  if (splits > 1) {
    alignas(64) float one[TILE];
    for (float& x : one) x = 1;
    for (int i = 0; i < lanes; ++i) {
      float* part = part_of(f, split, row_number(shape, t, i)) + shape.value_dim;
      part[0] = run.top[i], part[1] = run.total[i];
    }
    unpack_transposed(out, lanes, shape.value_dim, one, [&](int lane, int64_t d, int n, Vec x) {
      store_part(part_of(f, split, row_number(shape, t, lane)) + d, x, n);
    });
    return;
  }
  for (int i = 0; i < lanes; ++i) store_lse(f, row_number(shape, t, i), run.top[i], run.total[i]);
  for (int i = 0; i < TILE; ++i) run.total[i] = run.total[i] == 0 ? 0 : 1 / run.total[i];
  const Lanes<T> to = lanes_of<T>(f.out, t);
  unpack_transposed(out, lanes, shape.value_dim, run.total,
                    [&](int lane, int64_t d, int n, Vec x) { store_part(to(lane) + d, x, n); });
}

// The rows of a tile from what its splits have found.
template <class T>
static void merge_tile(const Forward& f, const Tile& t, int64_t splits) {
  const Shape& shape = f.shape;
  const Lanes<T> out = lanes_of<T>(f.out, t);
  for (int lane = 0; lane < t.lanes(); ++lane) {
    const int64_t row = row_number(shape, t, lane);
    float top = -__builtin_inff(), total = 0;
    for (int64_t i = 0; i < splits; ++i) {
      const float of_split = part_of(f, i, row)[shape.value_dim];
      top = of_split > top ? of_split : top;
    }
    const auto factor = [&](int64_t split) {
      const float of_split = part_of(f, split, row)[shape.value_dim];
      return of_split == -__builtin_inff() ? 0 : __builtin_expf(of_split - top);
    };
    for (int64_t i = 0; i < splits; ++i) total += factor(i) * part_of(f, i, row)[shape.value_dim + 1];
    const float each = total == 0 ? 0 : 1 / total;
    for (int64_t d = 0; d < shape.value_dim; d += WIDTH) {
      const int n = least(WIDTH, shape.value_dim - d);
      Vec x{};
      for (int64_t i = 0; i < splits; ++i) x = fma(load_part(part_of(f, i, row) + d, n), broadcast(factor(i)), x);
      store_part(out(lane) + d, x * each, n);
    }
    store_lse(f, row, top, total);
  }
}

int64_t attention_tiles(const Shape& shape) {
  return shape.batch * (shape.q_heads / heads_of_tile(shape)) * attention::tiles(shape.q_len);
}

int64_t attention_splits(const Shape& shape) {
  const int64_t tiles = attention_tiles(shape), wanted = tiles ? (PARALLEL + tiles - 1) / tiles : 1;
  const int64_t most = shape.k_len / SPLIT_KEYS;
  return wanted <= 1 || most <= 1 ? 1 : wanted < most ? wanted : most;
}

int64_t attention_workspace(const Shape& shape) {
  const int64_t widest = shape.dim > shape.value_dim ? shape.dim : shape.value_dim;
  return (shape.dim + shape.value_dim + FORWARD_KEYS) * TILE + CONVERTED_KEYS * padded(widest);
}

void attention_forward(const Forward& f, float* workspace, int64_t begin, int64_t end) {
  const int64_t splits = attention_splits(f.shape);
  for_dtype(f.shape, [&](auto type, auto pairs) {
    for (int64_t item = begin; item < end; ++item)
      forward_tile<pairs, decltype(type)>(f, tile_of(f.shape, item / splits), item % splits, splits, workspace);
  });
}

void attention_merge(const Forward& f, int64_t begin, int64_t end) {
  const int64_t splits = attention_splits(f.shape);
  for_dtype(f.shape, [&](auto type, auto) {
    for (int64_t item = begin; item < end; ++item) merge_tile<decltype(type)>(f, tile_of(f.shape, item), splits);
  });
}

}  // namespace mirasol::MIRASOL_ISA
