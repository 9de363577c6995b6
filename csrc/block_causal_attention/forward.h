#pragma once
// Forward: one item is a tile of query rows of one head, walked once over the keys it sees with an online softmax.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

using attention::Forward;

constexpr int FORWARD_KEYS = 192;  // keys of a softmax step

struct Running {  // of the softmax, per row of the tile
  alignas(64) float top[TILE];    // largest score so far
  alignas(64) float total[TILE];  // sum of exp(score - top)
};

struct Placed {  // a piece of the current step and where its scores stand
  Piece piece;
  Span span;
  int slot;
};

// Scores of one vector of rows become exp(scale * score - top), and top, total and `out` (value_dim, TILE) follow.
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
    for (int key = 0; key < x->piece.keys; ++key) {
      Vec p = exp(fma(load(s + key * TILE), scale, -base));
      if (x->span.masked) p = keep(x->span.mask[i], p);
      store(s + key * TILE, p);
      total += p;
    }
  }
  store(run.total + v * WIDTH, fma(load(run.total + v * WIDTH), shrink, total));
  store(run.top + v * WIDTH, top);
  for (float* o = out + v * WIDTH; o < out + shape.value_dim * TILE; o += TILE) store(o, load(o) * shrink);
}

static void forward_tile(const Forward& f, const Tile& t, float* workspace) {
  const Shape& shape = f.shape;
  float* q = workspace;                     // (dim, TILE)
  float* out = q + shape.dim * TILE;        // (value_dim, TILE)
  float* s = out + shape.value_dim * TILE;  // (FORWARD_KEYS, TILE)
  pack_transposed(at(f.q, t.batch, t.head, t.row), f.q.row, t.rows, shape.dim, q);
  zero(out, shape.value_dim * TILE);
  Running run;
  for (int i = 0; i < TILE; ++i) run.top[i] = -__builtin_inff(), run.total[i] = 0;

  Pieces sweep = pieces(f.seen, t.batch, t.row, t.rows, 0, shape.k_len);
  Placed placed[FORWARD_KEYS];
  Piece piece;
  bool more = next(sweep, FORWARD_KEYS, piece);
  while (more) {
    int count = 0;
    for (int slot = 0; more && slot + piece.keys <= FORWARD_KEYS; more = next(sweep, FORWARD_KEYS, piece)) {
      Placed& x = placed[count++] = {piece, span(piece, t.rows), slot};
      scores(piece, x.span, q, shape.dim, at(f.k, t.batch, t.kv_head, piece.key), f.k.row, s + slot * TILE);
      slot += piece.keys;
    }
    for (int v = 0; v * WIDTH < t.rows; ++v) softmax_step(shape, s, placed, count, v, run, out);
    for (const Placed* x = placed; x < placed + count; ++x) {
      const float* value = at(f.v, t.batch, t.kv_head, x->piece.key);
      gather(x->piece, x->span, s + x->slot * TILE, value, f.v.row, shape.value_dim, out);
    }
  }

  float* lse = f.lse + (t.batch * shape.q_heads + t.head) * shape.q_len + t.row;
  for (int i = 0; i < t.rows; ++i) lse[i] = run.top[i] + __builtin_logf(run.total[i]);  // -inf where nothing was seen
  for (int i = 0; i < TILE; ++i) run.total[i] = run.total[i] == 0 ? 0 : 1 / run.total[i];
  float* to = at(f.out, t.batch, t.head, t.row);
  unpack_transposed(out, t.rows, shape.value_dim, run.total,
                    [&](int r, int64_t d, int n, Vec x) { store_part(to + r * f.out.row + d, x, n); });
}

int64_t attention_tiles(const Shape& shape) { return shape.batch * shape.q_heads * attention::tiles(shape.q_len); }

int64_t attention_workspace(const Shape& shape) { return (shape.dim + shape.value_dim + FORWARD_KEYS) * TILE; }

void attention_forward(const Forward& f, float* workspace, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) forward_tile(f, tile_of(f.shape, item), workspace);
}

}  // namespace mirasol::MIRASOL_ISA
