#pragma once
// Problems for test.cpp, and what is right for them: attention by its definition, in any arithmetic.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>
#include "block_causal_attention/kernel.h"
#include "common/testing.h"

namespace mirasol::attention {

using namespace testing;

struct Tensor {  // (batch, heads, rows, dim), with NaN around it
  int64_t sizes[4], strides[4];
  vector<float> memory;

  enum Kind { plain, rows_first, padded };
  Tensor(int64_t b, int64_t h, int64_t n, int64_t d, Kind kind, float spread = 0) : sizes{b, h, n, d} {
    const int64_t row = d + (kind == padded ? 3 : 0);
    if (kind == rows_first) strides[0] = n * h * row, strides[1] = row, strides[2] = h * row;
    else strides[0] = h * (n + 1) * row, strides[1] = (n + 1) * row, strides[2] = row;
    strides[3] = 1;
    memory.assign(b * h * (n + 1) * row, NaN);  // one row more for each head, which nobody may read
    std::normal_distribution<float> normal(0, spread);
    if (spread > 0) each([&](float& x) { x = normal(generator); });
  }
  float& operator()(int64_t b, int64_t h, int64_t n, int64_t d) {
    return memory[b * strides[0] + h * strides[1] + n * strides[2] + d];
  }
  template <class F>
  void each(F f) {
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t n = 0; n < sizes[2]; ++n)
          for (int64_t d = 0; d < sizes[3]; ++d) f((*this)(b, h, n, d));
  }
  vector<double> values() {
    vector<double> all;
    each([&](float x) { all.push_back(x); });
    return all;
  }
  template <class T>
  View<T> view() { return {memory.data(), strides[0], strides[1], strides[2]}; }
};

