#pragma once
// Tensors as the bindings get them -> what kernels take, checked.  A template on the tensor's class, so that it names
// no torch header; mirasol_kernels/block_causal_attention/api.py has said it better to who calls through Python.
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include "block_causal_attention/kernel.h"

namespace mirasol::attention {

inline std::string tuple(const int64_t* sizes, size_t n) {
  std::string text = "(";
  for (size_t i = 0; i < n; ++i) {
    if (i) text += ", ";
    text += sizes[i] < 0 ? "any" : std::to_string(sizes[i]);
  }
  return text + ")";
}

[[noreturn]] inline void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string("block_causal_attention: ") + name + ": expected " + expected + ", got " + got);
}

inline void expect(bool fine, const char* name, const char* expected, const char* got) {
  if (!fine) refuse(name, expected, got);
}

// Of these sizes (-1: any).
template <class Tensor>
void expect_sizes(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
  bool fine = x.dim() == int64_t(want.size());
  for (size_t i = 0; fine && i < want.size(); ++i) fine = want.begin()[i] < 0 || want.begin()[i] == x.size(i);
  if (!fine) refuse(name, tuple(want.begin(), want.size()), tuple(x.sizes().data(), x.dim()));
}

template <class T, class Tensor>
const T* elements(const char* name, const Tensor& x) {
  using Type = decltype(x.scalar_type());
  const bool fine = x.scalar_type() == (std::is_same_v<T, float> ? Type::Float : Type::Int);
  expect(fine, name, std::is_same_v<T, float> ? "float32" : "int32", "another dtype");
  return static_cast<const T*>(x.data_ptr());
}

// (B, H, N) of floats.
template <class Tensor>
View<const float> of_rows(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
  expect_sizes(name, x, want);
  return {elements<float>(name, x), x.stride(0), x.stride(1), x.stride(2)};
}

template <class Tensor>
Dtype dtype_of(const char* name, const Tensor& x) {
  using Type = decltype(x.scalar_type());
  const Type type = x.scalar_type();
  expect(type == Type::Float || type == Type::BFloat16 || type == Type::Half, name, "float32, bfloat16 or float16",
         "another dtype");
  return type == Type::Float ? Dtype::float32 : type == Type::Half ? Dtype::float16 : Dtype::bfloat16;
}

// (B, H, N, D) of the dtype of the call.
template <class Tensor>
View<const void> input(const char* name, const Tensor& x, Dtype dtype, std::initializer_list<int64_t> want) {
  expect_sizes(name, x, want);
  if (x.size(3) > 1 && x.stride(3) != 1)
    refuse(name, "stride 1 in the last dimension", std::to_string(x.stride(3)));
  expect(dtype_of(name, x) == dtype, name, "the dtype of q", "another");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T = void, class Tensor>
View<T> output(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class Tensor>
const int32_t* table(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
  expect_sizes(name, x, want);
  expect(x.is_contiguous(), name, "a contiguous table", "strides");
  return elements<int32_t>(name, x);
}

template <class Tensor>
Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  expect_sizes("q", q, {-1, -1, -1, -1});
  expect_sizes("k", k, {q.size(0), -1, -1, q.size(3)});
  expect_sizes("v", v, {q.size(0), k.size(1), k.size(2), -1});
  Shape shape{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), float(scale)};
  shape.dtype = dtype_of("q", q);
  if (shape.dim < 1 || shape.value_dim < 1 || shape.dim > MAX_DIM || shape.value_dim > MAX_DIM)
    refuse("q, v", "1 to 256 in the last dimension",
           std::to_string(shape.dim) + " and " + std::to_string(shape.value_dim));
  const bool grouped = shape.kv_heads > 0 ? shape.q_heads % shape.kv_heads == 0 : shape.q_heads == 0;
  if (!grouped)
    refuse("q", "a multiple of " + std::to_string(shape.kv_heads) + " heads", std::to_string(shape.q_heads));
  return shape;
}

template <class Tensor>
Ranges ranges_of(const Shape& shape, const Tensor& q_offsets, const Tensor& k_ranges) {
  expect_sizes("q_offsets", q_offsets, {-1, -1});
  const int64_t batch = q_offsets.size(0), groups = q_offsets.size(1) - 1;
  if (batch != 1 && batch != shape.batch)
    refuse("q_offsets", "1 or " + std::to_string(shape.batch) + " tables", std::to_string(batch));
  expect(groups >= 0, "q_offsets", "at least one column", "none");
  const int32_t* offsets = table("q_offsets", q_offsets, {batch, groups + 1});
  const int32_t* ranges = table("k_ranges", k_ranges, {batch, groups, -1, 2});
  return {batch, groups, k_ranges.size(2), offsets, ranges};
}

template <class Tensor>
Transposed transposed_of(const Ranges& seen, const Tensor& k_offsets, const Tensor& q_index, const Tensor& q_ranges) {
  expect_sizes("k_offsets", k_offsets, {seen.batch, -1});
  const int64_t segments = k_offsets.size(1) - 1;
  expect(segments >= 0, "k_offsets", "at least one column", "none");
  const int32_t* offsets = table("k_offsets", k_offsets, {seen.batch, segments + 1});
  const int32_t* index = table("q_index", q_index, {seen.batch, segments + 1});
  const int32_t* ranges = table("q_ranges", q_ranges, {seen.batch, -1, 2});
  return {segments, q_ranges.size(1), offsets, index, ranges};
}

template <class Tensor>
Forward forward_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets, const Tensor& k_ranges,
                   double scale) {
  Forward f{};
  f.shape = shape_of(q, k, v, scale);
  f.seen = ranges_of(f.shape, q_offsets, k_ranges);
  const Dtype dtype = f.shape.dtype;
  f.q = input("q", q, dtype, {-1, -1, -1, -1}), f.k = input("k", k, dtype, {-1, -1, -1, -1});
  f.v = input("v", v, dtype, {-1, -1, -1, -1});
  return f;
}

template <class Tensor>
Backward backward_of(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& out, const Tensor& lse, const Tensor& lse_low, const Tensor& q_offsets,
                     const Tensor& k_ranges, const Tensor& k_offsets, const Tensor& q_index, const Tensor& q_ranges,
                     double scale) {
  const Forward f = forward_of(q, k, v, q_offsets, k_ranges, scale);
  const Shape& s = f.shape;
  Backward g{};
  g.shape = s, g.seen = f.seen, g.q = f.q, g.k = f.k, g.v = f.v;
  g.seen_by = transposed_of(g.seen, k_offsets, q_index, q_ranges);
  g.dout = input("dout", dout, s.dtype, {s.batch, s.q_heads, s.q_len, s.value_dim});
  g.out = input("out", out, s.dtype, {s.batch, s.q_heads, s.q_len, s.value_dim});
  g.lse = of_rows("lse", lse, {s.batch, s.q_heads, s.q_len});
  g.lse_low = of_rows("lse_low", lse_low, {s.batch, s.q_heads, s.q_len});
  g.dlse = of_rows("dlse", dlse, {s.batch, s.q_heads, s.q_len});
  return g;
}

// A view of (B, N, H, D) gets a result of the same kind, so that joining the heads afterwards is free.
template <class Tensor>
bool rows_before_heads(const Tensor& q) {
  return q.stride(1) < q.stride(2);
}

}  // namespace mirasol::attention
