#pragma once
// Backward in one pass of five products.  One item is a chunk of the keys of one kv head: it holds dk and dv of the
// chunk while it walks over the query tiles that see it, of all query heads of the group.  A tile's dq has a share from
// each chunk it sees; chunks add theirs in ascending order, each waiting for its turn: no sum depends on the threads.
#include <sched.h>
#include "block_causal_attention/amx.h"
#include "block_causal_attention/decode.h"

namespace mirasol::MIRASOL_ISA {

using attention::Backward;

// Keys of a step.  In tile registers 128 took 0.92 to 0.99 of the time of 96 (NOTES 2026-11-30).
constexpr int backward_keys(Products by) { return by == Products::amx ? 128 : 96; }
static_assert(backward_keys(Products::amx) <= AMX_KEYS);

// Keys of an item, whose dk and dv stay in a second-level cache.  Twice as many, each tile's rows are packed and its dq
// added half as often (3 to 4 % of the time, NOTES 2026-11-28), where that leaves items enough.
static int64_t chunk_of(const Shape& shape) {
  const int64_t few = 512, many = 2 * few, items = shape.batch * shape.kv_heads * ((shape.k_len + many - 1) / many);
  return items >= attention::PARALLEL / 2 && shape.dim + shape.value_dim <= 256 ? many : few;
}

struct Chunk {
  int64_t index, batch, kv_head, key, end;
  bool finite = true;  // its keys, of AMX
};

struct Buffers {
  float *q_t, *dout_t, *dq_t;  // (dim, TILE), (value_dim, TILE), (dim, TILE), in panels
  float *q, *dout;             // (TILE, padded dim): rows as vectors
  float *p, *ds, *ds_terms;    // (keys of a step, TILE)
  float *k, *v, *k_terms;      // (keys of a step, padded dim): what is not read where it lies; of AMX all of the chunk
  float *dk, *dv;              // (keys of a chunk, padded dim)
  float* few_q;                // (FEW, padded dim), where lanes are few
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
  const Products by = products_of(shape);
  const int64_t keys = chunk_of(shape), row = amx_dim(shape.dim) / 2, value_row = amx_dim(shape.value_dim) / 2;
  const bool amx = by == Products::amx;
  b.q_t = take(amx ? row : dim, TILE), b.dout_t = take(amx ? value_row : value_dim, TILE), b.dq_t = take(dim, TILE);
  b.q = take(TILE, dim), b.dout = take(TILE, value_dim);
  const int step = backward_keys(by);
  b.p = take(step, TILE), b.ds = take(step, TILE);
  b.ds_terms = by != Products::single ? take(step / 2, TILE) : b.ds;
  if (amx) {
    b.k = take(keys + SIDE, row), b.v = take(keys + SIDE, value_row), b.k_terms = take(dim, amx_keys(keys) / 2);
  } else {
    b.k = take(step, dim), b.v = take(step, value_dim);
    b.k_terms = by == Products::pairs ? take(step / 2, dim) : b.k;
  }
  b.dk = take(keys, dim), b.dv = take(keys, value_dim);
  b.few_q = few_lanes(shape) ? take(FEW, dim) : nullptr;
  *size = at - start;
  return b;
}

// to (lanes, padded dim) = the rows of the lanes, with zeros in the padding; or (lanes / 2, padded dim), pairs of rows.
template <bool PAIRS, class T>
static void pack_rows(const Lanes<const T>& from, int lanes, int64_t dim, float* to) {
  if constexpr (PAIRS) {
    pair_rows(from, lanes, dim, to);
  } else {
    for (int r = 0; r < lanes; ++r)
      for (int64_t d = 0; d < dim; d += WIDTH)
        store(to + r * padded(dim) + d, load_part(from(r) + d, least(WIDTH, dim - d)));
  }
}

struct Rows {  // of a tile, per lane
  alignas(64) float lse[TILE], lse_low[TILE], delta[TILE], dlse[TILE];
};

// P = exp(factor S - lse) and dS = P (dP - delta + dlse) in place of S and dP, each row of keys then for the product
// that ends in that key, and dS in ds_terms for the one that ends in a query.  Where these are pairs, of lanes the ones
// and of keys the other, rows are still TILE floats apart.  Delta is subtracted alone: where one key has all the weight
// and out is its value, delta is its dP to the bit, and nothing is left of the two.
// mask(v, key): lanes of vector v, where some are masked.
template <bool PAIRS, class T, class Mask>
static void softmax_backward(int keys, int first, int count, bool masked, Mask mask, const Rows& rows, float factor,
                             const Buffers& b) {
  const Vec scale = broadcast(factor);
  for (int v = first; v < first + count; ++v) {
    const int lane = v * WIDTH;
    const Vec lse = load(rows.lse + lane), lse_low = load(rows.lse_low + lane);
    const Vec delta = load(rows.delta + lane), dlse = load(rows.dlse + lane);
    const auto weigh = [&](int key) {  // -> dS
      float *const p = b.p + key * TILE, *const ds = b.ds + key * TILE;
      Vec weight[] = {fma(load(p + lane), scale, -lse) - lse_low};
      exp_of<PAIRS, T>(weight);
      const Vec x = masked ? keep(mask(v, key), weight[0]) : weight[0];
      Vec dx = x * (load(ds + lane) - delta + dlse);
      if (masked) dx = keep(mask(v, key), dx);
      if constexpr (PAIRS) {  // the halves of a row of vectors take up the places of vectors that are done
        store_halves(p + lane / 2, from_float(bfloat16{}, x), WIDTH);
        store_halves(ds + lane / 2, from_float(bfloat16{}, dx), WIDTH);
      } else {
        store(p + lane, x), store(ds + lane, dx);
      }
      return dx;
    };
    if constexpr (PAIRS) {
      for (int key = 0; key < keys; key += 2) {
        const Vec first = weigh(key), second = key + 1 < keys ? weigh(key + 1) : Vec{};
        store(b.ds_terms + key / 2 * TILE + lane, pair(first, second));
      }
    } else {
      for (int key = 0; key < keys; ++key) weigh(key);
    }
  }
}

// to (keys, padded dim) += P X, with P (keys, lanes of the piece), X (lanes, padded dim): the product that ends in a
// key.
template <bool PAIRS>
static inline void scatter(const Piece& piece, int lanes, const float* p, const float* x, int64_t dim, float* to) {
  const int64_t width = padded(dim);
  const auto product = [&](const float* from, int first, int terms) {
    gemm<PAIRS>({.vectors = int(width / WIDTH), .n = piece.keys, .k = terms, .a = from, .a_k = width,
                 .a_v = WIDTH, .b = p + first, .b_n = TILE, .b_k = 1, .c = to, .c_n = width, .c_v = WIDTH,
                 .add = true});
  };
  if constexpr (PAIRS) {  // half of a pair at an edge is a lane that does not see the keys: not even 0 * NaN may enter
    const int end = piece.row + piece.rows, first = (piece.row + 1) / 2, last = end < lanes ? end / 2 : (end + 1) / 2;
    alignas(64) float edge[padded(attention::MAX_DIM)];
    const auto half = [&](int at, uint32_t bits) {
      for (int64_t d = 0; d < width; d += WIDTH)
        store(edge + d, (Vec)((Words)load(x + at * width + d) & bits));
      product(edge, at, 1);
    };
    if (piece.row % 2) half(piece.row / 2, 0xffff0000u);
    if (first < last) product(x + first * width, first, last - first);
    if (end % 2 && end < lanes && end / 2 >= first) half(end / 2, 0xffffu);
  } else {
    product(x + piece.row * width, piece.row, piece.rows);
  }
}

// The keys among [begin, end) that the tile sees: the first and the last; none when first > last.
static void seen_between(const Backward& g, const Tile& t, int64_t begin, int64_t end, int64_t* first, int64_t* last) {
  const Pieces sweep = pieces(g.seen, t.batch, t.row, t.rows, t.heads, begin, end);
  *first = end, *last = begin - 1;
  for (int i = 0; i < sweep.groups; ++i)
    for (const int32_t* range = sweep.range[i]; range < sweep.range_end[i]; range += 2) {
      const int64_t from = range[0] < begin ? begin : range[0], to = range[1] < end ? range[1] : end;
      if (from >= to) continue;
      if (from < *first) *first = from;
      if (to - 1 > *last) *last = to - 1;
    }
}

// Adds the tile's share of dq to those of the chunks before, in their order; the last one leaves the result.
template <class T>
static void add_dq(const Backward& g, const Chunk& chunk, const Tile& t, const float* dq_t) {
  const Shape& shape = g.shape;
  int64_t first, last;
  seen_between(g, t, 0, chunk.key, &first, &last);
  const int64_t before = first > last ? -1 : last / chunk_of(shape);
  seen_between(g, t, chunk.end, shape.k_len, &first, &last);
  const bool is_last = first > last;
  int32_t* turn = g.turns + (t.batch * shape.q_heads + t.head) * attention::tiles(shape.q_len) + t.row / TILE;
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != before + 1) sched_yield();
  alignas(64) float scale[TILE];
  for (int i = 0; i < TILE; ++i) scale[i] = shape.scale;
  const Lanes<float> share = lanes_of<float>(g.dq_share, t);
  const Lanes<T> dq = lanes_of<T>(g.dq, t);
  unpack_transposed(dq_t, t.lanes(), shape.dim, scale, [&](int lane, int64_t d, int n, Vec x) {
    if (before >= 0) x = load_part(share(lane) + d, n) + x;
    if (is_last) store_part(dq(lane) + d, x, n);
    else store_part(share(lane) + d, x, n);
  });
  __atomic_store_n(turn, int32_t(chunk.index + 1), __ATOMIC_RELEASE);
}

