// Forward and backward against the definition in float64, for the instruction set that MIRASOL_ISA forces.  Needs
// neither torch nor Python.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include "common/testing.h"
#include "token_learner/kernel.h"

using namespace mirasol::testing;
using namespace mirasol::token_learner;

namespace {

struct Problem {
  std::string name;
  vector<int64_t> tokens;  // of each source
  int64_t batch, c, h, k;
  bool tables = false, valid = false, erf = false, divide = true;
  float spread = 1;   // of logits
  float mean = 0.5f;  // of tokens
  Dtype dtype = Dtype::float32;
  Products products = Products::single;
  bool pairs() const { return products != Products::single; }
};

// Numbers with NaN before, behind and between the rows, and their memory in the dtype.
struct Tensor {
  int64_t rows, columns, row;
  vector<float> memory;
  vector<uint16_t> halves;
  Dtype dtype;

  Tensor(int64_t rows, int64_t columns, Dtype dtype, float spread = 0, float mean = 0, int64_t gap = 0)
      : rows(rows), columns(columns), row(columns + gap), memory((rows + 2) * row + 1, NaN), dtype(dtype) {
    std::normal_distribution<float> normal(mean, spread);
    if (spread > 0)
      for (int64_t i = 0; i < rows * columns; ++i) (*this)[i] = rounded(normal(generator), dtype);
    encode();
  }
  float& operator[](int64_t i) { return memory[row + i / columns * row + i % columns]; }
  float operator[](int64_t i) const { return memory[row + i / columns * row + i % columns]; }
  int64_t size() const { return rows * columns; }
  void encode() {
    halves.clear();
    if (dtype != Dtype::float32)
      for (float x : memory) halves.push_back(encoded(x, dtype));
  }
  void read_back() {
    for (size_t i = 0; i < halves.size(); ++i) memory[i] = decoded(halves[i], dtype);
  }
  void* data() {
    return dtype == Dtype::float32 ? static_cast<void*>(memory.data() + row) : static_cast<void*>(halves.data() + row);
  }
  float* floats() { return memory.data() + row; }
};

struct Inputs {
  vector<Tensor> sources, tables, weights;
  vector<int64_t> valid;  // (batch, sources)
  Tensor dpooled, dsum;
};

Inputs inputs_of(const Problem& p) {
  const Dtype d = p.dtype;
  const float c = float(p.c), h = float(p.h);
  Inputs in{{},
            {},
            {Tensor(1, p.c, d, 0.2f, 1), Tensor(1, p.c, d, 0.2f), Tensor(p.h, p.c, d, 1.5f / std::sqrt(c)),
             Tensor(1, p.h, d, 0.2f), Tensor(p.k, p.h, d, 1.5f * p.spread / std::sqrt(h)), Tensor(1, p.k, d, 0.2f)},
            {},
            Tensor(p.batch * p.k, p.c, Dtype::float32, 1),
            Tensor(p.batch, p.k, Dtype::float32, 1)};
  for (int64_t n : p.tokens) {
    in.sources.emplace_back(p.batch * n, p.c, d, 1, p.mean, draw(0, 3));
    in.tables.emplace_back(n, p.c, d, 0.5f);
  }
  for (int64_t b = 0; b < p.batch; ++b)
    for (size_t i = 0; i < p.tokens.size(); ++i) {
      const int64_t n = p.tokens[i];
      in.valid.push_back(p.valid ? draw(-1, n + 1) : n);
      for (int64_t t = std::max<int64_t>(0, in.valid.back()); t < n; ++t)  // what does not count may hold anything
        for (int64_t j = 0; j < p.c; ++j)
          in.sources[i][(b * n + t) * p.c + j] = draw(0, 1) ? NaN : std::numeric_limits<float>::infinity();
    }
  for (Tensor& x : in.sources) x.encode();
  return in;
}

// max + log(sum), which is the same for every choice of max, as the state is when seen from it; then in order: pooled,
// gradients of sources, tables and weights.
template <class Number>
using Results = vector<vector<Number>>;

template <class Number>
Number gelu(Number z, bool erf, Number* slope) {
  if (erf) {
    const Number area = std::erfc(-z * Number(std::sqrt(0.5))) / 2;
    *slope = area + z * std::exp(-z * z / 2) * Number(0.3989422804014327);
    return z * area;
  }
  const Number root = Number(0.7978845608028654), cubic = Number(0.044715);
  const Number t = std::tanh(root * (z + cubic * z * z * z));
  *slope = (1 + t) / 2 + z * (1 - t * t) * root * (1 + 3 * cubic * z * z) / 2;
  return z * (1 + t) / 2;
}

// In the arithmetic of Number; channels are summed from `first` on, then from 0.  In float, normalised tokens and
// dz are what the large products take: bfloat16 where these are in pairs.
template <class Number>
Results<Number> definition(const Problem& p, const Inputs& in, int64_t first = 0) {
  const auto& w = in.weights;
  const int64_t c = p.c, h = p.h, k = p.k;
  const auto at = [&](int64_t i) { return (first + i) % c; };
  const auto factor = [&](Number x) {
    return p.pairs() && sizeof x == sizeof(float) ? Number(rounded(float(x), Dtype::bfloat16)) : x;
  };
  vector<Number> lse, pooled;
  Results<Number> dsources, dtables, dweights;
  for (int64_t n : p.tokens) dsources.emplace_back(p.batch * n * c), dtables.emplace_back(p.tables ? n * c : 0);
  for (const Tensor& x : w) dweights.emplace_back(x.size());
  struct Token {
    int64_t source, index;
    vector<Number> x, xhat, normed, hidden, slope, s;
    Number inverse;
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    vector<Token> seen;
    for (size_t i = 0; i < p.tokens.size(); ++i)
      for (int64_t t = 0; t < std::min(p.tokens[i], in.valid[b * p.tokens.size() + i]); ++t) {
        Token y{int64_t(i), t, vector<Number>(c), vector<Number>(c), vector<Number>(c), {}, {}, {}, 0};
        Number mean = 0, variance = 0;
        for (int64_t j = 0; j < c; ++j) {
          y.x[j] = Number(in.sources[i][(b * p.tokens[i] + t) * c + j]);
          if (p.tables) y.x[j] += Number(in.tables[i][t * c + j]);
        }
        for (int64_t j = 0; j < c; ++j) mean += y.x[at(j)] / c;
        for (int64_t j = 0; j < c; ++j) variance += (y.x[at(j)] - mean) * (y.x[at(j)] - mean) / c;
        y.inverse = 1 / std::sqrt(variance + Number(1e-6f));
        for (int64_t j = 0; j < c; ++j) {
          y.xhat[j] = (y.x[j] - mean) * y.inverse;
          y.normed[j] = factor(y.xhat[j] * Number(w[0][j]) + Number(w[1][j]));
        }
        for (int64_t u = 0; u < h; ++u) {
          Number z = 0, slope;
          for (int64_t j = 0; j < c; ++j) z += Number(w[2][u * c + at(j)]) * y.normed[at(j)];
          y.hidden.push_back(gelu(z + Number(w[3][u]), p.erf, &slope)), y.slope.push_back(slope);
        }
        for (int64_t l = 0; l < k; ++l) {
          Number s = Number(w[5][l]);
          for (int64_t u = 0; u < h; ++u) s += Number(w[4][l * h + u]) * y.hidden[u];
          y.s.push_back(s);
        }
        seen.push_back(y);
      }
    vector<vector<Number>> ds(seen.size(), vector<Number>(k)), weight = ds;
    for (int64_t l = 0; l < k; ++l) {
      Number top = -std::numeric_limits<Number>::infinity(), sum = 0, dsum = 0;
      for (const Token& y : seen) top = std::max(top, y.s[l]);
      for (size_t i = 0; i < seen.size(); ++i) sum += weight[i][l] = std::exp(seen[i].s[l] - top);
      lse.push_back(top + std::log(sum));
      vector<Number> mean(c), d(c);
      for (size_t i = 0; i < seen.size(); ++i)
        for (int64_t j = 0; j < c; ++j) mean[j] += weight[i][l] / sum * seen[i].x[j];
      pooled.insert(pooled.end(), mean.begin(), mean.end());
      const Number scale = p.divide ? 1 / sum : 1;
      for (int64_t j = 0; j < c; ++j) d[j] = Number(in.dpooled[(b * k + l) * c + j]) * scale;
      if (p.divide)
        for (int64_t j = 0; j < c; ++j) dsum -= d[at(j)] * mean[at(j)];
      else dsum = Number(in.dsum[b * k + l]);
      for (size_t i = 0; i < seen.size(); ++i) {
        Number product = 0;
        for (int64_t j = 0; j < c; ++j) product += d[at(j)] * seen[i].x[at(j)];
        ds[i][l] = weight[i][l] * (dsum + product);
        Number* const to = &dsources[seen[i].source][(b * p.tokens[seen[i].source] + seen[i].index) * c];
        for (int64_t j = 0; j < c; ++j) to[j] += weight[i][l] * d[j];
      }
    }
    for (size_t i = 0; i < seen.size(); ++i) {
      const Token& y = seen[i];
      vector<Number> dxhat(c);
      for (int64_t l = 0; l < k; ++l) {
        if (!p.divide) dweights[5][l] += ds[i][l];
        for (int64_t u = 0; u < h; ++u) dweights[4][l * h + u] += ds[i][l] * y.hidden[u];
      }
      for (int64_t u = 0; u < h; ++u) {
        Number dz = 0;
        for (int64_t l = 0; l < k; ++l) dz += ds[i][l] * Number(w[4][l * h + u]);
        dz = factor(dz * y.slope[u]);
        dweights[3][u] += dz;
        for (int64_t j = 0; j < c; ++j) {
          const Number dnormed = dz * Number(w[2][u * c + j]);
          dweights[2][u * c + j] += dz * y.normed[j], dweights[1][j] += dnormed;
          dweights[0][j] += dnormed * y.xhat[j], dxhat[j] += dnormed * Number(w[0][j]);
        }
      }
      Number level = 0, along = 0;
      for (int64_t j = 0; j < c; ++j) level += dxhat[at(j)] / c, along += dxhat[at(j)] * y.xhat[at(j)] / c;
      Number* const to = &dsources[y.source][(b * p.tokens[y.source] + y.index) * c];
      for (int64_t j = 0; j < c; ++j) to[j] += (dxhat[j] - level - y.xhat[j] * along) * y.inverse;
    }
  }
  for (size_t i = 0; i < p.tokens.size(); ++i)
    for (size_t j = 0; j < dsources[i].size() && p.tables; ++j) dtables[i][j % dtables[i].size()] += dsources[i][j];
  Results<Number> all{lse, pooled};
  for (const auto& some : {dsources, dtables, dweights}) all.insert(all.end(), some.begin(), some.end());
  return all;
}

Results<double> on_cpu(const Problem& p, Inputs& in, int threads) {
  Call call{};
  call.batch = p.batch, call.c = p.c, call.h = p.h, call.k = p.k;
  vector<Source> sources;
  for (size_t i = 0; i < p.tokens.size(); ++i)
    sources.push_back({in.sources[i].data(), p.tokens[i], p.tokens[i] * in.sources[i].row, in.sources[i].row,
                       p.tables ? in.tables[i].data() : nullptr});
  call.sources = sources.data(), call.count = int64_t(sources.size());
  const auto weight = [&](int i) { return in.weights[i].data(); };
  call.weights = {weight(0), weight(1), weight(2), weight(3), weight(4), weight(5)};
  call.valid = p.valid ? in.valid.data() : nullptr;
  call.erf = p.erf, call.eps = 1e-6f, call.divide = p.divide, call.dtype = p.dtype, call.products = p.products;
  call.gradients = true;
  vector<float> prepared(MIRASOL_CALL(token_learner_prepared, call), NaN);
  call.prepared = prepared.data();
  run(threads, MIRASOL_CALL(token_learner_prepare_items, call), 0,
      [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_prepare, call, begin, end); });

