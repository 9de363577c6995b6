#pragma once
// What forward and backward share: a tile of query rows in the lanes of vectors.  Scores are kept transposed, (keys,
// TILE): softmax is then vertical, K and V are read as they lie, an element broadcast at a time, and rows never meet.
// "(n, TILE) in panels" is one (n, WIDTH) after the other: what a product reads then fills whole lines of the cache,
// and lines of all its sets.
#include <type_traits>
#include "block_causal_attention/pieces.h"
#include "common/gemm.h"

namespace mirasol::MIRASOL_ISA {

using attention::Products;
using attention::Shape;
using attention::View;

constexpr int TILE_VECTORS = TILE / WIDTH;

template <class T, class Any>
static inline T* at(const View<Any>& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

// The lanes: `rows` rows of each of `heads` query heads of one kv head, head after head.
struct Tile {
  int64_t batch, head, kv_head, row;
  int rows, heads;
  int lanes() const { return rows * heads; }
};

// Short queries leave room for several heads that read the same keys: a divisor of the group, as many as fit.
static int heads_of_tile(const Shape& shape) {
  const int64_t group = shape.kv_heads ? shape.q_heads / shape.kv_heads : 1;
  int64_t heads = shape.q_len ? TILE / shape.q_len : 1;
  if (heads > group) heads = group;
  while (heads > 1 && group % heads) --heads;
  return heads > 1 ? int(heads) : 1;
}

int64_t attention_tiles(const Shape& shape) {
  return shape.batch * (shape.q_heads / heads_of_tile(shape)) * attention::tiles(shape.q_len);
}

// Tile number `number` of kv head `kv` (of all batch rows).  The last rows come first: in a causal layout they see the
// most, and short tiles even out the threads at the end.
static Tile tile_of(const Shape& shape, int64_t kv, int64_t number) {
  const int packed = heads_of_tile(shape);
  const int64_t group = shape.q_heads / shape.kv_heads, per_row = group / packed;
  const int64_t row = (attention::tiles(shape.q_len) - 1 - number / per_row) * TILE, kv_head = kv % shape.kv_heads;
  return {kv / shape.kv_heads, kv_head * group + number % per_row * packed, kv_head, row,
          least(TILE, shape.q_len - row), packed};
}

static Tile tile_of(const Shape& shape, int64_t item) {
  const int64_t kv_heads = shape.batch * shape.kv_heads;
  return tile_of(shape, item % kv_heads, item / kv_heads);
}

// Of a lane, among (batch, q_heads, q_len).
static int64_t row_number(const Shape& shape, const Tile& t, int lane) {
  return (t.batch * shape.q_heads + t.head + lane / t.rows) * shape.q_len + t.row + lane % t.rows;
}

// Where the elements of a lane are.
template <class T>
struct Lanes {
  T* first;
  int64_t head, row;
  int rows;
  T* operator()(int lane) const {
    return lane < rows ? first + lane * row : first + lane / rows * head + lane % rows * row;
  }
};
template <class T, class Any>
static Lanes<T> lanes_of(const View<Any>& view, const Tile& t) {
  return {at<T>(view, t.batch, t.head, t.row), view.head, view.row, t.rows};
}

// The vectors of a tile that hold rows of a piece; `masked` when one of them also holds another live row of the tile.
struct Span {
  int first, count;
  bool masked;
  Bits mask[TILE_VECTORS];  // of vectors first .. first + count - 1
};

static Span span(const Piece& piece, int lanes) {
  const int begin = piece.row, end = piece.row + piece.rows;
  Span s;
  s.first = begin / WIDTH, s.count = (end + WIDTH - 1) / WIDTH - s.first;
  s.masked = begin % WIDTH != 0 || (end % WIDTH != 0 && end < lanes);
  for (int v = 0; v < s.count; ++v) {
    const int lane = (s.first + v) * WIDTH;
    s.mask[v] = lanes_between(begin - lane, end - lane);
  }
  return s;
}

// x[j] = element d + j of the rows of lanes r .. r + WIDTH - 1, for j < n, and 0 behind the last lane.  As pairs:
// elements 2 (d + j) and the next, in one.
template <bool PAIRS, class T>
static inline void transposed(const Lanes<const T>& from, int lanes, int r, int64_t d, int n, Vec (&x)[WIDTH]) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    x[i] = Vec{};
    if (r + i < lanes) {
      if constexpr (PAIRS) x[i] = load_part(reinterpret_cast<const Element*>(from(r + i)) + d, n);
      else x[i] = load_part(from(r + i) + d, n);
    }
  }
  transpose(x);
}