template <bool PAIRS, class T>
static void backward_piece(const Backward& g, const Chunk& chunk, const Tile& t, const Rows& rows, const Buffers& b,
                           const Piece& piece) {
  const Shape& shape = g.shape;
  const int lanes = t.lanes();
  Span s = span(piece, lanes);
  // The partner of an odd last lane is none: its score is 0 * k, NaN where k is infinite.
  if (PAIRS && lanes % 2 && piece.row + piece.rows == lanes) s.masked = true;
  const T *k = at<const T>(g.k, t.batch, t.kv_head, piece.key), *v = at<const T>(g.v, t.batch, t.kv_head, piece.key);
  const int64_t key = piece.key - chunk.key;
  const Factor k_rows = rows_of<PAIRS>(k, g.k.row, piece.keys, shape.dim, b.k);
  const Factor k_terms = PAIRS ? terms_of<PAIRS>(k, g.k.row, piece.keys, shape.dim, b.k_terms) : k_rows;
  if (b.few_q) few_scores(piece, s, k, g.k.row, shape.dim, b.few_q, b.p);
  else scores<PAIRS>(piece.keys, s, b.q_t, shape.dim, k_rows, {b.p, TILE, WIDTH});
  scores<PAIRS>(piece.keys, s, b.dout_t, shape.value_dim,
                rows_of<PAIRS>(v, g.v.row, piece.keys, shape.value_dim, b.v), {b.ds, TILE, WIDTH});
  softmax_backward<PAIRS, T>(piece.keys, s.first, s.count, s.masked,
                             [&](int v, int) { return s.mask[v - s.first]; }, rows,
                             b.few_q ? 1 : scale_left<PAIRS>(shape), b);
  gather<PAIRS>(piece.keys, s, {b.ds_terms, TILE, WIDTH}, k_terms, shape.dim, b.dq_t);
  scatter<PAIRS>(piece, lanes, b.p, b.dout, shape.value_dim, b.dv + key * padded(shape.value_dim));
  scatter<PAIRS>(piece, lanes, b.ds, b.q, shape.dim, b.dk + key * padded(shape.dim));
}

