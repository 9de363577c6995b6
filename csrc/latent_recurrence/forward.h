#pragma once
// A step in phases.  Rows of the whole batch are together in each, so that a weight is read once a step; an item is some
// of the rows by some of the columns.  Whatever backward wants of a step stays in its Activations.
#include <initializer_list>
#include "latent_recurrence/rows.h"

namespace mirasol::MIRASOL_ISA {

using latent_recurrence::Block;
using latent_recurrence::Call;
using latent_recurrence::Forward;
using latent_recurrence::Pool;
using latent_recurrence::State;
using latent_recurrence::Team;

// Hands out consecutive pieces of a workspace; from none, it counts.
struct Pieces {
  float* begin;
  int64_t taken = 0;
  float* take(int64_t floats) {
    float* const piece = begin ? begin + taken : nullptr;
    taken += (floats + 15) / 16 * 16;
    return piece;
  }
};

// each(i) for i < items; `cost` in multiply-adds of one says whether it pays to wake a team.
template <class Each>
static inline void phase(const Team& team, int64_t items, double cost, const Each& each) {
  if (items == 1 || items * cost < 1 << 16)
    for (int64_t i = 0; i < items; ++i) each(i);
  else
    team.run(team.self, items, [](void* f, int64_t i) { (*static_cast<const Each*>(f))(i); },
             const_cast<void*>(static_cast<const void*>(&each)));
}

constexpr int64_t SOME_ROWS = 64, SOME_TOKENS = 16, SOME_OUTS = 48;

static inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// (n, m) = x w^T + bias, an item of `rows` by SOME_OUTS, each then given to done(first row, rows, first column, columns).
template <class Done>
static void linear(const Team& team, int64_t n, int64_t m, int64_t k, const float* x, const Linear& p, float* y,
                   int64_t y_row, const Done& done) {
  const int64_t across = pieces(m, SOME_OUTS), down = pieces(n, SOME_ROWS);
  phase(team, across * down, double(least(n, SOME_ROWS)) * SOME_OUTS * k, [&](int64_t item) {
    const int64_t row = item / across * SOME_ROWS, column = item % across * SOME_OUTS;
    const int rows = least(SOME_ROWS, n - row), columns = least(SOME_OUTS, m - column);
    rows_times({rows, columns, int(k), x + row * k, k, p.weight + column * k, k, y + row * y_row + column, y_row});
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t i = column; i < column + columns; i += WIDTH)
        store(y + r * y_row + i, load(y + r * y_row + i) + load(p.bias + i));
    done(row, rows, column, columns);
  });
}

// Some tokens on their way into a pool; per row of the batch `tokens` of them, `row` floats apart from batch to batch.
struct Look {
  const Pool* pool;
  int64_t tokens, k, wide;       // wide: k in whole vectors of any instruction set
  const float* table;
  float *placed;                 // (batch, tokens, c): with the table; none without
  float *mean, *inverse;         // (batch, tokens)
  float *normal, *hidden, *slope;  // (batch, tokens, c), (.., hidden) twice
  float* weights;                // (batch, some, wide): first logits, then what each token weighs
  int64_t weights_batch;         // from batch to batch; tokens of two looks may lie in one
  const float* from;             // where they are, this step
  int64_t from_batch;

  const float* x(int64_t b, int64_t c) const { return placed ? placed + b * tokens * c : from + b * from_batch; }
};

static int64_t wide(int64_t k) { return (k + 15) / 16 * 16; }

static Look look_at(Pieces& at, const Call& call, const Pool& pool, int64_t tokens, int64_t k, const float* table,
                    float* weights, int64_t weights_batch) {
  const int64_t rows = call.batch * tokens;
  Look look{};
  look.pool = &pool, look.tokens = tokens, look.k = k, look.wide = wide(k), look.table = table;
  look.placed = table ? at.take(rows * call.c) : nullptr;
  look.mean = at.take(rows), look.inverse = at.take(rows);
  look.normal = at.take(rows * call.c);
  look.hidden = at.take(rows * call.hidden), look.slope = at.take(rows * call.hidden);
  look.weights = weights, look.weights_batch = weights_batch;
  return look;
}

// Channels of a head in whole vectors of any instruction set; q, k and v of a row lie in 3 * heads pieces of it.
static inline int64_t head_width(const Call& call) { return wide(call.c / call.heads); }
static inline int64_t qkv_width(const Call& call) { return 3 * call.heads * head_width(call); }

