#pragma once
// Forward: one item is a few tiles of query rows that share a kv head, walked together over the keys they see, a block
// of keys at a time, with an online softmax: each block is brought to the cache, and made floats if it must, once for
// all of them.
#include <algorithm>
#include <utility>
#include "block_causal_attention/amx.h"
#include "block_causal_attention/decode.h"

namespace mirasol::MIRASOL_ISA {

constexpr int FORWARD_KEYS = 192;  // keys of a softmax step
static_assert(FORWARD_KEYS <= AMX_KEYS);

// Of a block; beside the tiles' part of the cache.  Even, for pairs.
static int keys_of_block(const Shape& shape) {
  const int64_t size = products_of(shape) == Products::amx ? sizeof(bfloat16) : sizeof(float);
  const int64_t fit = (128 << 10) / ((shape.dim + shape.value_dim) * size) / 2 * 2;
  return fit < FORWARD_KEYS ? int(fit) : FORWARD_KEYS;
}

// What a thread needs beside its tiles, and for each of them, in floats.
struct Space {
  int64_t k, v, piece, q, out;
};

static Space space_of(const Shape& shape) {
  const int64_t keys = keys_of_block(shape), width = padded(shape.dim), value_width = padded(shape.value_dim);
  const int64_t out = shape.value_dim * TILE;
  switch (products_of(shape)) {
    case Products::single: return {keys * width, keys * value_width, 0, shape.dim * TILE, out};
    case Products::pairs: return {keys * width, keys * value_width, keys / 2 * value_width, shape.dim * TILE, out};
    case Products::amx: break;
  }
  const int64_t row = amx_dim(shape.dim) / 2;
  return {(keys + SIDE) * row, value_width * amx_keys(keys) / 2, 0, row * TILE, out};
}

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
    float* const o = out + lane * shape.value_dim;
    for (int64_t d = 0; d < shape.value_dim; ++d) store(o + d * WIDTH, load(o + d * WIDTH) * shrink);
  }
}

// Keys and values of the next block, on their way to the cache while weights are computed: these wait for no memory.
struct Coming {
  const char *k, *v;
  int64_t k_step, v_step;
  void some() {
    __builtin_prefetch(k), __builtin_prefetch(v);
    k += k_step, v += v_step;
  }
};

// The largest product of each row of a vector.
static inline void amx_top(const AmxStep& step, int v, const Scores& s, float* top) {
  const float* const x = s.at(0, v);
  Vec most[4];
  for (Vec& each : most) each = load(top + v * WIDTH);
  const auto one = [&](int key, Vec& to) {
    const Vec y = load(x + key * WIDTH);
    to = max(step.masked ? select(amx_mask(step.seen[key], v), y, to) : y, to);
  };
  int key = 0;
  for (; key + 4 <= step.keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) one(key + i, most[i]);
  for (; key < step.keys; ++key) one(key, most[0]);
  store(top + v * WIDTH, max(max(most[0], most[1]), max(most[2], most[3])));
}

// As weights, in pairs of keys, and zeros up to whole tile registers.
static inline void amx_weights(const AmxStep& step, int v, float factor, const Scores& scores, Running& run,
                               Coming& coming) {
  const Vec scale = broadcast(factor), base = load(run.base + v * WIDTH);
  float* const s = scores.at(0, v);
  Vec total{};
  const auto weight = [&](int key) {
    const Vec p = exp_for_bfloat16(fma(load(s + key * WIDTH), scale, -base));
    return step.masked ? keep(amx_mask(step.seen[key], v), p) : p;
  };
  int key = 0;
  for (; key + 2 <= step.keys; key += 2) {
    coming.some();
    const Vec a = weight(key), b = weight(key + 1);
    total += a;
    total += b;
    store(s + key / 2 * WIDTH, pair(a, b));
  }
  if (key < step.keys) {
    const Vec a = weight(key);
    total += a;
    store(s + key / 2 * WIDTH, pair(a, Vec{}));
  }
  for (int64_t i = (step.keys + 1) / 2; i < whole_tiles((step.keys + 1) / 2); ++i) store(s + i * WIDTH, Vec{});
  store(run.total + v * WIDTH, load(run.total + v * WIDTH) + total);
}