// The same in tile registers, with the keys of the chunk and the rows of the tile ready in b.
template <class T>
static void amx_backward_step(const Backward& g, const Chunk& chunk, const Tile& t, const Rows& rows, bool finite,
                              const Buffers& b, const AmxStep& step, int64_t block) {
  const Shape& shape = g.shape;
  const int64_t key = block + step.key, row = amx_dim(shape.dim) / 2, value_row = amx_dim(shape.value_dim) / 2;
  const int64_t columns = amx_keys(chunk.end - chunk.key) / 2;
  const Scores p{b.p, TILE, WIDTH}, ds{b.ds, TILE, WIDTH}, ds_terms{b.ds_terms, TILE, WIDTH};
  amx_scores(step, b.q_t, shape.dim, {b.k + key * row, row}, p);
  amx_scores(step, b.dout_t, shape.value_dim, {b.v + key * value_row, value_row}, ds);
  softmax_backward<true, T>(step.keys, step.first, step.count, step.masked,
                            [&](int v, int i) { return amx_mask(step.seen[i], v); }, rows, scale_left<true>(shape), b);
  for (int v = step.first; v < step.first + step.count; ++v)
    for (int64_t i = (step.keys + 1) / 2; i < whole_tiles((step.keys + 1) / 2); ++i) store(ds_terms.at(i, v), Vec{});
  amx_gather(step, ds_terms, b.k_terms + key / 2, columns, shape.dim, b.dq_t);
  float *const dk = b.dk + key * padded(shape.dim), *const dv = b.dv + key * padded(shape.value_dim);
  amx_scatter(step, b.p, b.dout, shape.value_dim, dv);
  amx_scatter(step, b.ds, b.q, shape.dim, dk);
  if (!chunk.finite)
    amx_rest(step, ds_terms, at<const T>(g.k, t.batch, t.kv_head, chunk.key + key), g.k.row, shape.dim, b.dq_t);
  if (!finite) {
    amx_rest_of_rows(step, b.p, lanes_of<const T>(g.dout, t), t.lanes(), shape.value_dim, dv);
    amx_rest_of_rows(step, b.ds, lanes_of<const T>(g.q, t), t.lanes(), shape.dim, dk);
  }
}