struct Layer {
  float* x;                      // (rows, c): what comes in
  float *mean1, *inverse1, *mean2, *inverse2;
  float *normal1, *qkv, *attended;  // (rows, c), (rows, qkv_width), (rows, c)
  float* weights;                // (batch, heads, read, wide(read)) of attention
  float *middle, *normal2, *hidden, *slope;  // (rows, c) twice, (rows, mlp) twice
};

// The activations of a step; rows are batch * read.
struct Activations {
  Look read, write, written;  // memory for reading and for writing, the output for writing
  float *read_carry, *write_carry;  // (batch, wide): what the input's state weighs
  Layer* layers;
  float *x, *mean, *inverse;  // (rows, c), (rows) twice: after the blocks
  float* y;                   // normalised: (read, c), y_batch floats from batch to batch
  int64_t y_batch;
};

static Layer layer(Pieces& at, const Call& call) {
  const int64_t rows = call.batch * call.read;
  Layer l;
  l.x = at.take(rows * call.c);
  for (float** one : {&l.mean1, &l.inverse1, &l.mean2, &l.inverse2}) *one = at.take(rows);
  l.normal1 = at.take(rows * call.c), l.qkv = at.take(rows * qkv_width(call)), l.attended = at.take(rows * call.c);
  l.weights = at.take(rows * call.heads * wide(call.read));
  l.middle = at.take(rows * call.c), l.normal2 = at.take(rows * call.c);
  l.hidden = at.take(rows * call.mlp), l.slope = at.take(rows * call.mlp);
  return l;
}

static Activations activations(Pieces& at, const Call& call) {
  Activations s;
  const int64_t rows = call.batch * call.read, mem = call.memory, all = mem + call.read;
  float* const read_weights = at.take(call.batch * mem * wide(call.read));
  float* const write_weights = at.take(call.batch * all * wide(mem));
  s.read = look_at(at, call, call.reader, mem, call.read, call.read_table, read_weights, mem * wide(call.read));
  s.write = look_at(at, call, call.writer, mem, mem, call.write_table, write_weights, all * wide(mem));
  s.written = look_at(at, call, call.writer, call.read, mem, call.output_table,
                      write_weights ? write_weights + mem * wide(mem) : nullptr, all * wide(mem));
  s.read_carry = at.take(call.batch * wide(call.read)), s.write_carry = at.take(call.batch * wide(mem));
  s.layers = reinterpret_cast<Layer*>(at.take(call.layers * int64_t(sizeof(Layer) / sizeof(float))));
  for (int64_t i = 0; i < call.layers; ++i) {
    const Layer l = layer(at, call);
    if (at.begin) s.layers[i] = l;
  }
  s.x = at.take(rows * call.c), s.mean = at.take(rows), s.inverse = at.take(rows);
  return s;
}

// Tokens [first, first + n) of a row of the batch: with their table, normalised, their logits.
static void look_rows(const Call& call, const Look& look, int64_t b, int64_t first, int n) {
  const int64_t c = call.c, h = call.hidden, row = b * look.tokens + first;
  const float* x = look.from + b * look.from_batch + first * c;
  if (look.table) {
    float* const placed = look.placed + row * c;
    for (int64_t i = 0; i < n * c; i += WIDTH) store(placed + i, load(x + i) + load(look.table + first * c + i));
    x = placed;
  }
  float* const normal = look.normal + row * c;
  for (int r = 0; r < n; ++r)
    normalise(x + r * c, c, look.pool->norm, look.mean + row + r, look.inverse + row + r, normal + r * c);
  float *const hidden = look.hidden + row * h, *const slope = look.slope + row * h;
  rows_times({n, int(h), int(c), normal, c, look.pool->hidden.weight, c, hidden, h});
  for (int r = 0; r < n; ++r)
    for (int64_t i = 0; i < h; i += WIDTH) {
      Vec rise;
      store(hidden + r * h + i, gelu_tanh(load(hidden + r * h + i) + load(look.pool->hidden.bias + i), &rise));
      store(slope + r * h + i, rise);
    }
  float* const logits = look.weights + b * look.weights_batch + first * look.wide;
  rows_times({n, int(look.k), int(h), hidden, h, look.pool->out.weight, h, logits, look.wide});
  for (int r = 0; r < n; ++r)  // the bias is the same for all tokens, but not for the state they merge with
    for (int64_t i = 0; i < look.k; ++i) logits[r * look.wide + i] += look.pool->out.bias[i];
}

