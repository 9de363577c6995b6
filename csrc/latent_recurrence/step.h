#pragma once
// All steps of the forward in one kernel: phases, between which the whole grid meets: 4 + 5 layers times a step.
//
// A block of the GPU keeps a slice of the channels of every slot of memory in its shared memory, from step to step.
// Reading and writing pool slots, channel by channel, so they need no other block's slice: only logits, which are few
// (mem (mem + 2 r) numbers).  The logits need whole slots: each block also leaves its new slice in `last`, in the
// second-level cache, where a block then fetches the few slots that it looks at.  Slots cut among blocks instead would
// cost the same meetings and leave the pooling to fetch all slots.  Matrices are cut by outputs, so that all blocks
// together read each weight once a step.  The residual stream is in the scratch memory; every number there has one
// writer.  The batch goes along in every phase.
#include <type_traits>
#include "latent_recurrence/crew.h"

namespace mirasol::cuda {

using latent_recurrence::Call;
using latent_recurrence::Forward;
using latent_recurrence::State;

constexpr int MAX_LAYERS = 16;  // they are an argument of the kernel, which has room for 4 KB

struct Sizes {
  int batch, steps, memory, read, c, hidden, mlp, heads, layers;
  MIRASOL_HOST_DEVICE int dim() const { return c / heads; }
  MIRASOL_HOST_DEVICE int tokens() const { return memory + read; }
};

struct Scratch {  // in the GPU's memory; rows are (batch, read)
  float *x, *qkv, *attended, *inner;  // (rows, c), (rows, 3 c), (rows, c), (rows, mlp)
  float* read_logits;                 // (batch, memory, read)
  float* write_logits;                // (batch, memory + read, memory)
};

struct Arguments {
  Forward f;  // f.call.blocks is the host's
  Block layers[MAX_LAYERS];
  Sizes s;
  Scratch scratch;
};

// Hands out consecutive pieces of some memory; from none, it counts.
struct Cut {
  float* begin;
  int64_t taken = 0;
  MIRASOL_HOST_DEVICE float* take(int64_t floats) {
    float* const piece = begin ? begin + taken : nullptr;
    taken += floats;
    return piece;
  }
};

// Shared memory: memory now and next, and what a phase needs, in the same place for all three kinds of phase.
struct Shared {
  int width;    // channels of a slice
  float* held;  // (2, batch, memory, width): of even steps, and of odd ones
  float *x, *hidden;  // of matrices: (ROWS, c or mlp), (ROWS, hidden)
  Sums sums;
  float *placed, *weights, *parts, *three;  // of pooling
  float *q, *k, *v, *scores;                // of attention: (ROWS, d + 1), (read, d + 1) twice, (ROWS, read)
  int64_t floats;

  MIRASOL_HOST_DEVICE Shared(float* begin, const Sizes& s, int crews, int threads) {
    const int64_t d = s.dim() + 1, tokens = s.tokens();
    width = pieces(s.c, crews);
    Cut at{begin};
    held = at.take(int64_t(2) * s.batch * s.memory * width);
    Cut matrices = at, pooling = at, attention = at;
    x = matrices.take(int64_t(ROWS) * most(s.c, s.mlp)), hidden = matrices.take(int64_t(ROWS) * s.hidden);
    sums.part = matrices.take(SUMS);
    placed = pooling.take(tokens * width), weights = pooling.take(tokens * least(COLUMNS, most(s.memory, s.read)));
    parts = pooling.take(most(threads, COLUMNS)), three = pooling.take(3 * COLUMNS);
    q = attention.take(ROWS * d), k = attention.take(s.read * d), v = attention.take(s.read * d);
    scores = attention.take(int64_t(ROWS) * s.read);
    floats = matrices.taken;
    if (pooling.taken > floats) floats = pooling.taken;
    if (attention.taken > floats) floats = attention.taken;
  }
};

// One phase of one block: what it is called with.
template <class Crew>
struct Phase {
  Crew& crew;
  const Arguments& a;
  int step;
  const Sizes& s = a.s;
  const Shared shared{crew.shared, a.s, crew.count, crew.threads};
  const int channel = crew.number * shared.width, width = most(0, least(shared.width, s.c - channel));  // of the slice

