#pragma once
// The body of the CUDA kernel on the host: every thread of every block in turn, phase after phase, with the strides and
// indices that the GPU has, against the definition in double.  Threads and blocks also run in other orders: where a
// meeting is missing, or two threads write one number, the results differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include "common/testing.h"
#include "latent_recurrence/plan.h"

namespace mirasol::testing {

using namespace latent_recurrence;

struct DeviceProblem {
  std::string name;
  int64_t batch, steps, memory, read, c, hidden, mlp, heads, layers;
  int blocks, threads;
  bool tables = true;
  float sharp = 1;       // factor of logits
  double empty = 0;      // share of the input's states that are of nothing
};

inline Call sized(int64_t batch, int64_t steps, int64_t memory, int64_t read, int64_t c, int64_t hidden, int64_t mlp,
                  int64_t heads, int64_t layers) {
  Call s{};
  s.batch = batch, s.steps = steps, s.memory = memory, s.read = read, s.c = c;
  s.hidden = hidden, s.mlp = mlp, s.heads = heads, s.layers = layers;
  return s;
}

// A call and everything that it points to.
struct DeviceInputs {
  vector<vector<float>> owned;
  vector<Block> blocks;
  Call call;

  float* make(int64_t n, float spread, float centre = 0) {
    std::normal_distribution<float> normal(centre, spread);
    vector<float> x(n);
    for (float& one : x) one = normal(generator);
    owned.push_back(std::move(x));
    return owned.back().data();
  }
  Linear linear(int64_t out, int64_t in, float scale = 1) {
    return {make(out * in, scale / std::sqrt(float(in))), make(out, 0.2f)};
  }
  Norm norm() { return {make(call.c, 0.2f, 1), make(call.c, 0.2f)}; }
  Pool pool(int64_t k, float sharp) {
    const Norm first = norm();
    const Linear hidden = linear(call.hidden, call.c, 2);
    return {first, hidden, linear(k, call.hidden, sharp)};
  }
  State state(int64_t k, double empty) {
    const int64_t n = call.batch * call.steps * k;
    float *const max = make(n, 1), *const sum = make(n, 1), *const pooled = make(n * call.c, 1);
    for (int64_t i = 0; i < n; ++i) {
      const bool none = std::bernoulli_distribution(empty)(generator);
      max[i] = none ? -INFINITY : max[i];
      sum[i] = none ? 0 : 1 + 3 * std::abs(sum[i]);
      for (int64_t j = 0; j < call.c; ++j) pooled[i * call.c + j] *= sum[i];
    }
    return {max, sum, pooled};
  }
  explicit DeviceInputs(const DeviceProblem& p)
      : call(sized(p.batch, p.steps, p.memory, p.read, p.c, p.hidden, p.mlp, p.heads, p.layers)) {
    call.start = make(p.batch * p.memory * p.c, 1);
    call.for_read = state(p.read, p.empty), call.for_write = state(p.memory, p.empty);
    call.reader = pool(p.read, p.sharp), call.writer = pool(p.memory, p.sharp);
    for (int64_t i = 0; i < p.layers; ++i) {
      Block b;
      b.norm1 = norm();
      for (Linear* l : {&b.q, &b.k, &b.v, &b.out}) *l = linear(p.c, p.c);
      b.norm2 = norm(), b.hidden = linear(p.mlp, p.c), b.shrink = linear(p.c, p.mlp);
      blocks.push_back(b);
    }
    call.blocks = blocks.data();
    call.norm = norm();
    if (!p.tables) return;
    call.read_table = make(p.memory * p.c, 0.5f), call.write_table = make(p.memory * p.c, 0.5f);
    call.output_table = make(p.read * p.c, 0.5f), call.process_table = make(p.read * p.c, 0.5f);
  }
};

template <class T>
struct DeviceResults {
  vector<T> last, outputs, kept;
  vector<T>* all[3] = {&last, &outputs, &kept};
  DeviceResults() = default;
  DeviceResults(const DeviceResults& o) : last(o.last), outputs(o.outputs), kept(o.kept) {}
};

// By the book, one row of the batch after the other.  Sums over channels begin at channel `turn`.
template <class T>
struct Definition {
  using Rows = vector<vector<T>>;
  const Call& s;
  int64_t turn;