// Looks at tokens in one phase.
static void look(const Team& team, const Call& call, std::initializer_list<const Look*> looks) {
  int64_t items = 0;
  for (const Look* l : looks) items += call.batch * pieces(l->tokens, SOME_TOKENS);
  phase(team, items, double(SOME_TOKENS) * call.hidden * (call.c + 64), [&](int64_t item) {
    for (const Look* l : looks) {
      const int64_t each = pieces(l->tokens, SOME_TOKENS), mine = call.batch * each;
      if (item < mine) {
        const int64_t first = item % each * SOME_TOKENS;
        return look_rows(call, *l, item / each, first, least(SOME_TOKENS, l->tokens - first));
      }
      item -= mine;
    }
  });
}

// Logits of `tokens` tokens become what they weigh beside the input's state of this step, which weighs `carry`.
static void weigh(const Team& team, const Call& call, const State& state, int64_t step, float* weights, int64_t tokens,
                  int64_t k, float* carry) {
  const int64_t width = wide(k), across = pieces(k, WIDTH);
  phase(team, call.batch * across, 8.0 * tokens * WIDTH, [&](int64_t item) {
    const int64_t b = item / across, first = item % across * WIDTH, at = (b * call.steps + step) * k + first;
    const int n = least(WIDTH, k - first);
    float* const s = weights + b * tokens * width + first;
    const Bits real = lanes_between(0, n);
    const Vec none = broadcast(-__builtin_inff());
    if (n < WIDTH)
      for (int64_t i = 0; i < tokens; ++i) store(s + i * width, keep(real, load(s + i * width)));
    const Vec before = select(real, load_part(state.max + at, n), none);
    Vec top = before;
    for (int64_t i = 0; i < tokens; ++i) {
      const Vec x = load(s + i * width);
      top = select((x > top) | (x != x), x, top);  // NaN stays
    }
    const Vec base = select(top == none, Vec{}, top);
    Vec carried = exp(before - base), total = carried * load_part(state.sum + at, n);
    for (int64_t i = 0; i < tokens; ++i) {
      const Vec weight = exp(load(s + i * width) - base);
      store(s + i * width, weight);
      total += weight;
    }
    const Vec share = 1.0f / select(total == 0.0f, broadcast(1), total);
    for (int64_t i = 0; i < tokens; ++i) store(s + i * width, load(s + i * width) * share);
    store(carry + b * width + first, carried * share);
  });
}

// Part of a sum over tokens: `tokens` rows at x by their weights.
struct Weighed {
  const float* x;
  int64_t tokens;
  const float* weights;  // (tokens, wide)
};

struct Both {
  Weighed part[2];
};

// to (k, c) of a row of the batch = carry * pooled + sum of weights * tokens, of parts(b).
template <class Parts>
static void pool_rows(const Team& team, const Call& call, int64_t k, const State& state, int64_t step,
                      const float* carry, float* to, int64_t to_batch, const Parts& parts) {
  constexpr int64_t SLOTS = 16, CHANNELS = 128;
  const int64_t c = call.c, width = wide(k), down = pieces(k, SLOTS), across = pieces(c, CHANNELS);
  phase(team, call.batch * down * across, double(SLOTS) * CHANNELS * call.memory, [&](int64_t item) {
    const int64_t channel = item % across * CHANNELS, b = item / across / down, first = item / across % down * SLOTS;
    const int n = least(SLOTS, k - first), m = least(CHANNELS, c - channel);
    float* const y = to + b * to_batch + first * c + channel;
    const float* const input = state.pooled + ((b * call.steps + step) * k + first) * c + channel;
    for (int r = 0; r < n; ++r) {
      const Vec factor = broadcast(carry[b * width + first + r]);
      for (int i = 0; i < m; i += WIDTH) store(y + r * c + i, load(input + r * c + i) * factor);
    }
    for (const Weighed& part : parts(b).part)
      if (part.tokens)
        gemm({.vectors = m / WIDTH, .n = n, .k = int(part.tokens), .a = part.x + channel, .a_k = c, .a_v = WIDTH,
              .b = part.weights + first, .b_n = 1, .b_k = width, .c = y, .c_n = c, .c_v = WIDTH, .add = true});
  });
}