// Steps of keys that the same vectors see.
template <class T>
static void amx_backward_block(const Backward& g, const Chunk& chunk, const Tile& t, const Rows& rows, bool finite,
                               const Buffers& b, const AmxSeen& seen, int64_t block) {
  const uint64_t lanes = bits(0, int(padded(t.lanes())));
  const auto register_from = [&](int key) { return amx_step(seen, key, least(key + 2 * SIDE, seen.last), lanes); };
  for (AmxStep step = register_from(seen.first);;) {
    const int end = step.key + step.keys;
    const AmxStep other = end < seen.last ? register_from(end) : AmxStep{};
    if (end < seen.last && other.first == step.first && other.count == step.count) {
      step.keys += other.keys, step.masked |= other.masked;
      continue;
    }
    if (step.count) amx_backward_step<T>(g, chunk, t, rows, finite, b, step, block);
    if (end == seen.last) return;
    step = other;
  }
}

template <Products BY, class T>
static void backward_tile(const Backward& g, const Chunk& chunk, const Tile& t, const Buffers& b) {
  constexpr bool PAIRS = BY != Products::single, AMX = BY == Products::amx;
  const Shape& shape = g.shape;
  const int lanes = t.lanes();
  Pieces sweep = pieces(g.seen, t.batch, t.row, t.rows, t.heads, chunk.key, chunk.end);
  std::conditional_t<AMX, AmxSeen, Piece> part;
  constexpr int KEYS = backward_keys(BY);
  int64_t block = -KEYS;  // of keys of the chunk
  const auto more = [&] {
    if constexpr (AMX) {
      const int64_t keys = chunk.end - chunk.key;
      while ((block += KEYS) < keys)
        if (amx_seen(sweep, chunk.key + block, chunk.key + least(block + KEYS, keys), part)) return true;
      return false;
    } else {
      return next(sweep, KEYS, part);
    }
  };
  if (!more()) return;

  const Lanes<const T> q = lanes_of<const T>(g.q, t), dout = lanes_of<const T>(g.dout, t);
  pack_transposed<PAIRS>(q, lanes, shape.dim, b.q_t, shape.scale, AMX ? amx_dim(shape.dim) : 0);
  pack_transposed<PAIRS>(dout, lanes, shape.value_dim, b.dout_t, 1, AMX ? amx_dim(shape.value_dim) : 0);
  pack_rows<PAIRS>(q, lanes, shape.dim, b.q);
  if (b.few_q) decode_queries(q, lanes, shape, b.few_q);
  pack_rows<PAIRS>(dout, lanes, shape.value_dim, b.dout);
  bool finite = true;  // of AMX
  if constexpr (AMX) {
    const auto whole = [&](float* x, int64_t width) {
      for (int r = (lanes + 1) / 2; r < TILE / 2; ++r) zero(x + r * width, width);
      finite &= amx_finite(x, TILE / 2, width, width);
    };
    whole(b.q, padded(shape.dim)), whole(b.dout, padded(shape.value_dim));
  }
  zero(b.dq_t, shape.dim * TILE);
  Rows rows = {};
  const Lanes<const float> lse = lanes_of<const float>(g.lse, t), lse_low = lanes_of<const float>(g.lse_low, t);
  const Lanes<const float> dlse = lanes_of<const float>(g.dlse, t);
  for (int r = 0; r < lanes; ++r) {
    rows.lse[r] = *lse(r), rows.lse_low[r] = *lse_low(r);
    rows.delta[r] = g.delta[row_number(shape, t, r)], rows.dlse[r] = *dlse(r);
  }

  do {
    if constexpr (AMX) amx_backward_block<T>(g, chunk, t, rows, finite, b, part, block);
    else backward_piece<PAIRS, T>(g, chunk, t, rows, b, part);
  } while (more());
  add_dq<T>(g, chunk, t, b.dq_t);
}