// Products of a vector of lanes become exp(scale * product - base), and total grows by them.  As pairs, those of keys
// 2 i and 2 i + 1 of a piece stand in its row i.
template <bool PAIRS, class T>
static void weights(const Placed& x, int v, float factor, const Scores& scores, Running& run, Coming& coming) {
  const Vec scale = broadcast(factor), base = load(run.base + v * WIDTH);
  const Bits mask = x.span.mask[v - x.span.first];
  float* s = scores.at(x.slot, v);
  Vec total{};
  const auto some = [&](int key, auto n, bool masked) {
    constexpr int N = n;
    Vec p[N];
    coming.some();
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = fma(load(s + (key + i) * WIDTH), scale, -base);
    exp_of<PAIRS, T>(p);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) total += p[i] = masked ? keep(mask, p[i]) : p[i];
    if constexpr (PAIRS) {
      store(s + key / 2 * WIDTH, pair(p[0], N == 2 ? p[N - 1] : Vec{}));
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) store(s + (key + i) * WIDTH, p[i]);
    }
  };
  const auto all = [&](bool masked) {
    constexpr std::integral_constant<int, PAIRS ? 2 : 4> MANY;
    int key = 0;
    for (; key + MANY <= x.piece.keys; key += MANY) some(key, MANY, masked);
    for (; key < x.piece.keys; ++key) some(key, std::integral_constant<int, 1>{}, masked);
  };
  x.span.masked ? all(true) : all(false);
  store(run.total + v * WIDTH, load(run.total + v * WIDTH) + total);
}

// A block of keys of one kv head and their values, made ready when the first tile asks.
template <Products BY, class T>
struct Block {
  static constexpr bool PAIRS = BY == Products::pairs;
  const Shape& shape;
  const T *k, *v;
  int64_t k_stride, v_stride, key, end;
  float *k_space, *v_space, *piece_space = nullptr;
  Factor k_rows = {}, v_terms = {};

  Factor keys(const Piece& piece) {
    if (!k_rows.data) k_rows = rows_of<PAIRS>(k, k_stride, int(end - key), shape.dim, k_space);
    return {k_rows.data + (piece.key - key) * k_rows.row, k_rows.row};
  }
  Factor values(const Piece& piece) {
    const int64_t first = piece.key - key, last = first + piece.keys;
    // Pairs of the block that are not pairs of the piece would bring in a key that its rows do not see.
    if (PAIRS && (first % 2 || (last % 2 && piece.key + piece.keys != end)))
      return terms_of<PAIRS>(v + first * v_stride, v_stride, piece.keys, shape.value_dim, piece_space);
    if (!v_terms.data) v_terms = terms_of<PAIRS>(v, v_stride, int(end - key), shape.value_dim, v_space);
    return {v_terms.data + (PAIRS ? first / 2 : first) * v_terms.row, v_terms.row};
  }
};

template <class T>
struct Block<Products::amx, T> {
  const Shape& shape;
  const T *k, *v;
  int64_t k_stride, v_stride, key, end;
  float *k_space, *v_space;
  bool ready = false, finite = true;  // of v; others are 0 in v_space

  int64_t columns() const { return amx_keys(end - key) / 2; }
  void prepare() {
    if (ready) return;
    const int keys = int(end - key);
    amx_rows(k, k_stride, keys, shape.dim, k_space);
    amx_columns(v, v_stride, keys, shape.value_dim, v_space, columns());
    finite = amx_finite(v_space, padded(shape.value_dim), whole_tiles((keys + 1) / 2), columns());
    ready = true;
  }
};

struct Work {  // on a tile
  Tile tile;
  float *q, *out;  // (dim, TILE), (value_dim, TILE), in panels
  Running run;
  Pieces sweep;
};