  MIRASOL_HOST_DEVICE float* held(int at, int b) const {
    return shared.held + (int64_t(at % 2) * s.batch + b) * s.memory * shared.width;
  }

  // work(first, n) for this block's groups of up to ROWS out of `all` rows; `kinds` of work on each: work(.., kind).
  template <class Work>
  MIRASOL_HOST_DEVICE void groups(int all, int kinds, Work work) const {
    const int size = least(ROWS, pieces(all * kinds, crew.count)), items = pieces(all, size) * kinds;
    for (int item = crew.number; item < items; item += crew.count) {
      const int first = item / kinds * size;
      work(first, least(size, all - first), item % kinds);
    }
  }

  // work(row, n, first, end) for this block's part of all rows by `outs` outputs: few rows leave all blocks to outputs.
  template <class Work>
  MIRASOL_HOST_DEVICE void outputs(int outs, Work work) const {
    const int rows = s.batch * s.read, tiles = pieces(rows, ROWS);
    const int across = pieces(outs, pieces(outs, most(1, crew.count / tiles))), size = pieces(outs, across);
    for (int item = crew.number; item < tiles * across; item += crew.count) {
      const int row = item / across * ROWS, first = item % across * size;
      if (first < outs) work(row, least(ROWS, rows - row), first, least(outs, first + size));
    }
  }

  MIRASOL_HOST_DEVICE void fetch(const float* from, int row, int n, int k) const {  // rows of k numbers to shared.x
    spread_rows(crew, n, k, shared.x, [&](int r, int i) { return from[int64_t(row + r) * k + i]; });
  }

  MIRASOL_HOST_DEVICE void begin() const {
    spread(crew, s.batch * s.memory * width, [&](int i) {
      held(0, 0)[i / width * shared.width + i % width] =
          constant(a.f.call.start + int64_t(i / width) * s.c + channel + i % width);
    });
  }

  // Logits of memory, for reading and for writing.
  MIRASOL_HOST_DEVICE void look_at_memory() const {
    const Call& call = a.f.call;
    const float* const from = step ? a.f.last : call.start;
    groups(s.batch * s.memory, 2, [&](int first, int n, int writes) {
      const float* const table = writes ? call.write_table : call.read_table;
      if (!table) fetch(from, first, n, s.c);
      else
        spread_rows(crew, n, s.c, shared.x, [&](int row, int i) {
          const float add = constant(table + int64_t((first + row) % s.memory) * s.c + i);
          return from[int64_t(first + row) * s.c + i] + add;
        });
      const int k = writes ? s.memory : s.read;
      look(crew, shared.sums, writes ? call.writer : call.reader, shared.x, n, s.c, shared.hidden, s.hidden, k,
           [&](int row) {
             const int64_t token = first + row;
             if (!writes) return a.scratch.read_logits + token * k;
             return a.scratch.write_logits + (token + token / s.memory * s.read) * k;
           });
    });
  }

  MIRASOL_HOST_DEVICE Carried carried(const State& state, int b, int k) const {
    const int64_t at = (int64_t(b) * s.steps + step) * k;
    return {state.max + at, state.sum + at, state.pooled + at * s.c};
  }

