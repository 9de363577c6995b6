// Schemas: mirasol_kernels/latent_recurrence/op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#include "latent_recurrence/kernel.h"

using namespace torch::stable;
using namespace mirasol::latent_recurrence;
using Type = torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

namespace {

// hoisted.py and op.py have said all this better to who calls through Python.
void expect(bool fine, const char* name, const char* expected) {
  if (!fine) throw std::runtime_error(std::string("latent_recurrence: ") + name + ": expected " + expected);
}

float* memory(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  const bool has = x.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes().data());
  expect(has && x.scalar_type() == Type::Float && x.is_contiguous(), name, "contiguous float32, as the schema says");
  return static_cast<float*>(x.data_ptr());
}

// Takes tensors of a list one after the other.
struct Taken {
  const char* name;
  const std::vector<Tensor>& list;
  size_t next = 0;

  const Tensor& tensor() {
    expect(next < list.size(), name, "as many tensors as the schema says");
    return list[next++];
  }
  float* floats(std::initializer_list<int64_t> sizes) { return memory(name, tensor(), sizes); }
  template <class T>
  NormOf<T> norm(int64_t c) {
    float* const weight = floats({c});
    return {weight, floats({c})};
  }
  template <class T>
  LinearOf<T> linear(int64_t out, int64_t in) {
    float* const weight = floats({out, in});
    return {weight, floats({out})};
  }
  template <class T>
  PoolOf<T> pool(const Call& s, int64_t k) {
    const NormOf<T> first = norm<T>(s.c);
    const LinearOf<T> hidden = linear<T>(s.hidden, s.c);
    return {first, hidden, linear<T>(k, s.hidden)};
  }
  template <class T>
  BlockOf<T> block(const Call& s) {
    BlockOf<T> b;
    b.norm1 = norm<T>(s.c);
    for (LinearOf<T>* l : {&b.q, &b.k, &b.v, &b.out}) *l = linear<T>(s.c, s.c);
    b.norm2 = norm<T>(s.c);
    b.hidden = linear<T>(s.mlp, s.c), b.shrink = linear<T>(s.c, s.mlp);
    return b;
  }
};

constexpr size_t POOL = 6, BLOCK = 16, NORM = 2, TABLES = 4;

struct Checked {
  Call call{};
  std::vector<Block> blocks;

  Checked(const Tensor& start, const std::vector<Tensor>& for_read, const std::vector<Tensor>& for_write,
          const std::vector<Tensor>& weights, const std::vector<Optional>& tables, int64_t heads) {
    expect(start.dim() == 3, "memory", "3 dimensions");
    expect(for_read.size() == 3 && for_write.size() == 3, "for_read, for_write", "3 tensors each");
    expect(for_read[2].dim() == 4, "for_read", "a weighted sum of 4 dimensions");
    expect(weights.size() > 2 * POOL + NORM && (weights.size() - 2 * POOL - NORM) % BLOCK == 0, "weights",
           "those of two pools, of blocks and of a norm");
    expect(tables.size() == TABLES, "tables", "four");
    call.batch = start.size(0), call.memory = start.size(1), call.c = start.size(2);
    call.steps = for_read[2].size(1), call.read = for_read[2].size(2), call.heads = heads;
    call.layers = int64_t((weights.size() - 2 * POOL - NORM) / BLOCK);
    expect(weights[2].dim() == 2 && weights[weights.size() - NORM - 4].dim() == 2, "weights", "matrices");
    call.hidden = weights[2].size(0), call.mlp = weights[weights.size() - NORM - 4].size(0);
    expect(call.batch > 0 && call.steps > 0 && call.memory > 0 && call.read > 0, "memory, for_read", "nothing empty");
    expect(call.c % 16 == 0 && call.hidden % 16 == 0 && call.mlp % 16 == 0, "weights", "widths that are multiples of 16");
    expect(heads > 0 && call.c % heads == 0, "heads", "a divisor of the width");
    const int64_t B = call.batch, T = call.steps, mem = call.memory, r = call.read, c = call.c;
    call.start = ::memory("memory", start, {B, mem, c});
    const auto state = [&](const char* name, const std::vector<Tensor>& list, int64_t k) {
      Taken taken{name, list};
      float *const max = taken.floats({B, T, k}), *const sum = taken.floats({B, T, k});
      return State{max, sum, taken.floats({B, T, k, c})};
    };
    call.for_read = state("for_read", for_read, r), call.for_write = state("for_write", for_write, mem);
    Taken taken{"weights", weights};
    call.reader = taken.pool<const float>(call, r), call.writer = taken.pool<const float>(call, mem);
    for (int64_t i = 0; i < call.layers; ++i) blocks.push_back(taken.block<const float>(call));
    call.blocks = blocks.data();
    call.norm = taken.norm<const float>(c);
    const float** const to[] = {&call.read_table, &call.write_table, &call.output_table, &call.process_table};
    for (size_t i = 0; i < TABLES; ++i)
      *to[i] = tables[i] ? ::memory("tables", *tables[i], {i < 2 ? mem : r, c}) : nullptr;
  }
};

