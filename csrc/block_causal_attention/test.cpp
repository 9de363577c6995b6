// Forward and backward against the definition in float64, for the instruction set that MIRASOL_ISA forces, and the
// bodies of the CUDA kernels on the host.  Needs neither torch nor Python.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>
#include "block_causal_attention/problems.h"
#include "block_causal_attention/rows.h"

using namespace mirasol::attention;

namespace {

// The arguments of both directions, with everything that they point to.
struct Call {
  const Problem& p;
  const Tables& t;
  Results& r;
  Stored q, k, v, dout, out, dq, dk, dv;
  View<const float> dlse, lse, low;
  int64_t rows = p.shape.batch * p.shape.q_heads * p.shape.q_len;
  vector<float> delta = vector<float>(rows, NaN), parts, shares;
  vector<int32_t> turns = vector<int32_t>(p.shape.batch * p.shape.q_heads * tiles(p.shape.q_len), 0);

  Call(const Problem& problem, const Tables& tables, Inputs& in, Results& results)
      : p(problem), t(tables), r(results), q(in.q, p.shape.dtype), k(in.k, p.shape.dtype), v(in.v, p.shape.dtype),
        dout(in.dout, p.shape.dtype), out(r.out, p.shape.dtype), dq(r.dq, p.shape.dtype), dk(r.dk, p.shape.dtype),
        dv(r.dv, p.shape.dtype), dlse(in.dlse.view<const float>()), lse(r.lse.view<const float>()),
        low(r.lse_low.view<const float>()) {
    const Shape& s = p.shape;
    parts.assign(MIRASOL_CALL(attention_splits, s) * rows * (s.value_dim + 2), NaN);
    shares.assign(rows * s.dim, NaN);
  }
  Forward forward() {
    return {p.shape, t.seen(), q.view<const void>(), k.view<const void>(), v.view<const void>(), out.view<void>(),
            r.lse.memory.data(), r.lse_low.memory.data(), parts.data()};
  }
  Backward backward() {
    const Shape& s = p.shape;
    const bool single = s.dtype == Dtype::float32;
    const View<float> share{shares.data(), s.q_heads * s.q_len * s.dim, s.q_len * s.dim, s.dim};
    return {p.shape, t.seen(), t.seen_by(),
            dout.view<const void>(), q.view<const void>(), k.view<const void>(), v.view<const void>(),
            out.view<const void>(), dlse, lse, low, dq.view<void>(), dk.view<void>(), dv.view<void>(), delta.data(),
            single ? r.dq.view<float>() : share, turns.data()};
  }
  void read_back() {
    for (Stored* x : {&out, &dq, &dk, &dv}) x->read_back();
  }
};

Results on_cpu(const Problem& p, const Tables& t, Inputs& in, int threads) {
  Results r = empty_results(p);
  Call call(p, t, in, r);
  Forward f = call.forward();
  f.shape.threads = threads;
  const Shape& s = f.shape;
  const int64_t items = MIRASOL_CALL(attention_tiles, s), splits = MIRASOL_CALL(attention_splits, s);
  run(threads, MIRASOL_CALL(attention_forward_items, s), MIRASOL_CALL(attention_workspace, s),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(attention_forward, f, space, begin, end); });
  if (splits > 1)
    run(threads, items, 0, [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(attention_merge, f, begin, end); });
  const Backward g = call.backward();
  run(threads, items, 0,
      [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(attention_backward_rows, g, begin, end); });
  run(threads, MIRASOL_CALL(attention_backward_items, s), MIRASOL_CALL(attention_backward_workspace, s),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(attention_backward, g, space, begin, end); });
  call.read_back();
  return r;
}

struct Alone {  // a warp of one lane
  static constexpr int size = 1, lane = 0;
  float sum(float x) const { return x; }
};

