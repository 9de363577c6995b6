#pragma once
// Forward: one item is a tile of query rows, walked once over the keys it sees with an online softmax.  Where there are
// few tiles, as in decoding, the keys are cut into splits, an item each, and their results merged in a second pass.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

using attention::Forward;
using attention::PARALLEL;
using attention::SPLIT_KEYS;

constexpr int FORWARD_KEYS = 64;  // keys of a softmax step
constexpr int COPIED_KEYS = 96;    // of these, at a time, in one product: where they are copied, the copy stays close

struct Running {  // of the softmax, per lane of the tile
  alignas(64) float top[TILE];    // largest score so far
  alignas(64) float base[TILE];   // the same, but 0 where nothing has been seen: exp(-inf - base) is 0
  alignas(64) float total[TILE];  // sum of exp(score - base)
  alignas(64) float fresh[TILE];  // largest product of the current step, not yet scaled
};

struct Placed {  // a piece of the current step and where its scores stand
  Piece piece;
  Span span;
  int slot;
};

// A step has found `fresh` products: top and base follow, and what was summed so far shrinks to the new base.
static void raise_tops(const Shape& shape, float factor, int lanes, Running& run, float* out) {
  const Vec scale = broadcast(factor), hidden = broadcast(-__builtin_inff());
  for (int lane = 0; lane < lanes; lane += WIDTH) {
    const Vec fresh = load(run.fresh + lane), old = load(run.top + lane);
    if (!any(fresh != hidden)) continue;
    const Vec top = max(select(fresh == hidden, hidden, fresh * scale), old);
    const Vec base = select(top == hidden, Vec{}, top), shrink = exp(old - base);
    store(run.fresh + lane, hidden), store(run.top + lane, top), store(run.base + lane, base);
    if (!any(shrink != 1.0f)) continue;
    store(run.total + lane, load(run.total + lane) * shrink);
    for (float* o = out + lane; o < out + shape.value_dim * TILE; o += TILE) store(o, load(o) * shrink);
  }
}

// Products of N vectors of lanes, from number v on, become exp(scale * product - base), and total grows by them.  As
// pairs, those of keys 2 i and 2 i + 1 of a piece stand in its row i.
template <bool PAIRS, int N>
static void weights(const Placed& x, int v, float factor, float* scores, Running& run) {
  const Vec scale = broadcast(factor);
  const int lane = v * WIDTH, keys = x.piece.keys;
  Vec base[N], total[N] = {};
  for (int i = 0; i < N; ++i) base[i] = load(run.base + lane + i * WIDTH);
  const auto weight = [&](const float* s, int i) {
    Vec p = exp(fma(load(s + i * WIDTH), scale, -base[i]));
    if (x.span.masked) p = keep(x.span.mask[v - x.span.first + i], p);
    total[i] += p;
    return p;
  };
  float *s = scores + x.slot * TILE + lane, *to = s;
  if constexpr (PAIRS) {
    for (int key = 0; key < keys; key += 2, s += 2 * TILE, to += TILE)
      for (int i = 0; i < N; ++i) {
        const Vec first = weight(s, i), second = key + 1 < keys ? weight(s + TILE, i) : Vec{};
        store(to + i * WIDTH, pair(first, second));
      }
  } else {
    for (int key = 0; key < keys; ++key, s += TILE)
      for (int i = 0; i < N; ++i) store(s + i * WIDTH, weight(s, i));
  }
  for (int i = 0; i < N; ++i) {
    float* sum = run.total + lane + i * WIDTH;
    store(sum, load(sum) + total[i]);
  }
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
  float* copied = s + FORWARD_KEYS * TILE;       // (COPIED_KEYS, padded dim)
  pack_transposed<PAIRS>(lanes_of<const T>(f.q, t), lanes, shape.dim, q);
  const float scale = __builtin_fabsf(shape.scale);
  if (shape.scale < 0) negate<PAIRS>(q, (PAIRS ? shape.dim / 2 : shape.dim) * TILE);  // so that the largest product has the largest score
  zero(out, shape.value_dim * TILE);
  Running run;
  for (int i = 0; i < TILE; ++i) run.top[i] = run.fresh[i] = -__builtin_inff(), run.base[i] = run.total[i] = 0;

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
      for (int key = 0; key < piece.keys; key += COPIED_KEYS) {
        const int keys = least(COPIED_KEYS, piece.keys - key);
        const Factor factor = rows_of<PAIRS>(k + key * f.k.row, f.k.row, keys, shape.dim, copied);
        scores<PAIRS>(keys, x.span, q, shape.dim, factor, s + (slot + key) * TILE, run.fresh);
      }
      slot += piece.keys;
    }
    raise_tops(shape, scale, lanes, run, out);
    for (const Placed* x = placed; x < placed + count; ++x) {
      int v = x->span.first;
      for (; v + 2 <= x->span.first + x->span.count; v += 2) weights<PAIRS, 2>(*x, v, scale, s, run);
      if (v < x->span.first + x->span.count) weights<PAIRS, 1>(*x, v, scale, s, run);
      const T* value = at<const T>(f.v, t.batch, t.kv_head, x->piece.key);
      for (int key = 0; key < x->piece.keys; key += COPIED_KEYS) {
        const int keys = least(COPIED_KEYS, x->piece.keys - key);
        const Factor factor = terms_of<PAIRS>(value + key * f.v.row, f.v.row, keys, shape.value_dim, copied);
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
  return (shape.dim + shape.value_dim + FORWARD_KEYS) * TILE + COPIED_KEYS * padded(widest);
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