// The memory of a tensor in its dtype, while a kernel works on it.
struct Stored {
  Tensor& tensor;
  Dtype dtype;
  vector<uint16_t> halves;
  Stored(Tensor& of, Dtype as) : tensor(of), dtype(as) {
    if (dtype != Dtype::float32)
      for (float x : tensor.memory) halves.push_back(encoded(x, dtype));
  }
  void read_back() {
    for (size_t i = 0; i < halves.size(); ++i) tensor.memory[i] = decoded(halves[i], dtype);
  }
  template <class T>
  View<T> view() {
    void* data = dtype == Dtype::float32 ? static_cast<void*>(tensor.memory.data()) : halves.data();
    return {data, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
  }
};

using Range = std::pair<int32_t, int32_t>;
using Sees = vector<vector<Range>>;  // [row] -> ranges of keys

inline bool holds(const vector<Range>& ranges, int64_t key) {
  return std::any_of(ranges.begin(), ranges.end(), [&](Range r) { return r.first <= key && key < r.second; });
}

struct Tables {
  int64_t batch, groups, ranges, segments, entries;
  vector<int32_t> q_offsets, k_ranges, k_offsets, q_index, q_ranges;
  Ranges seen() const { return {batch, groups, ranges, q_offsets.data(), k_ranges.data()}; }
  Transposed seen_by() const { return {segments, entries, k_offsets.data(), q_index.data(), q_ranges.data()}; }
};

// Every row its own group and every key its own segment, except where neighbours agree; padded to equal lengths.
inline Tables tables_of(const vector<Sees>& batch, int32_t q_len, int32_t k_len) {
  Tables t{int64_t(batch.size()), q_len + 1, 4, k_len + 1, 0, {}, {}, {}, {}, {}};
  vector<vector<int32_t>> entries;
  for (const Sees& sees : batch) {
    size_t end = t.q_offsets.size() + t.groups;
    t.q_offsets.push_back(0);
    for (int32_t row = 0; row < q_len; ++row) {
      if (row == 0 || sees[row] != sees[row - 1]) {
        if (row) t.q_offsets.push_back(row);
        for (size_t r = 0; r < 4; ++r) {
          const Range range = r < sees[row].size() ? sees[row][r] : Range{k_len, k_len};
          t.k_ranges.insert(t.k_ranges.end(), {range.first, range.second});
        }
      }
    }
    while (t.q_offsets.size() <= end) t.q_offsets.push_back(q_len);
    t.k_ranges.resize(t.q_offsets.size() / (t.groups + 1) * t.groups * 8, k_len);

    entries.emplace_back();
    vector<int32_t>& of = entries.back();
    vector<int32_t> last;
    end = t.k_offsets.size() + t.segments;
    t.k_offsets.push_back(0), t.q_index.push_back(0);
    for (int32_t key = 0; key < k_len; ++key) {
      vector<int32_t> rows;
      for (int32_t row = 0; row < q_len; ++row)
        if (holds(sees[row], key)) {
          if (!rows.empty() && rows.back() == row) ++rows.back();
          else rows.insert(rows.end(), {row, row + 1});
        }
      if (key && rows == last) continue;
      if (key) t.k_offsets.push_back(key), t.q_index.push_back(int32_t(of.size() / 2));
      of.insert(of.end(), rows.begin(), rows.end());
      last = rows;
    }
    while (t.k_offsets.size() <= end) t.k_offsets.push_back(k_len), t.q_index.push_back(int32_t(of.size() / 2));
    t.entries = std::max<int64_t>(t.entries, of.size() / 2);
  }
  for (vector<int32_t>& of : entries) {
    of.resize(2 * t.entries);
    t.q_ranges.insert(t.q_ranges.end(), of.begin(), of.end());
  }
  return t;
}

inline Sees random_sees(int32_t q_len, int32_t k_len) {
  Sees sees(q_len);
  for (int32_t row = 0; row < q_len; ++row) {
    if (row && draw(0, 15)) { sees[row] = sees[row - 1]; continue; }
    vector<int32_t> cuts(2 * draw(0, 4));
    for (int32_t& cut : cuts) cut = int32_t(draw(0, k_len));
    std::sort(cuts.begin(), cuts.end());
    if (std::adjacent_find(cuts.begin(), cuts.end()) != cuts.end()) cuts.clear();  // touching ranges would be merged
    for (size_t i = 0; i < cuts.size(); i += 2) sees[row].push_back({cuts[i], cuts[i + 1]});
  }
  return sees;
}

inline Sees block_causal(int32_t q_len, int32_t k_len, int32_t q_snippet, int32_t k_snippet, int32_t window) {
  Sees sees(q_len);
  for (int32_t row = 0; row < q_len; ++row) {
    const int32_t end = std::min(k_len, (row / q_snippet + 1) * k_snippet);
    const int32_t begin = std::max(0, end - window * k_snippet);
    if (begin < end) sees[row] = {{begin, end}};
  }
  return sees;
}

struct Problem {
  std::string name;
  Shape shape;
  vector<Sees> sees;  // one, or one for each row of the batch
  Tensor::Kind kind = Tensor::plain;
  float spread = 1;
};

inline bool sees(const Problem& p, int64_t b, int64_t row, int64_t key) {
  return holds(p.sees[b % p.sees.size()][row], key);
}

struct Results {
  Tensor out, lse, dq, dk, dv, lse_low;
  vector<Tensor*> all() { return {&out, &lse, &dq, &dk, &dv}; }
};

struct Inputs {
  Tensor q, k, v, dout, dlse;
};

inline Inputs inputs_of(const Problem& p) {
  const Shape& s = p.shape;
  Inputs in{Tensor(s.batch, s.q_heads, s.q_len, s.dim, p.kind, p.spread),
            Tensor(s.batch, s.kv_heads, s.k_len, s.dim, p.kind, p.spread),
            Tensor(s.batch, s.kv_heads, s.k_len, s.value_dim, p.kind, 1),
            Tensor(s.batch, s.q_heads, s.q_len, s.value_dim, p.kind, 1),
            Tensor(s.batch, s.q_heads, s.q_len, 1, Tensor::plain, 1)};
  for (Tensor* x : {&in.q, &in.k, &in.v, &in.dout})
    for (float& y : x->memory) y = rounded(y, s.dtype);
  return in;
}

inline Results empty_results(const Problem& p) {
  const Shape& s = p.shape;
  Tensor lse(s.batch, s.q_heads, s.q_len, 1, Tensor::plain);
  lse.strides[0] = s.q_heads * s.q_len, lse.strides[1] = s.q_len;  // contiguous: the NaN row is at the very end
  return {Tensor(s.batch, s.q_heads, s.q_len, s.value_dim, p.kind), lse,
          Tensor(s.batch, s.q_heads, s.q_len, s.dim, p.kind), Tensor(s.batch, s.kv_heads, s.k_len, s.dim, p.kind),
          Tensor(s.batch, s.kv_heads, s.k_len, s.value_dim, p.kind), lse};
}

// The definition, in the arithmetic of T, in the order of Results::all(); q is scaled first, as in the reference of
// Python.  Scores are summed from element `first` on, then from 0.
template <class T>
vector<vector<T>> definition(const Problem& p, Inputs& in, int64_t first = 0) {
  const Shape& s = p.shape;
  vector<T> out, lse, dq, dk(s.batch * s.kv_heads * s.k_len * s.dim), dv(s.batch * s.kv_heads * s.k_len * s.value_dim);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.q_heads; ++h)
      for (int64_t row = 0; row < s.q_len; ++row) {
        const int64_t kv = h / (s.q_heads / s.kv_heads);
        vector<int64_t> keys;
        for (Range r : p.sees[b % p.sees.size()][row])
          for (int64_t key = r.first; key < r.second; ++key) keys.push_back(key);
        vector<T> weight, o(s.value_dim), g(s.dim);
        const float *const q = &in.q(b, h, row, 0), *const dout = &in.dout(b, h, row, 0);
        T top = -std::numeric_limits<T>::infinity(), total = 0, delta = -T(in.dlse(b, h, row, 0));
        for (int64_t key : keys) {
          const float* const k = &in.k(b, kv, key, 0);
          T score = 0;
          for (int64_t d = first; d < s.dim; ++d) score += T(q[d]) * T(s.scale) * T(k[d]);
          for (int64_t d = 0; d < first; ++d) score += T(q[d]) * T(s.scale) * T(k[d]);
          weight.push_back(score), top = std::max(top, weight.back());
        }
        for (T& w : weight) total += w = std::exp(w - top);
        for (T& w : weight) w /= total;
        for (size_t i = 0; i < keys.size(); ++i) {
          const float* const v = &in.v(b, kv, keys[i], 0);
          for (int64_t d = 0; d < s.value_dim; ++d) o[d] += weight[i] * T(v[d]);
        }
        for (int64_t d = 0; d < s.value_dim; ++d) delta += o[d] * T(dout[d]);
        for (size_t i = 0; i < keys.size(); ++i) {
          const float *const k = &in.k(b, kv, keys[i], 0), *const v = &in.v(b, kv, keys[i], 0);
          T* const to_k = &dk[((b * s.kv_heads + kv) * s.k_len + keys[i]) * s.dim];
          T* const to_v = &dv[((b * s.kv_heads + kv) * s.k_len + keys[i]) * s.value_dim];
          T dp = 0;
          for (int64_t d = 0; d < s.value_dim; ++d) {
            dp += T(dout[d]) * T(v[d]);
            to_v[d] += weight[i] * T(dout[d]);
          }
          const T dscore = weight[i] * (dp - delta) * T(s.scale);
          for (int64_t d = 0; d < s.dim; ++d) g[d] += dscore * T(k[d]), to_k[d] += dscore * T(q[d]);
        }
        out.insert(out.end(), o.begin(), o.end()), dq.insert(dq.end(), g.begin(), g.end());
        lse.push_back(top + std::log(total));
      }
  return {out, lse, dq, dk, dv};
}

