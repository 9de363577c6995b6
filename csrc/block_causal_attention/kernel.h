#pragma once
// Block-causal attention on the CPU: raw pointers and sizes, no torch.
// Each query row sees up to `ranges` disjoint ranges of keys, the same for all rows of a group (tables as
// mirasol_kernels/layout.py builds them).  Work is cut into items that do not depend on the number of threads, and each
// output element is summed in one fixed order: results are bitwise the same for any number of threads.
#include <cstdint>
#include "common/dtype.h"
#include "common/isa.h"

namespace mirasol::attention {

using mirasol::Dtype;
using mirasol::Products;

template <class T>  // T is void where the dtype is that of the shape
struct View {       // a tensor (batch, head, row, element); strides in elements, the last one is 1
  T* data;
  int64_t batch, head, row;
};

struct Shape {
  int64_t batch, q_heads, kv_heads, q_len, k_len;  // query head h uses kv head h / (q_heads / kv_heads)
  int64_t dim, value_dim;                          // of q and k; of v and out
  float scale;
  Dtype dtype = Dtype::float32;  // of q, k, v, out and their gradients
  Products products = Products::single;  // others: of bfloat16 with even dims only
  int64_t threads = 16;  // that will share the items of forward: says how many tiles make one, and changes no result
};

inline Products products_that_pay(const Shape& s) {
  if (s.dtype != Dtype::bfloat16 || s.dim % 2 || s.value_dim % 2) return Products::single;
  return isa() == Isa::amx ? Products::amx : pairs_pay() ? Products::pairs : Products::single;
}

struct Ranges {  // the keys that a query row sees
  int64_t batch, groups, ranges;  // batch: 1, for all rows of the batch, or one table for each
  const int32_t* q_offsets;       // (batch, groups + 1): group g owns rows q_offsets[g] .. q_offsets[g + 1] - 1
  const int32_t* k_ranges;        // (batch, groups, ranges, 2): begin and end, ascending, empty ones last
};

struct Transposed {  // the query rows that see a key
  int64_t segments, entries;
  const int32_t* k_offsets;  // (batch, segments + 1): segment s owns keys k_offsets[s] .. k_offsets[s + 1] - 1
  const int32_t* q_index;    // (batch, segments + 1): its ranges are q_ranges[q_index[s] .. q_index[s + 1] - 1]
  const int32_t* q_ranges;   // (batch, entries, 2)
};

struct Forward {
  Shape shape;
  Ranges seen;
  View<const void> q, k, v;
  View<void> out;
  // (batch, q_heads, q_len), contiguous.  The natural logarithm of the sum of exp(score), -inf for a row that sees
  // nothing, and what its rounding left out: half an ulp of lse is 5e-4 at 1e4, too much for exp(score - lse).
  float *lse, *lse_low;
  float* parts = nullptr;  // (splits, batch, q_heads, q_len, value_dim + 2), contiguous, where there are splits
};

struct Backward {
  Shape shape;
  Ranges seen;
  Transposed seen_by;
  View<const void> dout, q, k, v, out;
  View<const float> dlse, lse, lse_low;  // (batch, q_heads, q_len): here `row` is the stride of the last axis
  View<void> dq, dk, dv;
  float* delta;          // (batch, q_heads, q_len), contiguous, of the rows: made first, then used for every key
  View<float> dq_share;  // like dq, for the sum of the shares so far: dq itself where that is float
  int32_t* turns;        // (batch, q_heads, tiles(q_len)), all zeros at the start
};

constexpr int64_t MAX_DIM = 256;
constexpr int TILE = 64;  // query rows of a tile
// With fewer tiles than that, keys are split, each part at least that long: enough work for a large machine, and the
// same on every one.
constexpr int64_t PARALLEL = 64, SPLIT_KEYS = 1024;
constexpr int64_t tiles(int64_t q_len) { return (q_len + TILE - 1) / TILE; }

}  // namespace mirasol::attention

// Workspace: how many floats each thread needs, 64-byte aligned, not initialised.  Items [begin, end) may be run in any
// cut, except that the last function's must be begun in ascending order: one may wait for lower ones to have added
// their share of dq.  (One thread that runs all is right, and so are threads that draw items from a counter.)
//   forward             attention_forward_items items of attention_forward
//   forward, then       where there are splits, attention_tiles items of attention_merge
//   backward, first     attention_tiles items of attention_backward_rows, all of them before
//   backward, then      attention_backward_items items of attention_backward
MIRASOL_DECLARE(
    int64_t attention_tiles(const attention::Shape&);
    int64_t attention_splits(const attention::Shape&);
    int64_t attention_forward_items(const attention::Shape&);
    int64_t attention_workspace(const attention::Shape&);
    void attention_forward(const attention::Forward&, float* workspace, int64_t begin, int64_t end);
    void attention_merge(const attention::Forward&, int64_t begin, int64_t end);
    int64_t attention_backward_items(const attention::Shape&);
    int64_t attention_backward_workspace(const attention::Shape&);
    void attention_backward_rows(const attention::Backward&, int64_t begin, int64_t end);
    void attention_backward(const attention::Backward&, float* workspace, int64_t begin, int64_t end))