// The query rows between the first and the last that see a key of the chunk.
static void rows_between(const Backward& g, const Chunk& chunk, int64_t* begin, int64_t* end) {
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

template <Products BY, class T>
static void backward_chunk(const Backward& g, Chunk chunk, const Buffers& b) {
  const Shape& shape = g.shape;
  const int64_t keys = chunk.end - chunk.key, group = shape.q_heads / shape.kv_heads;
  const int64_t dim = padded(shape.dim), value_dim = padded(shape.value_dim);
  const int heads = heads_of_tile(shape);
  zero(b.dk, keys * dim), zero(b.dv, keys * value_dim);
  int64_t first, end;
  rows_between(g, chunk, &first, &end);
  if constexpr (BY == Products::amx) {
    const T *k = at<const T>(g.k, chunk.batch, chunk.kv_head, chunk.key);
    const T *v = at<const T>(g.v, chunk.batch, chunk.kv_head, chunk.key);
    amx_rows(k, g.k.row, int(keys), shape.dim, b.k), amx_rows(v, g.v.row, int(keys), shape.value_dim, b.v);
    amx_columns(k, g.k.row, int(keys), shape.dim, b.k_terms, amx_keys(keys) / 2);
    chunk.finite = amx_finite(b.k_terms, dim, whole_tiles((keys + 1) / 2), amx_keys(keys) / 2);
  }
  for (int64_t head = chunk.kv_head * group; head < (chunk.kv_head + 1) * group; head += heads)
    // Downwards: the next chunk, which begins at the same tile, follows one step behind.
    for (int64_t row = (attention::tiles(end) - 1) * TILE; row > first - TILE; row -= TILE)
      backward_tile<BY, T>(g, chunk,
                           {chunk.batch, head, chunk.kv_head, row, least(TILE, shape.q_len - row), heads}, b);
  for (int64_t i = 0; i < keys; ++i) {
    T* dk = at<T>(g.dk, chunk.batch, chunk.kv_head, chunk.key + i);
    T* dv = at<T>(g.dv, chunk.batch, chunk.kv_head, chunk.key + i);
    for (int64_t d = 0; d < shape.dim; d += WIDTH)
      store_part(dk + d, load(b.dk + i * dim + d) * shape.scale, least(WIDTH, shape.dim - d));
    for (int64_t d = 0; d < shape.value_dim; d += WIDTH)
      store_part(dv + d, load(b.dv + i * value_dim + d), least(WIDTH, shape.value_dim - d));
  }
}

// delta = sum(dout * out), in the order in which gemm sums dP = sum(dout * v); and dq = 0 where no chunk will come by.
template <Products BY, class T>
static void backward_rows(const Backward& g, const Tile& t) {
  constexpr bool PAIRS = BY != Products::single;
  const Shape& shape = g.shape;
  const Lanes<const T> dout = lanes_of<const T>(g.dout, t), out = lanes_of<const T>(g.out, t);
  const Lanes<T> dq = lanes_of<T>(g.dq, t);
  const int lanes = t.lanes();
  const int64_t terms = PAIRS ? shape.value_dim / 2 : shape.value_dim;
  for (int r = 0; r < lanes; r += WIDTH) {
    Vec delta{};
    for (int64_t d = 0; d < terms; d += WIDTH) {
      const int n = least(WIDTH, terms - d);
      Vec x[WIDTH], y[WIDTH];
      transposed<PAIRS>(dout, lanes, r, d, n, x);
      transposed<PAIRS>(out, lanes, r, d, n, y);
      if constexpr (BY == Products::amx) {
        delta += amx_sum(x, y, n);
        continue;
      }
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j)
        if (j < n) delta = step<PAIRS>(x[j], y[j], delta);
    }
    for (int i = 0; i < WIDTH && r + i < lanes; ++i) g.delta[row_number(shape, t, r + i)] = delta[i];
  }
  int64_t first, last;
  seen_between(g, t, 0, shape.k_len, &first, &last);
  if (first <= last) return;
  for (int r = 0; r < lanes; ++r)
    for (int64_t d = 0; d < shape.dim; d += WIDTH) store_part(dq(r) + d, Vec{}, least(WIDTH, shape.dim - d));
}

