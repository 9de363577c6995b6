#pragma once
// What forward and backward share: a tile of query rows in the lanes of vectors.  Scores are kept transposed, (keys,
// TILE): softmax is then vertical, K and V are read as they lie, an element broadcast at a time, and rows never meet.
#include "block_causal_attention/pieces.h"
#include "common/gemm.h"

namespace mirasol::MIRASOL_ISA {

using attention::Shape;
using attention::View;

constexpr int TILE_VECTORS = TILE / WIDTH;

static inline void zero(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += WIDTH) store(x + i, Vec{});
}

static inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }
static inline int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

template <class T>
static inline T* at(const View<T>& view, int64_t batch, int64_t head, int64_t row) {
  return view.data + batch * view.batch + head * view.head + row * view.row;
}

struct Tile {
  int64_t batch, head, kv_head, row;
  int rows;
};

// The last tiles come first: in a causal layout they are the longest, and short ones even out the threads at the end.
static Tile tile_of(const Shape& shape, int64_t item) {
  const int64_t heads = shape.batch * shape.q_heads, head = item % shape.q_heads;
  const int64_t row = (attention::tiles(shape.q_len) - 1 - item / heads) * TILE;
  const int64_t kv_head = head / (shape.q_heads / shape.kv_heads);
  return {item % heads / shape.q_heads, head, kv_head, row, least(TILE, shape.q_len - row)};
}

// The vectors of a tile that hold rows of a piece; `masked` when one of them also holds another live row of the tile.
struct Span {
  int first, count;
  bool masked;
  Bits mask[TILE_VECTORS];  // of vectors first .. first + count - 1
};

static Span span(const Piece& piece, int tile_rows) {
  const int begin = piece.row, end = piece.row + piece.rows;
  Span s;
  s.first = begin / WIDTH, s.count = (end + WIDTH - 1) / WIDTH - s.first;
  s.masked = begin % WIDTH != 0 || (end % WIDTH != 0 && end < tile_rows);
  for (int v = 0; v < s.count; ++v) s.mask[v] = lanes(begin - (s.first + v) * WIDTH, end - (s.first + v) * WIDTH);
  return s;
}

// to[d * TILE + r] = from[r * stride + d], and 0 up to the next whole vector of rows.
static void pack_transposed(const float* from, int64_t stride, int rows, int64_t dim, float* to) {
  for (int r = 0; r < rows; r += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      Vec x[WIDTH] = {};
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i)
        if (r + i < rows) x[i] = load_part(from + (r + i) * stride + d, n);
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j)
        if (j < n) store(to + (d + j) * TILE + r, x[j]);
    }
}

// Calls each(row, d, n, x) with elements [d, d + n) of a row of a transposed tile, times the `factor` of the row.
template <class Each>
static inline void unpack_transposed(const float* from, int rows, int64_t dim, const float* factor, Each each) {
  for (int r = 0; r < rows; r += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      Vec x[WIDTH] = {};
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j)
        if (j < n) x[j] = load(from + (d + j) * TILE + r) * load(factor + r);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i)
        if (r + i < rows) each(r + i, d, n, x[i]);
    }
}

// to(keys, lanes) = K Q^T for the vectors of a span, with `tile` the packed Q^T.  Not scaled yet: that is one rounding
// together with the subtraction that follows, and Q is not rounded before the product.
static inline void scores(const Piece& piece, const Span& s, const float* tile, int64_t dim, const float* keys,
                          int64_t key_stride, float* to) {
  gemm({.vectors = s.count, .n = piece.keys, .k = int(dim), .a = tile + s.first * WIDTH, .a_k = TILE,
        .b = keys, .b_n = key_stride, .b_k = 1, .c = to + s.first * WIDTH, .c_n = TILE});
}

// tile(dim, lanes) += X^T P, with X (keys, dim) and P (keys, lanes): the product that ends in a row of queries.
static inline void gather(const Piece& piece, const Span& s, const float* p, const float* x, int64_t x_stride,
                          int64_t dim, float* tile) {
  gemm({.vectors = s.count, .n = int(dim), .k = piece.keys, .a = p + s.first * WIDTH, .a_k = TILE,
        .b = x, .b_n = 1, .b_k = x_stride, .c = tile + s.first * WIDTH, .c_n = TILE, .add = true,
        .mask = s.masked ? s.mask : nullptr});
}

}  // namespace mirasol::MIRASOL_ISA
