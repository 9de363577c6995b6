#pragma once
// Items of forward and what becomes of their rows.  Where there are few tiles, as in decoding, the keys are cut into
// splits, an item each, and their results merged in a second pass.
#include "block_causal_attention/tile.h"

namespace mirasol::MIRASOL_ISA {

using attention::Forward;
using attention::PARALLEL;
using attention::SPLIT_KEYS;

constexpr int TOGETHER = 8;  // tiles of an item, at most

// As many tiles as half a second-level cache holds with what they sum, but items enough for all threads.  With AMX, whose
// chips have 2 MB of it, more: what is transposed for all of them takes a tenth of the time of four.
static int tiles_of_item(const Shape& shape) {
  const bool amx = products_of(shape) == Products::amx;
  const int64_t cache = amx ? 1 << 19 : 1 << 18, few = amx ? TOGETHER : TOGETHER / 2;
  const int64_t fit = cache / ((shape.dim + shape.value_dim) * TILE * int64_t(sizeof(float)));
  const int64_t share = attention_tiles(shape) / (8 * shape.threads), most = fit < few ? fit : few;
  return share <= 1 || most <= 1 ? 1 : int(share < most ? share : most);
}

int64_t attention_splits(const Shape& shape) {
  const int64_t tiles = attention_tiles(shape), wanted = tiles ? (PARALLEL + tiles - 1) / tiles : 1;
  const int64_t most = shape.k_len / SPLIT_KEYS;
  return wanted <= 1 || most <= 1 ? 1 : wanted < most ? wanted : most;
}

int64_t attention_forward_items(const Shape& shape) {
  const int64_t kv_heads = shape.batch * shape.kv_heads, together = tiles_of_item(shape);
  if (kv_heads == 0) return 0;
  return (attention_tiles(shape) / kv_heads + together - 1) / together * kv_heads * attention_splits(shape);
}

struct Item {  // tiles first .. first + count - 1 of a kv head, in the order of tile_of
  int64_t kv_head, first;
  int count;
};

static Item tiles_of(const Shape& shape, int64_t item) {
  const int64_t kv_heads = shape.batch * shape.kv_heads, per_kv_head = attention_tiles(shape) / kv_heads;
  const int together = tiles_of_item(shape);
  const int64_t first = item / kv_heads * together;
  return {item % kv_heads, first, least(together, per_kv_head - first)};
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

void attention_merge(const Forward& f, int64_t begin, int64_t end) {
  const int64_t splits = attention_splits(f.shape);
  for_dtype(f.shape, [&](auto type, auto) {
    for (int64_t item = begin; item < end; ++item) merge_tile<decltype(type)>(f, tile_of(f.shape, item), splits);
  });
}

}  // namespace mirasol::MIRASOL_ISA