  // A slice of the tokens before the blocks.
  MIRASOL_HOST_DEVICE void read() const {
    if (width == 0) return;
    const Call& call = a.f.call;
    for (int b = 0; b < s.batch; ++b) {
      const float* const now = held(step, b);
      spread(crew, s.memory * width, [&](int i) {
        const int slot = i / width, j = i % width;
        const int64_t at = int64_t(slot) * s.c + channel + j;
        const float value = now[slot * shared.width + j];
        shared.placed[i] = value + (call.read_table ? constant(call.read_table + at) : 0);
        if (a.f.kept) a.f.kept[(int64_t(b) * s.steps + step) * s.memory * s.c + at] = value;
      });
      const float* const logits = a.scratch.read_logits + int64_t(b) * s.memory * s.read;
      pool(crew, carried(call.for_read, b, s.read), [&](int token) { return logits + token * s.read; }, s.memory,
           s.read, shared.placed, s.c, channel, width, shared.weights, shared.parts, shared.three,
           [&](int token, int j, float value) {
             const int64_t at = int64_t(token) * s.c + channel + j;
             const float add = call.process_table ? constant(call.process_table + at) : 0;
             a.scratch.x[int64_t(b) * s.read * s.c + at] = value + add;
           });
    }
  }

  // Matrix `which` of the four of a layer: to queries, keys and values; out of attention; into the MLP; out of it.
  MIRASOL_HOST_DEVICE void product(const Block& p, int which) const {
    const bool three = which == 0, inner = which == 2, add = which % 2;
    const Norm& norm = three ? p.norm1 : p.norm2;
    const Linear &one = three ? p.q : inner ? p.hidden : which == 1 ? p.out : p.shrink;
    const float* const from = which == 1 ? a.scratch.attended : which == 3 ? a.scratch.inner : a.scratch.x;
    float* const to = three ? a.scratch.qkv : inner ? a.scratch.inner : a.scratch.x;
    const int k = which == 3 ? s.mlp : s.c, each = inner ? s.mlp : s.c, outs = three ? 3 * s.c : each;
    outputs(outs, [&](int row, int n, int first, int end) {
      fetch(from, row, n, k);
      if (!add) normalise(crew, shared.sums, shared.x, n, k, norm);
      const auto of = [&](int out) -> const Linear& { return out < each ? one : out < 2 * each ? p.k : p.v; };
      times(crew, shared.sums, shared.x, n, k, first, end,
            [&](int out) { return of(out).weight + int64_t(out % each) * k; },
            [&](int r, int out, float sum) {
              sum += constant(of(out).bias + out % each);
              float& y = to[int64_t(row + r) * outs + out];  // read and written by this thread alone
              y = add ? y + sum : inner ? gelu(sum) : sum;
            });
    });
  }

  MIRASOL_HOST_DEVICE void attend() const {
    const int d = s.dim(), stride = d + 1, tiles = pieces(s.read, ROWS);  // a bank apart from row to row
    const float scale = 1 / sqrtf(float(d));
    for (int item = crew.number; item < s.batch * s.heads * tiles; item += crew.count) {
      const int row = item % tiles * ROWS, head = item / tiles % s.heads, b = item / tiles / s.heads;
      const int n = least(ROWS, s.read - row);
      const float* const from = a.scratch.qkv + int64_t(b) * s.read * 3 * s.c + head * d;
      spread(crew, s.read * d, [&](int i) {
        const int token = i / d, j = i % d;
        const float* const at = from + int64_t(token) * 3 * s.c + j;
        if (token >= row && token < row + n) shared.q[(token - row) * stride + j] = at[0];
        shared.k[token * stride + j] = at[s.c], shared.v[token * stride + j] = at[2 * s.c];
      });
      spread(crew, n * s.read, [&](int i) {
        const float *const q = shared.q + i / s.read * stride, *const k = shared.k + i % s.read * stride;
        float sum = 0;
        for (int j = 0; j < d; ++j) sum += q[j] * k[j];
        shared.scores[i] = sum * scale;
      });
      spread(crew, n, [&](int i) {
        float *const score = shared.scores + i * s.read, highest = -INFINITY, total = 0;
        for (int j = 0; j < s.read; ++j) highest = fmaxf(highest, score[j]);
        for (int j = 0; j < s.read; ++j) total += score[j] = expf(score[j] - highest);
        for (int j = 0; j < s.read; ++j) score[j] /= total;
      });
      spread(crew, n * d, [&](int i) {
        const float* const score = shared.scores + i / d * s.read;
        float sum = 0;
        for (int j = 0; j < s.read; ++j) sum += score[j] * shared.v[j * stride + i % d];
        a.scratch.attended[(int64_t(b) * s.read + row + i / d) * s.c + head * d + i % d] = sum;
      });
    }
  }

