#pragma once
// What AMX changes: rows are padded to whole tile registers, and what ends in a query is a product with values that are
// transposed, (value_dim, keys), since both factors of a tile register are read along the sum.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

// In elements: terms of a product are whole tile registers, of pairs.
static inline int64_t amx_dim(int64_t dim) { return whole_tiles((dim + 1) / 2) * 2; }
// Of transposed rows: room for a piece that begins anywhere; an odd number of lines, so that rows use all sets of a
// first-level cache.
static inline int64_t amx_keys(int64_t keys) { return (amx_dim(keys) / 32 + 1) / 2 * 64 + 32; }

// to (rows, amx_dim) = the rows, and zeros behind each.
template <class T>
static inline void amx_rows(const T* from, int64_t stride, int rows, int64_t dim, float* to) {
  const int64_t row = amx_dim(dim) / 2, bytes = dim * sizeof(T);
  for (int r = 0; r < rows; ++r, to += row) {
    fetch(from + (r + AHEAD) * stride, dim);
    if (2 * row != dim) store(to + row - WIDTH, Vec{});
    std::memcpy(to, from + r * stride, bytes);
  }
}

// to (padded dim, row) = the rows transposed, as pairs of rows, and zeros up to a whole tile register and for one more:
// a piece may begin anywhere.
template <class T>
static inline void amx_columns(const T* from, int64_t stride, int rows, int64_t dim, float* to, int64_t row) {
  for (int64_t d = 0; d < padded(dim); ++d) store(to + d * row + whole_tiles((rows + 1) / 2), Vec{});
  for (int r = 0; r < rows; r += 2 * SIDE)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const int n = least(WIDTH, dim - d);
      const auto halves = [&](int i) { return i < rows ? load_halves(from + i * stride + d, n) : Halves{}; };
      Vec x[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) x[i] = pair(halves(r + 2 * i), halves(r + 2 * i + 1));
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j) store(to + (d + j) * row + r / 2, x[j]);
    }
}

struct AmxFactor {
  const Element* data;
  int64_t row;
  const Element* last = nullptr;  // (padded dim, SIDE): the last tile registers, where these are elsewhere
};

// The columns of a piece of `keys` keys from `first` on, of `all`.  Others must not be in its last tile registers: they
// would meet weights of 0, and may be anything.
static inline AmxFactor amx_piece(const float* columns, int64_t row, int64_t first, int keys, int all, int64_t dim,
                                  float* last) {
  const int rest = keys % (2 * SIDE);
  const char* const data = reinterpret_cast<const char*>(columns) + first * sizeof(bfloat16);
  AmxFactor piece{reinterpret_cast<const Element*>(data), row, nullptr};
  if (rest == 0 || first + keys == all) return piece;
  const char* from = data + (keys - rest) * sizeof(bfloat16);
  const Words mask = (Words)lanes_between(0, rest / 2) | ((Words)lanes_between(rest / 2, (rest + 1) / 2) & 0xffffu);
  for (int64_t d = 0; d < padded(dim); ++d, from += row * sizeof(float))
    store(last + d * SIDE, (Vec)((Words)load(reinterpret_cast<const Element*>(from)) & mask));
  piece.last = last;
  return piece;
}

// Whether all columns are finite; what is not becomes 0.
static inline bool amx_finite(float* columns, int64_t row, int keys, int64_t dim) {
  typedef uint16_t All __attribute__((vector_size(4 * WIDTH)));
  const auto each = [&](auto use) {
    for (int64_t d = 0; d < padded(dim); ++d)
      for (int64_t i = 0; i < whole_tiles((keys + 1) / 2); i += WIDTH) {
        float* const at = columns + d * row + i;
        const All x = (All)load(at);
        use(at, x, (x & 0x7f80) == 0x7f80);
      }
  };
  Bits bad{};
  each([&](float*, All, auto infinite) { bad |= (Bits)infinite; });
  if (!any(bad != 0)) return true;
  each([&](float* at, All x, auto infinite) { store(at, (Vec)(x & ~(All)infinite)); });
  return false;
}

// As scores and gather of tile.h, for `count` vectors from `first` on.
static inline void amx_scores(int keys, int first, int count, const float* tile, int64_t dim, const Factor& k,
                              const Scores& to) {
  const int64_t terms = amx_dim(dim) / 2;
  amx_gemm({.vectors = count, .n = int(whole_tiles(keys)), .k = int(terms / SIDE), .a = tile + first * WIDTH * terms,
            .a_k = WIDTH, .a_v = WIDTH * terms, .b = k.data, .b_n = k.row, .c = to.at(0, first), .c_n = to.key,
            .c_v = to.vector});
}

static inline void amx_gather(int keys, int first, int count, const Scores& p, const AmxFactor& x, int64_t dim,
                              float* tile, const Bits* mask = nullptr) {
  amx_gemm({.vectors = count, .n = int(dim), .k = int(amx_dim(keys) / (2 * SIDE)), .a = p.at(0, first), .a_k = p.key,
            .a_v = p.vector, .b = x.data, .b_n = x.row, .c = tile + first * WIDTH * dim, .c_n = WIDTH,
            .c_v = WIDTH * dim, .add = true, .mask = mask, .b_last = x.last});
}

// As scatter of backward.h; `some`: room for x.
static inline void amx_scatter(const Piece& piece, int lanes, float* p, const float* x, int64_t dim, float* some,
                               float* to) {
  constexpr int ONE = 2 * SIDE;  // lanes of a tile register
  const int end = piece.row + piece.rows, first = piece.row / ONE * ONE, last = (end + ONE - 1) / ONE * ONE;
  const int64_t width = padded(dim);
  for (int key = 0; key < piece.keys; ++key) {
    for (int lane = first; lane < piece.row / WIDTH * WIDTH; lane += WIDTH)
      store_halves(p + key * TILE + lane / 2, Halves{}, WIDTH);
    for (int lane = int(padded(end)); lane < last; lane += WIDTH)
      store_halves(p + key * TILE + lane / 2, Halves{}, WIDTH);
  }
  if (piece.row > first || (end < last && end < lanes)) {  // not even 0 * NaN of a row that does not see the keys
    for (int lane = first; lane < last; lane += 2) {
      const auto sees = [&](int i) { return piece.row <= i && i < end; };
      const uint32_t bits = (sees(lane) ? 0xffffu : 0) | (sees(lane + 1) ? 0xffff0000u : 0);
      for (int64_t d = 0; d < width; d += WIDTH)
        store(some + lane / 2 * width + d, (Vec)((Words)load(x + lane / 2 * width + d) & bits));
    }
    x = some;
  }
  amx_gemm({.vectors = int(width / WIDTH), .n = piece.keys, .k = (last - first) / ONE, .a = x + first / 2 * width,
            .a_k = width, .a_v = WIDTH, .b = p + first / 2, .b_n = TILE, .c = to, .c_n = width, .c_v = WIDTH,
            .add = true});
}

// Sums of products of pairs, n <= SIDE of them, in the order in which a tile register sums them.
static inline Vec amx_sum(const Vec (&x)[WIDTH], const Vec (&y)[WIDTH], int n) {
  Vec firsts{}, seconds{};
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if (i < n) {
      firsts = fma((Vec)((Words)x[i] << 16), (Vec)((Words)y[i] << 16), firsts);
      seconds = fma((Vec)((Words)x[i] & 0xffff0000u), (Vec)((Words)y[i] & 0xffff0000u), seconds);
    }
  return firsts + seconds;
}

}  // namespace mirasol::MIRASOL_ISA
