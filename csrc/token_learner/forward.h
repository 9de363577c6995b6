#pragma once
// Forward: an item is a row of the batch, or a part of its tokens where there are few rows.  It walks over tiles of
// tokens with an online softmax; parts are merged in their order, each by the thread that has it.
#include <sched.h>
#include "token_learner/logits.h"

namespace mirasol::MIRASOL_ISA {

using token_learner::Forward;

static int64_t forward_parts(const Call& call) { return parts_of(call, 256); }

int64_t token_learner_forward_items(const Call& call) { return call.batch * forward_parts(call); }

struct Seen {  // the state of the tokens so far
  float *top, *total;  // (k)
  float* sums;         // (k, row): sum p x
  bool empty = true;
};

struct ForwardSpace {
  Tokens tokens;
  float *hidden, *weights;  // (rows, h), (rows, k)
  Seen seen;
};

static ForwardSpace forward_space(const Call& call, float* at, int64_t* floats = nullptr) {
  const Sizes size(call);
  Space space{at};
  ForwardSpace s;
  s.tokens = tokens(call, size, space);
  s.hidden = space.take(size.rows * size.h), s.weights = space.take(size.rows * size.k);
  s.seen.top = space.take(size.k), s.seen.total = space.take(size.k);
  s.seen.sums = space.take(size.k * size.row);
  if (floats) *floats = space.next - at;
  return s;
}

int64_t token_learner_forward_workspace(const Call& call) {
  int64_t floats;
  forward_space(call, nullptr, &floats);
  return floats;
}

// Logits become weights exp(logit - top), and what was summed shrinks to the new top.  In pairs weights are rounded
// before either sum has them: pooled is then a mean of tokens exactly, and its error does not grow with theirs.
template <bool PAIRS>
static void weigh(const Call& call, const Sizes& size, const Prepared& p, int rows, const ForwardSpace& s) {
  const Seen& seen = s.seen;
  const Vec hidden = broadcast(-__builtin_inff());
  for (int64_t k = 0; k < size.k; k += WIDTH) {
    const Vec bias = load(p.b2 + k), old = seen.empty ? hidden : load(seen.top + k);
    Vec top = old;
    for (int r = 0; r < rows; ++r) top = max(load(s.weights + r * size.k + k) + bias, top);
    const Vec base = select(top == hidden, Vec{}, top), shrink = exp(old - base);
    Vec total{};
    for (int r = 0; r < rows; ++r) {
      float* const at = s.weights + r * size.k + k;
      Vec weight = exp_of<PAIRS>(load(at) + bias - base);
      if constexpr (PAIRS) weight = (Vec)(round_bfloat16(weight) & 0xffff0000u);
      total += weight;
      store(at, weight);
    }
    if (!seen.empty) {
      total = fma(load(seen.total + k), shrink, total);
      for (int i = 0; i < WIDTH && k + i < call.k; ++i)
        if (shrink[i] != 1)
          for (float *x = seen.sums + (k + i) * size.row, *end = x + size.c; x < end; x += WIDTH)
            store(x, load(x) * shrink[i]);
    }
    store(seen.top + k, top), store(seen.total + k, total);
  }
}

// The part's state joins that of the parts before it; the last one leaves the result.
static void leave(const Forward& f, const Sizes& size, int64_t batch, int64_t part, int64_t parts, const Seen& seen) {
  const Call& call = f.call;
  int32_t* const turn = f.turns + batch;
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != part) sched_yield();
  const bool last = part + 1 == parts;
  for (int64_t k = 0, at = batch * call.k; k < call.k; ++k, ++at) {
    const float none = -__builtin_inff(), mine = seen.empty ? none : seen.top[k], before = part ? f.max[at] : none;
    const float top = mine > before || mine != mine ? mine : before, base = top == none ? 0 : top;
    const float keep_mine = exp(broadcast(mine - base))[0], keep_before = exp(broadcast(before - base))[0];
    const float total = (seen.empty ? 0 : keep_mine * seen.total[k]) + (part ? keep_before * f.sum[at] : 0);
    f.max[at] = top, f.sum[at] = total;
    const float divisor = last && call.divide && total != 0 ? total : 1;
    for (int64_t c = 0; c < call.c; c += WIDTH) {
      const int n = least(WIDTH, call.c - c);
      Vec x = seen.empty ? Vec{} : load(seen.sums + k * size.row + c) * keep_mine;
      if (part) x = fma(load_part(f.pooled + at * call.c + c, n), broadcast(keep_before), x);
      store_part(f.pooled + at * call.c + c, x / divisor, n);
    }
  }
  __atomic_store_n(turn, int32_t(part + 1), __ATOMIC_RELEASE);
}

template <class T, bool PAIRS>
static void forward_item(const Forward& f, int64_t item, ForwardSpace s) {
  const Call& call = f.call;
  const Sizes size(call);
  const Prepared p = prepared(call, call.prepared);
  const int64_t parts = forward_parts(call), tiles = tiles_of(call, size);
  const int64_t batch = item % call.batch, part = item / call.batch;  // first parts first: who waits, waits least
  s.seen.empty = true;
  for_tiles(call, size, batch, part * tiles / parts, (part + 1) * tiles / parts, [&](const Tile& tile) {
    if (!tile.real) return;
    const Raw raw = fetch<T, PAIRS>(call, tile, size, s.tokens);
    Ahead next = next_tile<PAIRS>(call, tile, steps_of_blocks(call, size.h / WIDTH, tile.real, call.c / 2));
    logits<PAIRS>(call, size, p, tile.real, s.tokens, raw, s.hidden, s.hidden, nullptr, s.weights,
                  next.step ? &next : nullptr);
    weigh<PAIRS>(call, size, p, tile.real, s);
    if constexpr (PAIRS) pair_rows(s.weights, tile.real, size.k, size.k), fill(call, s.weights, tile.real, size.k);
    gather<PAIRS>(tile.real, in_tiles(call) ? size.k : call.k, s.weights, size.k, s.tokens.x, size.row, size.c,
                  s.seen.sums, size.row, !s.seen.empty, s.tokens.room);
    s.seen.empty = false;
  });
  leave(f, size, batch, part, parts, s.seen);
}

void token_learner_forward(const Forward& f, float* workspace, int64_t begin, int64_t end) {
  const ForwardSpace space = forward_space(f.call, workspace);
  const Amx registers(in_tiles(f.call));
  for_dtype(f.call, [&](auto type, auto pairs) {
    for (int64_t item = begin; item < end; ++item) forward_item<decltype(type), pairs>(f, item, space);
  });
}

}  // namespace mirasol::MIRASOL_ISA