  // The output, and its logits for writing.
  MIRASOL_HOST_DEVICE void look_at_output() const {
    const Call& call = a.f.call;
    groups(s.batch * s.read, 1, [&](int first, int n, int) {
      fetch(a.scratch.x, first, n, s.c);
      normalise(crew, shared.sums, shared.x, n, s.c, call.norm);
      spread_rows(crew, n, s.c, shared.x, [&](int row, int i) {
        const int64_t b = (first + row) / s.read, token = (first + row) % s.read;
        const float y = shared.x[row * s.c + i];
        a.f.outputs[((b * s.steps + step) * s.read + token) * s.c + i] = y;
        return call.output_table ? y + constant(call.output_table + token * s.c + i) : y;
      });
      look(crew, shared.sums, call.writer, shared.x, n, s.c, shared.hidden, s.hidden, s.memory, [&](int row) {
        const int b = (first + row) / s.read, token = s.memory + (first + row) % s.read;
        return a.scratch.write_logits + (int64_t(b) * s.tokens() + token) * s.memory;
      });
    });
  }

  // A slice of the next memory.
  MIRASOL_HOST_DEVICE void write() const {
    if (width == 0) return;
    const Call& call = a.f.call;
    for (int b = 0; b < s.batch; ++b) {
      const float* const now = held(step, b);
      float* const next = held(step + 1, b);
      const float* const output = a.f.outputs + (int64_t(b) * s.steps + step) * s.read * s.c;
      spread(crew, s.tokens() * width, [&](int i) {
        const int token = i / width, j = i % width, out = token - s.memory;
        const float* const table = out < 0 ? call.write_table : call.output_table;
        const int64_t at = int64_t(out < 0 ? token : out) * s.c + channel + j;
        const float value = out < 0 ? now[token * shared.width + j] : output[at];
        shared.placed[i] = value + (table ? constant(table + at) : 0);
      });
      const float* const logits = a.scratch.write_logits + int64_t(b) * s.tokens() * s.memory;
      pool(crew, carried(call.for_write, b, s.memory), [&](int token) { return logits + token * s.memory; }, s.tokens(),
           s.memory, shared.placed, s.c, channel, width, shared.weights, shared.parts, shared.three,
           [&](int slot, int j, float value) {
             next[slot * shared.width + j] = value;
             a.f.last[(int64_t(b) * s.memory + slot) * s.c + channel + j] = value;
           });
    }
  }
};

// All steps.  grid.phase(f) calls f(crew) with every crew and returns when all are done.
template <class Grid>
MIRASOL_HOST_DEVICE void run_steps(Grid& grid, const Arguments& a) {
  for (int step = 0; step < a.s.steps; ++step) {
    const auto phase = [&](auto work) {
      grid.phase([&](auto& crew) { work(Phase<std::remove_reference_t<decltype(crew)>>{crew, a, step}); });
    };
    phase([&](const auto& p) {
      if (step == 0) p.begin();
      p.look_at_memory();
    });
    phase([](const auto& p) { p.read(); });
    for (int i = 0; i < a.s.layers; ++i) {
      const Block& block = a.layers[i];
      MIRASOL_ROLLED
      for (int which = 0; which < 4; ++which) {  // one piece of code for all four
        phase([&](const auto& p) { p.product(block, which); });
        if (which == 0) phase([](const auto& p) { p.attend(); });
      }
    }
    phase([](const auto& p) { p.look_at_output(); });
    phase([](const auto& p) { p.write(); });
  }
}

}  // namespace mirasol::cuda
