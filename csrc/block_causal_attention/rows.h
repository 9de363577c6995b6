#pragma once
// The CUDA kernels' bodies: what one warp does for one query row, or for one key row.  The code knows a warp only as
// `Lanes` that share the elements of a row, so that test.cpp runs it on the host, with a single lane.
// Exact and simple, not fast: every pair costs a product of rows.  No atomics; sums in a fixed order.
#include <cmath>
#include "block_causal_attention/kernel.h"
#include "common/host_device.h"

namespace mirasol::cuda {

using attention::Backward;
using attention::Forward;
using attention::Ranges;
using attention::Shape;
using attention::View;

using attention::MAX_DIM;
constexpr int RUN = 64;  // terms that are summed before they join the rest: rounding grows with the run, not the row

// This lane's elements of a row: number `lane`, lane + size, ...
template <class Lanes>
struct Row {
  float x[MAX_DIM / Lanes::size];
};

template <class Lanes>
MIRASOL_HOST_DEVICE Row<Lanes> load(Lanes lanes, const float* p, int64_t dim, float factor = 1) {
  Row<Lanes> row;
  for (int i = 0; i < MAX_DIM / Lanes::size; ++i) {
    const int64_t d = lanes.lane + i * Lanes::size;
    row.x[i] = d < dim ? p[d] * factor : 0;
  }
  return row;
}

template <class Lanes>
MIRASOL_HOST_DEVICE void store(Lanes lanes, float* p, int64_t dim, const Row<Lanes>& row, float factor = 1) {
  for (int i = 0; i < MAX_DIM / Lanes::size; ++i) {
    const int64_t d = lanes.lane + i * Lanes::size;
    if (d < dim) p[d] = row.x[i] * factor;
  }
}

// a += factor * b
template <class Lanes>
MIRASOL_HOST_DEVICE void add(Row<Lanes>& a, float factor, const Row<Lanes>& b) {
  for (int i = 0; i < MAX_DIM / Lanes::size; ++i) a.x[i] += factor * b.x[i];
}

// Every lane gets it.
template <class Lanes>
MIRASOL_HOST_DEVICE float dot(Lanes lanes, const Row<Lanes>& a, const Row<Lanes>& b) {
  float sum = 0;
  for (int i = 0; i < MAX_DIM / Lanes::size; ++i) sum += a.x[i] * b.x[i];
  return lanes.sum(sum);
}

MIRASOL_HOST_DEVICE inline const float* at(const View<const void>& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const float*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}
MIRASOL_HOST_DEVICE inline float* at(const View<void>& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<float*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}
MIRASOL_HOST_DEVICE inline float at(const View<const float>& view, int64_t batch, int64_t head, int64_t row) {
  return view.data[batch * view.batch + head * view.head + row * view.row];
}

// The last of n intervals that begins at or before x: offsets has n + 1 ascending entries, offsets[0] <= x.
MIRASOL_HOST_DEVICE inline int64_t find(const int32_t* offsets, int64_t n, int64_t x) {
  int64_t below = 0, above = n;
  while (above - below > 1) {
    const int64_t middle = (below + above) / 2;
    (offsets[middle] <= x ? below : above) = middle;
  }
  return below;
}

// each(begin, end) for runs of at most RUN of the keys that a query row sees, in ascending order.
template <class Each>
MIRASOL_HOST_DEVICE void for_keys(const Ranges& seen, int64_t batch, int64_t row, Each each) {
  const int64_t table = seen.batch == 1 ? 0 : batch;
  const int64_t group = find(seen.q_offsets + table * (seen.groups + 1), seen.groups, row);
  const int32_t* range = seen.k_ranges + (table * seen.groups + group) * seen.ranges * 2;
  for (int64_t r = 0; r < seen.ranges; ++r, range += 2)
    for (int64_t key = range[0]; key < range[1]; key += RUN) each(key, key + RUN < range[1] ? key + RUN : range[1]);
}

// The row of q is scaled, then multiplied with that of k, and summed in one order: forward and backward meet the same
// scores, and no compiler can fuse the scale into a subtraction that follows in one of them and not in the other.
template <class Lanes>
struct Softmax {  // a weighted sum of value rows with weights exp(score - top), and the sum of the weights
  float top, total;
  Row<Lanes> sum;
};

template <class Lanes>
MIRASOL_HOST_DEVICE Softmax<Lanes> nothing() {
  Softmax<Lanes> s;
  s.top = -INFINITY, s.total = 0;
  for (float& x : s.sum.x) x = 0;
  return s;
}

template <class Lanes>
MIRASOL_HOST_DEVICE void merge(Softmax<Lanes>& a, const Softmax<Lanes>& b) {
  const float top = fmaxf(a.top, b.top), base = top == -INFINITY ? 0 : top;
  const float of_a = expf(a.top - base), of_b = expf(b.top - base);
  a.top = top, a.total = a.total * of_a + b.total * of_b;
  for (int i = 0; i < MAX_DIM / Lanes::size; ++i) a.sum.x[i] = a.sum.x[i] * of_a + b.sum.x[i] * of_b;
}

struct Place {
  int64_t batch, head, row;
};

MIRASOL_HOST_DEVICE inline Place place(int64_t item, int64_t heads, int64_t rows) {
  return {item / rows / heads, item / rows % heads, item % rows};
}

// out and lse of one query row; items: batch * q_heads * q_len.
template <class Lanes>
MIRASOL_HOST_DEVICE void forward_row(Lanes lanes, const Forward& f, int64_t item) {
  const Shape& shape = f.shape;
  const Place to = place(item, shape.q_heads, shape.q_len);
  const int64_t kv_head = to.head / (shape.q_heads / shape.kv_heads);
  const Row<Lanes> q = load(lanes, at(f.q, to.batch, to.head, to.row), shape.dim, shape.scale);
  Softmax<Lanes> all = nothing<Lanes>();
  for_keys(f.seen, to.batch, to.row, [&](int64_t key, int64_t end) {
    Softmax<Lanes> run = nothing<Lanes>();
    for (; key < end; ++key) {
      const float score = dot(lanes, q, load(lanes, at(f.k, to.batch, kv_head, key), shape.dim));
      merge(run, Softmax<Lanes>{score, 1, load(lanes, at(f.v, to.batch, kv_head, key), shape.value_dim)});
    }
    merge(all, run);
  });
  store(lanes, at(f.out, to.batch, to.head, to.row), shape.value_dim, all.sum, all.total == 0 ? 0 : 1 / all.total);
  if (lanes.lane == 0) {
    const float log_total = logf(all.total), lse = all.top + log_total, moved = lse - all.top;
    f.lse[item] = lse;  // -inf where nothing was seen
    f.lse_low[item] = fabsf(lse) < INFINITY ? (all.top - (lse - moved)) + (log_total - moved) : 0;
  }
}

// dq of one query row, and its delta for the keys' turn; items: batch * q_heads * q_len.
template <class Lanes>
MIRASOL_HOST_DEVICE void backward_query_row(Lanes lanes, const Backward& g, int64_t item) {
  const Shape& shape = g.shape;
  const Place to = place(item, shape.q_heads, shape.q_len);
  const int64_t kv_head = to.head / (shape.q_heads / shape.kv_heads);
  const Row<Lanes> q = load(lanes, at(g.q, to.batch, to.head, to.row), shape.dim, shape.scale);
  const Row<Lanes> dout = load(lanes, at(g.dout, to.batch, to.head, to.row), shape.value_dim);
  const float lse = at(g.lse, to.batch, to.head, to.row), low = at(g.lse_low, to.batch, to.head, to.row);
  const float delta = dot(lanes, dout, load(lanes, at(g.out, to.batch, to.head, to.row), shape.value_dim));
  const float dlse = at(g.dlse, to.batch, to.head, to.row);
  Row<Lanes> dq = {};
  for_keys(g.seen, to.batch, to.row, [&](int64_t key, int64_t end) {
    Row<Lanes> run = {};
    for (; key < end; ++key) {
      const Row<Lanes> k = load(lanes, at(g.k, to.batch, kv_head, key), shape.dim);
      const Row<Lanes> v = load(lanes, at(g.v, to.batch, kv_head, key), shape.value_dim);
      const float p = expf(dot(lanes, q, k) - lse - low);
      add(run, p * (dot(lanes, dout, v) - delta + dlse), k);
    }
    add(dq, 1, run);
  });
  store(lanes, at(g.dq, to.batch, to.head, to.row), shape.dim, dq, shape.scale);
  if (lanes.lane == 0) g.delta[item] = delta;
}

// dk and dv of one key row, after all query rows; items: batch * kv_heads * k_len.
template <class Lanes>
MIRASOL_HOST_DEVICE void backward_key_row(Lanes lanes, const Backward& g, int64_t item) {
  const Shape& shape = g.shape;
  const Place to = place(item, shape.kv_heads, shape.k_len);
  const int64_t group = shape.q_heads / shape.kv_heads, segments = g.seen_by.segments;
  const int64_t table = g.seen.batch == 1 ? 0 : to.batch;
  const int64_t segment = find(g.seen_by.k_offsets + table * (segments + 1), segments, to.row);
  const int32_t* index = g.seen_by.q_index + table * (segments + 1) + segment;
  const int32_t* ranges = g.seen_by.q_ranges + table * g.seen_by.entries * 2;
  const Row<Lanes> k = load(lanes, at(g.k, to.batch, to.head, to.row), shape.dim);
  const Row<Lanes> v = load(lanes, at(g.v, to.batch, to.head, to.row), shape.value_dim);
  Row<Lanes> dk = {}, dv = {};
  for (int64_t head = to.head * group; head < (to.head + 1) * group; ++head)
    for (int32_t entry = index[0]; entry < index[1]; ++entry)
      for (int64_t row = ranges[2 * entry], end = ranges[2 * entry + 1]; row < end;) {
        Row<Lanes> run_k = {}, run_v = {};
        for (const int64_t stop = row + RUN < end ? row + RUN : end; row < stop; ++row) {
          const int64_t number = (to.batch * shape.q_heads + head) * shape.q_len + row;
          const Row<Lanes> q = load(lanes, at(g.q, to.batch, head, row), shape.dim, shape.scale);
          const Row<Lanes> dout = load(lanes, at(g.dout, to.batch, head, row), shape.value_dim);
          const float lse = at(g.lse, to.batch, head, row), low = at(g.lse_low, to.batch, head, row);
          const float p = expf(dot(lanes, q, k) - lse - low);
          add(run_k, p * (dot(lanes, dout, v) - g.delta[number] + at(g.dlse, to.batch, head, row)), q);
          add(run_v, p, dout);
        }
        add(dk, 1, run_k), add(dv, 1, run_v);
      }
  store(lanes, at(g.dk, to.batch, to.head, to.row), shape.dim, dk);
  store(lanes, at(g.dv, to.batch, to.head, to.row), shape.value_dim, dv);
}

}  // namespace mirasol::cuda