// The keys of a block that a tile sees, in steps of the softmax.
template <Products BY, class T>
static void forward_block(const Shape& shape, float scale, Block<BY, T>& block, Work& w, const Scores& s,
                          Coming& coming) {
  constexpr bool PAIRS = BY == Products::pairs;
  const int lanes = w.tile.lanes();
  Placed placed[FORWARD_KEYS];
  Piece piece;
  w.sweep.end = block.end;
  bool more = next(w.sweep, FORWARD_KEYS, piece);
  while (more) {
    int count = 0;
    for (int slot = 0; more && slot + piece.keys <= FORWARD_KEYS; more = next(w.sweep, FORWARD_KEYS, piece)) {
      Placed& x = placed[count++] = {piece, span(piece, lanes), slot};
      scores<PAIRS>(piece.keys, x.span, w.q, shape.dim, block.keys(piece),
                    {s.at(slot, 0), s.key, s.vector}, w.run.fresh);
      slot += piece.keys;
    }
    raise_tops(shape, scale, lanes, w.run, w.out);
    for (const Placed* x = placed; x < placed + count; ++x) {
      for (int v = 0; v < x->span.count; ++v) weights<PAIRS, T>(*x, x->span.first + v, scale, s, w.run, coming);
      gather<PAIRS>(x->piece.keys, x->span, {s.at(x->slot, 0), s.key, s.vector}, block.values(x->piece),
                    shape.value_dim, w.out);
    }
  }
}

// The same in tile registers, in one step.
template <class T>
static void forward_block(const Shape& shape, float scale, Block<Products::amx, T>& block, Work& w, const Scores& s,
                          Coming& coming) {
  AmxSeen seen;
  if (!amx_seen(w.sweep, block.key, block.end, seen)) return;
  const AmxStep step = amx_step(seen, seen.first, seen.last, bits(0, w.tile.lanes()));
  block.prepare();
  const int64_t row = amx_dim(shape.dim) / 2;
  amx_scores(step, w.q, shape.dim, {block.k_space + step.key * row, row}, s);
  for (int v = step.first; v < step.first + step.count; ++v) amx_top(step, v, s, w.run.fresh);
  raise_tops(shape, scale, w.tile.lanes(), w.run, w.out);
  for (int v = step.first; v < step.first + step.count; ++v) amx_weights(step, v, scale, s, w.run, coming);
  amx_gather(step, s, block.v_space + step.key / 2, block.columns(), shape.value_dim, w.out);
  if (!block.finite) amx_rest(step, s, block.v + step.key * block.v_stride, block.v_stride, shape.value_dim, w.out);
}

// As many keys again, asked for by so many tiles, `weights` keys of a vector at a time.  Rows that are apart have a
// prefetch of their own.
static Coming coming_after(const Forward& f, const Tile& t, int64_t end, int tiles, int weights) {
  const int64_t size = f.shape.dtype == Dtype::float32 ? sizeof(float) : sizeof(bfloat16);
  const auto from = [&](const View<const void>& x) {
    return static_cast<const char*>(x.data) + (t.batch * x.batch + t.kv_head * x.head + end * x.row) * size;
  };
  const auto step = [&](const View<const void>& x, int64_t dim) {
    return x.row == dim ? dim * size * weights / (TILE_VECTORS * tiles) : 0;
  };
  return {from(f.k), from(f.v), step(f.k, f.shape.dim), step(f.v, f.shape.value_dim)};
}

template <class T>
static void finish(const Forward& f, Work& w, int64_t split, int64_t splits) {
  const Shape& shape = f.shape;
  const int lanes = w.tile.lanes();
  Running& run = w.run;
  alignas(64) float factor[TILE];
  if (splits > 1) {
    for (float& x : factor) x = 1;
    for (int i = 0; i < lanes; ++i) {
      float* part = part_of(f, split, row_number(shape, w.tile, i)) + shape.value_dim;
      part[0] = run.top[i], part[1] = run.total[i];
    }
    unpack_transposed(w.out, lanes, shape.value_dim, factor, [&](int lane, int64_t d, int n, Vec x) {
      store_part(part_of(f, split, row_number(shape, w.tile, lane)) + d, x, n);
    });
    return;
  }
  for (int i = 0; i < lanes; ++i) store_lse(f, row_number(shape, w.tile, i), run.top[i], run.total[i]);
  for (int i = 0; i < TILE; ++i) factor[i] = run.total[i] == 0 ? 0 : 1 / run.total[i];
  const Lanes<T> to = lanes_of<T>(f.out, w.tile);
  unpack_transposed(w.out, lanes, shape.value_dim, factor,
                    [&](int lane, int64_t d, int n, Vec x) { store_part(to(lane) + d, x, n); });
}