Results as_on_gpu(const Problem& p, const Tables& t, Inputs& in) {
  Results r = empty_results(p);
  const Shape& s = p.shape;
  Call call(p, t, in, r);
  const Forward f = call.forward();
  for (int64_t i = 0; i < s.batch * s.q_heads * s.q_len; ++i) mirasol::cuda::forward_row(Alone{}, f, i);
  const Backward g = call.backward();
  for (int64_t i = 0; i < s.batch * s.q_heads * s.q_len; ++i) mirasol::cuda::backward_query_row(Alone{}, g, i);
  for (int64_t i = 0; i < s.batch * s.kv_heads * s.k_len; ++i) mirasol::cuda::backward_key_row(Alone{}, g, i);
  return r;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  const auto bits = [](float x, float y) { return std::memcmp(&x, &y, sizeof x) == 0; };
  return std::equal(a.memory.begin(), a.memory.end(), b.memory.begin(), bits);
}

// NaN or infinity in every element of row n, of batch row b.
void poison(Tensor& x, int64_t b, int64_t n) {
  for (int64_t h = 0; h < x.sizes[1]; ++h)
    for (int64_t d = 0; d < x.sizes[3]; ++d) x(b, h, n, d) = draw(0, 1) ? NaN : std::numeric_limits<float>::infinity();
}

bool unchanged(Tensor& before, Tensor& after, int64_t b, int64_t n) {
  bool same = true;
  for (int64_t h = 0; h < before.sizes[1]; ++h)
    for (int64_t d = 0; d < before.sizes[3]; ++d) same &= before(b, h, n, d) == after(b, h, n, d);
  return same;
}

bool lost(Tensor& x, int64_t b, int64_t n) {  // nothing of row n is finite
  bool finite = false;
  for (int64_t h = 0; h < x.sizes[1]; ++h)
    for (int64_t d = 0; d < x.sizes[3]; ++d) finite |= bool(std::isfinite(x(b, h, n, d)));
  return !finite;
}

int failures = 0;

void expect(bool fine, const Problem& p, const std::string& what) {
  if (fine) return;
  ++failures;
  std::printf("FAILED %s: %s\n", p.name.c_str(), what.c_str());
}

// What is right, and the error that the arithmetic of floats cannot avoid.
struct Right {
  vector<vector<double>> exact;
  double unavoidable[5] = {};

  static Dtype dtype(const Problem& p, int i) { return i == 1 ? Dtype::float32 : p.shape.dtype; }  // lse is float
  Right(const Problem& p, Inputs& in) : exact(definition<double>(p, in)) {
    for (int order = 0; order < 3; ++order) {  // one alone may be lucky where few rows have large scores
      const vector<vector<float>> low = definition<float>(p, in, order * p.shape.dim / 3);
      for (int i = 0; i < 5; ++i)
        for (size_t j = 0; j < exact[i].size(); ++j) {
          const double error = std::abs(rounded(low[i][j], dtype(p, i)) - exact[i][j]);
          if (std::isfinite(exact[i][j])) unavoidable[i] = std::max(unavoidable[i], error);
        }
    }
  }
  double used(const Problem& p, Results& r, const char* who) const {
    static const char* const names[] = {"out", "lse", "dq", "dk", "dv"};
    double worst = 0;
    for (int i = 0; i < 5; ++i) {
      const double part = excess(r.all()[i]->values(), exact[i], unavoidable[i], dtype(p, i));
      expect(part <= 1, p, std::string(who) + " " + names[i] + ": error is " + std::to_string(part) + " of its budget");
      worst = std::max(worst, part);
    }
    return worst;
  }
};

