#pragma once
// What the threads of one block of the GPU do together, between two meetings of the grid.  A `Crew` is such a block:
//   number, count    which it is, of how many
//   threads          a multiple of LANES
//   shared           its shared memory
//   each(f)          f(thread) for every thread, in any order; returns when all are done
// Threads have nothing of their own from one each() to the next: what they hand on is in shared memory.  So the host
// can be a crew, and every index and every meeting but the hardware's own barriers is tested there (test_device.h).
#include <cmath>
#include <cstdint>
#include "common/host_device.h"
#include "latent_recurrence/kernel.h"

namespace mirasol::cuda {

using latent_recurrence::Block;
using latent_recurrence::Linear;
using latent_recurrence::Norm;
using latent_recurrence::Pool;

constexpr int ROWS = 8;     // that share a number of a matrix while it is in a register
constexpr int LANES = 32;   // that share a sum over channels, next to each other
constexpr int PAIRS = 128;  // sums of LANES parts that fit in shared memory at a time
constexpr int COLUMNS = 64;  // tokens that are pooled at a time
constexpr int DEPTH = 16;   // numbers of a matrix that a thread asks for before it waits for one,
constexpr int SHALLOW = 4;  // and where there are less
constexpr float EPS = 1e-6f;

MIRASOL_HOST_DEVICE inline int least(int a, int b) { return a < b ? a : b; }
MIRASOL_HOST_DEVICE inline int most(int a, int b) { return a < b ? b : a; }
MIRASOL_HOST_DEVICE inline int pieces(int n, int size) { return (n + size - 1) / size; }

// Of what nobody writes while the kernel runs: it may come through the read-only cache.
MIRASOL_HOST_DEVICE inline float constant(const float* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

// f(i) for every i < n, each on some thread.
template <class Crew, class F>
MIRASOL_HOST_DEVICE void spread(Crew& crew, int n, F f) {
  crew.each([&](int thread) {
    MIRASOL_ROLLED
    for (int i = thread; i < n; i += crew.threads) f(i);
  });
}

// x (n, k) = value(row, column), n up to ROWS: a thread has a column, and asks for all of it before it waits for any.
template <class Crew, class Value>
MIRASOL_HOST_DEVICE void spread_rows(Crew& crew, int n, int k, float* x, Value value) {
  spread(crew, k, [&](int column) {
    float values[ROWS];
    for (int row = 0; row < ROWS; ++row) values[row] = value(least(row, n - 1), column);
    for (int row = 0; row < ROWS; ++row)
      if (row < n) x[row * k + column] = values[row];
  });
}

// z / (1 + e^(-2 u)) with u = sqrt(2 / pi) (z + 0.044715 z^3), which is z (1 + tanh u) / 2.
MIRASOL_HOST_DEVICE inline float gelu(float z) {
  return z / (1 + expf(-2 * 0.797884561f * z * (1 + 0.044715f * z * z)));
}

// Where a sum over channels has its parts: (PAIRS, LANES + 1), a bank apart from pair to pair, and then whole (PAIRS).
constexpr int SUMS = PAIRS * (LANES + 2);
struct Sums {
  float* part;
  MIRASOL_HOST_DEVICE float& lane(int pair, int lane) const { return part[pair * (LANES + 1) + lane]; }
  MIRASOL_HOST_DEVICE float& whole(int pair) const { return part[PAIRS * (LANES + 1) + pair]; }
  MIRASOL_HOST_DEVICE float over_lanes(int pair) const {
    float total[4] = {};
    for (int i = 0; i < LANES; i += 4)
      for (int j = 0; j < 4; ++j) total[j] += lane(pair, i + j);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
};

// total[row] += sum over the next N numbers of a row of a matrix, `stride` apart, times those of x (n, k).
template <int N>
MIRASOL_HOST_DEVICE void times_some(float (&total)[ROWS], const float* w, const float* x, int n, int k, int stride) {
  float some[N];
  for (int i = 0; i < N; ++i) some[i] = constant(w + i * stride);
  for (int row = 0; row < ROWS; ++row)
    if (row < n)
      for (int i = 0; i < N; ++i) total[row] += some[i] * x[row * k + i * stride];
}

// x (n, k) in shared memory, n up to ROWS, by the rows of a matrix at weight(out), first <= out < end, k numbers each;
// the sums go to done(row, out, sum).  LANES threads share an output, or a `splits`-th of one where outputs are few.
template <class Crew, class Weight, class Done>
MIRASOL_HOST_DEVICE void times(Crew& crew, Sums sums, const float* x, int n, int k, int first, int end, Weight weight,
                               Done done) {
  const int groups = crew.threads / LANES;
  int splits = 1;
  while (2 * splits * (end - first) <= groups && 2 * splits * LANES <= k && 2 * splits * ROWS <= PAIRS) splits *= 2;
  const int some = PAIRS / (n * splits);  // outputs at a time
  for (; first < end; first += some) {
    const int outs = least(some, end - first), stride = splits * LANES;
    crew.each([&](int thread) {
      const int lane = thread % LANES;
      MIRASOL_ROLLED
      for (int unit = thread / LANES; unit < outs * splits; unit += groups) {
        const float* const w = weight(first + unit / splits);
        float total[ROWS] = {};
        int i = unit % splits * LANES + lane;
        MIRASOL_ROLLED
        for (; i + (DEPTH - 1) * stride < k; i += DEPTH * stride) times_some<DEPTH>(total, w + i, x + i, n, k, stride);
        MIRASOL_ROLLED
        for (; i + (SHALLOW - 1) * stride < k; i += SHALLOW * stride)
          times_some<SHALLOW>(total, w + i, x + i, n, k, stride);
        MIRASOL_ROLLED
        for (; i < k; i += stride) times_some<1>(total, w + i, x + i, n, k, stride);
        for (int row = 0; row < ROWS; ++row)
          if (row < n) sums.lane(unit * n + row, lane) = total[row];
      }
    });
    spread(crew, outs * splits * n, [&](int i) { sums.whole(i) = sums.over_lanes(i); });
    spread(crew, outs * n, [&](int i) {
      const int row = i % n, out = i / n;
      float total = 0;
      MIRASOL_ROLLED
      for (int split = 0; split < splits; ++split) total += sums.whole((out * splits + split) * n + row);
      done(row, first + out, total);
    });
  }
}

// x (n, c) in shared memory becomes LayerNorm of its rows.  The mean first: E[x^2] - mean^2 would cancel.
template <class Crew>
MIRASOL_HOST_DEVICE void normalise(Crew& crew, Sums sums, float* x, int n, int c, const Norm& norm) {
  const int groups = crew.threads / LANES;
  MIRASOL_ROLLED
  for (int squares = 0; squares < 2; ++squares) {
    crew.each([&](int thread) {
      const int lane = thread % LANES;
      MIRASOL_ROLLED
      for (int row = thread / LANES; row < n; row += groups) {
        const float centre = squares ? sums.whole(row) : 0;
        float total = 0;
        for (int i = lane; i < c; i += LANES) {
          const float away = x[row * c + i] - centre;
          total += squares ? away * away : away;
        }
        sums.lane(row, lane) = total;
      }
    });
    spread(crew, n, [&](int row) {
      const float average = sums.over_lanes(row) / c;
      sums.whole(squares * ROWS + row) = squares ? 1 / sqrtf(average + EPS) : average;
    });
  }
  spread(crew, c, [&](int i) {
    const float weight = constant(norm.weight + i), bias = constant(norm.bias + i);
    for (int row = 0; row < ROWS; ++row)
      if (row < n) {
        const float normal = (x[row * c + i] - sums.whole(row)) * sums.whole(ROWS + row);
        x[row * c + i] = normal * weight + bias;
      }
  });
}

// Tokens x (n, c) in shared memory, which are overwritten, to their k logits: token row's at logits(row).
template <class Crew, class Logits>
MIRASOL_HOST_DEVICE void look(Crew& crew, Sums sums, const Pool& p, float* x, int n, int c, float* hidden, int h, int k,
                              Logits logits) {
  normalise(crew, sums, x, n, c, p.norm);
  MIRASOL_ROLLED
  for (int last = 0; last < 2; ++last) {  // one piece of code for both matrices
    const Linear& m = last ? p.out : p.hidden;
    const int in = last ? h : c;
    times(crew, sums, last ? hidden : x, n, in, 0, last ? k : h, [&](int out) { return m.weight + int64_t(out) * in; },
          [&](int row, int out, float sum) {
            sum += constant(m.bias + out);
            if (last) logits(row)[out] = sum;
            else hidden[row * h + out] = gelu(sum);
          });
  }
}

// A softmax state that is merged with that of the tokens: max (k), sum (k), weighted sum (k, c).
struct Carried {
  const float *max, *sum, *pooled;
};

// Pools `tokens` tokens x (tokens, width) in shared memory, a slice of their channels that begins at `channel`, by the
// softmax over tokens of their k logits, at logits(token): done(i, j, value) for channel j of the slice of pooled token
// i.  Shared memory: weights (tokens, up to COLUMNS), parts (threads), three (3, COLUMNS).
template <class Crew, class Logits, class Done>
MIRASOL_HOST_DEVICE void pool(Crew& crew, const Carried& carried, Logits logits, int tokens, int k, const float* x,
                              int c, int channel, int width, float* weights, float* parts, float* three, Done done) {
  float *const top = three, *const carry = three + COLUMNS, *const total = three + 2 * COLUMNS;
  for (int first = 0; first < k; first += COLUMNS) {
    const int n = least(COLUMNS, k - first), shares = most(1, crew.threads / n);
    spread(crew, shares * n, [&](int i) {
      const int column = i % n;
      float highest = -INFINITY;
      MIRASOL_ROLLED
      for (int token = i / n; token < tokens; token += ROWS * shares) {
        float some[ROWS];
        for (int j = 0; j < ROWS; ++j) some[j] = logits(least(token + j * shares, tokens - 1))[first + column];
        for (int j = 0; j < ROWS; ++j) {
          if (token + j * shares < tokens) weights[(token + j * shares) * n + column] = some[j];
          highest = fmaxf(highest, some[j]);
        }
      }
      parts[i] = highest;
    });
    spread(crew, n, [&](int i) {
      const float before = constant(carried.max + first + i);
      float highest = before;
      for (int j = 0; j < shares; ++j) highest = fmaxf(highest, parts[j * n + i]);
      top[i] = highest == -INFINITY ? 0 : highest;  // of nothing at all
      carry[i] = expf(before - top[i]);
    });
    spread(crew, shares * n, [&](int i) {
      const int column = i % n;
      float sum = 0;
      for (int token = i / n; token < tokens; token += shares)
        sum += weights[token * n + column] = expf(weights[token * n + column] - top[column]);
      parts[i] = sum;
    });
    spread(crew, n, [&](int i) {
      float sum = carry[i] * constant(carried.sum + first + i);
      for (int j = 0; j < shares; ++j) sum += parts[j * n + i];
      total[i] = sum == 0 ? 1 : sum;
    });
    spread(crew, n * width, [&](int i) {
      const int column = i / width, j = i % width;
      float sum = carry[column] * constant(carried.pooled + int64_t(first + column) * c + channel + j);
      for (int token = 0; token < tokens; ++token) sum += weights[token * n + column] * x[token * width + j];
      done(first + column, j, sum / total[column]);
    });
  }
}

}  // namespace mirasol::cuda
