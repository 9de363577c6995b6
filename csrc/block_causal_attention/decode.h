#pragma once
// Forward where a tile has few lanes, as in decoding a row at a time: the lanes of a vector run along the head instead,
// K and V are read once, as they lie, and time is what memory takes.
#include <utility>
#include "block_causal_attention/result.h"

namespace mirasol::MIRASOL_ISA {

// More rows than FEW are faster in the lanes, where no sum goes across a vector.
constexpr int AT_ONCE = 4;                  // rows for each reading of K and V
constexpr int DECODE_KEYS = 64;             // of a softmax step; whole vectors

struct Decoding {  // of a tile
  int64_t dim, value_dim;    // padded
  float *q, *out, *weights;  // (FEW, dim), (FEW, value_dim), (FEW, DECODE_KEYS)
  float *k, *v;              // (DECODE_KEYS, dim), (DECODE_KEYS, value_dim): copies, where they are made
  float top[FEW], total[FEW];
};

// to (lanes, padded dim) = the rows of the lanes, scaled, with zeros in the padding.
template <class T>
static void decode_queries(const Lanes<const T>& from, int lanes, const Shape& shape, float* to) {
  for (int i = 0; i < lanes; ++i)
    for (int64_t d = 0; d < shape.dim; d += WIDTH)
      store(to + i * padded(shape.dim) + d, load_part(from(i) + d, least(WIDTH, shape.dim - d)) * shape.scale);
}

// weights (R, DECODE_KEYS) = Q K^T; past the keys, up to a whole vector, -inf.
template <int R, class T>
static void decode_scores(const T* k, int64_t stride, int keys, int64_t dim, const float* q, int64_t q_row,
                          float* weights) {
  constexpr int N = WIDTH / (R == 3 ? 4 : R);  // keys at once: sums enough for one vector
  for (int key = 0; key < keys; key += N) {
    const T* row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      row[n] = k + (key + n < keys ? key + n : keys - 1) * stride;
      fetch(row[n] + AHEAD * stride, dim);
    }
    Vec sum[WIDTH] = {};
    const auto step = [&](int64_t d, int count) {
      Vec x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + r * q_row + d);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vec y = load_part(row[n] + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * N + n] = fma(x[r], y, sum[r * N + n]);
      }
    };
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) step(d, WIDTH);
    if (d < dim) step(d, int(dim - d));
    alignas(64) float all[WIDTH];
    store(all, sums(sum));
    for (int r = 0; r < R; ++r) std::memcpy(weights + r * DECODE_KEYS + key, all + r * N, N * sizeof(float));
  }
  for (int r = 0; r < R; ++r)
    for (int key = keys; key % WIDTH != 0; ++key) weights[r * DECODE_KEYS + key] = -__builtin_inff();
}

// Scores become exp(score - top); what was summed so far shrinks to the new top, and total grows.
static void decode_softmax(Decoding& w, int row, int keys) {
  float* const s = w.weights + row * DECODE_KEYS;
  float* const out = w.out + row * w.value_dim;
  const float hidden = -__builtin_inff();
  Vec most = broadcast(hidden), total{};
  for (int key = 0; key < keys; key += WIDTH) most = max(load(s + key), most);
  float fresh = hidden;
  for (int i = 0; i < WIDTH; ++i) fresh = most[i] > fresh ? most[i] : fresh;
  const float old = w.top[row], top = fresh > old ? fresh : old, base = top == hidden ? 0 : top;
  if (top != old) {
    const Vec shrink = exp(broadcast(old - base));
    w.top[row] = top, w.total[row] *= shrink[0];
    for (int64_t d = 0; d < w.value_dim; d += WIDTH) store(out + d, load(out + d) * shrink);
  }
  for (int key = 0; key < keys; key += WIDTH) {
    const Vec p = exp(load(s + key) - base);
    store(s + key, p), total += p;
  }
  w.total[row] += sum(total);
}

