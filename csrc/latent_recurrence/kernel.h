#pragma once
// The sequential part of a Token Turing Machine, all steps in one call: raw pointers and sizes, no torch, float32.
// mirasol_kernels/latent_recurrence/README.md has the mathematics.  Everything is contiguous.
#include <cstdint>
#include "common/isa.h"

namespace mirasol::latent_recurrence {

template <class T>
struct LinearOf {
  T *weight, *bias;  // (out, in), (out)
};

template <class T>
struct NormOf {
  T *weight, *bias;  // (c)
};

template <class T>
struct PoolOf {  // a token learner: c -> hidden -> k logits of a token
  NormOf<T> norm;
  LinearOf<T> hidden, out;
};

template <class T>
struct BlockOf {  // of the processor
  NormOf<T> norm1;
  LinearOf<T> q, k, v, out;
  NormOf<T> norm2;
  LinearOf<T> hidden, shrink;  // c -> mlp -> c
};

using Linear = LinearOf<const float>;
using Norm = NormOf<const float>;
using Pool = PoolOf<const float>;
using Block = BlockOf<const float>;

struct State {             // of the input, of every step, as token_learner_state leaves it
  const float *max, *sum;  // (batch, steps, k)
  const float* pooled;     // (batch, steps, k, c)
};

struct Call {
  int64_t batch, steps, memory, read, c;  // memory slots, tokens read
  int64_t hidden, mlp, heads, layers;
  const float* start;         // (batch, memory, c)
  State for_read, for_write;  // k = read, k = memory
  Pool reader, writer;
  const Block* blocks;
  Norm norm;
  // Added to memory for reading, to memory and to the output for writing, to the tokens before the blocks; or none.
  const float *read_table, *write_table, *output_table, *process_table;
};

struct Forward {
  Call call;
  float* last;     // (batch, memory, c)
  float* outputs;  // (batch, steps, read, c)
  float* kept;     // (batch, steps, memory, c): the memory before each step; or none
};

struct Backward {
  Call call;                      // `start` is not read: `kept` begins with it
  const float *dlast, *doutputs;
  const float* kept;
  // What is written, each as large as what it is the gradient of; tables where there is one.
  float* dstart;
  float *dread_sum, *dread_pooled, *dwrite_sum, *dwrite_pooled;  // of the states
  PoolOf<float> dreader, dwriter;
  const BlockOf<float>* dblocks;
  NormOf<float> dnorm;
  float *dread_table, *dwrite_table, *doutput_table, *dprocess_table;
};

// Who shares the work of a phase: run(self, items, work, argument) calls work(argument, i) for every i < items, in any
// order and on any thread, and returns when all are done.
struct Team {
  void* self;
  void (*run)(void* self, int64_t items, void (*work)(void* argument, int64_t item), void* argument);
};

}  // namespace mirasol::latent_recurrence

// Widths (c, hidden, mlp) are multiples of 16, steps and batch at least 1.  Workspace: so many floats, 64-byte aligned,
// not initialised.  An item of a phase writes what no other does and sums in a fixed order: results are bitwise the
// same for any team.
MIRASOL_DECLARE(
    int64_t latent_recurrence_forward_workspace(const latent_recurrence::Call&);
    void latent_recurrence_forward(const latent_recurrence::Forward&, const latent_recurrence::Team&, float* workspace);
    int64_t latent_recurrence_backward_workspace(const latent_recurrence::Call&);
    void latent_recurrence_backward(const latent_recurrence::Backward&, const latent_recurrence::Team&,
                                    float* workspace))