template <Products BY, class T>
static void forward_item(const Forward& f, int64_t item, int64_t split, int64_t splits, float* space) {
  constexpr bool PAIRS = BY != Products::single;
  const Shape& shape = f.shape;
  const Space need = space_of(shape);
  const auto [kv_head, first, count] = tiles_of(shape, item);
  const auto take = [&](int64_t floats) { return std::exchange(space, space + floats); };
  const Scores s{take(FORWARD_KEYS * TILE), WIDTH, FORWARD_KEYS * WIDTH};  // in panels
  const int keys = keys_of_block(shape);
  float *const k_space = take(need.k), *const v_space = take(need.v), *const piece_space = take(need.piece);
  const float scale = __builtin_fabsf(scale_left<PAIRS>(shape));
  const int64_t from = shape.k_len * split / splits, to = shape.k_len * (split + 1) / splits;

  Work work[TOGETHER];
  for (int i = 0; i < count; ++i) {
    Work& w = work[i];
    w.tile = tile_of(shape, kv_head, first + i);
    w.q = take(need.q), w.out = take(need.out);
    pack_transposed<PAIRS>(lanes_of<const T>(f.q, w.tile), w.tile.lanes(), shape.dim, w.q, shape.scale,
                           BY == Products::amx ? 2 * need.q / TILE : 0);
    // The largest product must have the largest score.
    if (PAIRS && shape.scale < 0) negate_pairs(w.q, need.q / (BY == Products::pairs ? 2 : 1));
    zero(w.out, need.out);
    for (int j = 0; j < TILE; ++j)
      w.run.top[j] = w.run.fresh[j] = -__builtin_inff(), w.run.base[j] = w.run.total[j] = 0;
    w.sweep = pieces(f.seen, w.tile.batch, w.tile.row, w.tile.rows, w.tile.heads, from, to);
  }
  const Tile& any = work[0].tile;
  for (;;) {
    int64_t key = to;
    for (int i = 0; i < count; ++i) key = std::min(key, upcoming(work[i].sweep, to));
    if (key >= to) break;
    // Blocks end at multiples of their length, so that it is the same for a tile which others share them.
    const int64_t edge = std::min(to, (key / keys + 1) * keys);
    if (BY == Products::amx) key = key / keys * keys;  // they begin there too, and so do terms of a tile register
    int64_t end = key;
    for (int i = 0; i < count; ++i) end = seen_until(work[i].sweep, edge, end);
    Block<BY, T> block{shape, at<const T>(f.k, any.batch, any.kv_head, key),
                       at<const T>(f.v, any.batch, any.kv_head, key), f.k.row, f.v.row, key, end,
                       k_space, v_space};
    if constexpr (BY == Products::pairs) block.piece_space = piece_space;
    Coming coming = coming_after(f, any, end, count, PAIRS ? 2 : 4);
    for (int i = 0; i < count; ++i) forward_block(shape, scale, block, work[i], s, coming);
  }
  for (int i = 0; i < count; ++i) finish<T>(f, work[i], split, splits);
}

int64_t attention_workspace(const Shape& shape) {
  if (few_lanes(shape)) return decode_workspace(shape);
  const Space need = space_of(shape);
  return FORWARD_KEYS * TILE + need.k + need.v + need.piece + tiles_of_item(shape) * (need.q + need.out);
}

void attention_forward(const Forward& f, float* workspace, int64_t begin, int64_t end) {
  const int64_t splits = attention_splits(f.shape);
  const bool few = few_lanes(f.shape);
  const Amx registers(products_of(f.shape) == Products::amx);
  for_dtype(f.shape, [&](auto type, auto by) {
    for (int64_t item = begin; item < end; ++item)
      if (few) decode_item<decltype(type)>(f, item / splits, item % splits, splits, workspace);
      else forward_item<by, decltype(type)>(f, item / splits, item % splits, splits, workspace);
  });
}

}  // namespace mirasol::MIRASOL_ISA