  const Dtype single = Dtype::float32;
  Tensor max(p.batch, p.k, single), sum(p.batch, p.k, single), pooled(p.batch * p.k, p.c, single);
  vector<int32_t> turns(p.batch, 0);
  const Forward f{call, max.floats(), sum.floats(), pooled.floats(), turns.data()};
  run(threads, MIRASOL_CALL(token_learner_forward_items, call), MIRASOL_CALL(token_learner_forward_workspace, call),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_forward, f, space, begin, end); });

  vector<Tensor> results;
  for (int64_t n : p.tokens) results.emplace_back(p.batch * n, p.c, p.dtype);
  for (int64_t n : p.tokens) results.emplace_back(p.tables ? n : 0, p.c, p.dtype);
  for (const Tensor& w : in.weights) results.emplace_back(w.rows, w.columns, p.dtype);
  const size_t count = p.tokens.size();
  vector<void*> dsources, dtables;
  for (size_t i = 0; i < count; ++i) dsources.push_back(results[i].data());
  for (size_t i = 0; i < count; ++i) dtables.push_back(p.tables ? results[count + i].data() : nullptr);
  vector<float> totals(MIRASOL_CALL(token_learner_totals, call), 0);
  int32_t turn = 0;
  Backward g{};
  g.call = call, g.dpooled = in.dpooled.floats(), g.dsum = in.dsum.floats();
  g.max = max.floats(), g.sum = sum.floats(), g.pooled = pooled.floats();
  g.dsources = dsources.data(), g.dtables = dtables.data(), g.totals = totals.data(), g.turn = &turn;
  for (int i = 0; i < 6; ++i) g.dweights[i] = results[2 * count + i].data();
  run(threads, MIRASOL_CALL(token_learner_backward_items, call), MIRASOL_CALL(token_learner_backward_workspace, call),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_backward, g, space, begin, end); });
  run(threads, MIRASOL_CALL(token_learner_backward_rest_items, call), 0,
      [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_backward_rest, g, begin, end); });

  Results<double> all(2);
  for (int64_t i = 0; i < max.size(); ++i) all[0].push_back(max[i] + std::log(sum[i]));
  for (int64_t i = 0; i < pooled.size(); ++i) {
    const float divisor = p.divide || sum[i / p.c] == 0 ? 1 : sum[i / p.c];
    all[1].push_back(double(pooled[i]) / divisor);
  }
  for (Tensor& x : results) {
    x.read_back();
    all.emplace_back();
    for (int64_t i = 0; i < x.size(); ++i) all.back().push_back(x[i]);
  }
  return all;
}