// out (R, C vectors) += weights V.
template <int R, int C, class T>
static inline void decode_sum(const T* v, int64_t stride, int keys, int count, const float* weights, float* out,
                              int64_t out_row) {
  Vec sum[R][C] = {};
  for (int key = 0; key < keys; ++key, v += stride) {
    fetch(v + AHEAD * stride, C > 1 ? C * WIDTH : count);
    Vec p[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) p[r] = broadcast(weights[r * DECODE_KEYS + key]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec y = load_part(v + c * WIDTH, C > 1 ? WIDTH : count);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][c] = fma(p[r], y, sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* const to = out + r * out_row + c * WIDTH;
      store(to, load(to) + sum[r][c]);
    }
}

// The same for elements [d, dim), C vectors at once as far as they go.
template <int R, int C, class T>
static void decode_values(const T* v, int64_t stride, int keys, int64_t d, int64_t dim, const float* weights,
                          float* out, int64_t out_row) {
  for (; d < dim && (C == 1 || d + C * WIDTH <= dim); d += C * WIDTH)
    decode_sum<R, C>(v + d, stride, keys, least(WIDTH, dim - d), weights, out + d, out_row);
  if constexpr (C > 1) decode_values<R, C / 2>(v, stride, keys, d, dim, weights, out, out_row);
}

template <int R, class T>
static void decode_rows(const Shape& shape, Decoding& w, int row, int keys, const T* k, int64_t k_stride, const T* v,
                        int64_t v_stride) {
  float* const weights = w.weights + row * DECODE_KEYS;
  decode_scores<R>(k, k_stride, keys, shape.dim, w.q + row * w.dim, w.dim, weights);
  for (int r = row; r < row + R; ++r) decode_softmax(w, r, keys);
  decode_values<R, 8 / R>(v, v_stride, keys, 0, shape.value_dim, weights, w.out + row * w.value_dim, w.value_dim);
}

// run(first row, how many), as many at once as go.
template <class Run>
static inline void few_at_once(int row, int rows, Run run) {
  for (; rows >= AT_ONCE; row += AT_ONCE, rows -= AT_ONCE) run(row, std::integral_constant<int, AT_ONCE>{});
  if (rows == 3) run(row, std::integral_constant<int, 3>{});
  if (rows == 2) run(row, std::integral_constant<int, 2>{});
  if (rows == 1) run(row, std::integral_constant<int, 1>{});
}

template <class T>
static void decode_piece(const Shape& shape, Decoding& w, const Piece& piece, const T* k, int64_t k_stride, const T* v,
                         int64_t v_stride) {
  few_at_once(piece.row, piece.rows, [&](int row, auto rows) {
    decode_rows<rows>(shape, w, row, piece.keys, k, k_stride, v, v_stride);
  });
}

// For backward: to (keys, TILE) = K Q^T with the bits of forward, of which lse was made.  Large ones in another order
// of sums would give other weights: at 1e4 by parts of a thousand.
template <class T>
static void few_scores(const Piece& piece, const Span& s, const T* k, int64_t stride, int64_t dim, const float* q,
                       float* to) {
  alignas(64) float scores[AT_ONCE * DECODE_KEYS];
  for (int key = 0; key < piece.keys; ++key) zero(to + key * TILE + s.first * WIDTH, s.count * WIDTH);
  for (int key = 0; key < piece.keys; key += DECODE_KEYS) {
    const int keys = least(DECODE_KEYS, piece.keys - key);
    few_at_once(piece.row, piece.rows, [&](int row, auto rows) {
      decode_scores<rows>(k + key * stride, stride, keys, dim, q + row * padded(dim), padded(dim), scores);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < keys; ++i) to[(key + i) * TILE + row + r] = scores[r * DECODE_KEYS + i];
    });
  }
}

static int64_t decode_workspace(const Shape& shape) {
  return (FEW + DECODE_KEYS) * (padded(shape.dim) + padded(shape.value_dim)) + FEW * DECODE_KEYS;
}

template <class T>
static void decode_finish(const Forward& f, const Tile& tile, int lane, const Decoding& w, int64_t split,
                          int64_t splits) {
  const float* const from = w.out + lane * w.value_dim;
  const float top = w.top[lane], total = w.total[lane];
  const int64_t row = row_number(f.shape, tile, lane), dim = f.shape.value_dim;
  if (splits > 1) {
    float* const part = part_of(f, split, row);
    std::memcpy(part, from, dim * sizeof(float));
    part[dim] = top, part[dim + 1] = total;
    return;
  }
  store_lse(f, row, top, total);
  T* const to = lanes_of<T>(f.out, tile)(lane);
  const float each = total == 0 ? 0 : 1 / total;
  for (int64_t d = 0; d < dim; d += WIDTH) store_part(to + d, load(from + d) * each, least(WIDTH, dim - d));
}

template <class T>
static void decode_tile(const Forward& f, const Tile& tile, int64_t split, int64_t splits, float* space) {
  const Shape& shape = f.shape;
  const auto take = [&](int64_t floats) { return std::exchange(space, space + floats); };
  Decoding w;
  w.dim = padded(shape.dim), w.value_dim = padded(shape.value_dim);
  w.q = take(FEW * w.dim), w.out = take(FEW * w.value_dim), w.weights = take(FEW * DECODE_KEYS);
  w.k = take(DECODE_KEYS * w.dim), w.v = take(DECODE_KEYS * w.value_dim);
  const int lanes = tile.lanes();
  decode_queries(lanes_of<const T>(f.q, tile), lanes, shape, w.q);
  for (int i = 0; i < lanes; ++i) {
    zero(w.out + i * w.value_dim, w.value_dim);
    w.top[i] = -__builtin_inff(), w.total[i] = 0;
  }
  const int64_t from = shape.k_len * split / splits, to = shape.k_len * (split + 1) / splits;
  Pieces sweep = pieces(f.seen, tile.batch, tile.row, tile.rows, tile.heads, from, to);
  for (Piece piece; next(sweep, DECODE_KEYS, piece);) {
    const T* const k = at<const T>(f.k, tile.batch, tile.kv_head, piece.key);
    const T* const v = at<const T>(f.v, tile.batch, tile.kv_head, piece.key);
    if (piece.rows <= AT_ONCE) {
      decode_piece(shape, w, piece, k, f.k.row, v, f.v.row);
    } else {  // read more than once: as floats side by side, since rows that are apart share few sets of the cache
      const Factor x = rows_of<false>(k, f.k.row, piece.keys, shape.dim, w.k);
      const Factor y = rows_of<false>(v, f.v.row, piece.keys, shape.value_dim, w.v);
      decode_piece(shape, w, piece, x.data, x.row, y.data, y.row);
    }
  }
  for (int i = 0; i < lanes; ++i) decode_finish<T>(f, tile, i, w, split, splits);
}

template <class T>
static void decode_item(const Forward& f, int64_t item, int64_t split, int64_t splits, float* space) {
  const auto [kv_head, first, count] = tiles_of(f.shape, item);
  for (int i = 0; i < count; ++i) decode_tile<T>(f, tile_of(f.shape, kv_head, first + i), split, splits, space);
}

}  // namespace mirasol::MIRASOL_ISA