int64_t attention_backward_items(const Shape& shape) {
  const int64_t chunk = chunk_of(shape);
  return shape.batch * shape.kv_heads * ((shape.k_len + chunk - 1) / chunk);
}

int64_t attention_backward_workspace(const Shape& shape) {
  int64_t size;
  buffers(shape, nullptr, &size);
  return size;
}

void attention_backward_rows(const Backward& g, int64_t begin, int64_t end) {
  for_dtype(g.shape, [&](auto type, auto by) {
    for (int64_t item = begin; item < end; ++item) backward_rows<by, decltype(type)>(g, tile_of(g.shape, item));
  });
}

void attention_backward(const Backward& g, float* workspace, int64_t begin, int64_t end) {
  int64_t size;
  const Buffers b = buffers(g.shape, workspace, &size);
  const int64_t heads = g.shape.batch * g.shape.kv_heads, chunk = chunk_of(g.shape);
  const Amx registers(products_of(g.shape) == Products::amx);
  for_dtype(g.shape, [&](auto type, auto by) {
    for (int64_t item = begin; item < end; ++item) {  // early keys first: in a causal layout more rows see them
      const int64_t index = item / heads, batch = item % heads / g.shape.kv_heads;
      const int64_t last = (index + 1) * chunk < g.shape.k_len ? (index + 1) * chunk : g.shape.k_len;
      backward_chunk<by, decltype(type)>(g, {index, batch, item % g.shape.kv_heads, index * chunk, last}, b);
    }
  });
}

}  // namespace mirasol::MIRASOL_ISA