int failures = 0;

void expect(bool fine, const Problem& p, const std::string& what) {
  if (fine) return;
  ++failures;
  std::printf("FAILED %s: %s\n", p.name.c_str(), what.c_str());
}

// -> what the largest error uses of its budget.
double judge(const Problem& p, Inputs& in, const Results<double>& got) {
  const Results<double> exact = definition<double>(p, in);
  vector<double> unavoidable(exact.size(), 0);
  const auto dtype = [&](size_t i) {  // floats, but no better than the factors that they come from
    return !p.pairs() && i < 2 ? Dtype::float32 : p.dtype;
  };
  for (int order = 0; order < 3; ++order) {  // one alone may be lucky
    const Results<float> low = definition<float>(p, in, order * p.c / 3);
    for (size_t i = 0; i < exact.size(); ++i)
      for (size_t j = 0; j < exact[i].size(); ++j)
        if (std::isfinite(exact[i][j]))
          unavoidable[i] = std::max(unavoidable[i], std::abs(rounded(low[i][j], dtype(i)) - exact[i][j]));
  }
  double worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double used = excess(got[i], exact[i], unavoidable[i], dtype(i));
    expect(used <= 1, p, "result " + std::to_string(i) + ": error is " + std::to_string(used) + " of its budget");
    worst = std::max(worst, used);
  }
  return worst;
}