inline vector<Problem> problems() {
  const auto scale = [](int64_t dim) { return 1 / std::sqrt(float(dim)); };
  vector<Problem> all = {
      {"block-causal", {2, 4, 2, 100, 100, 64, 64, scale(64)}, {block_causal(100, 100, 20, 20, 99)}},
      {"window", {1, 2, 1, 240, 240, 80, 80, scale(80)}, {block_causal(240, 240, 24, 24, 2)}, Tensor::rows_first},
      {"diagonal", {1, 2, 2, 192, 192, 32, 32, scale(32)}, {block_causal(192, 192, 32, 32, 1)}},
      {"few queries", {2, 3, 1, 12, 390, 24, 40, scale(24)}, {block_causal(12, 390, 4, 130, 99)}, Tensor::padded},
      {"decode", {2, 6, 2, 3, 3100, 24, 40, scale(24)}, {block_causal(3, 3100, 1, 1033, 99)}, Tensor::padded},
      {"decode with holes", {1, 4, 1, 5, 4200, 16, 8, scale(16)}, {random_sees(5, 4200)}, Tensor::rows_first},
      {"one row", {2, 3, 3, 1, 3000, 64, 64, scale(64)}, {block_causal(1, 3000, 1, 3000, 1)}, Tensor::rows_first},
      {"one row, odd", {1, 2, 1, 1, 2200, 33, 17, -0.3f}, {random_sees(1, 2200)}, Tensor::padded},
      {"rows of few lanes", {1, 2, 2, 3, 2100, 40, 80, scale(40)}, {random_sees(3, 2100)}, Tensor::rows_first},
      {"heads of few lanes", {2, 8, 1, 1, 130, 128, 256, scale(128)}, {random_sees(1, 130), random_sees(1, 130)}},
      {"holes of few lanes", {1, 6, 3, 4, 300, 20, 72, scale(20)}, {random_sees(4, 300)}, Tensor::padded},
      {"few lanes, large logits", {1, 5, 1, 1, 200, 64, 64, scale(64)}, {block_causal(1, 200, 1, 200, 1)},
       Tensor::plain, 60},
      {"many keys", {1, 2, 1, 150, 1300, 16, 16, scale(16)}, {block_causal(150, 1300, 15, 130, 99)}, Tensor::padded},
      {"many items", {4, 4, 4, 70, 1100, 8, 16, scale(8)}, {block_causal(70, 1100, 14, 220, 4)}, Tensor::rows_first},
      {"tiles together", {1, 8, 1, 260, 700, 16, 24, scale(16)}, {random_sees(260, 700)}, Tensor::rows_first},
      {"causal text", {1, 2, 1, 130, 130, 48, 48, scale(48)}, {block_causal(130, 130, 1, 1, 999)}},
      {"largest dims", {1, 1, 1, 70, 70, 256, 256, scale(256)}, {block_causal(70, 70, 7, 7, 99)}},
      {"large logits", {1, 2, 1, 90, 90, 64, 64, scale(64)}, {block_causal(90, 90, 9, 9, 99)}, Tensor::plain, 60},
      {"large logits, D 80", {1, 2, 1, 90, 90, 80, 80, scale(80)}, {block_causal(90, 90, 9, 9, 99)}, Tensor::plain, 60},
      {"few lanes, large logits, D 128", {1, 5, 1, 1, 200, 128, 128, scale(128)}, {block_causal(1, 200, 1, 200, 1)},
       Tensor::plain, 60},
      {"negative scale", {1, 2, 1, 40, 40, 33, 17, -0.3f}, {block_causal(40, 40, 9, 9, 99)}, Tensor::padded},
      {"no keys", {1, 2, 1, 5, 0, 8, 8, 1}, {Sees(5)}},
      {"no queries", {1, 2, 1, 0, 70, 8, 8, 1}, {Sees(0)}},
      {"no batch", {0, 2, 1, 3, 4, 8, 8, 1}, {block_causal(3, 4, 1, 1, 9)}},
      {"nothing seen", {1, 2, 1, 70, 70, 8, 8, 1}, {Sees(70)}},
      {"one", {1, 1, 1, 1, 1, 1, 1, 1}, {block_causal(1, 1, 1, 1, 1)}},
  };
  for (int i = 0; i < 48; ++i) {
    const int64_t batch = draw(1, 3), kv_heads = draw(1, 2), q_heads = kv_heads * draw(1, 3);
    const int64_t q_len = draw(1, 200), k_len = draw(1, 200), dim = draw(1, 100), value_dim = draw(1, 100);
    Problem p{"random " + std::to_string(i), {batch, q_heads, kv_heads, q_len, k_len, dim, value_dim, scale(dim)}, {}};
    p.kind = Tensor::Kind(draw(0, 2)), p.spread = draw(0, 3) ? 1 : 3;
    for (int64_t b = draw(0, 1) ? 1 : batch; b > 0; --b) p.sees.push_back(random_sees(int32_t(q_len), int32_t(k_len)));
    all.push_back(p);
  }
  // In halves too: the named ones in all ways, random ones in one.
  const vector<Way> ways = ways_of_halves();
  for (size_t i = 0, n = all.size(), named = n - 48; i < n; ++i)
    for (size_t way = 0; way < ways.size(); ++way) {
      if (i >= named && i % ways.size() != way) continue;
      Problem p = all[i];
      p.shape.dtype = ways[way].dtype, p.shape.products = ways[way].products, p.name += ways[way].name;
      if (p.shape.products != Products::single)
        p.shape.dim += p.shape.dim % 2, p.shape.value_dim += p.shape.value_dim % 2;
      if (p.shape.dtype == Dtype::float16 && p.spread > 10) continue;
      all.push_back(p);
    }
  return all;
}

}  // namespace mirasol::attention
