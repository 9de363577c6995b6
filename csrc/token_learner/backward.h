#pragma once
// Backward recomputes the logits, exactly as forward made them.  An item is a few rows of the batch, or a part of the
// tokens of one: it owns the gradients of its tokens, and adds its share of the weights' to the totals when the item
// before it has added its own.  With G = sum of dz xhat over all tokens, xhat normalised, the rest is small: dw1 = G
// norm_weight + db1 norm_bias, dnorm_weight = sum of w1 G over hidden units, dnorm_bias = w1 db1.
#include <sched.h>
#include <cstring>
#include "token_learner/logits.h"

namespace mirasol::MIRASOL_ISA {

using token_learner::Backward;

constexpr int64_t ITEM_TOKENS = 512;  // a share of the weights' gradients costs as much as they are themselves

struct Cut {
  int64_t rows, parts;  // of the batch in an item; items for a row
};

static Cut cut(const Call& call) {
  const int64_t n = tokens_of(call), parts = parts_of(call, ITEM_TOKENS);
  if (parts > 1) return {1, parts};
  const int64_t enough = n ? (ITEM_TOKENS + n - 1) / n : call.batch, share = call.batch / 64;
  const int64_t rows = enough < share ? enough : share;
  return {rows > 1 ? rows : 1, 1};
}

int64_t token_learner_backward_items(const Call& call) {
  const Cut c = cut(call);
  return (call.batch + c.rows - 1) / c.rows * c.parts;
}

struct Sums {  // over tokens: of the gradients of weights
  float *w1;   // (h, row): dz times the normalised token
  float *w2;   // (k, h): ds hidden
  float *b1, *b2;
};

static Sums sums(const Call& call, float* at, int64_t* floats = nullptr) {
  const Sizes size(call);
  Space space{at};
  const Sums s{space.take(call.h * size.row), space.take(call.k * size.h), space.take(size.h), space.take(size.k)};
  if (floats) *floats = space.next - at;
  return s;
}

int64_t token_learner_totals(const Call& call) {
  int64_t floats;
  sums(call, nullptr, &floats);
  return floats;
}

struct BackwardSpace {
  Tokens tokens;
  float *hidden, *slope, *z, *dz;  // (rows, h); z without b1
  float *weights, *ds;             // (rows, k)
  float* ds_pairs;                 // (rows / 2, k), of pairs: of tokens, for the sum over them
  float* dx;                       // (rows, row); of pairs (rows, MAX_VECTORS WIDTH): of some channels
  float *lift, *slopes;            // (rows): what the norm takes away, of a token
  float* dpooled_terms;            // (k / WIDTH, c, WIDTH), for the sum over channels
  float* both;                     // (rows, h + k): what the two products that end in a token sum over, side by side:
                                   // dz inverse, weights
  float* both_rows;                // (c / WIDTH, h + k, WIDTH), for that sum: w1 norm_weight, dpooled
  float *base, *share, *dsum;      // (k): what is taken from logits; 1 / sum, or 1; gradient of sum
  float *level;                    // (rows): of floats, means of tokens over channels, which x is without,
  float *pooled_level, *rise;      // (k): of what is pooled, or 0; how much of dpooled means bring, its sum
  float* shift;                    // (h): of pairs, what means of tokens brought into the sum w1
  float* sums;                     // token_learner_totals
};

static BackwardSpace backward_space(const Call& call, float* at, int64_t* floats = nullptr) {
  const Sizes size(call);
  Space space{at};
  BackwardSpace s;
  s.tokens = tokens(call, size, space);
  s.hidden = space.take(size.rows * size.h), s.slope = space.take(size.rows * size.h);
  s.z = space.take(size.rows * size.h), s.dz = space.take(size.rows * size.h);
  s.weights = space.take(size.rows * size.k), s.ds = space.take(size.rows * size.k);
  s.ds_pairs = space.take((size.rows + 1) / 2 * size.k);
  s.dx = space.take(size.rows * (call.products == Products::single ? size.row : MAX_VECTORS * WIDTH));
  s.lift = space.take(size.rows), s.slopes = space.take(size.rows);
  s.dpooled_terms = space.take(size.k * call.c);
  s.both = space.take(size.rows * (size.h + size.k)), s.both_rows = space.take(size.c * (call.h + call.k + 2 * SIDE));
  s.base = space.take(size.k), s.share = space.take(size.k), s.dsum = space.take(size.k);
  s.level = space.take(size.rows), s.pooled_level = space.take(size.k), s.rise = space.take(size.k);
  s.shift = space.take(size.h);
  s.sums = space.take(token_learner_totals(call));
  if (floats) *floats = space.next - at;
  return s;
}

int64_t token_learner_backward_workspace(const Call& call) {
  int64_t floats;
  backward_space(call, nullptr, &floats);
  return floats;
}

template <bool PAIRS>
static inline int64_t terms_of_both(const Call& call) {
  const int64_t all = terms<PAIRS>(call.h) + terms<PAIRS>(call.k);
  return PAIRS && in_tiles(call) ? whole_tiles(all) : all;
}

// Rows k .. k + WIDTH of what a row of the batch brings: of the gradient of what it pools, both ways round, and for
// finished tokens dpooled . pooled in the diagonal of ds, and what is missing from it, negated, in dsum.  Tokens and
// what is pooled are taken without their means over channels, of which only the difference counts: far from 0 two large
// products would leave their roundings.
static void bring_floats(const Backward& g, const Sizes& size, int64_t first, int64_t k, int rows,
                         const BackwardSpace& s) {
  const Call& call = g.call;
  float* const panels = s.both_rows + call.h * WIDTH;
  Vec total[WIDTH] = {};
  for (int64_t c = 0; c < call.c; c += WIDTH) {
    const int n = least(WIDTH, call.c - c);
    for (int i = 0; i < rows; ++i) {  // too many streams for the chip to foresee
      const int64_t ahead = (first + i) * call.c + c + 4 * WIDTH;
      __builtin_prefetch(g.dpooled + ahead);
      if (call.divide) __builtin_prefetch(g.pooled + ahead);
    }
    Vec x[WIDTH] = {};
    for (int i = 0; i < rows; ++i) x[i] = load_part(g.dpooled + (first + i) * call.c + c, n), total[i] += x[i];
    store_terms<false>(x, rows, panels + c * terms_of_both<false>(call) + k * WIDTH);
    transpose(x);
    store_terms<false>(x, n, s.dpooled_terms + k * call.c + c * WIDTH);
  }
  store(s.dsum + k, Vec{}), store(s.rise + k, sums(total)), store(s.pooled_level + k, Vec{});
  if (!call.divide) return;
  const auto pooled = [&](int r, int64_t c) {
    return load_part(g.pooled + (first + r) * call.c + c, least(WIDTH, call.c - c));
  };
  for (int r = 0; r < rows; ++r)
    s.pooled_level[k + r] = mean_of(call, size, [&](int64_t c, Vec sum) { return sum + pooled(r, c); });
  product_of_channels(call, rows, [&](int r, int64_t c) { return pooled(r, c) - s.pooled_level[k + r]; },
                      s.tokens.block, s.dpooled_terms + k * call.c, WIDTH, s.ds);
}

// The same.  Rows become bfloat16 one after the other, as memory has them, where no tile is yet.  Tokens are exact and
// pooled is not: what its rounding leaves out grows with the mean of tokens, and is what is missing.
static void bring_pairs(const Backward& g, const Sizes& size, int64_t first, int64_t k, int rows,
                        const BackwardSpace& s) {
  const Call& call = g.call;
  float *const dpooled = s.tokens.x, *const pooled = dpooled + size.c / 2;  // rows are size.row apart
  Vec rest[WIDTH] = {};
  for (int i = 0; i < rows; ++i)
    for (int64_t c = 0; c < call.c; c += WIDTH) {
      const int64_t at = (first + i) * call.c + c;
      const int n = least(WIDTH, call.c - c);
      __builtin_prefetch(g.dpooled + at + 16 * WIDTH);
      const Vec x = load_part(g.dpooled + at, n);
      store_factor<true>(dpooled + i * size.row, c, x);
      if (!call.divide) continue;
      const auto rounded = [](Vec y) { return (Vec)(round_bfloat16(y) & 0xffff0000u); };
      __builtin_prefetch(g.pooled + at + 16 * WIDTH);
      const Vec y = load_part(g.pooled + at, n);
      store_factor<true>(pooled + i * size.row, c, y);
      rest[i] = fma(rounded(x), y - rounded(y), rest[i]);
    }
  store(s.dsum + k, -sums(rest));
  const int64_t terms_of_c = call.c / 2, both = terms_of_both<true>(call) * WIDTH;
  float* const panels = s.both_rows + (terms<true>(call.h) + terms<true>(k)) * WIDTH;
  float* const to = s.dpooled_terms + k * terms_of_c;
  for (int64_t t = 0; t < terms_of_c; t += WIDTH) {
    const int n = least(WIDTH, terms_of_c - t);
    Vec x[WIDTH] = {};
    for (int i = 0; i < rows; ++i) x[i] = load_part(dpooled + i * size.row + t, n);
    float* const panel = panels + 2 * t / WIDTH * both;
    for (int i = 0; i < rows; i += 2) {
      const Interleaved two = interleave(x[i], x[i + 1]);
      store(panel + i / 2 * WIDTH, two.low);
      if (2 * t + WIDTH < size.c) store(panel + both + i / 2 * WIDTH, two.high);
    }
    transpose(x);
    for (int j = 0; j < n; ++j) store(to + (t + j) * WIDTH, x[j]);
  }
  if (call.divide)
    product<true>(rows, terms_of_c, depth_of(terms_of_c), pooled, size.row, to, WIDTH, s.ds, WIDTH,
                  s.tokens.room);
}

// dsum = -(dpooled . pooled) is summed as x . dpooled will be: where one token has all the weight, and is what comes
// out, its ds is 0 to the bit and not what two orders of summation leave.
template <bool PAIRS>
static void bring(const Backward& g, const Sizes& size, int64_t batch, const BackwardSpace& s) {
  const Call& call = g.call;
  for (int64_t k = 0; k < size.k; k += WIDTH) {
    const int rows = least(WIDTH, call.k - k);
    const int64_t first = batch * call.k + k;
    for (int i = 0; i < WIDTH; ++i) {
      s.base[k + i] = i >= rows || g.max[first + i] == -__builtin_inff() ? 0 : g.max[first + i];
      s.share[k + i] = i >= rows ? 0 : !call.divide || g.sum[first + i] == 0 ? 1 : 1 / g.sum[first + i];
    }
    if constexpr (PAIRS) bring_pairs(g, size, first, k, rows, s);
    else bring_floats(g, size, first, k, rows, s);
    for (int i = 0; i < rows; ++i)
      s.dsum[k + i] = call.divide ? s.dsum[k + i] - s.ds[i * WIDTH + i] : g.dsum[first + i];
  }
}

// Logits become weights, and ds, so far x . dpooled, of floats without means, becomes the gradient of the logits.
template <bool PAIRS>
static void softmax_backward(const Sizes& size, const Prepared& p, int rows, const BackwardSpace& s, float* db2) {
  for (int64_t k = 0; k < size.k; k += WIDTH) {
    const Vec bias = load(p.b2 + k), base = load(s.base + k), share = load(s.share + k), dsum = load(s.dsum + k);
    const Vec level = load(s.pooled_level + k), rise = load(s.rise + k);  // of floats
    Vec total{};
    for (int r = 0; r < rows; ++r) {
      const int64_t at = r * size.k + k;
      const Vec weight = exp_of<PAIRS>(load(s.weights + at) + bias - base) * share;
      Vec along = load(s.ds + at);
      if constexpr (!PAIRS) along = fma(s.level[r] - level, rise, along);
      const Vec ds = weight * (dsum + along);
      store(s.weights + at, weight), store_factor<PAIRS>(s.ds + r * size.k, k, ds);
      total += ds;
    }
    store(db2 + k, load(db2 + k) + total);
  }
}

// Of LayerNorm: with d the gradient of a normalised token, dx = inverse (d - mean(d) - normalised mean(d normalised)).
// Both means are known before d is, which is linear in dz: mean(d) = dz . w1_mean, mean(d normalised) = dz . z / c.
// So what is taken away is lift + slope (x - mean), and d inverse and the sum of p dpooled are one product.
static void normalise_backward(const Call& call, const Sizes& size, const Prepared& p, int rows,
                               const BackwardSpace& s) {
  for (int first = 0; first < rows; first += WIDTH) {
    const int some = least(WIDTH, rows - first);
    Vec levels[WIDTH] = {}, alongs[WIDTH] = {};
    for (int i = 0; i < some; ++i)
      for (int64_t h = 0, at = (first + i) * size.h; h < size.h; h += WIDTH) {
        const Vec dz = load(s.dz + at + h);
        levels[i] = fma(dz, load(p.w1_mean + h), levels[i]);
        alongs[i] = fma(dz, load(s.z + at + h), alongs[i]);
      }
    const Vec inverse = -load(s.tokens.inverse + first);
    store(s.lift + first, inverse * sums(levels));
    store(s.slopes + first, -inverse * inverse * (sums(alongs) / float(call.c)));
  }
}

// The product, and what is to be taken away.  In pairs some channels of all tokens at a time, finished while they are
// near; products of floats take so long that whole rows, in place if they can be, are better.
template <class T, bool PAIRS>
static void gradients_of_tokens(const Call& call, const Sizes& size, int rows, const BackwardSpace& s, const Raw& raw,
                                T* to) {
  const int64_t both = terms_of_both<PAIRS>(call), channels = PAIRS ? MAX_VECTORS * WIDTH : size.c;
  float* dx = s.dx;
  int64_t dx_row = PAIRS ? channels : size.row;
  if constexpr (sizeof(T) == sizeof(float))
    if (call.c == size.c) dx = to, dx_row = call.c;
  for (int64_t begin = 0; begin < call.c; begin += channels) {
    const int64_t end = least(begin + channels, size.c);
    if constexpr (PAIRS)
      for (int r = 0; r < rows; ++r)  // written soon
        for (int64_t c = begin; c < end; c += 64 / sizeof(T)) __builtin_prefetch(to + r * call.c + c, 1);
    product<PAIRS>(rows, both, both, s.both, size.h + size.k, s.both_rows + begin * both, end - begin, dx, dx_row,
                   s.tokens.room);
    for (int r = 0; r < rows; ++r) {
      const float mean = s.tokens.mean[r];
      const Vec lift = broadcast(s.lift[r]), slope = broadcast(s.slopes[r]);
      const auto finish = [&](int64_t c, int n) {
        Vec x;
        if constexpr (PAIRS) x = load_part(raw.x + r * raw.row + c, n);
        else x = load(s.tokens.x + r * size.row + c);
        store_part(to + r * call.c + c, load(dx + r * dx_row + c - begin) + fma(x - mean, slope, lift), n);
      };
      int64_t c = begin;
      for (; c + WIDTH <= end && c + WIDTH <= call.c; c += WIDTH) finish(c, WIDTH);
      if (c < end) finish(c, int(call.c - c));
    }
  }
}

// A row of bfloat16 is the factor of a product in tile registers, of so many pairs: zeros behind its elements.
static inline void fill_row(const Call& call, float* row, int64_t elements, int64_t pairs) {
  if (in_tiles(call) && elements < 2 * pairs)
    std::memset(reinterpret_cast<bfloat16*>(row) + elements, 0, (2 * pairs - elements) * sizeof(bfloat16));
}

template <bool PAIRS>
static void side_by_side(const Call& call, const Sizes& size, int rows, const BackwardSpace& s) {
  for (int r = 0; r < rows; ++r) {
    float* const to = s.both + r * (size.h + size.k);
    const auto place = [&](int64_t at, const float* from, int64_t n, float factor) {
      for (int64_t i = 0; i < n; i += WIDTH) {
        if constexpr (PAIRS) store_part(reinterpret_cast<bfloat16*>(to) + at + i, load(from + i) * factor, WIDTH);
        else store(to + at + i, load(from + i) * factor);
      }
    };
    place(0, s.dz + r * size.h, size.h, s.tokens.inverse[r]);
    place((PAIRS ? 2 : 1) * terms<PAIRS>(call.h), s.weights + r * size.k, size.k, 1);
    fill_row(call, to, 2 * terms<PAIRS>(call.h) + size.k, terms_of_both<PAIRS>(call));
  }
}

// dz inverse as pairs of tokens, in place, for the sum of it times raw tokens: their means are taken away at the end.
static void pair_dz(const Sizes& size, int rows, const BackwardSpace& s) {
  for (int r = 0; r < rows; r += 2)
    for (int64_t h = 0; h < size.h; h += WIDTH) {
      Vec x[2] = {}, shift = load(s.shift + h);
      for (int i = 0; i < 2 && r + i < rows; ++i) {
        x[i] = load(s.dz + (r + i) * size.h + h) * s.tokens.inverse[r + i];
        x[i] = (Vec)(round_bfloat16(x[i]) & 0xffff0000u);
        shift = fma(x[i], broadcast(s.tokens.mean[r + i]), shift);
      }
      store(s.shift + h, shift);
      store(s.dz + r / 2 * size.h + h, pair(x[0], x[1]));
    }
}

template <class T, bool PAIRS>
static void backward_tile(const Backward& g, const Sizes& size, const Prepared& p, const Tile& tile,
                          const BackwardSpace& s, bool first) {
  const Call& call = g.call;
  const Sums sum = sums(call, s.sums);
  const int rows = tile.real;
  T* const to = static_cast<T*>(g.dsources[tile.source]) +
                (tile.batch * call.sources[tile.source].tokens + tile.token) * call.c;
  if (rows) {
    const Raw raw = fetch<T, PAIRS>(call, tile, size, s.tokens, s.level);
    Ahead next = next_tile<PAIRS>(call, tile, steps_of_blocks(call, size.h / WIDTH, rows, call.c / 2) +
                                                  steps_of_blocks(call, size.c / WIDTH, call.h, terms<PAIRS>(rows)));
    Ahead* const ahead = next.step ? &next : nullptr;  // its first part now, the rest during the last product
    logits<PAIRS>(call, size, p, rows, s.tokens, raw, s.z, s.hidden, s.slope, s.weights, ahead);
    const int64_t depth = depth_of(terms<PAIRS>(call.c));
    product<PAIRS>(rows, terms<PAIRS>(call.c), depth, PAIRS ? raw.pairs() : s.tokens.x, PAIRS ? raw.row / 2 : size.row,
                   s.dpooled_terms, size.k, s.ds, size.k, s.tokens.room);
    softmax_backward<PAIRS>(size, p, rows, s, sum.b2);
    const int64_t terms_of_k = in_tiles(call) ? w2_rows_of(call) : terms<PAIRS>(call.k);
    for (int r = 0; r < rows; ++r) fill_row(call, s.ds + r * size.k, size.k, terms_of_k);
    product_of_rows<PAIRS>(rows, terms_of_k, terms_of_k, s.ds, size.k, p.w2_rows, size.h, s.dz, s.tokens.room);
    for (int64_t h = 0; h < size.h; h += WIDTH) {
      Vec total{};
      for (int64_t at = h; at < rows * size.h; at += size.h) {
        const Vec dz = load(s.dz + at) * load(s.slope + at);
        store(s.dz + at, dz);
        total += dz;
      }
      store(sum.b1 + h, load(sum.b1 + h) + total);
    }
    if constexpr (PAIRS)
      pair_tokens(s.ds, rows, size.k, s.ds_pairs), fill(call, s.ds_pairs, rows, size.k),
          pair_rows(s.hidden, rows, size.h, size.h), fill(call, s.hidden, rows, size.h);
    gather<PAIRS>(rows, call.k, PAIRS ? s.ds_pairs : s.ds, size.k, s.hidden, size.h, size.h,
                  sum.w2, size.h, !first, s.tokens.room);
    side_by_side<PAIRS>(call, size, rows, s);
    normalise_backward(call, size, p, rows, s);
    gradients_of_tokens<T, PAIRS>(call, size, rows, s, raw, to);
    if constexpr (PAIRS) {
      pair_dz(size, rows, s), fill(call, s.dz, rows, size.h);
      gather<PAIRS>(rows, call.h, s.dz, size.h, s.tokens.x, size.row, size.c, sum.w1, size.row, !first, s.tokens.room,
                    ahead);
    } else
      for (int64_t c = 0; c < size.c; c += DEPTH) {
        const int n = least(DEPTH, size.c - c);
        for (int r = 0; r < rows; ++r)
          for (int i = 0; i < n; i += WIDTH)
            store(s.tokens.block + r * BLOCK_ROW + i, normalised(size, s.tokens, r, c + i));
        gather<PAIRS>(rows, call.h, s.dz, size.h, s.tokens.block, BLOCK_ROW, n, sum.w1 + c, size.row, !first,
                      nullptr);
      }
  }
  for (int64_t at = rows * call.c, end = tile.rows * call.c; at < end; at += WIDTH)
    store_part(to + at, Vec{}, least(WIDTH, end - at));
}

template <class T, bool PAIRS>
static void backward_item(const Backward& g, int64_t item, const BackwardSpace& s) {
  const Call& call = g.call;
  const Sizes size(call);
  const Prepared p = prepared(call, call.prepared);
  const Cut c = cut(call);
  const Sums mine = sums(call, s.sums), total = sums(call, g.totals);
  zero(mine.b1, size.h), zero(mine.b2, size.k), zero(s.shift, size.h);
  const int64_t w1_panel = terms<PAIRS>(call.h) * WIDTH, panel = terms_of_both<PAIRS>(call) * WIDTH;
  for (int64_t i = 0; i < size.c / WIDTH; ++i)
    std::memcpy(s.both_rows + i * panel, p.w1_rows + i * w1_panel, w1_panel * sizeof(float));
  if (in_tiles(call))
    for (int64_t i = 0, end = terms<PAIRS>(call.h) + terms<PAIRS>(call.k); i < size.c / WIDTH; ++i)
      zero(s.both_rows + i * panel + end * WIDTH, panel - end * WIDTH);
  bool first = true;
  const int64_t tiles = tiles_of(call, size), begin = item / c.parts * c.rows, part = item % c.parts;
  for (int64_t batch = begin; batch < begin + c.rows && batch < call.batch; ++batch) {
    bring<PAIRS>(g, size, batch, s);
    for_tiles(call, size, batch, part * tiles / c.parts, (part + 1) * tiles / c.parts, [&](const Tile& tile) {
      backward_tile<T, PAIRS>(g, size, p, tile, s, first);
      if (tile.real) first = false;
    });
  }
  while (__atomic_load_n(g.turn, __ATOMIC_ACQUIRE) != item) sched_yield();
  if (!first) {
    const auto add = [](float* to, const float* from, int64_t n, float shift = 0) {
      for (int64_t i = 0; i < n; i += WIDTH) store(to + i, load(to + i) + (load(from + i) - shift));
    };
    for (int64_t h = 0; h < call.h; ++h) add(total.w1 + h * size.row, mine.w1 + h * size.row, size.c, s.shift[h]);
    add(total.w2, mine.w2, call.k * size.h), add(total.b1, mine.b1, size.h), add(total.b2, mine.b2, size.k);
  }
  __atomic_store_n(g.turn, int32_t(item + 1), __ATOMIC_RELEASE);
}

void token_learner_backward(const Backward& g, float* workspace, int64_t begin, int64_t end) {
  const BackwardSpace space = backward_space(g.call, workspace);
  const Amx registers(in_tiles(g.call));
  for_dtype(g.call, [&](auto type, auto pairs) {
    for (int64_t item = begin; item < end; ++item) backward_item<decltype(type), pairs>(g, item, space);
  });
}

}  // namespace mirasol::MIRASOL_ISA