  template <class Term>
  T sum(int64_t n, Term term) const {
    T total = 0;
    for (int64_t i = 0; i < n; ++i) total += term((i + turn) % n);
    return total;
  }
  Rows norm(Rows x, const Norm& p) const {
    for (vector<T>& row : x) {
      const T mean = sum(s.c, [&](int64_t i) { return row[i]; }) / T(s.c);
      const T variance = sum(s.c, [&](int64_t i) { return (row[i] - mean) * (row[i] - mean); }) / T(s.c);
      const T inverse = 1 / std::sqrt(variance + T(1e-6));
      for (int64_t i = 0; i < s.c; ++i) row[i] = (row[i] - mean) * inverse * p.weight[i] + p.bias[i];
    }
    return x;
  }
  Rows linear(const Rows& x, const Linear& p, int64_t out) const {
    Rows y;
    for (const vector<T>& row : x) {
      y.emplace_back(out);
      const int64_t n = int64_t(row.size());
      for (int64_t o = 0; o < out; ++o)
        y.back()[o] = sum(n, [&](int64_t i) { return row[i] * T(p.weight[o * n + i]); }) + p.bias[o];
    }
    return y;
  }
  static Rows gelu(Rows x) {
    for (vector<T>& row : x)
      for (T& z : row) z = z * (1 + std::tanh(std::sqrt(T(2 / M_PI)) * (z + T(0.044715) * z * z * z))) / 2;
    return x;
  }
  static Rows plus(Rows x, const Rows& y) {
    for (size_t r = 0; r < x.size(); ++r)
      for (size_t i = 0; i < x[r].size(); ++i) x[r][i] += y[r][i];
    return x;
  }
  Rows placed(Rows x, const float* table) const {
    for (size_t r = 0; table && r < x.size(); ++r)
      for (int64_t i = 0; i < s.c; ++i) x[r][i] += table[r * s.c + i];
    return x;
  }
  // The value of the state of tokens x merged with that of the input.
  Rows pool(const Rows& x, const Pool& p, int64_t k, const State& state, int64_t at) const {
    const Rows logits = linear(gelu(linear(norm(x, p.norm), p.hidden, s.hidden)), p.out, k);
    Rows value;
    for (int64_t j = 0; j < k; ++j) {
      T top = state.max[at + j];
      for (const vector<T>& row : logits) top = std::max(top, row[j]);
      const T carry = std::exp(state.max[at + j] - top);
      T total = carry * state.sum[at + j];
      vector<T> pooled(s.c);
      for (int64_t i = 0; i < s.c; ++i) pooled[i] = carry * state.pooled[(at + j) * s.c + i];
      for (size_t r = 0; r < x.size(); ++r) {
        const T weight = std::exp(logits[r][j] - top);
        total += weight;
        for (int64_t i = 0; i < s.c; ++i) pooled[i] += weight * x[r][i];
      }
      for (T& one : pooled) one /= total;
      value.push_back(pooled);
    }
    return value;
  }
  Rows attention(const Rows& x, const Block& p) const {
    const Rows q = linear(x, p.q, s.c), k = linear(x, p.k, s.c), v = linear(x, p.v, s.c);
    const int64_t d = s.c / s.heads, n = int64_t(x.size());
    Rows y(n, vector<T>(s.c));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t from = 0; from < s.c; from += d) {
        vector<T> w(n);
        for (int64_t j = 0; j < n; ++j)
          w[j] = sum(d, [&](int64_t e) { return q[i][from + e] * k[j][from + e]; }) / std::sqrt(T(d));
        const T top = *std::max_element(w.begin(), w.end());
        T total = 0;
        for (T& one : w) total += one = std::exp(one - top);
        for (int64_t e = from; e < from + d; ++e)
          for (int64_t j = 0; j < n; ++j) y[i][e] += w[j] / total * v[j][e];
      }
    return linear(y, p.out, s.c);
  }
  DeviceResults<T> run() const {
    DeviceResults<T> to;
    const auto append = [](vector<T>& all, const Rows& x) {
      for (const vector<T>& row : x) all.insert(all.end(), row.begin(), row.end());
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      Rows memory(s.memory, vector<T>(s.c));
      for (int64_t i = 0; i < s.memory * s.c; ++i) memory[i / s.c][i % s.c] = s.start[b * s.memory * s.c + i];
      for (int64_t t = 0; t < s.steps; ++t) {
        append(to.kept, memory);
        const int64_t at = b * s.steps + t;
        Rows x = pool(placed(memory, s.read_table), s.reader, s.read, s.for_read, at * s.read);
        x = placed(x, s.process_table);
        for (int64_t i = 0; i < s.layers; ++i) {
          const Block& p = s.blocks[i];
          x = plus(x, attention(norm(x, p.norm1), p));
          x = plus(x, linear(gelu(linear(norm(x, p.norm2), p.hidden, s.mlp)), p.shrink, s.c));
        }
        const Rows y = norm(x, s.norm);
        append(to.outputs, y);
        Rows tokens = placed(memory, s.write_table);
        for (const vector<T>& row : placed(y, s.output_table)) tokens.push_back(row);
        memory = pool(tokens, s.writer, s.memory, s.for_write, at * s.memory);
      }
      append(to.last, memory);
    }
    return to;
  }
};

