#pragma once
// Tensors as the bindings get them -> what kernels take, checked.  Templates on the tensor's class, so that they name
// no torch header.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>
#include "latent_recurrence/kernel.h"

namespace mirasol::latent_recurrence {

// hoisted.py and op.py have said all this better to who calls through Python.
inline void expect(bool fine, const char* name, const char* expected) {
  if (!fine) throw std::runtime_error(std::string("latent_recurrence: ") + name + ": expected " + expected);
}

template <class Tensor>
float* memory(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  using Type = decltype(x.scalar_type());
  const bool has = x.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes().data());
  expect(has && x.scalar_type() == Type::Float && x.is_contiguous(), name, "contiguous float32, as the schema says");
  return static_cast<float*>(x.data_ptr());
}

// Takes tensors of a list one after the other.
template <class Tensor>
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

template <class Tensor>
struct Checked {
  Call call{};
  std::vector<Block> blocks;

  Checked(const Tensor& start, const std::vector<Tensor>& for_read, const std::vector<Tensor>& for_write,
          const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& tables, int64_t heads) {
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
    expect(heads > 0 && call.c % heads == 0, "heads", "a divisor of the width");
    const int64_t B = call.batch, T = call.steps, mem = call.memory, r = call.read, c = call.c;
    call.start = latent_recurrence::memory("memory", start, {B, mem, c});
    const auto state = [&](const char* name, const std::vector<Tensor>& list, int64_t k) {
      Taken<Tensor> taken{name, list};
      float *const max = taken.floats({B, T, k}), *const sum = taken.floats({B, T, k});
      return State{max, sum, taken.floats({B, T, k, c})};
    };
    call.for_read = state("for_read", for_read, r), call.for_write = state("for_write", for_write, mem);
    Taken<Tensor> taken{"weights", weights};
    call.reader = taken.template pool<const float>(call, r);
    call.writer = taken.template pool<const float>(call, mem);
    for (int64_t i = 0; i < call.layers; ++i) blocks.push_back(taken.template block<const float>(call));
    call.blocks = blocks.data();
    call.norm = taken.template norm<const float>(c);
    const float** const to[] = {&call.read_table, &call.write_table, &call.output_table, &call.process_table};
    for (size_t i = 0; i < TABLES; ++i)
      *to[i] = tables[i] ? latent_recurrence::memory("tables", *tables[i], {i < 2 ? mem : r, c}) : nullptr;
  }
};

}  // namespace mirasol::latent_recurrence