struct Workspace {
  static constexpr std::align_val_t alignment{64};
  float* floats;
  explicit Workspace(int64_t n) : floats(static_cast<float*>(::operator new(n * sizeof(float), alignment))) {}
  ~Workspace() { ::operator delete(floats, alignment); }
  Workspace(const Workspace&) = delete;
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
  const Checked checked(start, for_read, for_write, weights, tables, heads);
  const Call& s = checked.call;
  const Tensor last = new_empty(start, start.sizes()), outputs = new_empty(start, {s.batch, s.steps, s.read, s.c});
  const Tensor kept = new_empty(start, {s.batch, keep ? s.steps : 0, s.memory, s.c});
  const auto floats = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  const Workspace space(MIRASOL_CALL(latent_recurrence_forward_workspace, s));
  const Forward f{s, floats(last), floats(outputs), keep ? floats(kept) : nullptr};
  MIRASOL_CALL(latent_recurrence_forward, f, TEAM, space.floats);
  return {last, outputs, kept};
}

std::vector<Tensor> backward(const Tensor& dlast, const Tensor& doutputs, const Tensor& kept, const Tensor& start,
                             const std::vector<Tensor>& for_read, const std::vector<Tensor>& for_write,
                             const std::vector<Tensor>& weights, const std::vector<Optional>& tables, int64_t heads) {
  const Checked checked(start, for_read, for_write, weights, tables, heads);
  const Call& s = checked.call;
  Backward g{};
  g.call = s;
  g.dlast = ::memory("dmemory", dlast, {s.batch, s.memory, s.c});
  g.doutputs = ::memory("doutputs", doutputs, {s.batch, s.steps, s.read, s.c});
  g.kept = ::memory("kept", kept, {s.batch, s.steps, s.memory, s.c});
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
  Taken taken{"weights", dweights};
  g.dreader = taken.pool<float>(s, s.read), g.dwriter = taken.pool<float>(s, s.memory);
  std::vector<BlockOf<float>> dblocks;
  for (int64_t i = 0; i < s.layers; ++i) dblocks.push_back(taken.block<float>(s));
  g.dblocks = dblocks.data();
  g.dnorm = taken.norm<float>(s.c);
  float** const to[] = {&g.dread_table, &g.dwrite_table, &g.doutput_table, &g.dprocess_table};
  for (size_t i = 0; i < TABLES; ++i)
    if (tables[i]) *to[i] = result(*tables[i]);
  const Workspace space(MIRASOL_CALL(latent_recurrence_backward_workspace, s));
  MIRASOL_CALL(latent_recurrence_backward, g, TEAM, space.floats);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mirasol_native, CPU, m) {
  m.impl("latent_recurrence_fwd", TORCH_BOX(&forward));
  m.impl("latent_recurrence_bwd", TORCH_BOX(&backward));
}