// Blocks of a GPU, one after the other.
struct OnHost {  // a crew
  int number, count, threads;
  float* shared;
  const vector<int>* order;
  template <class F>
  void each(F f) const {
    for (const int thread : *order) f(thread);
  }
};

struct HostGrid {
  vector<OnHost> crews;
  vector<int> order;
  int64_t persistent;  // floats of shared memory that are more than one phase's
  int64_t floats;
  template <class F>
  void phase(F f) {
    for (const int number : order) {
      std::fill(crews[number].shared + persistent, crews[number].shared + floats, NaN);
      f(crews[number]);
    }
  }
};

constexpr int64_t GUARD = 8;

inline DeviceResults<float> on_host(const DeviceProblem& p, const Call& call, bool keep, const std::string& order) {
  const int64_t slots = p.batch * p.memory * p.c, out = p.batch * p.steps * p.read * p.c;
  DeviceResults<float> r;
  r.last.assign(slots, NaN), r.outputs.assign(out, NaN), r.kept.assign(keep ? p.steps * slots : 0, NaN);
  vector<float> scratch(cuda::scratch_floats(call), NaN);
  const cuda::Arguments a = cuda::arguments_of(
      {call, r.last.data(), r.outputs.data(), keep ? r.kept.data() : nullptr}, scratch.data());
  const auto ordered = [&](int n) {
    vector<int> numbers(n);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == "descending") std::reverse(numbers.begin(), numbers.end());
    if (order == "shuffled") std::shuffle(numbers.begin(), numbers.end(), generator);
    return numbers;
  };
  const cuda::Shared shared(nullptr, a.s, p.blocks, p.threads);
  const vector<int> threads = ordered(p.threads);
  vector<vector<float>> memory(p.blocks, vector<float>(shared.floats + GUARD, NaN));
  HostGrid grid{{}, ordered(p.blocks), 2 * p.batch * p.memory * shared.width, shared.floats};
  for (int i = 0; i < p.blocks; ++i) grid.crews.push_back({i, p.blocks, p.threads, memory[i].data(), &threads});
  cuda::run_steps(grid, a);
  for (const vector<float>& one : memory)
    for (int64_t i = 0; i < GUARD; ++i)
      if (!std::isnan(one[shared.floats + i])) r.last[0] = NaN;  // somebody wrote past the end
  return r;
}

