#pragma once
// Problems for test.cpp and test_device.h, and what is right for them: a step as it is written, in any arithmetic.
#include <cmath>
#include "common/testing.h"
#include "latent_recurrence/kernel.h"

namespace mirasol::latent_recurrence {

using namespace testing;

struct Problem {
  int64_t batch, steps, memory, read, c, hidden, mlp, heads, layers;
  bool tables;
};

// Everything a call reads, in one list: start, 3 of read, 3 of write, weights as in op.py, 4 tables (may be empty).
using Arrays = vector<vector<double>>;

inline vector<int64_t> lengths(const Problem& s) {
  const int64_t T = s.batch * s.steps, c = s.c, mem = s.memory, r = s.read;
  vector<int64_t> n{s.batch * mem * c, T * r, T * r, T * r * c, T * mem, T * mem, T * mem * c};
  for (int64_t k : {r, mem}) n.insert(n.end(), {c, c, s.hidden * c, s.hidden, k * s.hidden, k});
  for (int64_t i = 0; i < s.layers; ++i) {
    n.insert(n.end(), {c, c});
    for (int j = 0; j < 4; ++j) n.insert(n.end(), {c * c, c});
    n.insert(n.end(), {c, c, s.mlp * c, s.mlp, c * s.mlp, c});
  }
  n.insert(n.end(), {c, c});
  for (int64_t k : {mem, mem, r, r}) n.push_back(s.tables ? k * c : 0);
  return n;
}

inline Arrays drawn(const Problem& s) {
  std::normal_distribution<float> normal;
  Arrays all;
  const vector<int64_t> sizes = lengths(s);
  for (size_t i = 0; i < sizes.size(); ++i) {
    vector<double> x(sizes[i]);
    const bool weight = i >= 7 && i + 4 < sizes.size();
    for (double& v : x) v = float(normal(generator) * (weight && sizes[i] > s.c ? 0.3 : 0.7));
    if (i == 2 || i == 5)
      for (double& v : x) v = float(std::abs(v) + 0.5);
    all.push_back(x);
  }
  // A state of no tokens at all.
  all[1][0] = -INFINITY, all[2][0] = 0;
  std::fill(all[3].begin(), all[3].begin() + s.c, 0);
  return all;
}

template <class T>
vector<T> layer_norm(const vector<T>& x, int64_t c, const double* weight, const double* bias) {
  vector<T> y(x.size());
  for (size_t row = 0; row < x.size(); row += c) {
    T mean = 0, variance = 0;
    for (int64_t i = 0; i < c; ++i) mean += x[row + i] / T(c);
    for (int64_t i = 0; i < c; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean) / T(c);
    for (int64_t i = 0; i < c; ++i)
      y[row + i] = (x[row + i] - mean) / std::sqrt(variance + T(1e-6)) * T(weight[i]) + T(bias[i]);
  }
  return y;
}

// Sums begin at channel `turn`: one order alone may be lucky.
template <class T>
vector<T> linear(const vector<T>& x, int64_t in, const vector<double>& weight, const vector<double>& bias,
                 int64_t turn) {
  const int64_t out = bias.size(), rows = x.size() / in, first = turn % in;
  vector<T> y(rows * out);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o) {
      T sum = T(bias[o]);
      const T* const from = &x[r * in];
      const double* const by = &weight[o * in];
      for (int64_t i = first; i < in; ++i) sum += from[i] * T(by[i]);
      for (int64_t i = 0; i < first; ++i) sum += from[i] * T(by[i]);
      y[r * out + o] = sum;
    }
  return y;
}

template <class T>
vector<T> gelu(vector<T> x) {
  for (T& v : x) v = v * T(0.5) * (1 + std::tanh(T(0.7978845608028654) * (v + T(0.044715) * v * v * v)));
  return x;
}

template <class T>
struct Machine {
  const Problem& s;
  const Arrays& a;
  int64_t turn = 0;

  vector<T> plus(vector<T> x, const vector<double>& table) const {
    for (size_t i = 0; i < table.size(); ++i) x[i] += T(table[i]);
    return x;
  }

  // Pools tokens (n, c) with the weights from a[first] on and the state from a[state] on, of that row and step.
  vector<T> pool(const vector<T>& x, size_t first, size_t state, int64_t at) const {
    const int64_t c = s.c, n = x.size() / c, k = a[first + 5].size();
    const vector<T> normal = layer_norm(x, c, a[first].data(), a[first + 1].data());
    const vector<T> logits = linear(gelu(linear(normal, c, a[first + 2], a[first + 3], turn)), s.hidden, a[first + 4],
                                    a[first + 5], turn);
    vector<T> out(k * c);
    for (int64_t j = 0; j < k; ++j) {
      T top = T(a[state][at * k + j]);
      for (int64_t i = 0; i < n; ++i) top = std::max(top, logits[i * k + j]);
      const T carry = std::exp(T(a[state][at * k + j]) - top);
      T total = carry * T(a[state + 1][at * k + j]);
      for (int64_t e = 0; e < c; ++e) out[j * c + e] = carry * T(a[state + 2][(at * k + j) * c + e]);
      for (int64_t i = 0; i < n; ++i) {
        const T weight = std::exp(logits[i * k + j] - top);
        total += weight;
        for (int64_t e = 0; e < c; ++e) out[j * c + e] += weight * x[i * c + e];
      }
      for (int64_t e = 0; e < c; ++e) out[j * c + e] /= total;
    }
    return out;
  }

