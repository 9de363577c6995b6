#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <memory>
#include <tuple>
#include "block_causal_attention/arguments.h"
#include "common/run.h"

using namespace torch::stable;
using namespace mirasol::attention;

namespace {

constexpr auto single = torch::headeronly::ScalarType::Float;

template <class Each>
void run(int64_t items, int64_t workspace, double multiply_adds, const Each& each) {
  const auto start = [](int64_t n, const auto& work) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t, int64_t) { work(); });
  };
  const int64_t threads = mirasol::threads_for(multiply_adds, torch::stable::get_num_threads());
  mirasol::share(start, threads, items, workspace, each);
}

// New, without torch's dispatcher, which takes 1.5 us of a small call for each tensor.
Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// (batch, heads, rows, dim), contiguous, or a view of (batch, rows, heads, dim).
Tensor empty(int64_t batch, int64_t heads, int64_t rows, int64_t dim, bool rows_first, int32_t dtype) {
  const auto some = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t row = some(dim) * (rows_first ? some(heads) : 1), head = some(dim) * (rows_first ? 1 : some(rows));
  const int64_t sizes[] = {batch, heads, rows, dim}, strides[] = {some(heads) * some(rows) * some(dim), head, row, 1};
  return empty_strided(4, sizes, strides, dtype);
}

Tensor empty_rows(const Shape& s) {
  const int64_t row = std::max<int64_t>(s.q_len, 1), head = std::max<int64_t>(s.q_heads, 1) * row;
  const int64_t sizes[] = {s.batch, s.q_heads, s.q_len}, strides[] = {head, row, 1};
  return empty_strided(3, sizes, strides, aoti_torch_dtype_float32());
}

int32_t torch_dtype(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

double multiply_adds(const Shape& s) {  // at most: as if every row saw every key
  return double(s.batch * s.q_heads) * s.q_len * s.k_len * (s.dim + s.value_dim);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                                           const Tensor& k_ranges, double scale) {
  Forward f = forward_of(q, k, v, q_offsets, k_ranges, scale);
  f.shape.products = products_that_pay(f.shape), f.shape.threads = torch::stable::get_num_threads();
  const Shape& s = f.shape;
  Tensor out = empty(s.batch, s.q_heads, s.q_len, s.value_dim, rows_before_heads(q), torch_dtype(q));
  Tensor lse = empty_rows(s), lse_low = empty_rows(s);
  f.out = output(out), f.lse = output<float>(lse).data, f.lse_low = output<float>(lse_low).data;
  const int64_t tiles = MIRASOL_CALL(attention_tiles, s), splits = MIRASOL_CALL(attention_splits, s);
  const int64_t part = splits > 1 ? s.batch * s.q_heads * s.q_len * (s.value_dim + 2) : 0;
  const mirasol::Scratch parts(splits * part);
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
  if (x.is_contiguous()) return empty_strided(4, x.sizes().data(), x.strides().data(), torch_dtype(x));
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
  g.shape.products = products_that_pay(g.shape);
  const Shape& s = g.shape;
  Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v);
  g.dq = output(dq), g.dk = output(dk), g.dv = output(dv);
  Tensor share = dq;  // of halves the sums over chunks need a place of their own
  if (s.dtype != Dtype::float32) share = new_empty(q, {s.batch, s.q_heads, s.q_len, s.dim}, single);
  g.dq_share = output<float>(share);
  const auto turns = std::make_unique<int32_t[]>(s.batch * s.q_heads * tiles(s.q_len));
  const mirasol::Scratch delta(s.batch * s.q_heads * s.q_len);
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
