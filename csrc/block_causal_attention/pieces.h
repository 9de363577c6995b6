#pragma once
// What a tile of query rows sees, cut into rectangles: every row of a piece sees every key of it.  So nothing is masked
// but the lanes of a vector that is not wholly inside, and nothing outside is computed.
#include "block_causal_attention/kernel.h"

namespace mirasol::MIRASOL_ISA {

using attention::TILE;

struct Piece {
  int64_t key;
  int keys, row, rows;  // rows: lanes of the tile
};

struct Pieces {
  int64_t key, end;                // where the sweep stands, and stops
  int groups;                      // that own rows of the tile
  uint64_t rows[TILE];             // of each group, one bit per row
  const int32_t* range[TILE];      // the first range of the group that is not wholly behind the sweep
  const int32_t* range_end[TILE];
  uint64_t pending;                // rows that see keys [key, bound) and have not been given out
  int64_t bound;
};

static inline uint64_t bits(int first, int last) {  // first <= i < last, of 64
  return first >= last ? 0 : (~uint64_t{0} >> (64 - (last - first))) << first;
}

// The pieces of rows [row, row + rows) of each of `heads` heads, with keys in [key, end).
static Pieces pieces(const attention::Ranges& seen, int64_t batch, int64_t row, int rows, int heads, int64_t key,
                     int64_t end) {
  Pieces p;
  p.key = p.bound = key, p.end = end, p.groups = 0, p.pending = 0;
  const int64_t table = seen.batch == 1 ? 0 : batch;
  const int32_t* offsets = seen.q_offsets + table * (seen.groups + 1);
  int64_t g = 0, above = seen.groups;  // the last group that begins at or before `row`: an empty one cannot own it
  while (above - g > 1) {
    const int64_t middle = (g + above) / 2;
    (offsets[middle] <= row ? g : above) = middle;
  }
  for (; g < seen.groups && offsets[g] < row + rows; ++g) {
    const int64_t first = offsets[g] > row ? offsets[g] - row : 0;
    const int64_t last = offsets[g + 1] < row + rows ? offsets[g + 1] - row : rows;
    if (first >= last) continue;
    p.rows[p.groups] = 0;
    for (int h = 0; h < heads; ++h) p.rows[p.groups] |= bits(int(first), int(last)) << (h * rows);
    p.range[p.groups] = seen.k_ranges + (table * seen.groups + g) * seen.ranges * 2;
    p.range_end[p.groups] = p.range[p.groups] + seen.ranges * 2;
    ++p.groups;
  }
  return p;
}

// The next piece, of at most `limit` keys, in ascending order of keys; false when there is none.
static bool next(Pieces& p, int limit, Piece& piece) {
  while (!p.pending) {
    p.key = p.bound;
    if (p.key >= p.end) return false;
    p.bound = p.end;
    for (int g = 0; g < p.groups; ++g) {
      const int32_t*& range = p.range[g];
      while (range != p.range_end[g] && range[1] <= p.key) range += 2;
      if (range == p.range_end[g]) continue;
      const bool inside = range[0] <= p.key;
      const int64_t change = inside ? range[1] : range[0];
      if (inside) p.pending |= p.rows[g];
      if (change < p.bound) p.bound = change;
    }
    if (p.pending && p.bound > p.key + limit) p.bound = p.key + limit;
  }
  const int first = __builtin_ctzll(p.pending);
  const uint64_t after = ~(p.pending >> first);  // its lowest set bit is the end of the run of rows
  const int count = after ? __builtin_ctzll(after) : TILE;
  p.pending &= ~bits(first, first + count);
  piece = {p.key, int(p.bound - p.key), first, count};
  return true;
}

// Where nothing is pending: the next key that is seen, or `end` if there is none before.
static int64_t upcoming(Pieces& p, int64_t end) {
  int64_t first = end;
  for (int g = 0; g < p.groups; ++g) {
    const int32_t*& range = p.range[g];
    while (range != p.range_end[g] && range[1] <= p.bound) range += 2;
    if (range == p.range_end[g]) continue;
    const int64_t key = range[0] > p.bound ? range[0] : p.bound;
    if (key < range[1] && key < first) first = key;
  }
  return first;
}

// Behind the last key that is seen before `end`, or `last` if that is more.
static int64_t seen_until(const Pieces& p, int64_t end, int64_t last) {
  for (int g = 0; g < p.groups; ++g)
    for (const int32_t* range = p.range[g]; range != p.range_end[g] && range[0] < end; range += 2) {
      const int64_t stop = range[1] < end ? range[1] : end;
      if (stop > last) last = stop;
    }
  return last;
}

}  // namespace mirasol::MIRASOL_ISA
