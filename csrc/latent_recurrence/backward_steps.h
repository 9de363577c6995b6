#pragma once
// The second half of backward: through the processor, and the walk over steps.
#include "latent_recurrence/backward.h"

namespace mirasol::MIRASOL_ISA {

static int64_t depth_of(const Call& call) {  // steps whose rows make a product
  const int64_t steps = pieces(ENOUGH_ROWS, call.batch * call.read);
  return steps < call.steps ? steps : call.steps;
}

// What of a Layer a gradient of a matrix is a product with: the other factor, of `depth` steps.
struct Inputs {
  float *normal1, *attended, *normal2, *hidden;
};

struct StepBack {
  Activations s;
  LookBack read, write, written;
  Inputs* inputs;         // of each layer
  LayerBack* layers;
  float *dy, *dz, *dmemory;  // (rows, c) twice: of the output, of what was read; (batch, memory, c)
  float *dattended;       // (rows, c)
  float *dheads, *dscores;  // (batch, heads, read, head width), (batch, heads, read, wide(read))
};

static StepBack step_back(Pieces& at, const Call& call) {
  StepBack g;
  Activations& s = g.s = activations(at, call);
  const int64_t rows = call.batch * call.read, mem = call.memory, all = mem + call.read, c = call.c;
  const int64_t depth = depth_of(call) * rows;
  float* const write_ds = at.take(call.batch * all * wide(mem));
  g.read = look_back(at, call, s.read, at.take(call.batch * mem * wide(call.read)));
  g.write = look_back(at, call, s.write, write_ds);
  g.written = look_back(at, call, s.written, write_ds ? write_ds + mem * wide(mem) : nullptr);
  g.inputs = reinterpret_cast<Inputs*>(at.take(call.layers * int64_t(sizeof(Inputs) / sizeof(float))));
  g.layers = reinterpret_cast<LayerBack*>(at.take(call.layers * int64_t(sizeof(LayerBack) / sizeof(float))));
  for (int64_t i = 0; i < call.layers; ++i) {
    const Inputs in{at.take(depth * c), at.take(depth * c), at.take(depth * c), at.take(depth * call.mlp)};
    const LayerBack back{at.take(depth * c), at.take(depth * call.mlp), at.take(depth * c),
                         at.take(depth * qkv_width(call)), at.take(rows * c), at.take(rows * c)};
    if (at.begin) g.inputs[i] = in, g.layers[i] = back;
  }
  g.dy = at.take(rows * c), g.dz = at.take(rows * c), g.dmemory = at.take(call.batch * mem * c);
  g.dattended = at.take(rows * c);
  g.dheads = at.take(rows * call.heads * head_width(call)), g.dscores = at.take(rows * call.heads * wide(call.read));
  s.y = at.take(rows * c), s.y_batch = call.read * c;
  return g;
}

// Step number `turn` of those whose rows are collected.
static void collect(const Call& call, const StepBack& g, int64_t turn) {
  const int64_t row = turn * call.batch * call.read;
  for (int64_t i = 0; i < call.layers; ++i) {
    Layer& l = g.s.layers[i];
    l.normal1 = g.inputs[i].normal1 + row * call.c, l.attended = g.inputs[i].attended + row * call.c;
    l.normal2 = g.inputs[i].normal2 + row * call.c, l.hidden = g.inputs[i].hidden + row * call.mlp;
  }
}

static void attend_backward(const Call& call, const Layer& l, const StepBack& g, float* dqkv, int64_t item) {
  const int64_t d = call.c / call.heads, b = item / call.heads, head = item % call.heads, r = call.read;
  const int64_t width = wide(r), piece = head_width(call), row = qkv_width(call), next = call.heads * piece;
  const float *const q = l.qkv + b * r * row + head * piece, *const k = q + next, *const v = k + next;
  float* const dq = dqkv + b * r * row + head * piece;
  const float* const weights = l.weights + item * r * width;
  float *const dout = g.dheads + item * r * piece, *const ds = g.dscores + item * r * width;
  const float scale = 1 / __builtin_sqrtf(float(d));
  for (int64_t i = 0; i < r; ++i)
    for (int64_t e = 0; e < piece; e += WIDTH) {
      const int n = e < d ? least(WIDTH, d - e) : 0;
      store(dout + i * piece + e, load_part(g.dattended + (b * r + i) * call.c + head * d + e, n));
    }
  rows_times({int(r), int(r), int(piece), dout, piece, v, row, ds, width});
  for (int64_t i = 0; i < r; ++i) {
    const float* const p = weights + i * width;
    float* const s = ds + i * width;
    Vec total{};
    for (int64_t j = 0; j < r; j += WIDTH) {
      const Vec x = keep(lanes_between(0, least(WIDTH, r - j)), load(s + j));
      store(s + j, x);
      total = fma(load(p + j), x, total);
    }
    const float mean = sum(total);
    for (int64_t j = 0; j < r; j += WIDTH) store(s + j, load(p + j) * (load(s + j) - mean) * scale);
  }
  product_of({r, piece, r, k, row, ds, width, 1, dq, row});
  product_of({r, piece, r, q, row, ds, 1, width, dq + next, row});
  product_of({r, piece, r, dout, piece, weights, 1, width, dq + 2 * next, row});
}

// From g.layers[i].dout at row `first` on to `dx` (rows, c), the gradient of what came into the block.
static void block_backward(const Team& team, const Call& call, int64_t i, const StepBack& g, int64_t first,
                           float* dx) {
  const Block& p = call.blocks[i];
  const Layer& l = g.s.layers[i];
  const int64_t rows = call.batch * call.read, c = call.c, mlp = call.mlp, d = c / call.heads;
  const int64_t piece = head_width(call), row = qkv_width(call);
  const LayerBack& at = g.layers[i];
  float *const dout = at.dout + first * c, *const dhidden = at.dhidden + first * mlp;
  float *const dmiddle = at.dmiddle + first * c, *const dqkv = at.dqkv + first * row;
  const auto nothing = [](int64_t, int, int64_t, int) {};
  const auto through_norm = [&](const float* x, const Norm& norm, const float* mean, const float* inverse,
                                const float* dy, const float* beside, float* to) {
    phase(team, pieces(rows, 8), 128.0 * c, [&](int64_t item) {
      for (int64_t r = item * 8; r < rows && r < item * 8 + 8; ++r) {
        for (int64_t j = r * c; j < (r + 1) * c; j += WIDTH) store(to + j, load(beside + j));
        normalise_backward(x + r * c, c, norm.weight, mean[r], inverse[r], dy + r * c, to + r * c);
      }
    });
  };
  product_in_items(team, {rows, mlp, c, p.shrink.weight, mlp, dout, c, 1, dhidden, mlp},
                   [&](int64_t r, int n, int64_t column, int columns) {
    for (int64_t j = r * mlp + column, end = (r + n) * mlp; j < end; j += mlp)
      for (int e = 0; e < columns; e += WIDTH) store(dhidden + j + e, load(dhidden + j + e) * load(l.slope + j + e));
  });
  product_in_items(team, {rows, c, mlp, p.hidden.weight, c, dhidden, mlp, 1, at.dnormal2, c}, nothing);
  through_norm(l.middle, p.norm2, l.mean2, l.inverse2, at.dnormal2, dout, dmiddle);
  product_in_items(team, {rows, c, c, p.out.weight, c, dmiddle, c, 1, g.dattended, c}, nothing);
  phase(team, call.batch * call.heads, 8.0 * call.read * call.read * d,
        [&](int64_t item) { attend_backward(call, l, g, dqkv, item); });
  const Linear* const three[] = {&p.q, &p.k, &p.v};
  const int64_t across = pieces(c, SOME_COLUMNS), down = pieces(rows, SOME_ROWS);
  phase(team, across * down, 3.0 * least(rows, SOME_ROWS) * SOME_COLUMNS * c, [&](int64_t item) {
    const int64_t r = item / across * SOME_ROWS, column = item % across * SOME_COLUMNS;
    for (int64_t each = 0; each < 3 * call.heads; ++each)
      product_of({least(SOME_ROWS, rows - r), least(SOME_COLUMNS, c - column), d,
                  three[each / call.heads]->weight + each % call.heads * d * c + column, c,
                  dqkv + r * row + each * piece, row, 1, at.dnormal1 + r * c + column, c, each > 0});
  });
  through_norm(l.x, p.norm1, l.mean1, l.inverse1, at.dnormal1, dmiddle, dx);
}

// The gradients of a processor's norms, and with `rows` collected rows those of its matrices.
static void block_norms(const Team& team, const Backward& f, const StepBack& g) {
  const Call& call = f.call;
  const int64_t rows = call.batch * call.read, c = call.c, panels = pieces(c, SOME_COLUMNS);
  phase(team, (2 * call.layers + 1) * panels, 2.0 * rows * SOME_COLUMNS, [&](int64_t item) {
    const int64_t which = item / panels, begin = item % panels * SOME_COLUMNS;
    const int64_t end = begin + least(SOME_COLUMNS, c - begin);
    if (which == 2 * call.layers)
      return add_norm(g.s.x, g.s.mean, g.s.inverse, g.dy, rows, c, begin, end, f.dnorm);
    const Layer& l = g.s.layers[which / 2];
    const LayerBack& at = g.layers[which / 2];
    const BlockOf<float>& to = f.dblocks[which / 2];
    if (which % 2) add_norm(l.middle, l.mean2, l.inverse2, at.dnormal2, rows, c, begin, end, to.norm2);
    else add_norm(l.x, l.mean1, l.inverse1, at.dnormal1, rows, c, begin, end, to.norm1);
  });
}

static void block_matrices(const Team& team, const Backward& f, const StepBack& g, int64_t rows) {
  const Call& call = f.call;
  const int64_t c = call.c, mlp = call.mlp, d = c / call.heads, piece = head_width(call), row = qkv_width(call);
  // dw (m, k) += dy^T x; an item is `outs` of the m, of all terms.
  const auto matrix = [&](const LinearOf<float>& to, const float* dy, int64_t dy_row, int64_t m, const float* x,
                          int64_t k, int64_t outs) {
    const int64_t down = pieces(m, outs), across = pieces(k, SOME_COLUMNS);
    phase(team, down * across, double(outs) * SOME_COLUMNS * rows, [&](int64_t item) {
      const int64_t out = item / across * outs, column = item % across * SOME_COLUMNS;
      const int64_t n = least(outs, m - out);
      product_of({n, least(SOME_COLUMNS, k - column), rows, x + column, k, dy + out, 1, dy_row,
                  to.weight + out * k + column, k, true});
      if (column == 0) add_rows(dy + out, rows, dy_row, n, to.bias + out);
    });
  };
  for (int64_t i = 0; i < call.layers; ++i) {
    const LayerBack& at = g.layers[i];
    const Inputs& in = g.inputs[i];
    const BlockOf<float>& to = f.dblocks[i];
    const LinearOf<float>* const three[] = {&to.q, &to.k, &to.v};
    const int64_t across = pieces(c, SOME_COLUMNS);
    phase(team, 3 * call.heads * across, double(d) * SOME_COLUMNS * rows, [&](int64_t item) {
      const int64_t which = item / across, head = which % call.heads, column = item % across * SOME_COLUMNS;
      const LinearOf<float>& w = *three[which / call.heads];
      const float* const dy = at.dqkv + which * piece;
      product_of({d, least(SOME_COLUMNS, c - column), rows, in.normal1 + column, c, dy, 1, row,
                  w.weight + head * d * c + column, c, true});
      if (column == 0) add_rows(dy, rows, row, d, w.bias + head * d);
    });
    matrix(to.out, at.dmiddle, c, c, in.attended, c, 64);
    matrix(to.hidden, at.dhidden, mlp, mlp, in.normal2, c, 64);
    matrix(to.shrink, at.dout, c, c, in.hidden, mlp, 64);
  }
}

// to (tokens, c) += the sum over the batch of x (batch, tokens, c).
static void add_table(const Call& call, const float* x, int64_t tokens, float* to) {
  if (to) add_rows(x, call.batch, tokens * call.c, tokens * call.c, to);
}

int64_t latent_recurrence_backward_workspace(const Call& call) {
  Pieces at{};
  step_back(at, call);
  return at.taken;
}

void latent_recurrence_backward(const Backward& f, const Team& team, float* workspace) {
  const Call& call = f.call;
  const int64_t mem = call.memory, c = call.c, r = call.read, size = mem * c, T = call.steps, rows = call.batch * r;
  Pieces at{workspace};
  StepBack g = step_back(at, call);
  Activations& s = g.s;
  const auto clear = [](float* x, int64_t n) {
    if (x) __builtin_memset(x, 0, n * sizeof(float));
  };
  const auto clear_norm = [&](const NormOf<float>& n) { clear(n.weight, c), clear(n.bias, c); };
  const auto clear_linear = [&](const LinearOf<float>& l, int64_t out, int64_t in) {
    clear(l.weight, out * in), clear(l.bias, out);
  };
  const auto clear_pool = [&](const PoolOf<float>& p, int64_t k) {
    clear_norm(p.norm), clear_linear(p.hidden, call.hidden, c), clear_linear(p.out, k, call.hidden);
  };
  clear_pool(f.dreader, r), clear_pool(f.dwriter, mem), clear_norm(f.dnorm);
  for (int64_t i = 0; i < call.layers; ++i) {
    const BlockOf<float>& b = f.dblocks[i];
    clear_norm(b.norm1), clear_norm(b.norm2);
    for (const LinearOf<float>* l : {&b.q, &b.k, &b.v, &b.out}) clear_linear(*l, c, c);
    clear_linear(b.hidden, call.mlp, c), clear_linear(b.shrink, c, call.mlp);
  }
  clear(f.dread_table, size), clear(f.dwrite_table, size), clear(f.doutput_table, r * c);
  clear(f.dprocess_table, r * c);

  const int64_t depth = depth_of(call);
  int64_t turn = 0;
  const float* dnext = f.dlast;
  for (int64_t t = T - 1; t >= 0; --t) {
    set_memory(s, f.kept + t * size, T * size);
    collect(call, g, turn);
    run_step(team, call, t, s);
    pool_backward(team, call, mem, call.for_write, t, s.write_carry, dnext, size,
                  {{&s.write, &g.write}, {&s.written, &g.written}}, f.dwrite_sum, f.dwrite_pooled);
    const int64_t first = turn * rows;
    float* const dlast_block = g.layers[call.layers - 1].dout + first * c;
    phase(team, pieces(rows, 8), 128.0 * c, [&](int64_t item) {
      for (int64_t row = item * 8; row < rows && row < item * 8 + 8; ++row) {
        const float* const given = f.doutputs + (row / r * T + t) * r * c + row % r * c;
        for (int64_t i = 0; i < c; i += WIDTH)
          store(g.dy + row * c + i, load(given + i) + load(g.written.dx + row * c + i));
        zero(dlast_block + row * c, c);
        normalise_backward(s.x + row * c, c, call.norm.weight, s.mean[row], s.inverse[row], g.dy + row * c,
                           dlast_block + row * c);
      }
    });
    for (int64_t i = call.layers - 1; i >= 0; --i)
      block_backward(team, call, i, g, first, i ? g.layers[i - 1].dout + first * c : g.dz);
    pool_backward(team, call, r, call.for_read, t, s.read_carry, g.dz, r * c, {{&s.read, &g.read}}, f.dread_sum,
                  f.dread_pooled);
    float* const dmemory = t ? g.dmemory : f.dstart;
    phase(team, call.batch * mem, double(c), [&](int64_t row) {
      for (int64_t i = row * c; i < (row + 1) * c; i += WIDTH)
        store(dmemory + i, load(g.read.dx + i) + load(g.write.dx + i));
    });
    dnext = dmemory;
    pool_weights(team, call, r, {{&s.read, &g.read}}, f.dreader);
    pool_weights(team, call, mem, {{&s.write, &g.write}, {&s.written, &g.written}}, f.dwriter);
    block_norms(team, f, g);
    add_table(call, g.read.dx, mem, f.dread_table), add_table(call, g.write.dx, mem, f.dwrite_table);
    add_table(call, g.written.dx, r, f.doutput_table), add_table(call, g.dz, r, f.dprocess_table);
    if (++turn == depth || t == 0) {
      block_matrices(team, f, g, turn * rows);
      turn = 0;
    }
  }
}

}  // namespace mirasol::MIRASOL_ISA
