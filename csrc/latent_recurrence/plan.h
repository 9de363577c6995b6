#pragma once
// The host's side of step.h: what the kernel is called with, and which calls it does not take.
#include <initializer_list>
#include "latent_recurrence/step.h"

namespace mirasol::cuda {

constexpr int THREADS = 512;  // of a block

inline Sizes sizes_of(const Call& c) {
  return {int(c.batch), int(c.steps), int(c.memory), int(c.read), int(c.c),
          int(c.hidden), int(c.mlp), int(c.heads), int(c.layers)};
}

// Why `blocks` blocks with so many bytes of shared memory each do not take this call, or nullptr.
inline const char* refusal(const Call& call, int64_t blocks, int64_t bytes) {
  if (call.layers > MAX_LAYERS) return "at most 16 layers";
  constexpr int64_t large = 1 << 24;  // below, an int holds every number of a block's own
  for (const int64_t size : {call.batch, call.memory, call.read, call.c, call.hidden, call.mlp, call.steps})
    if (size >= large) return "every size below 2^24";
  if (call.batch * call.read >= large || call.batch * call.heads * call.read >= large * 64)
    return "batch times read tokens below 2^24, times heads below 2^30";
  const Shared shared(nullptr, sizes_of(call), int(blocks), THREADS);
  return shared.floats * int64_t(sizeof(float)) <= bytes ? nullptr : "what fits the shared memory of this GPU";
}

inline Scratch scratch_of(Cut& at, const Call& c) {
  const int64_t rows = c.batch * c.read;
  Scratch to;
  to.x = at.take(rows * c.c), to.qkv = at.take(rows * 3 * c.c), to.attended = at.take(rows * c.c);
  to.inner = at.take(rows * c.mlp);
  to.read_logits = at.take(c.batch * c.memory * c.read);
  to.write_logits = at.take(c.batch * (c.memory + c.read) * c.memory);
  return to;
}

inline int64_t scratch_floats(const Call& call) {
  Cut at{nullptr};
  scratch_of(at, call);
  return at.taken;
}

inline Arguments arguments_of(const Forward& f, float* scratch) {
  Cut at{scratch};
  Arguments a{f, {}, sizes_of(f.call), scratch_of(at, f.call)};
  for (int64_t i = 0; i < f.call.layers; ++i) a.layers[i] = f.call.blocks[i];
  return a;
}

}  // namespace mirasol::cuda
