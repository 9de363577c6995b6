#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#include "common/run.h"
#include "token_learner/kernel.h"

using namespace torch::stable;
using namespace mirasol::token_learner;
using Type = torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

namespace {

template <class Each>
void run(int64_t items, int64_t workspace, double multiply_adds, const Each& each) {
  const auto start = [](int64_t n, const auto& work) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t, int64_t) { work(); });
  };
  const int64_t threads = mirasol::threads_for(multiply_adds, torch::stable::get_num_threads());
  mirasol::share(start, threads, items, workspace, each);
}

constexpr double MOVED = 16;  // an element is read and written in the time of so many multiply-adds

// mirasol_kernels/token_learner/api.py has said all this better to who calls through Python.
void expect(bool fine, const char* name, const char* expected) {
  if (!fine) throw std::runtime_error(std::string("token_learner: ") + name + ": expected " + expected);
}

bool has(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return x.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes().data());
}

// The memory of a contiguous tensor of that dtype and those sizes.
void* memory(const char* name, const Tensor& x, Type type, std::initializer_list<int64_t> sizes) {
  expect(x.scalar_type() == type && has(x, sizes) && x.is_contiguous(), name, "a contiguous tensor as the schema says");
  return x.data_ptr();
}

// A tensor so large that malloc maps fresh pages for it (glibc: always from 32 MB on): large pages where the system gives
// them on demand, since a fault for each 4 KB takes longer than writing them.
void fresh(const Tensor& x, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(x.data_ptr()), first = (at + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (at + bytes) / PAGE * PAGE;
  if (bytes >= 32 << 20 && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Arguments {  // of the schema
  const std::vector<Tensor>& sources;
  const std::vector<Optional>& positions;
  const Tensor &norm_weight, &norm_bias, &w1, &b1, &w2, &b2;
  const Optional& valid;
  bool erf;
  double eps;
  bool divide;
};

struct Checked {
  Type type;
  std::vector<Source> sources;
  Call call{};
  std::optional<mirasol::Scratch> prepared;
  double multiply_adds;  // of forward

  Checked(const Arguments& a, bool gradients) {
    expect(!a.sources.empty() && a.sources.size() == a.positions.size(), "sources, positions", "as many of both");
    const Tensor& first = a.sources[0];
    type = first.scalar_type();
    expect(type == Type::Float || type == Type::BFloat16 || type == Type::Half, "sources",
           "float32, bfloat16 or float16");
    expect(first.dim() == 3 && a.w1.dim() == 2 && a.w2.dim() == 2, "sources, w1, w2", "3, 2 and 2 dimensions");
    const int64_t batch = first.size(0), c = first.size(2), h = a.w1.size(0), k = a.w2.size(0);
    expect(c > 0 && h > 0 && k > 0, "sources, w1, w2", "no empty dimension but that of the tokens and the batch");
    double tokens = 0;
    for (size_t i = 0; i < a.sources.size(); ++i) {
      const Tensor& x = a.sources[i];
      expect(x.scalar_type() == type && x.dim() == 3 && has(x, {batch, x.size(1), c}), "sources",
             "one dtype, batch and number of channels");
      expect(x.stride(2) == 1 || c == 1, "sources", "stride 1 in the last dimension");
      const void* table = a.positions[i] ? memory("positions", *a.positions[i], type, {x.size(1), c}) : nullptr;
      sources.push_back({x.data_ptr(), x.size(1), x.stride(0), x.stride(1), table});
      tokens += double(batch) * x.size(1);
    }
    call.batch = batch, call.c = c, call.h = h, call.k = k;
    call.sources = sources.data(), call.count = int64_t(sources.size());
    call.weights = {memory("norm_weight", a.norm_weight, type, {c}), memory("norm_bias", a.norm_bias, type, {c}),
                    memory("w1", a.w1, type, {h, c}),                memory("b1", a.b1, type, {h}),
                    memory("w2", a.w2, type, {k, h}),                memory("b2", a.b2, type, {k})};
    if (a.valid)
      call.valid = static_cast<const int64_t*>(memory("valid", *a.valid, Type::Long, {batch, call.count}));
    call.erf = a.erf, call.eps = float(a.eps), call.divide = a.divide;
    call.dtype = type == Type::Float ? Dtype::float32 : type == Type::Half ? Dtype::float16 : Dtype::bfloat16;
    call.products = products_that_pay(call), call.gradients = gradients;
    prepared.emplace(MIRASOL_CALL(token_learner_prepared, call));
    call.prepared = prepared->get();
    multiply_adds = tokens * (double(c) * (h + k) + double(h) * k);
    run(MIRASOL_CALL(token_learner_prepare_items, call), 0, MOVED * double(c) * h,
        [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_prepare, call, begin, end); });
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const std::vector<Tensor>& sources, const std::vector<Optional>& positions,
                                           const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w1,
                                           const Tensor& b1, const Tensor& w2, const Tensor& b2, const Optional& valid,
                                           bool erf, double eps, bool divide) {
  const Checked checked({sources, positions, norm_weight, norm_bias, w1, b1, w2, b2, valid, erf, eps, divide}, false);
  const Call& call = checked.call;
  const Tensor& like = sources[0];
  const Tensor max = new_empty(like, {call.batch, call.k}, Type::Float), sum = empty_like(max);
  const Tensor pooled = new_empty(like, {call.batch, call.k, call.c}, Type::Float);
  const auto turns = std::make_unique<int32_t[]>(call.batch);
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  const Forward f{call, floats(max), floats(sum), floats(pooled), turns.get()};
  run(MIRASOL_CALL(token_learner_forward_items, call), MIRASOL_CALL(token_learner_forward_workspace, call),
      checked.multiply_adds,
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_forward, f, space, begin, end); });
  return {max, sum, pooled};
}

std::vector<Tensor> backward(const Tensor& dpooled, const Optional& dsum, const Tensor& max, const Tensor& sum,
                             const Optional& pooled, const std::vector<Tensor>& sources,
                             const std::vector<Optional>& positions, const Tensor& norm_weight, const Tensor& norm_bias,
                             const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                             const Optional& valid, bool erf, double eps, bool divide) {
  const Checked checked({sources, positions, norm_weight, norm_bias, w1, b1, w2, b2, valid, erf, eps, divide}, true);
  const Call& call = checked.call;
  const int64_t batch = call.batch, k = call.k, c = call.c;
  expect(divide ? bool(pooled) : bool(dsum), "pooled, dsum", "pooled with `divide`, dsum without");
  const auto floats = [&](const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
    return static_cast<const float*>(memory(name, x, Type::Float, sizes));
  };
  Backward g{};
  g.call = call;
  g.dpooled = floats("dpooled", dpooled, {batch, k, c});
  g.max = floats("max", max, {batch, k}), g.sum = floats("sum", sum, {batch, k});
  if (divide) g.pooled = floats("pooled", *pooled, {batch, k, c});
  else g.dsum = floats("dsum", *dsum, {batch, k});
  std::vector<Tensor> results;
  std::vector<void*> dsources, dtables;
  const auto result = [&](const Tensor& like) {
    results.push_back(new_empty(like, like.sizes()));
    fresh(results.back(), like.numel() * like.element_size());
    return results.back().data_ptr();
  };
  for (const Tensor& x : sources) dsources.push_back(result(x));
  for (const Optional& x : positions) dtables.push_back(x ? result(*x) : nullptr);
  const Tensor* const weights[] = {&norm_weight, &norm_bias, &w1, &b1, &w2, &b2};
  for (int i = 0; i < 6; ++i) g.dweights[i] = result(*weights[i]);
  const int64_t sums = MIRASOL_CALL(token_learner_totals, call);
  const mirasol::Scratch totals(sums);
  std::fill_n(totals.get(), sums, 0.f);
  int32_t turn = 0;
  g.dsources = dsources.data(), g.dtables = dtables.data(), g.totals = totals.get(), g.turn = &turn;
  run(MIRASOL_CALL(token_learner_backward_items, call), MIRASOL_CALL(token_learner_backward_workspace, call),
      3 * checked.multiply_adds,
      [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_backward, g, space, begin, end); });
  double moved = double(c) * call.h;  // weights' gradients, and tables'
  for (size_t i = 0; i < sources.size(); ++i) moved += positions[i] ? double(batch) * sources[i].size(1) * c : 0;
  run(MIRASOL_CALL(token_learner_backward_rest_items, call), 0, MOVED * moved,
      [&](float*, int64_t begin, int64_t end) { MIRASOL_CALL(token_learner_backward_rest, g, begin, end); });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mirasol_native, CPU, m) {
  m.impl("token_learner_fwd", TORCH_BOX(&forward));
  m.impl("token_learner_bwd", TORCH_BOX(&backward));
}