// to (dim, TILE), in panels = the rows of the lanes, transposed, and 0 up to the next whole vector of lanes.  As pairs:
// (dim / 2, TILE), elements d and d + 1 in one.  Floats are multiplied by `scale`, if it is given.  `panel`: the dim of
// a panel where that is more, with zeros behind the last element.
template <bool PAIRS, class T>
static void pack_transposed(const Lanes<const T>& from, int lanes, int64_t dim, float* to, float scale = 1,
                            int64_t panel = 0) {
  if constexpr (PAIRS) dim /= 2, panel /= 2;
  if (panel < dim) panel = dim;
  for (int r = 0; r < lanes; r += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      Vec x[WIDTH];
      transposed<PAIRS>(from, lanes, r, d, n, x);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j)
        if (j < n) store(to + r * panel + (d + j) * WIDTH, PAIRS ? x[j] : x[j] * scale);
    }
  for (int r = 0; r < lanes; r += WIDTH) zero(to + r * panel + dim * WIDTH, (panel - dim) * WIDTH);
}

// Calls each(lane, d, n, x) with elements [d, d + n) of the row of a lane of a transposed tile in panels, times its
// `factor`.
template <class Each>
static inline void unpack_transposed(const float* from, int lanes, int64_t dim, const float* factor, Each each) {
  for (int r = 0; r < lanes; r += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      Vec x[WIDTH] = {};
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j)
        if (j < n) x[j] = load(from + r * dim + (d + j) * WIDTH) * load(factor + r);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i)
        if (r + i < lanes) each(r + i, d, n, x[i]);
    }
}

// Rows of K or V as the factor of a product that is broadcast.
struct Factor {
  const Element* data;
  int64_t row;  // stride
};

// Rows that do not follow each other in memory (heads interleaved) are each in a page of their own, where the hardware
// fetches nothing ahead of time: 16 heads of 64, 50 -> 61 Gflop/s forward (EPYC Zen 3, one thread, NOTES 2026-11-25).
constexpr int AHEAD = 16;
template <class T>
static inline void fetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Row by row, for a sum over their elements.  Halves are made floats in `space`, rows that are apart are copied there.
template <bool PAIRS, class T>
static Factor rows_of(const T* from, int64_t stride, int rows, int64_t dim, float* space) {
  if constexpr (PAIRS) {
    if (stride == dim) return {reinterpret_cast<const Element*>(from), stride / 2};
    for (int r = 0; r < rows; ++r) {
      fetch(from + (r + AHEAD) * stride, dim);
      std::memcpy(space + r * (dim / 2), from + r * stride, dim * sizeof(T));
    }
    return {space, dim / 2};
  } else {
    if constexpr (sizeof(T) == sizeof(float))
      if (stride == dim) return {from, stride};
    const int64_t width = padded(dim);
    for (int r = 0; r < rows; ++r) {
      fetch(from + (r + AHEAD) * stride, dim);
      for (int64_t d = 0; d < dim; d += WIDTH)
        store(space + r * width + d, load_part(from + r * stride + d, least(WIDTH, dim - d)));
    }
    return {space, width};
  }
}

// to (rows / 2, padded dim): rows 2 i and 2 i + 1 as pairs; 0 is the partner of an odd last one.
template <class Row>
static void pair_rows(Row row, int rows, int64_t dim, float* to) {
  for (int r = 0; r < rows; r += 2, to += padded(dim))
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      store(to + d, pair(load_halves(row(r) + d, n), r + 1 < rows ? load_halves(row(r + 1) + d, n) : Halves{}));
    }
}

