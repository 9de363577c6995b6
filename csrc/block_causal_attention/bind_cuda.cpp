// Schemas as in mirasol_kernels/block_causal_attention/op.py, plus the stream.  What asks torch for it is not in
// libtorch_cpu, the only library we link, so that this one also loads beside a CPU build of torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <stdexcept>
#include <tuple>
#include "block_causal_attention/arguments.h"
#include "block_causal_attention/cuda.h"

using namespace torch::stable;
using namespace mirasol::attention;

namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("block_causal_attention: CUDA launch failed: ") + error);
}

void float32_only(const Shape& s) { expect(s.dtype == Dtype::float32, "q", "float32", "another dtype"); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                                           const Tensor& k_ranges, double scale, int64_t stream) {
  Forward f = forward_of(q, k, v, q_offsets, k_ranges, scale);
  const Shape& s = f.shape;
  float32_only(s);
  const accelerator::DeviceGuard device(q.get_device_index());
  Tensor out = rows_before_heads(q) ? transpose(new_empty(q, {s.batch, s.q_len, s.q_heads, s.value_dim}), 1, 2)
                                    : new_empty(q, {s.batch, s.q_heads, s.q_len, s.value_dim});
  Tensor lse = new_empty(q, {s.batch, s.q_heads, s.q_len}), lse_low = empty_like(lse);
  f.out = output(out), f.lse = output<float>(lse).data, f.lse_low = output<float>(lse_low).data;
  check(mirasol::cuda::attention_forward(f, reinterpret_cast<void*>(stream)));
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
                                            double scale, int64_t stream) {
  Backward g = backward_of(dout, dlse, q, k, v, out, lse, lse_low, q_offsets, k_ranges, k_offsets, q_index, q_ranges,
                           scale);
  const Shape& s = g.shape;
  float32_only(s);
  const accelerator::DeviceGuard device(q.get_device_index());
  Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v);
  g.dq = output(dq), g.dk = output(dk), g.dv = output(dv);
  Tensor delta = new_empty(q, {s.batch, s.q_heads, s.q_len});
  g.delta = output<float>(delta).data;
  check(mirasol::cuda::attention_backward(g, reinterpret_cast<void*>(stream)));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mirasol_cuda_raw, m) {
  m.def(
      "block_causal_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_ranges, float scale, "
      "int stream) -> (Tensor, Tensor, Tensor)");
  m.def(
      "block_causal_attention_bwd(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor lse_low, Tensor q_offsets, Tensor k_ranges, Tensor k_offsets, Tensor q_index, Tensor q_ranges, "
      "float scale, int stream) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mirasol_cuda_raw, CUDA, m) {
  m.impl("block_causal_attention_fwd", TORCH_BOX(&forward));
  m.impl("block_causal_attention_bwd", TORCH_BOX(&backward));
}
