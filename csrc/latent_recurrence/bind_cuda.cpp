// Schema as in mirasol_kernels/latent_recurrence/op.py, plus the stream, which bind_cuda.cpp of block_causal_attention
// explains.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <iterator>
#include <tuple>
#include "latent_recurrence/arguments.h"
#include "latent_recurrence/cuda.h"

using namespace torch::stable;
using namespace mirasol::latent_recurrence;
using Optional = std::optional<Tensor>;

namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& start, const std::vector<Tensor>& for_read,
                                           const std::vector<Tensor>& for_write, const std::vector<Tensor>& weights,
                                           const std::vector<Optional>& tables, int64_t heads, bool keep,
                                           int64_t stream) {
  const Checked<Tensor> checked(start, for_read, for_write, weights, tables, heads);
  const Call& s = checked.call;
  const auto beside = [&](const Tensor& x) {
    expect(x.is_cuda() && x.get_device_index() == start.get_device_index(), "memory", "one GPU for all tensors");
  };
  for (const std::vector<Tensor>* list : {&for_read, &for_write, &weights})
    for (const Tensor& x : *list) beside(x);
  for (const Optional& x : tables)
    if (x) beside(*x);
  const accelerator::DeviceGuard device(start.get_device_index());
  const char* const refusal = mirasol::cuda::recurrence_refusal(s);
  expect(!refusal, "memory, weights", refusal);
  const Tensor last = new_empty(start, start.sizes()), outputs = new_empty(start, {s.batch, s.steps, s.read, s.c});
  const Tensor kept = new_empty(start, {s.batch, keep ? s.steps : 0, s.memory, s.c});
  const Tensor scratch = new_empty(start, {mirasol::cuda::recurrence_scratch(s)});
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  const Forward f{s, floats(last), floats(outputs), keep ? floats(kept) : nullptr};
  const char* const error = mirasol::cuda::recurrence_forward(f, floats(scratch), reinterpret_cast<void*>(stream));
  if (error) throw std::runtime_error(std::string("latent_recurrence: CUDA launch failed: ") + error);
  return {last, outputs, kept};
}

// Whether a call of these sizes (batch, steps, memory, read, c, hidden, mlp, heads, layers) fits that GPU.
bool fits(const std::vector<int64_t>& sizes, int64_t device) {
  Call s{};
  int64_t* const to[] = {&s.batch, &s.steps, &s.memory, &s.read, &s.c, &s.hidden, &s.mlp, &s.heads, &s.layers};
  expect(sizes.size() == std::size(to), "sizes", "nine");
  for (size_t i = 0; i < sizes.size(); ++i) *to[i] = sizes[i];
  const accelerator::DeviceGuard guard{accelerator::DeviceIndex(device)};
  return !mirasol::cuda::recurrence_refusal(s);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mirasol_cuda_raw, m) {
  m.def("latent_recurrence_fits(int[] sizes, int device) -> bool");
  m.def(
      "latent_recurrence_fwd(Tensor memory, Tensor[] for_read, Tensor[] for_write, Tensor[] weights, Tensor?[] tables, "
      "int heads, bool keep, int stream) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mirasol_cuda_raw, CUDA, m) {
  m.impl("latent_recurrence_fwd", TORCH_BOX(&forward));
}

STABLE_TORCH_LIBRARY_IMPL(mirasol_cuda_raw, CompositeExplicitAutograd, m) {
  m.impl("latent_recurrence_fits", TORCH_BOX(&fits));
}