// The same for a sum over the rows, as pairs of them.
template <bool PAIRS, class T>
static Factor terms_of(const T* from, int64_t stride, int rows, int64_t dim, float* space) {
  if constexpr (!PAIRS) return rows_of<false>(from, stride, rows, dim, space);
  else {
    pair_rows([&](int r) { return from + r * stride; }, rows, dim, space);
    return {space, padded(dim)};
  }
}

struct Scores {  // (keys, TILE)
  float* data;
  int64_t key, vector;  // strides
  float* at(int key_number, int vector_number) const { return data + key_number * key + vector_number * vector; }
};

// Q is scaled before its product with K, as in the reference: exp(score - top) of the key that has all the weight is 1
// to the bit then.  With scale * product - top it was 1 and what the rounding of top = scale * product left, 5e-4 at
// 1e4, unless the scale was a power of two.  Pairs are not scaled, for that would round them; what is left to do after
// the product:
template <bool PAIRS>
static float scale_left(const Shape& shape) {
  return PAIRS ? shape.scale : 1;
}

// to(keys, lanes) = K Q^T for the vectors of a span, with `tile` the packed Q^T; `top`, if given, the largest so far of
// each lane.
template <bool PAIRS>
static inline void scores(int keys, const Span& s, const float* tile, int64_t dim, const Factor& k, const Scores& to,
                          float* top = nullptr) {
  if constexpr (PAIRS) dim /= 2;
  gemm<PAIRS>({.vectors = s.count, .n = keys, .k = int(dim), .a = tile + s.first * WIDTH * dim, .a_k = WIDTH,
               .a_v = WIDTH * dim, .b = k.data, .b_n = k.row, .b_k = 1, .c = to.at(0, s.first), .c_n = to.key,
               .c_v = to.vector, .top = top ? top + s.first * WIDTH : nullptr, .on = s.masked ? s.mask : nullptr});
}

// tile (dim, lanes), in panels, += X^T P, with X (keys, dim) and P (keys, lanes), or pairs of keys of both: the product
// that ends in a row of queries.
template <bool PAIRS>
static inline void gather(int keys, const Span& s, const Scores& p, const Factor& x, int64_t dim, float* tile) {
  gemm<PAIRS>({.vectors = s.count, .n = int(dim), .k = PAIRS ? (keys + 1) / 2 : keys, .a = p.at(0, s.first),
               .a_k = p.key, .a_v = p.vector, .b = x.data, .b_n = 1, .b_k = x.row, .c = tile + s.first * WIDTH * dim,
               .c_n = WIDTH, .c_v = WIDTH * dim, .add = true, .mask = s.masked ? s.mask : nullptr});
}

// e^x of weights on their way to a product.
template <bool PAIRS, class T, int N>
static inline void exp_of(Vec (&x)[N]) {
  if constexpr (PAIRS) for (Vec& each : x) each = exp_for_bfloat16(each);
  else if constexpr (sizeof(T) < sizeof(float)) exp_for_halves(x);
  else exp(x);
}

constexpr int FEW = WIDTH < 8 ? WIDTH : 8;  // query rows of which decode.h takes care
static bool few_lanes(const Shape& shape) { return shape.q_len * heads_of_tile(shape) <= FEW; }

template <Products BY>
using By = std::integral_constant<Products, BY>;

static Products products_of(const Shape& shape) {
  const bool tiles = WIDTH == SIDE && !few_lanes(shape);
  return shape.products == Products::amx && !tiles ? Products::pairs : shape.products;
}

// Kernels are written once and compiled for each dtype and its products: call(T{}, By<products>{}).
template <class Call>
static inline void for_dtype(const Shape& shape, Call call) {
  switch (shape.dtype) {
    case Dtype::float32: return call(float{}, By<Products::single>{});
    case Dtype::float16: return call(float16{}, By<Products::single>{});
    case Dtype::bfloat16: break;
  }
  switch (products_of(shape)) {
    case Products::single: return call(bfloat16{}, By<Products::single>{});
    case Products::pairs: return call(bfloat16{}, By<Products::pairs>{});
    case Products::amx:
      if constexpr (WIDTH == SIDE) call(bfloat16{}, By<Products::amx>{});
  }
}

}  // namespace mirasol::MIRASOL_ISA
