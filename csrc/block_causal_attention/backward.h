#pragma once
// Backward in one pass of five products.  One item is a chunk of the keys of one kv head: it holds dk and dv of the
// chunk while it walks over the query tiles that see it, of all query heads of the group.  A tile's dq has a share from
// each chunk it sees; chunks add theirs in ascending order, each waiting for its turn: no sum depends on the threads.
#include <sched.h>
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

using attention::Backward;

constexpr int64_t CHUNK = 512;     // keys of an item: k, v, dk and dv of it stay in a second-level cache
constexpr int BACKWARD_KEYS = 96;  // keys of a step

struct Chunk {
  int64_t index, batch, kv_head, key, end;
};

struct Buffers {
  float *q_t, *dout_t, *dq_t;  // (dim, TILE), (value_dim, TILE), (dim, TILE)
  float *q, *dout;             // (TILE, padded dim): rows as vectors
  float *p, *ds;               // (BACKWARD_KEYS, TILE)
  float *dk, *dv;              // (CHUNK, padded dim)
};

static Buffers buffers(const Shape& shape, float* at, int64_t* size) {
  const int64_t dim = padded(shape.dim), value_dim = padded(shape.value_dim);
  float* const start = at;
  Buffers b;
  const auto take = [&](int64_t rows, int64_t columns) {
    float* const taken = at;
    at += rows * columns;
    return taken;
  };
  b.q_t = take(dim, TILE), b.dout_t = take(value_dim, TILE), b.dq_t = take(dim, TILE);
  b.q = take(TILE, dim), b.dout = take(TILE, value_dim);
  b.p = take(BACKWARD_KEYS, TILE), b.ds = take(BACKWARD_KEYS, TILE);
  b.dk = take(CHUNK, dim), b.dv = take(CHUNK, value_dim);
  *size = at - start;
  return b;
}

// to (rows, padded dim) = from, with zeros in the padding.
static void pack_rows(const float* from, int64_t stride, int rows, int64_t dim, float* to) {
  for (int r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += WIDTH)
      store(to + r * padded(dim) + d, load_part(from + r * stride + d, least(WIDTH, dim - d)));
}

struct Rows {  // of a tile
  alignas(64) float lse[TILE], lse_low[TILE], delta[TILE];
};

// P = exp(scale S - lse) and dS = P (dP - delta) in place of S and dP.
static void softmax_backward(const Piece& piece, const Span& s, const Rows& rows, float factor, float* p, float* ds) {
  const Vec scale = broadcast(factor);
  for (int v = 0; v < s.count; ++v) {
    const int64_t lane = (s.first + v) * WIDTH;
    const Vec lse = load(rows.lse + lane), lse_low = load(rows.lse_low + lane), delta = load(rows.delta + lane);
    for (int64_t i = lane; i < piece.keys * TILE; i += TILE) {
      Vec x = exp(fma(load(p + i), scale, -lse) - lse_low);
      if (s.masked) x = keep(s.mask[v], x);
      Vec dx = x * (load(ds + i) - delta);
      if (s.masked) dx = keep(s.mask[v], dx);
      store(p + i, x), store(ds + i, dx);
    }
  }
}

// to (keys, padded dim) += P X, with P (keys, rows of the piece), X (rows, padded dim): the product that ends in a key.
static inline void scatter(const Piece& piece, const float* p, const float* x, int64_t dim, float* to) {
  gemm({.vectors = int(padded(dim) / WIDTH), .n = piece.keys, .k = piece.rows, .a = x + piece.row * padded(dim),
        .a_k = padded(dim), .b = p + piece.row, .b_n = TILE, .b_k = 1, .c = to, .c_n = padded(dim), .add = true});
}

// The last chunk before this one of which the tile sees a key, or -1.
static int64_t chunk_before(const Backward& g, const Chunk& chunk, const Tile& t) {
  const Pieces sweep = pieces(g.seen, t.batch, t.row, t.rows, 0, chunk.key);
  int64_t last = -1;  // key
  for (int i = 0; i < sweep.groups; ++i)
    for (const int32_t* range = sweep.range[i]; range < sweep.range_end[i]; range += 2) {
      const int64_t end = range[1] < chunk.key ? range[1] : chunk.key;
      if (range[0] < end && end - 1 > last) last = end - 1;
    }
  return last < 0 ? -1 : last / CHUNK;
}

static void add_dq(const Backward& g, const Chunk& chunk, const Tile& t, const float* dq_t) {
  const Shape& shape = g.shape;
  int32_t* turn = g.turns + (t.batch * shape.q_heads + t.head) * attention::tiles(shape.q_len) + t.row / TILE;
  const int64_t before = chunk_before(g, chunk, t);
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != before + 1) sched_yield();
  alignas(64) float scale[TILE];
  for (int i = 0; i < TILE; ++i) scale[i] = shape.scale;
  float* dq = at(g.dq, t.batch, t.head, t.row);
  unpack_transposed(dq_t, t.rows, shape.dim, scale, [&](int r, int64_t d, int n, Vec x) {
    float* to = dq + r * g.dq.row + d;
    store_part(to, load_part(to, n) + x, n);
  });
  __atomic_store_n(turn, int32_t(chunk.index + 1), __ATOMIC_RELEASE);
}