static void normalise_rows(const Team& team, int64_t rows, int64_t c, const float* x, const Norm& norm, float* mean,
                           float* inverse, float* y) {
  phase(team, pieces(rows, 8), 64.0 * c, [&](int64_t item) {
    for (int64_t r = item * 8; r < rows && r < item * 8 + 8; ++r)
      normalise(x + r * c, c, norm, mean + r, inverse + r, y + r * c);
  });
}

// Softmax attention among the read tokens of a head of a row of the batch.
static void attend(const Call& call, const Layer& l, int64_t item) {
  const int64_t d = call.c / call.heads, b = item / call.heads, head = item % call.heads, r = call.read;
  const int64_t width = wide(r), piece = head_width(call), row = qkv_width(call), next = call.heads * piece;
  const float* const q = l.qkv + b * r * row + head * piece;
  const float scale = 1 / __builtin_sqrtf(float(d));
  float* const weights = l.weights + item * r * width;
  rows_times({int(r), int(r), int(piece), q, row, q + next, row, weights, width});
  for (int64_t i = 0; i < r; ++i) {
    float* const s = weights + i * width;
    Vec tops = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < r; j += WIDTH) {
      const Bits real = lanes_between(0, least(WIDTH, r - j));
      const Vec x = select(real, load(s + j) * scale, broadcast(-__builtin_inff()));
      tops = select((x > tops) | (x != x), x, tops);  // NaN stays
      store(s + j, x);
    }
    float top = tops[0], total = 0;
    for (int j = 1; j < WIDTH; ++j) top = tops[j] > top || tops[j] != tops[j] ? tops[j] : top;
    for (int64_t j = 0; j < r; j += WIDTH) {
      const Vec weight = exp(load(s + j) - top);
      store(s + j, weight);
      total += sum(weight);
    }
    for (int64_t j = 0; j < r; j += WIDTH) store(s + j, load(s + j) / total);
    float* const to = l.attended + (b * r + i) * call.c + head * d;
    for (int64_t e = 0; e < d; e += WIDTH) {
      const float* const v = q + 2 * next + e;
      Vec x[4] = {};  // one alone would wait for each addition
      for (int64_t j = 0; j < r; ++j) x[j % 4] = fma(broadcast(s[j]), load(v + j * row), x[j % 4]);
      store_part(to + e, (x[0] + x[1]) + (x[2] + x[3]), least(WIDTH, d - e));
    }
  }
}

static void run_block(const Team& team, const Call& call, const Block& p, const Layer& l, float* next) {
  const int64_t rows = call.batch * call.read, c = call.c, mlp = call.mlp;
  const auto plus = [&](float* y, const float* x) {
    return [=](int64_t row, int n, int64_t column, int columns) {
      for (int64_t at = row * c + column, end = (row + n) * c; at < end; at += c)
        for (int i = 0; i < columns; i += WIDTH) store(y + at + i, load(y + at + i) + load(x + at + i));
    };
  };
  normalise_rows(team, rows, c, l.x, p.norm1, l.mean1, l.inverse1, l.normal1);
  const Linear* const three[] = {&p.q, &p.k, &p.v};
  const int64_t d = c / call.heads, piece = head_width(call), row = qkv_width(call), down = pieces(rows, SOME_ROWS);
  phase(team, 3 * call.heads * down, double(least(rows, SOME_ROWS)) * d * c, [&](int64_t item) {
    const int64_t which = item / down, head = which % call.heads, first = item % down * SOME_ROWS;
    const int n = least(SOME_ROWS, rows - first);
    const Linear& w = *three[which / call.heads];
    float* const y = l.qkv + first * row + which * piece;
    rows_times({n, int(d), int(c), l.normal1 + first * c, c, w.weight + head * d * c, c, y, row});
    for (int r = 0; r < n; ++r)
      for (int64_t i = 0; i < piece; i += WIDTH) {
        const int some = int(d - i) < 0 ? 0 : least(WIDTH, d - i);
        const Bits real = lanes_between(0, some);
        store(y + r * row + i, keep(real, load(y + r * row + i) + load_part(w.bias + head * d + i, some)));
      }
  });
  phase(team, call.batch * call.heads, 4.0 * call.read * call.read * (c / call.heads),
        [&](int64_t item) { attend(call, l, item); });
  linear(team, rows, c, c, l.attended, p.out, l.middle, c, plus(l.middle, l.x));
  normalise_rows(team, rows, c, l.middle, p.norm2, l.mean2, l.inverse2, l.normal2);
  linear(team, rows, mlp, c, l.normal2, p.hidden, l.hidden, mlp, [&](int64_t row, int n, int64_t column, int columns) {
    for (int64_t at = row * mlp + column, end = (row + n) * mlp; at < end; at += mlp)
      for (int i = 0; i < columns; i += WIDTH) {
        Vec rise;
        store(l.hidden + at + i, gelu_tanh(load(l.hidden + at + i), &rise));
        store(l.slope + at + i, rise);
      }
  });
  linear(team, rows, c, mlp, l.hidden, p.shrink, next, c, plus(next, l.middle));
}