double check(const Problem& p) {
  Inputs in = inputs_of(p);
  const Results<double> got = on_cpu(p, in, 1);
  const double worst = JUDGED ? judge(p, in, got) : 0;
  for (int threads : {2, 7}) {
    const Results<double> other = on_cpu(p, in, threads);
    for (size_t i = 0; i < got.size(); ++i) {
      const auto &a = got[i], &b = other[i];
      const bool same = a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
      expect(same, p, std::to_string(threads) + " threads change result " + std::to_string(i));
    }
  }
  return worst;
}

vector<Problem> problems() {
  vector<Problem> all = {
      {"small", {20}, 2, 32, 64, 8},
      {"three sources", {19, 0, 40}, 2, 48, 16, 12, true},
      {"wide", {70}, 1, 200, 24, 40, false, false, true},
      {"counts", {30, 9}, 3, 24, 8, 5, true, true},
      {"no tokens", {0}, 2, 8, 4, 3},
      {"no batch", {5}, 0, 8, 4, 3, true, true},
      {"one of everything", {1}, 1, 1, 1, 1},
      {"two parts", {60, 52}, 1, 48, 16, 12, true},
      {"parts", {1300, 40}, 1, 16, 8, 4, true},
      {"parts of which some are empty", {1300}, 2, 8, 8, 4, false, true},
      {"many rows of few tokens", {3}, 200, 8, 8, 4, true},
      {"large logits", {60}, 2, 32, 16, 8, false, false, false, true, 1e4f},
      {"large logits of parts", {600}, 1, 16, 8, 8, false, false, false, false, 300},
      {"far from zero", {60, 40}, 2, 64, 64, 8, false, false, false, true, 1, 100},
      {"far from zero, of parts", {600}, 1, 128, 16, 8, false, false, false, true, 1, 100},
  };
  const size_t named = all.size();
  for (int i = 0; i < 30; ++i) {
    // Not one or two channels, of which the norm leaves 0 or signs: gradients through it are 0, and rounding.
    Problem p{"random " + std::to_string(i), {}, draw(1, 4), draw(4, 90), draw(1, 40), draw(1, 40)};
    for (int64_t s = draw(1, 3); s > 0; --s) p.tokens.push_back(draw(0, 5) ? draw(0, 60) : draw(100, 300));
    p.tables = draw(0, 1), p.valid = draw(0, 1), p.erf = draw(0, 1), p.divide = draw(0, 2);
    all.push_back(p);
  }
  // In halves too: the named ones in all ways, random ones in one.
  const vector<Way> ways = ways_of_halves();
  for (size_t i = 0, n = all.size(); i < n; ++i)
    for (size_t way = 0; way < ways.size(); ++way) {
      if (i >= named && i % ways.size() != way) continue;
      Problem p = all[i];
      p.dtype = ways[way].dtype, p.products = ways[way].products, p.name += ways[way].name;
      if (p.products == Products::pairs) p.c += p.c % 2;
      if (p.products == Products::amx) p.c = (p.c + 31) / 32 * 32;
      if (p.dtype == Dtype::float16 && p.spread > 1) continue;  // infinite
      all.push_back(p);
    }
  Problem decided{"one token decides, several sums of channels", {40}, 2, 128, 16, 8, false, false, false, true, 1e4f};
  decided.dtype = ways.back().dtype, decided.products = ways.back().products;
  all.push_back(decided);
  return all;
}

}  // namespace

int main() {
  if (!mirasol::isa_granted()) {
    std::printf("skipped: this CPU has no %s\n", std::getenv("MIRASOL_ISA"));
    return 77;
  }
  double worst = 0;
  const vector<Problem> all = problems();
  for (const Problem& p : all) worst = std::max(worst, check(p));
  std::printf("%s: %zu problems, largest error %.0f%% of its budget, %d failures\n",
              mirasol::isa_name(mirasol::isa()), all.size(), 100 * worst, failures);
  return failures != 0;
}
