#pragma once
// What is left of backward when all items have added their shares: the gradients of w1 and of the norm out of the
// totals, and those of tables, which are sums over the batch of those of tokens.
#include "token_learner/backward.h"

namespace mirasol::MIRASOL_ISA {

constexpr int64_t REST_CHANNELS = 64;  // of an item

static int64_t channel_items(const Call& call) { return (call.c + REST_CHANNELS - 1) / REST_CHANNELS; }

int64_t token_learner_backward_rest_items(const Call& call) {
  return channel_items(call) + tiles_of(call, Sizes(call));
}

// Of w1 and the norm, for some channels; with the first ones also what has no channels.
template <class T>
static void backward_weights(const Backward& g, int64_t begin, int64_t end) {
  const Call& call = g.call;
  const Sizes size(call);
  const Sums total = sums(call, g.totals);
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  T* const* const out = reinterpret_cast<T* const*>(g.dweights);
  for (int64_t c = begin; c < end; c += WIDTH) {
    const int n = least(WIDTH, call.c - c);
    const Vec weight = load_part(in(call.weights.norm_weight) + c, n);
    const Vec bias = load_part(in(call.weights.norm_bias) + c, n);
    Vec dweight{}, dbias{};
    for (int64_t h = 0; h < call.h; ++h) {
      const Vec w1 = load_part(in(call.weights.w1) + h * call.c + c, n), sum = load(total.w1 + h * size.row + c);
      const Vec db1 = broadcast(total.b1[h]);
      dweight = fma(w1, sum, dweight), dbias = fma(w1, db1, dbias);
      store_part(out[2] + h * call.c + c, fma(sum, weight, db1 * bias), n);
    }
    store_part(out[0] + c, dweight, n), store_part(out[1] + c, dbias, n);
  }
  if (begin) return;
  const auto copy = [](const float* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; i += WIDTH) store_part(to + i, load(from + i), least(WIDTH, count - i));
  };
  for (int64_t k = 0; k < call.k; ++k) copy(total.w2 + k * size.h, call.h, out[4] + k * call.h);
  copy(total.b1, call.h, out[3]);
  if (call.divide)  // finished tokens do not depend on b2: it is the same for all tokens of a softmax
    for (int64_t k = 0; k < call.k; k += WIDTH) store_part(out[5] + k, Vec{}, least(WIDTH, call.k - k));
  else copy(total.b2, call.k, out[5]);
}

// Of the table of a tile of tokens: the sum over the batch.
template <class T>
static void backward_table(const Backward& g, const Tile& tile) {
  const Call& call = g.call;
  T* const to = static_cast<T*>(g.dtables[tile.source]);
  if (!to) return;
  const T* const from = static_cast<const T*>(g.dsources[tile.source]);
  const int64_t n = call.sources[tile.source].tokens * call.c;
  for (int64_t at = tile.token * call.c, end = at + tile.rows * call.c; at < end; at += WIDTH) {
    Vec total{};
    for (int64_t b = 0; b < call.batch; ++b) total += load_part(from + b * n + at, least(WIDTH, end - at));
    store_part(to + at, total, least(WIDTH, end - at));
  }
}

void token_learner_backward_rest(const Backward& g, int64_t begin, int64_t end) {
  Call call = g.call;
  call.valid = nullptr;  // tiles of tables: all tokens
  const Sizes size(call);
  for_dtype(call, [&](auto type, auto) {
    using T = decltype(type);
    const int64_t weights = channel_items(call);
    int64_t item = begin;
    for (; item < end && item < weights; ++item)
      backward_weights<T>(g, item * REST_CHANNELS, least((item + 1) * REST_CHANNELS, call.c));
    if (item < end)
      for_tiles(call, size, 0, item - weights, end - weights, [&](const Tile& tile) { backward_table<T>(g, tile); });
  });
}

}  // namespace mirasol::MIRASOL_ISA