  vector<T> attention(const vector<T>& x, size_t w) const {
    const int64_t c = s.c, r = s.read, d = c / s.heads;
    const vector<T> q = linear(x, c, a[w], a[w + 1], turn), k = linear(x, c, a[w + 2], a[w + 3], turn);
    const vector<T> v = linear(x, c, a[w + 4], a[w + 5], turn);
    vector<T> out(r * c);
    for (int64_t h = 0; h < c; h += d)
      for (int64_t i = 0; i < r; ++i) {
        vector<T> p(r);
        T top = -INFINITY, total = 0;
        for (int64_t j = 0; j < r; ++j) {
          for (int64_t e = h; e < h + d; ++e) p[j] += q[i * c + e] * k[j * c + e];
          top = std::max(top, p[j] /= std::sqrt(T(d)));
        }
        for (T& weight : p) total += weight = std::exp(weight - top);
        for (int64_t j = 0; j < r; ++j)
          for (int64_t e = h; e < h + d; ++e) out[i * c + e] += p[j] / total * v[j * c + e];
      }
    return linear(out, c, a[w + 6], a[w + 7], turn);
  }

  // (last memory, outputs), one after the other; `kept`, if wanted, becomes the memory before each step.
  vector<T> run(vector<T>* kept = nullptr) const {
    const int64_t c = s.c, size = s.memory * c, out = s.read * c;
    vector<T> all(s.batch * (size + s.steps * out));
    const size_t tables = a.size() - 4, norm = tables - 2;
    const auto sum = [](vector<T> x, const vector<T>& y) {
      for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
      return x;
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      vector<T> memory(a[0].begin() + b * size, a[0].begin() + (b + 1) * size);
      for (int64_t t = 0; t < s.steps; ++t) {
        if (kept) kept->insert(kept->end(), memory.begin(), memory.end());
        vector<T> x = plus(pool(plus(memory, a[tables]), 7, 1, b * s.steps + t), a[tables + 3]);
        for (size_t w = 19; w < norm; w += 16) {
          x = sum(x, attention(layer_norm(x, c, a[w].data(), a[w + 1].data()), w + 2));
          const vector<T> normal = layer_norm(x, c, a[w + 10].data(), a[w + 11].data());
          const vector<T> inner = gelu(linear(normal, c, a[w + 12], a[w + 13], turn));
          x = sum(x, linear(inner, s.mlp, a[w + 14], a[w + 15], turn));
        }
        const vector<T> y = layer_norm(x, c, a[norm].data(), a[norm + 1].data());
        std::copy(y.begin(), y.end(), all.begin() + s.batch * size + (b * s.steps + t) * out);
        vector<T> seen = plus(memory, a[tables + 1]);
        const vector<T> last = plus(y, a[tables + 2]);
        seen.insert(seen.end(), last.begin(), last.end());
        memory = pool(seen, 13, 4, b * s.steps + t);
      }
      std::copy(memory.begin(), memory.end(), all.begin() + b * size);
    }
    return all;
  }
};

using Floats = vector<vector<float>>;

inline Floats floats_of(const Arrays& a) {
  Floats all;
  for (const vector<double>& x : a) all.emplace_back(x.begin(), x.end());
  return all;
}

template <class T, class List>
PoolOf<T> pool_at(List& a, size_t i) {
  return {{a[i].data(), a[i + 1].data()}, {a[i + 2].data(), a[i + 3].data()}, {a[i + 4].data(), a[i + 5].data()}};
}

template <class T, class List>
vector<BlockOf<T>> blocks_at(List& a, const Problem& s) {
  vector<BlockOf<T>> blocks;
  for (int64_t i = 0; i < s.layers; ++i) {
    const auto at = [&](int j) { return a[19 + 16 * i + j].data(); };
    blocks.push_back({{at(0), at(1)}, {at(2), at(3)}, {at(4), at(5)}, {at(6), at(7)}, {at(8), at(9)},
                      {at(10), at(11)}, {at(12), at(13)}, {at(14), at(15)}});
  }
  return blocks;
}

inline Call call_of(const Problem& s, const Floats& a, const vector<Block>& blocks) {
  const size_t tables = a.size() - 4;
  const auto table = [&](size_t i) { return s.tables ? a[tables + i].data() : nullptr; };
  return {s.batch, s.steps, s.memory, s.read, s.c, s.hidden, s.mlp, s.heads, s.layers, a[0].data(),
          {a[1].data(), a[2].data(), a[3].data()}, {a[4].data(), a[5].data(), a[6].data()},
          pool_at<const float>(a, 7), pool_at<const float>(a, 13), blocks.data(),
          {a[tables - 2].data(), a[tables - 1].data()}, table(0), table(1), table(2), table(3)};
}

}  // namespace mirasol::latent_recurrence
