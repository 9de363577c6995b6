#pragma once
// The token learner on the CPU: raw pointers and sizes, no torch.  mirasol_kernels/token_learner/README.md has the
// mathematics; n tokens, c channels, h hidden units, k learned tokens.
// Work is cut into items that do not depend on the number of threads, and each sum has one fixed order: results are
// bitwise the same for any number of threads.
#include <cstdint>
#include "common/dtype.h"
#include "common/isa.h"

namespace mirasol::token_learner {

using mirasol::Dtype;
using mirasol::Products;

struct Source {
  const void* data;            // (batch, tokens, c); strides in elements, the last one is 1
  int64_t tokens, batch, row;  // how many of them; the other two strides
  const void* table;           // (tokens, c), contiguous, or none: what is added to the tokens
};

struct Weights {  // contiguous
  const void *norm_weight, *norm_bias, *w1, *b1, *w2, *b2;
};

struct Call {
  int64_t batch, c, h, k;
  const Source* sources;
  int64_t count;         // of sources
  Weights weights;       // of the sources' dtype, like their tables
  const int64_t* valid;  // (batch, count): how many leading tokens count, clamped; or none: all of them
  bool erf;              // which GELU
  float eps;
  bool divide;      // pooled: finished tokens; else the weighted sums of the state
  Dtype dtype;
  Products products;  // the large ones; pairs: of bfloat16 with even c only, in tile registers with whole ones of c
  float* prepared;  // token_learner_prepared floats, shared by all threads
  bool gradients;   // backward is to come as well: it takes weights in more than one order
};

inline Products products_that_pay(const Call& call) {
  if (call.dtype != Dtype::bfloat16) return Products::single;
  if (isa() == Isa::amx && call.c % 32 == 0) return Products::amx;
  return pairs_pay() && call.c % 2 == 0 ? Products::pairs : Products::single;
}

struct Forward {
  Call call;
  float *max, *sum;  // (batch, k)
  float* pooled;     // (batch, k, c)
  int32_t* turns;    // (batch), all zeros at the start
};

struct Backward {
  Call call;
  const float* dpooled;
  const float* dsum;  // (batch, k); none with `divide`
  const float *max, *sum;
  const float* pooled;    // none without `divide`
  void* const* dsources;  // (batch, tokens, c) each, contiguous
  void* const* dtables;   // none where there is no table
  void* dweights[6];      // in the order of Weights
  float* totals;          // token_learner_totals floats, all zeros at the start
  int32_t* turn;          // 0 at the start
};

}  // namespace mirasol::token_learner

// Workspace: how many floats each thread needs, 64-byte aligned, not initialised.  Items [begin, end) may be run in any
// cut, except that those of token_learner_forward and token_learner_backward must be begun in ascending order: one may
// wait for lower ones to have added their share.
//   forward   token_learner_prepare, then token_learner_forward
//   backward  token_learner_prepare, token_learner_backward, token_learner_backward_rest
// Each begins when the one before it has ended.
MIRASOL_DECLARE(
    int64_t token_learner_prepared(const token_learner::Call&);
    int64_t token_learner_prepare_items(const token_learner::Call&);
    void token_learner_prepare(const token_learner::Call&, int64_t begin, int64_t end);
    int64_t token_learner_forward_items(const token_learner::Call&);
    int64_t token_learner_forward_workspace(const token_learner::Call&);
    void token_learner_forward(const token_learner::Forward&, float* workspace, int64_t begin, int64_t end);
    int64_t token_learner_totals(const token_learner::Call&);
    int64_t token_learner_backward_items(const token_learner::Call&);
    int64_t token_learner_backward_workspace(const token_learner::Call&);
    void token_learner_backward(const token_learner::Backward&, float* workspace, int64_t begin, int64_t end);
    int64_t token_learner_backward_rest_items(const token_learner::Call&);
    void token_learner_backward_rest(const token_learner::Backward&, int64_t begin, int64_t end))
