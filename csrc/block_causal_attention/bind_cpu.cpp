#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <tuple>
#include "block_causal_attention/arguments.h"

using namespace torch::stable;
using namespace mirasol::attention;

namespace {

constexpr std::align_val_t ALIGNMENT{64};
constexpr auto single = torch::headeronly::ScalarType::Float;
constexpr double LEAST_WORK = 1 << 19;  // multiply-adds for which waking another thread pays

// Threads draw items from a counter and call each(workspace, begin, end): they are begun in ascending order, and no
// thread idles while there are more.
template <class Each>
void run(int64_t items, int64_t workspace, double work, const Each& each) {
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), int64_t(work / LEAST_WORK) + 1);
  const int64_t workers = std::min(items, threads);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const auto release = [](float* p) { ::operator delete(p, ALIGNMENT); };
    std::unique_ptr<float, decltype(release)> space(
        static_cast<float*>(::operator new(workspace * sizeof(float), ALIGNMENT)), release);
    for (int64_t item; (item = next++) < items;) each(space.get(), item, item + 1);
  });
}

double multiply_adds(const Shape& s) {  // at most: as if every row saw every key
  return double(s.batch * s.q_heads) * s.q_len * s.k_len * (s.dim + s.value_dim);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                                           const Tensor& k_ranges, double scale) {
  Forward f = forward_of(q, k, v, q_offsets, k_ranges, scale);
  const Shape& s = f.shape;
  Tensor out = rows_before_heads(q) ? transpose(new_empty(q, {s.batch, s.q_len, s.q_heads, s.value_dim}), 1, 2)
                                    : new_empty(q, {s.batch, s.q_heads, s.q_len, s.value_dim});
  Tensor lse = new_empty(q, {s.batch, s.q_heads, s.q_len}, single), lse_low = empty_like(lse);
  f.out = output(out), f.lse = output<float>(lse).data, f.lse_low = output<float>(lse_low).data;
  const int64_t tiles = MIRASOL_CALL(attention_tiles, s), splits = MIRASOL_CALL(attention_splits, s);
  const int64_t part = splits > 1 ? s.batch * s.q_heads * s.q_len * (s.value_dim + 2) : 0;
  const std::unique_ptr<float[]> parts(new float[splits * part]);
  f.parts = parts.get();
  run(MIRASOL_CALL(attention_forward_items, s), MIRASOL_CALL(attention_workspace, s), multiply_adds(s),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(attention_forward, f, space, begin, end); });
  if (splits > 1)
    run(tiles, 0, double(splits * part),
        [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(attention_merge, f, begin, end); });
  return {out, lse, lse_low};
}

// With the strides of x, unless the last one would not be 1.
Tensor gradient_of(const Tensor& x) {
  Tensor g = empty_like(x);
  return g.size(3) <= 1 || g.stride(3) == 1 ? g : new_empty(x, x.sizes());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& lse_low, const Tensor& q_offsets, const Tensor& k_ranges,
                                            const Tensor& k_offsets, const Tensor& q_index, const Tensor& q_ranges,
                                            double scale) {
  Backward g = backward_of(dout, dlse, q, k, v, out, lse, lse_low, q_offsets, k_ranges, k_offsets, q_index, q_ranges,
                           scale);
  const Shape& s = g.shape;
  Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v);
  g.dq = output(dq), g.dk = output(dk), g.dv = output(dv);
  Tensor share = dq;  // of halves the sums over chunks need a place of their own
  if (s.dtype != Dtype::float32) share = new_empty(q, {s.batch, s.q_heads, s.q_len, s.dim}, single);
  g.dq_share = output<float>(share);
  const auto turns = std::make_unique<int32_t[]>(s.batch * s.q_heads * tiles(s.q_len));
  const std::unique_ptr<float[]> delta(new float[s.batch * s.q_heads * s.q_len]);
  g.turns = turns.get(), g.delta = delta.get();
  run(MIRASOL_CALL(attention_tiles, s), 0, double(s.batch * s.q_heads * s.q_len * s.value_dim),
      [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(attention_backward_rows, g, begin, end); });
  run(MIRASOL_CALL(attention_backward_items, s), MIRASOL_CALL(attention_backward_workspace, s), multiply_adds(s),
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(attention_backward, g, space, begin, end); });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mirasol_native, CPU, m) {
  m.impl("block_causal_attention_fwd", TORCH_BOX(&forward));
  m.impl("block_causal_attention_bwd", TORCH_BOX(&backward));
}
