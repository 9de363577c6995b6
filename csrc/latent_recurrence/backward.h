#pragma once
// Backward, step by step from the last: a step is run again from the memory it began with, then differentiated in the
// same kind of phases.  Gradients of the processor's matrices wait until enough rows have come together to make their
// product worth reading and writing a matrix for.
#include "latent_recurrence/forward.h"

namespace mirasol::MIRASOL_ISA {

using latent_recurrence::Backward;
using latent_recurrence::BlockOf;
using latent_recurrence::LinearOf;
using latent_recurrence::NormOf;
using latent_recurrence::PoolOf;

constexpr int64_t ENOUGH_ROWS = 64, SOME_COLUMNS = 96;

// c (n, m) = or += b (n, k) a (k, m), rows of each so far apart; `b_k` from term to term of b.
struct Terms {
  int64_t n, m, k;
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row, b_k;
  float* c;
  int64_t c_row;
  bool add = false;
};

static void product_of(const Terms& p) {
  constexpr int64_t DEPTH = 64;
  for (int64_t t = 0; t < p.k; t += DEPTH)
    gemm({.vectors = int(p.m / WIDTH), .n = int(p.n), .k = least(DEPTH, p.k - t), .a = p.a + t * p.a_row,
          .a_k = p.a_row, .a_v = WIDTH, .b = p.b + t * p.b_k, .b_n = p.b_row, .b_k = p.b_k, .c = p.c, .c_n = p.c_row,
          .c_v = WIDTH, .add = p.add || t > 0});
}

// The same in a phase; each item is then given to done(first row, rows, first column, columns).
template <class Done>
static void product_in_items(const Team& team, const Terms& p, const Done& done) {
  const int64_t across = pieces(p.m, SOME_COLUMNS), down = pieces(p.n, SOME_ROWS);
  phase(team, across * down, double(least(p.n, SOME_ROWS)) * least(p.m, SOME_COLUMNS) * p.k, [&](int64_t item) {
    const int64_t row = item / across * SOME_ROWS, column = item % across * SOME_COLUMNS;
    Terms part = p;
    part.n = least(SOME_ROWS, p.n - row), part.m = least(SOME_COLUMNS, p.m - column);
    part.a += column, part.b += row * p.b_row, part.c += row * p.c_row + column;
    product_of(part);
    done(row, int(part.n), column, int(part.m));
  });
}

// dx += the gradient of one row x that `dy` is after a norm.
static void normalise_backward(const float* x, int64_t c, const float* weight, float mean, float inverse,
                               const float* dy, float* dx) {
  Vec levels{}, alongs{};
  for (int64_t i = 0; i < c; i += WIDTH) {
    const Vec g = load(dy + i) * load(weight + i), away = (load(x + i) - mean) * inverse;
    levels += g, alongs = fma(g, away, alongs);
  }
  const float level = sum(levels) / float(c), along = sum(alongs) / float(c);
  for (int64_t i = 0; i < c; i += WIDTH) {
    const Vec g = load(dy + i) * load(weight + i), away = (load(x + i) - mean) * inverse;
    store(dx + i, load(dx + i) + (g - level - away * along) * inverse);
  }
}

// to (m) += the sum of `rows` rows of x; one at a time, from zero.
static void add_rows(const float* x, int64_t rows, int64_t row, int64_t m, float* to) {
  for (int64_t i = 0; i < m; i += WIDTH) {
    Vec total{};
    for (int64_t r = 0; r < rows; ++r) total += load(x + r * row + i);
    store_part(to + i, load_part(to + i, least(WIDTH, m - i)) + total, least(WIDTH, m - i));
  }
}

// The gradients of channels [begin, end) of a norm's parameters from rows x and dy.
static void add_norm(const float* x, const float* mean, const float* inverse, const float* dy, int64_t rows, int64_t c,
                     int64_t begin, int64_t end, const NormOf<float>& to) {
  for (int64_t i = begin; i < end; i += WIDTH) {
    Vec weight{}, bias{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec g = load(dy + r * c + i);
      weight = fma(g, (load(x + r * c + i) - mean[r]) * inverse[r], weight), bias += g;
    }
    store(to.weight + i, load(to.weight + i) + weight), store(to.bias + i, load(to.bias + i) + bias);
  }
}

struct LookBack {  // gradients at a Look
  float* ds;       // as its weights
  float *dhidden, *dnormal, *dx;  // (batch, tokens, hidden), (batch, tokens, c) twice
};

static LookBack look_back(Pieces& at, const Call& call, const Look& look, float* ds) {
  const int64_t rows = call.batch * look.tokens;
  return {ds, at.take(rows * call.hidden), at.take(rows * call.c), at.take(rows * call.c)};
}

struct Pair {
  const Look* look;
  const LookBack* back;
};

// From dz (k, c) of each row of the batch, the gradient of what a pool gave, to all that went into it.
static void pool_backward(const Team& team, const Call& call, int64_t k, const State& state, int64_t step,
                          const float* carry, const float* dz, int64_t dz_batch, std::initializer_list<Pair> pairs,
                          float* dsum, float* dpooled) {
  const int64_t c = call.c, h = call.hidden, width = wide(k);
  int64_t items = 0, tokens = 0;
  for (const Pair& p : pairs) items += call.batch * pieces(p.look->tokens, SOME_TOKENS), tokens += p.look->tokens;
  const auto each = [&](double cost, auto work) {  // work(pair, row of the batch, first token, tokens)
    phase(team, items, cost, [&](int64_t item) {
      for (const Pair& p : pairs) {
        const int64_t blocks = pieces(p.look->tokens, SOME_TOKENS), mine = call.batch * blocks;
        if (item < mine) {
          const int64_t first = item % blocks * SOME_TOKENS;
          return work(p, item / blocks, first, least(SOME_TOKENS, p.look->tokens - first));
        }
        item -= mine;
      }
    });
  };
  each(double(SOME_TOKENS) * k * c, [&](const Pair& p, int64_t b, int64_t first, int n) {
    rows_times({n, int(k), int(c), p.look->x(b, c) + first * c, c, dz + b * dz_batch, c,
                p.back->ds + b * p.look->weights_batch + first * width, width});
  });
  const Look& front = *pairs.begin()->look;  // the others' weights and ds follow
  float* const all_ds = pairs.begin()->back->ds;
  const int64_t across = pieces(k, WIDTH);
  phase(team, call.batch * across, double(WIDTH) * (c + 4 * tokens), [&](int64_t item) {
    const int64_t b = item / across, slot = item % across * WIDTH, at = (b * call.steps + step) * k + slot;
    const int n = least(WIDTH, k - slot);
    const Bits real = lanes_between(0, n);
    Vec along{};
    for (int i = 0; i < n; ++i) {
      const float *const x = state.pooled + (at + i) * c, *const g = dz + b * dz_batch + (slot + i) * c;
      const Vec factor = broadcast(carry[b * width + slot + i]);
      Vec total{};
      for (int64_t j = 0; j < c; j += WIDTH) {
        total = fma(load(x + j), load(g + j), total);
        store(dpooled + (at + i) * c + j, load(g + j) * factor);
      }
      along[i] = sum(total);
    }
    const float* const weights = front.weights + b * front.weights_batch + slot;
    float* const ds = all_ds + b * front.weights_batch + slot;
    const Vec carried = load(carry + b * width + slot);
    Vec mean = keep(real, carried * along);  // of the gradient over all that was pooled
    for (int64_t i = 0; i < tokens; ++i) mean = fma(load(weights + i * width), load(ds + i * width), mean);
    for (int64_t i = 0; i < tokens; ++i)
      store(ds + i * width, keep(real, load(weights + i * width) * (load(ds + i * width) - mean)));
    store_part(dsum + at, -carried * mean, n);
  });
  each(double(SOME_TOKENS) * (k * (c + h) + h * c), [&](const Pair& p, int64_t b, int64_t first, int n) {
    const Look& l = *p.look;
    const int64_t row = b * l.tokens + first;
    float *const dx = p.back->dx + row * c, *const dnormal = p.back->dnormal + row * c;
    float* const dhidden = p.back->dhidden + row * h;
    const float* const weights = l.weights + b * l.weights_batch + first * width;
    const float* const ds = p.back->ds + b * l.weights_batch + first * width;
    product_of({n, c, k, dz + b * dz_batch, c, weights, width, 1, dx, c});
    product_of({n, h, k, l.pool->out.weight, h, ds, width, 1, dhidden, h});
    for (int64_t i = 0; i < n * h; i += WIDTH) store(dhidden + i, load(dhidden + i) * load(l.slope + row * h + i));
    product_of({n, c, h, l.pool->hidden.weight, c, dhidden, h, 1, dnormal, c});
    for (int r = 0; r < n; ++r)
      normalise_backward(l.x(b, c) + (first + r) * c, c, l.pool->norm.weight, l.mean[row + r], l.inverse[row + r],
                         dnormal + r * c, dx + r * c);
  });
}

// The gradients of a pool's parameters, from all tokens of a step.
static void pool_weights(const Team& team, const Call& call, int64_t k, std::initializer_list<Pair> pairs,
                         const PoolOf<float>& to) {
  constexpr int64_t UNITS = 16;
  const int64_t c = call.c, h = call.hidden, width = wide(k);
  const int64_t slots = pieces(k, UNITS), units = h / UNITS, panels = pieces(c, SOME_COLUMNS);
  phase(team, slots + units * panels + panels, double(UNITS) * SOME_COLUMNS * call.batch * call.memory,
        [&](int64_t item) {
    for (const Pair& p : pairs) {
      const Look& l = *p.look;
      const int64_t rows = call.batch * l.tokens;
      if (item < slots) {
        const int64_t slot = item * UNITS;
        const int n = least(UNITS, k - slot);
        for (int64_t b = 0; b < call.batch; ++b) {
          const float* const ds = p.back->ds + b * l.weights_batch + slot;
          product_of({n, h, l.tokens, l.hidden + b * l.tokens * h, h, ds, 1, width, to.out.weight + slot * h, h, true});
          add_rows(ds, l.tokens, width, n, to.out.bias + slot);
        }
      } else if (item < slots + units * panels) {
        const int64_t unit = (item - slots) / panels * UNITS, column = (item - slots) % panels * SOME_COLUMNS;
        const float* const dhidden = p.back->dhidden + unit;
        product_of({UNITS, least(SOME_COLUMNS, c - column), rows, l.normal + column, c, dhidden, 1, h,
                    to.hidden.weight + unit * c + column, c, true});
        if (column == 0) add_rows(dhidden, rows, h, UNITS, to.hidden.bias + unit);
      } else {
        const int64_t column = (item - slots - units * panels) * SOME_COLUMNS;
        const int64_t end = column + least(SOME_COLUMNS, c - column);
        for (int64_t b = 0; b < call.batch; ++b)
          add_norm(l.x(b, c), l.mean + b * l.tokens, l.inverse + b * l.tokens, p.back->dnormal + b * l.tokens * c,
                   l.tokens, c, column, end, to.norm);
      }
    }
  });
}

struct LayerBack {  // gradients at a Layer; those that matrices wait for have `depth` steps of rows
  float *dout, *dhidden, *dmiddle, *dqkv;  // (rows, c), (rows, mlp), (rows, c), (rows, qkv_width)
  float *dnormal2, *dnormal1;              // (rows, c)
};

}  // namespace mirasol::MIRASOL_ISA