static void backward_tile(const Backward& g, const Chunk& chunk, const Tile& t, const Buffers& b) {
  const Shape& shape = g.shape;
  Pieces sweep = pieces(g.seen, t.batch, t.row, t.rows, chunk.key, chunk.end);
  Piece piece;
  if (!next(sweep, BACKWARD_KEYS, piece)) return;

  const float *q = at(g.q, t.batch, t.head, t.row), *dout = at(g.dout, t.batch, t.head, t.row);
  pack_transposed(q, g.q.row, t.rows, shape.dim, b.q_t);
  pack_transposed(dout, g.dout.row, t.rows, shape.value_dim, b.dout_t);
  pack_rows(q, g.q.row, t.rows, shape.dim, b.q);
  pack_rows(dout, g.dout.row, t.rows, shape.value_dim, b.dout);
  zero(b.dq_t, shape.dim * TILE);
  Rows rows = {};
  const int64_t first = (t.batch * shape.q_heads + t.head) * shape.q_len + t.row;
  for (int r = 0; r < t.rows; ++r) {
    rows.lse[r] = *at(g.lse, t.batch, t.head, t.row + r);
    rows.lse_low[r] = g.lse_low[first + r], rows.delta[r] = g.delta[first + r];
  }

  do {
    const Span s = span(piece, t.rows);
    const float *k = at(g.k, t.batch, t.kv_head, piece.key), *v = at(g.v, t.batch, t.kv_head, piece.key);
    const int64_t key = piece.key - chunk.key;
    scores(piece, s, b.q_t, shape.dim, k, g.k.row, b.p);
    scores(piece, s, b.dout_t, shape.value_dim, v, g.v.row, b.ds);
    softmax_backward(piece, s, rows, shape.scale, b.p, b.ds);
    gather(piece, s, b.ds, k, g.k.row, shape.dim, b.dq_t);
    scatter(piece, b.p, b.dout, shape.value_dim, b.dv + key * padded(shape.value_dim));
    scatter(piece, b.ds, b.q, shape.dim, b.dk + key * padded(shape.dim));
  } while (next(sweep, BACKWARD_KEYS, piece));
  add_dq(g, chunk, t, b.dq_t);
}

// The query rows between the first and the last that see a key of the chunk.
static void rows_of(const Backward& g, const Chunk& chunk, int64_t* begin, int64_t* end) {
  const attention::Transposed& t = g.seen_by;
  const int64_t table = g.seen.batch == 1 ? 0 : chunk.batch;
  const int32_t *offsets = t.k_offsets + table * (t.segments + 1), *index = t.q_index + table * (t.segments + 1);
  const int32_t* ranges = t.q_ranges + table * t.entries * 2;
  int64_t s = 0, above = t.segments;  // the last segment that begins at or before the chunk
  while (above - s > 1) {
    const int64_t middle = (s + above) / 2;
    (offsets[middle] <= chunk.key ? s : above) = middle;
  }
  *begin = g.shape.q_len, *end = 0;
  for (; s < t.segments && offsets[s] < chunk.end; ++s) {
    if (offsets[s + 1] <= chunk.key || index[s] == index[s + 1]) continue;
    const int32_t first = ranges[2 * index[s]], last = ranges[2 * index[s + 1] - 1];
    if (first < *begin) *begin = first;
    if (last > *end) *end = last;
  }
}

static void backward_chunk(const Backward& g, const Chunk& chunk, const Buffers& b) {
  const Shape& shape = g.shape;
  const int64_t keys = chunk.end - chunk.key, group = shape.q_heads / shape.kv_heads;
  const int64_t dim = padded(shape.dim), value_dim = padded(shape.value_dim);
  zero(b.dk, keys * dim), zero(b.dv, keys * value_dim);
  int64_t first, end;
  rows_of(g, chunk, &first, &end);
  for (int64_t head = chunk.kv_head * group; head < (chunk.kv_head + 1) * group; ++head)
    // Downwards: the next chunk, which begins at the same tile, follows one step behind.
    for (int64_t row = (attention::tiles(end) - 1) * TILE; row > first - TILE; row -= TILE)
      backward_tile(g, chunk, {chunk.batch, head, chunk.kv_head, row, least(TILE, shape.q_len - row)}, b);
  for (int64_t i = 0; i < keys; ++i) {
    float* dk = at(g.dk, chunk.batch, chunk.kv_head, chunk.key + i);
    float* dv = at(g.dv, chunk.batch, chunk.kv_head, chunk.key + i);
    for (int64_t d = 0; d < shape.dim; d += WIDTH)
      store_part(dk + d, load(b.dk + i * dim + d) * shape.scale, least(WIDTH, shape.dim - d));
    for (int64_t d = 0; d < shape.value_dim; d += WIDTH)
      store_part(dv + d, load(b.dv + i * value_dim + d), least(WIDTH, shape.value_dim - d));
  }
}

