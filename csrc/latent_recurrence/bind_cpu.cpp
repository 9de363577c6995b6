// Schemas: mirasol_kernels/latent_recurrence/op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <tuple>
#include "common/run.h"
#include "latent_recurrence/arguments.h"

using namespace torch::stable;
using namespace mirasol::latent_recurrence;
using Optional = std::optional<Tensor>;

namespace {

struct Wide : Checked<Tensor> {
  template <class... Arguments>
  explicit Wide(const Arguments&... arguments) : Checked<Tensor>(arguments...) {
    expect(call.c % 16 == 0 && call.hidden % 16 == 0 && call.mlp % 16 == 0, "weights", "widths in multiples of 16");
  }
};

void run(void*, int64_t items, void (*work)(void*, int64_t), void* argument) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(argument, i);
  });
}

constexpr Team TEAM{nullptr, run};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& start, const std::vector<Tensor>& for_read,
                                           const std::vector<Tensor>& for_write, const std::vector<Tensor>& weights,
                                           const std::vector<Optional>& tables, int64_t heads, bool keep) {
  const Wide checked(start, for_read, for_write, weights, tables, heads);
  const Call& s = checked.call;
  const Tensor last = new_empty(start, start.sizes()), outputs = new_empty(start, {s.batch, s.steps, s.read, s.c});
  const Tensor kept = new_empty(start, {s.batch, keep ? s.steps : 0, s.memory, s.c});
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  const mirasol::Scratch space(MIRASOL_CALL(latent_recurrence_forward_workspace, s));
  const Forward f{s, floats(last), floats(outputs), keep ? floats(kept) : nullptr};
  MIRASOL_CALL(latent_recurrence_forward, f, TEAM, space.get());
  return {last, outputs, kept};
}

std::vector<Tensor> backward(const Tensor& dlast, const Tensor& doutputs, const Tensor& kept, const Tensor& start,
                             const std::vector<Tensor>& for_read, const std::vector<Tensor>& for_write,
                             const std::vector<Tensor>& weights, const std::vector<Optional>& tables, int64_t heads) {
  const Wide checked(start, for_read, for_write, weights, tables, heads);
  const Call& s = checked.call;
  Backward g{};
  g.call = s;
  g.dlast = mirasol::latent_recurrence::memory("dmemory", dlast, {s.batch, s.memory, s.c});
  g.doutputs = mirasol::latent_recurrence::memory("doutputs", doutputs, {s.batch, s.steps, s.read, s.c});
  g.kept = mirasol::latent_recurrence::memory("kept", kept, {s.batch, s.steps, s.memory, s.c});
  std::vector<Tensor> results;
  const auto result = [&](const Tensor& like) {
    results.push_back(new_empty(like, like.sizes()));
    return static_cast<float*>(results.back().data_ptr());
  };
  g.dstart = result(start);
  g.dread_sum = result(for_read[1]), g.dread_pooled = result(for_read[2]);
  g.dwrite_sum = result(for_write[1]), g.dwrite_pooled = result(for_write[2]);
  const size_t before = results.size();
  for (const Tensor& x : weights) result(x);
  const std::vector<Tensor> dweights(results.begin() + before, results.end());
  Taken<Tensor> taken{"weights", dweights};
  g.dreader = taken.pool<float>(s, s.read), g.dwriter = taken.pool<float>(s, s.memory);
  std::vector<BlockOf<float>> dblocks;
  for (int64_t i = 0; i < s.layers; ++i) dblocks.push_back(taken.block<float>(s));
  g.dblocks = dblocks.data();
  g.dnorm = taken.norm<float>(s.c);
  float** const to[] = {&g.dread_table, &g.dwrite_table, &g.doutput_table, &g.dprocess_table};
  for (size_t i = 0; i < TABLES; ++i)
    if (tables[i]) *to[i] = result(*tables[i]);
  const mirasol::Scratch space(MIRASOL_CALL(latent_recurrence_backward_workspace, s));
  MIRASOL_CALL(latent_recurrence_backward, g, TEAM, space.get());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mirasol_native, CPU, m) {
  m.impl("latent_recurrence_fwd", TORCH_BOX(&forward));
  m.impl("latent_recurrence_bwd", TORCH_BOX(&backward));
}