// From the memory of this step, at s.read.from and s.write.from, to what write's tokens weigh.
static void run_step(const Team& team, const Call& call, int64_t step, Activations& s) {
  const int64_t mem = call.memory, r = call.read, c = call.c, rows = call.batch * r;
  look(team, call, {&s.read, &s.write});
  weigh(team, call, call.for_read, step, s.read.weights, mem, r, s.read_carry);
  float* const first = s.layers[0].x;
  pool_rows(team, call, r, call.for_read, step, s.read_carry, first, r * c, [&](int64_t b) {
    return Both{{{s.read.x(b, c), mem, s.read.weights + b * s.read.weights_batch}, {}}};
  });
  if (call.process_table)
    for (int64_t b = 0; b < call.batch; ++b)
      for (int64_t i = 0; i < r * c; i += WIDTH)
        store(first + b * r * c + i, load(first + b * r * c + i) + load(call.process_table + i));
  for (int64_t i = 0; i < call.layers; ++i)
    run_block(team, call, call.blocks[i], s.layers[i], i + 1 < call.layers ? s.layers[i + 1].x : s.x);
  phase(team, pieces(rows, 8), 64.0 * c, [&](int64_t item) {
    for (int64_t row = item * 8; row < rows && row < item * 8 + 8; ++row)
      normalise(s.x + row * c, c, call.norm, s.mean + row, s.inverse + row, s.y + row / r * s.y_batch + row % r * c);
  });
  s.written.from = s.y, s.written.from_batch = s.y_batch;
  look(team, call, {&s.written});
  weigh(team, call, call.for_write, step, s.write.weights, mem + r, mem, s.write_carry);
}

static void set_memory(Activations& s, const float* memory, int64_t batch) {
  s.read.from = s.write.from = memory, s.read.from_batch = s.write.from_batch = batch;
}

int64_t latent_recurrence_forward_workspace(const Call& call) {
  Pieces at{};
  activations(at, call);
  at.take(call.batch * call.memory * call.c);
  return at.taken;
}

void latent_recurrence_forward(const Forward& f, const Team& team, float* workspace) {
  const Call& call = f.call;
  const int64_t size = call.memory * call.c, T = call.steps;
  Pieces at{workspace};
  Activations s = activations(at, call);
  float* const other = at.take(call.batch * size);
  if (f.kept)
    for (int64_t b = 0; b < call.batch; ++b)
      __builtin_memcpy(f.kept + b * T * size, call.start + b * size, size * sizeof(float));
  set_memory(s, call.start, size);
  s.y_batch = T * call.read * call.c;
  for (int64_t t = 0; t < T; ++t) {
    s.y = f.outputs + t * call.read * call.c;
    run_step(team, call, t, s);
    const bool stays = f.kept && t + 1 < T;
    float* const next = stays ? f.kept + (t + 1) * size : (T - 1 - t) % 2 ? other : f.last;
    const int64_t batch = stays ? T * size : size;
    pool_rows(team, call, call.memory, call.for_write, t, s.write_carry, next, batch, [&](int64_t b) {
      const float* const weights = s.write.weights + b * s.write.weights_batch;
      return Both{{{s.write.x(b, call.c), call.memory, weights},
                   {s.written.x(b, call.c), call.read, weights + call.memory * s.write.wide}}};
    });
    set_memory(s, next, batch);
  }
}

}  // namespace mirasol::MIRASOL_ISA