// total = sum of exp(scale S - lse) over the keys that a row sees, for the rows of a tile.
static void sum_weights(const Backward& g, const Tile& t, const float* lse, float* q_t, float* s, float* total) {
  const Shape& shape = g.shape;
  pack_transposed(at(g.q, t.batch, t.head, t.row), g.q.row, t.rows, shape.dim, q_t);
  Pieces sweep = pieces(g.seen, t.batch, t.row, t.rows, 0, shape.k_len);
  zero(total, TILE);
  for (Piece piece; next(sweep, BACKWARD_KEYS, piece);) {
    const Span of = span(piece, t.rows);
    scores(piece, of, q_t, shape.dim, at(g.k, t.batch, t.kv_head, piece.key), g.k.row, s);
    for (int v = 0; v < of.count; ++v) {
      const int lane = (of.first + v) * WIDTH;
      const Vec scale = broadcast(shape.scale), shift = -load(lse + lane);
      Vec part{};
      for (int key = 0; key < piece.keys; ++key)
        part += keep(of.mask[v], exp(fma(load(s + key * TILE + lane), scale, shift)));
      store(total + lane, load(total + lane) + part);
    }
  }
}

// Half an ulp of a large lse is much more than one of P = exp(S - lse): 5e-4 at 1e4.  The sum of P, which should be 1,
// tells what the rounding has left out.  Up to 16 that is within 4 ulps of P and not worth the product.
static inline bool needs_low(float lse) { return __builtin_fabsf(lse) > 16 && __builtin_fabsf(lse) < __builtin_inff(); }

// delta = sum(dout * out) - dlse, and lse_low.  Each row by itself: whether it gets an lse_low is no matter of its
// tile.  (An lse that stems from more keys than these is not the rounded sum of them, and is taken as it is.)
static void backward_rows(const Backward& g, const Tile& t, float* workspace) {
  const Shape& shape = g.shape;
  const int64_t first = (t.batch * shape.q_heads + t.head) * shape.q_len + t.row;
  alignas(64) float lse[TILE] = {}, total[TILE];
  bool large = false;
  for (int r = 0; r < t.rows; ++r) {
    const float *dout = at(g.dout, t.batch, t.head, t.row + r), *out = at(g.out, t.batch, t.head, t.row + r);
    Vec product{};
    for (int64_t d = 0; d < shape.value_dim; d += WIDTH) {
      const int n = least(WIDTH, shape.value_dim - d);
      product = fma(load_part(dout + d, n), load_part(out + d, n), product);
    }
    lse[r] = *at(g.lse, t.batch, t.head, t.row + r);
    g.delta[first + r] = sum(product) - *at(g.dlse, t.batch, t.head, t.row + r);
    g.lse_low[first + r] = 0;
    large |= needs_low(lse[r]);
  }
  if (!large) return;
  sum_weights(g, t, lse, workspace, workspace + shape.dim * TILE, total);
  for (int r = 0; r < t.rows; ++r) {
    const float low = __builtin_logf(total[r]), most = __FLT_EPSILON__ * __builtin_fabsf(lse[r]);
    if (needs_low(lse[r]) && __builtin_fabsf(low) <= most) g.lse_low[first + r] = low;
  }
}

int64_t attention_backward_items(const Shape& shape) {
  return shape.batch * shape.kv_heads * ((shape.k_len + CHUNK - 1) / CHUNK);
}

int64_t attention_backward_workspace(const Shape& shape) {
  int64_t size;
  buffers(shape, nullptr, &size);
  return size;
}

void attention_backward_rows(const Backward& g, float* workspace, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) backward_rows(g, tile_of(g.shape, item), workspace);
}

void attention_backward(const Backward& g, float* workspace, int64_t begin, int64_t end) {
  int64_t size;
  const Buffers b = buffers(g.shape, workspace, &size);
  const int64_t heads = g.shape.batch * g.shape.kv_heads;
  for (int64_t item = begin; item < end; ++item) {  // early keys first: in a causal layout more rows see them
    const int64_t index = item / heads, batch = item % heads / g.shape.kv_heads;
    const int64_t last = (index + 1) * CHUNK < g.shape.k_len ? (index + 1) * CHUNK : g.shape.k_len;
    backward_chunk(g, {index, batch, item % g.shape.kv_heads, index * CHUNK, last}, b);
  }
}

}  // namespace mirasol::MIRASOL_ISA
