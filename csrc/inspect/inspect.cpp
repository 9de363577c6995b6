// mirasol_kernels._inspect: the C++ side for tests and benchmarks, on NumPy arrays, with no torch in the process.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "block_causal_attention/kernel.h"
#include "common/run.h"

namespace py = pybind11;
using namespace mirasol;
using namespace mirasol::attention;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

namespace {

std::map<std::string, long> caches() {  // bytes; 0 where the system does not say
  return {{"l1d", sysconf(_SC_LEVEL1_DCACHE_SIZE)}, {"l2", sysconf(_SC_LEVEL2_CACHE_SIZE)},
          {"l3", sysconf(_SC_LEVEL3_CACHE_SIZE)}};
}

void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

void expect_dims(const Shape& s) {
  expect(std::min(s.dim, s.value_dim) > 0 && std::max(s.dim, s.value_dim) <= MAX_DIM,
         "q, v: expected a head_dim of 1 to 256");
}

Shape shape_of(const Floats& q, const Floats& k, const Floats& v, float scale) {
  expect(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "q, k, v: expected (batch, heads, tokens, head_dim)");
  const Shape s{q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3), scale};
  expect(k.shape(0) == s.batch && k.shape(3) == s.dim, "k: expected batch and head_dim like q");
  expect(v.shape(0) == s.batch && v.shape(1) == s.kv_heads && v.shape(2) == s.k_len, "v: expected sizes like k");
  expect(s.kv_heads > 0 && s.q_heads % s.kv_heads == 0, "q: expected heads a multiple of those of k");
  expect_dims(s);
  return s;
}

Ranges ranges_of(const Ints& q_offsets, const Ints& k_ranges) {
  expect(q_offsets.ndim() == 2 && k_ranges.ndim() == 4 && k_ranges.shape(3) == 2 &&
             q_offsets.shape(0) == k_ranges.shape(0) && q_offsets.shape(1) == k_ranges.shape(1) + 1,
         "expected q_offsets (B, G + 1) and k_ranges (B, G, R, 2)");
  return {k_ranges.shape(0), k_ranges.shape(1), k_ranges.shape(2), q_offsets.data(), k_ranges.data()};
}

template <class T, class Array>
View<T> view(const Array& x, T* data) {
  return {data, x.shape(1) * x.shape(2) * x.shape(3), x.shape(2) * x.shape(3), x.shape(3)};
}
View<const void> in(const Floats& x) { return view<const void>(x, x.data()); }
View<void> out(Floats& x) { return view<void>(x, x.mutable_data()); }

Floats like(int64_t b, int64_t h, int64_t n, int64_t d) { return Floats(std::vector<int64_t>{b, h, n, d}); }

std::tuple<Floats, Floats> forward(const Floats& q, const Floats& k, const Floats& v, const Ints& q_offsets,
                                   const Ints& k_ranges, float scale, int threads) {
  const Shape s = shape_of(q, k, v, scale);
  Floats result = like(s.batch, s.q_heads, s.q_len, s.value_dim), lse({s.batch, s.q_heads, s.q_len});
  const int64_t tiles = MIRASOL_CALL(attention_tiles, s), splits = MIRASOL_CALL(attention_splits, s);
  std::vector<float> lse_low(lse.size()), parts(splits > 1 ? splits * lse.size() * (s.value_dim + 2) : 0);
  const Forward call{s, ranges_of(q_offsets, k_ranges), in(q), in(k), in(v), out(result), lse.mutable_data(),
                     lse_low.data(), parts.data()};
  share(OwnThreads{}, threads, MIRASOL_CALL(attention_forward_items, s), MIRASOL_CALL(attention_workspace, s),
        [&](float* space, int64_t begin, int64_t end) { MIRASOL_CALL(attention_forward, call, space, begin, end); });
  if (splits > 1) MIRASOL_CALL(attention_merge, call, 0, tiles);
  return {result, lse};
}

// How a call is cut: work items, floats of workspace per thread, rows of a tile.
std::map<std::string, int64_t> plan(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t q_len, int64_t k_len,
                                    int64_t dim, int64_t value_dim) {
  const Shape s{batch, q_heads, kv_heads, q_len, k_len, dim, value_dim, 1};
  expect_dims(s);
  return {{"tile", TILE},
          {"tiles", MIRASOL_CALL(attention_tiles, s)},
          {"forward_items", MIRASOL_CALL(attention_forward_items, s)},
          {"splits", MIRASOL_CALL(attention_splits, s)},
          {"workspace", MIRASOL_CALL(attention_workspace, s)},
          {"backward_items", MIRASOL_CALL(attention_backward_items, s)},
          {"backward_workspace", MIRASOL_CALL(attention_backward_workspace, s)}};
}

}  // namespace

PYBIND11_MODULE(_inspect, m) {
  m.doc() = "The torch-free C++ side of mirasol_kernels.";
  m.def("isa", [] { return isa_name(isa()); }, "instruction set in use");
  m.def("caches", caches, "bytes of the data caches");
  m.def("attention_plan", plan, py::arg("batch"), py::arg("q_heads"), py::arg("kv_heads"), py::arg("q_len"),
        py::arg("k_len"), py::arg("dim"), py::arg("value_dim"));
  m.def("attention_forward", forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_offsets"),
        py::arg("k_ranges"), py::arg("scale"), py::arg("threads") = 1, "(out, lse) of block_causal_attention");
}