inline vector<DeviceProblem> device_problems() {
  vector<DeviceProblem> all = {
      // batch, steps, memory, read, c, hidden, mlp, heads, layers, blocks, threads
      {"small", 2, 3, 6, 4, 24, 8, 32, 4, 1, 5, 64},
      {"one block, one group of lanes", 1, 2, 3, 2, 8, 5, 7, 2, 2, 1, 32},
      {"more blocks than channels", 1, 2, 5, 3, 8, 4, 12, 2, 1, 13, 64},
      {"odd sizes, no tables", 3, 3, 5, 3, 15, 7, 9, 3, 1, 4, 96, false},
      {"one of everything", 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 32},
      {"no layers", 2, 2, 4, 3, 12, 4, 0, 1, 0, 5, 64},
      {"more read tokens than rows", 2, 2, 9, 19, 32, 8, 40, 4, 1, 7, 128},
      {"more memory than columns", 1, 2, 70, 3, 16, 8, 16, 2, 1, 6, 64},
      {"memory smaller than read", 2, 2, 2, 9, 16, 8, 16, 2, 1, 6, 64},
      {"sharp", 1, 3, 8, 4, 32, 16, 32, 4, 1, 9, 64, true, 30},
      {"empty inputs", 1, 3, 8, 4, 32, 16, 32, 4, 1, 9, 64, true, 1, 0.6},
      {"long", 1, 24, 6, 4, 32, 8, 32, 4, 1, 5, 64},
      {"two layers", 1, 2, 24, 16, 96, 16, 100, 4, 2, 20, 512},
      {"as on an H100", 1, 2, 64, 8, 512, 64, 512, 8, 1, 132, cuda::THREADS},
  };
  for (int i = 0; i < 30; ++i) {
    const int64_t heads = draw(1, 4), layers = draw(0, 2);
    all.push_back({"drawn " + std::to_string(i), draw(1, 3), draw(1, 4), draw(1, 20), draw(1, 12), heads * draw(1, 12),
                   draw(1, 20), layers ? draw(1, 70) : 0, heads, layers, int(draw(1, 24)), int(32 * draw(1, 5)),
                   draw(0, 1) == 1, float(draw(1, 4)), draw(0, 1) ? 0.0 : 0.3});
  }
  return all;
}

struct DeviceReport {
  size_t problems = 0;
  int failures = 0;
  double worst = 0;
  void expect(bool fine, const std::string& who, const std::string& what) {
    if (fine) return;
    ++failures;
    std::printf("FAILED device, %s: %s\n", who.c_str(), what.c_str());
  }
};

inline bool same_floats(const vector<float>& a, const vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// How the body does: problems, what failed, and the largest error as a share of its budget.
inline DeviceReport device_body() {
  DeviceReport report;
  for (const DeviceProblem& p : device_problems()) {
    const DeviceInputs in(p);
    DeviceResults<double> exact = Definition<double>{in.call, 0}.run();
    DeviceResults<float> got = on_host(p, in.call, true, "ascending");
    double unavoidable[3] = {};
    for (const int64_t turn : {int64_t(0), p.c / 3, 2 * p.c / 3}) {  // one order alone may be lucky
      DeviceResults<float> low = Definition<float>{in.call, turn}.run();
      for (int i = 0; i < 3; ++i)
        for (size_t j = 0; j < exact.all[i]->size(); ++j)
          unavoidable[i] = std::max(unavoidable[i], std::abs((*low.all[i])[j] - (*exact.all[i])[j]));
    }
    for (int i = 0; i < 3; ++i) {
      const vector<double> values(got.all[i]->begin(), got.all[i]->end());
      const double used = excess(values, *exact.all[i], unavoidable[i], Dtype::float32);
      static const char* const names[] = {"last memory", "outputs", "kept"};
      report.expect(used <= 1, p.name, std::string(names[i]) + ": error is " + std::to_string(used) + " of its budget");
      report.worst = std::max(report.worst, used);
    }
    for (const char* const order : {"descending", "shuffled"}) {
      DeviceResults<float> other = on_host(p, in.call, false, order);
      report.expect(same_floats(got.last, other.last) && same_floats(got.outputs, other.outputs), p.name,
                    std::string("the order of threads changes the result: ") + order);
    }
    ++report.problems;
  }
  // What it refuses: multiprocessors and bytes of shared memory of an H100 and an A100.
  const auto taken = [](const Call& call) { return !cuda::refusal(call, 132, 232448); };
  const Call usual = sized(1, 8, 64, 8, 512, 64, 512, 8, 1);
  report.expect(taken(usual) && !cuda::refusal(usual, 108, 166912), "refusal", "the usual size is refused");
  report.expect(taken(sized(8, 8, 96, 32, 768, 64, 3072, 12, 2)), "refusal", "a large size is refused");
  report.expect(!taken(sized(1, 8, 64, 8, 512, 64, 512, 8, cuda::MAX_LAYERS + 1)), "refusal", "many layers are taken");
  report.expect(!taken(sized(1, 8, 4096, 8, 512, 64, 512, 8, 1)), "refusal", "too much memory is taken");
  report.expect(!taken(sized(1 << 24, 8, 1, 1, 1, 1, 1, 1, 1)), "refusal", "too large a batch is taken");
  return report;
}

}  // namespace mirasol::testing