double check(const Problem& p) {
  const Shape& s = p.shape;
  const Tables t = tables_of(p.sees, int32_t(s.q_len), int32_t(s.k_len));
  Inputs in = inputs_of(p);
  for (int64_t b = 0; b < s.batch; ++b) {  // what nobody sees may hold anything
    for (int64_t row = 0; row < s.q_len; ++row)
      if (p.sees[b % p.sees.size()][row].empty())
        poison(in.q, b, row), poison(in.dout, b, row), poison(in.dlse, b, row);
    for (int64_t key = 0; key < s.k_len; ++key) {
      bool seen = false;
      for (int64_t row = 0; row < s.q_len && !seen; ++row) seen = sees(p, b, row, key);
      if (!seen) poison(in.k, b, key), poison(in.v, b, key);
    }
  }
  Results r = on_cpu(p, t, in, 1);
  std::optional<Results> gpu;  // the bodies of the CUDA kernels are the same for every instruction set
  if (p.shape.dtype == Dtype::float32 && mirasol::isa() == mirasol::Isa::base) gpu = as_on_gpu(p, t, in);
  double worst = 0;
  if (JUDGED) {
    const Right right(p, in);
    worst = right.used(p, r, "cpu");
    if (gpu) worst = std::max(worst, right.used(p, *gpu, "rows"));
  }
  for (int threads : {2, 7}) {
    Results other = on_cpu(p, t, in, threads);
    for (int i = 0; i < 5; ++i)
      expect(same_bits(*r.all()[i], *other.all()[i]), p, std::to_string(threads) + " threads change the result");
  }
  if (s.batch * s.q_len * s.k_len == 0) return worst;

  // A row never meets what it does not see, not even as 0 * NaN, and a key never meets a row that does not see it.
  const int64_t key = draw(0, s.k_len - 1), row = draw(0, s.q_len - 1), b = draw(0, s.batch - 1);
  Inputs bad_key = in, bad_row = in;
  poison(bad_key.k, b, key), poison(bad_key.v, b, key), poison(bad_row.q, b, row), poison(bad_row.dout, b, row);
  Results with_key = on_cpu(p, t, bad_key, 1), with_row = on_cpu(p, t, bad_row, 1);
  for (int64_t i = 0; i < s.q_len; ++i)
    expect(sees(p, b, i, key) || (unchanged(r.out, with_key.out, b, i) && unchanged(r.dq, with_key.dq, b, i)), p,
           "row " + std::to_string(i) + " met a key that it does not see");
  for (int64_t i = 0; i < s.q_len; ++i)
    expect(!sees(p, b, i, key) || (lost(with_key.out, b, i) && lost(with_key.dq, b, i)), p,
           "row " + std::to_string(i) + " passed over a key that it sees");
  for (int64_t i = 0; i < s.k_len; ++i)
    expect(sees(p, b, row, i) || (unchanged(r.dk, with_row.dk, b, i) && unchanged(r.dv, with_row.dv, b, i)), p,
           "key " + std::to_string(i) + " met a row that does not see it");
  for (int64_t i = 0; i < s.k_len; ++i)
    expect(!sees(p, b, row, i) || (lost(with_row.dk, b, i) && lost(with_row.dv, b, i)), p,
           "key " + std::to_string(i) + " passed over a row that sees it");
  return worst;
}

// A key of -infinity that others stand beside has no weight: nothing comes of it, whatever lies in lanes without rows.
void check_infinite_key() {
  for (const Way& way : ways_of_halves())
    for (int64_t rows : {9, 10, 65}) {
      Problem p{"infinite key", {1, 1, 1, rows, 5, 8, 8, 1}, {block_causal(int32_t(rows), 5, int32_t(rows), 5, 1)}};
      p.name += way.name;
      p.shape.dtype = way.dtype, p.shape.products = way.products;
      const Tables t = tables_of(p.sees, int32_t(rows), 5);
      Inputs in = inputs_of(p);
      for (int64_t row = 0; row < rows; ++row) in.q(0, 0, row, 0) = 1;
      in.k(0, 0, 2, 0) = -std::numeric_limits<float>::infinity();
      Results r = on_cpu(p, t, in, 1);
      bool none = true;
      for (int64_t d = 0; d < 8; ++d) none &= r.dk(0, 0, 2, d) == 0 && r.dv(0, 0, 2, d) == 0;
      expect(none, p, std::to_string(rows) + " rows: it has a gradient");
    }
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
  check_infinite_key();
  std::printf("%s: %zu problems, largest error %.0f%% of its budget, %d failures\n",
              mirasol::isa_name(mirasol::isa()), all.size(), 100 * worst, failures);
  return failures != 0;
}
