#pragma once
// The forward of latent_recurrence on a GPU, float32, all steps in one launch: pointers to its memory and a stream, no
// torch.  `blocks` of the call is the host's.
#include "latent_recurrence/kernel.h"

namespace mirasol::cuda {

// Why the current device does not take this call, or nullptr; asked before anything else.
const char* recurrence_refusal(const latent_recurrence::Call& call);
int64_t recurrence_scratch(const latent_recurrence::Call& call);  // floats, not initialised
// nullptr, or what went wrong with the launch.
const char* recurrence_forward(const latent_recurrence::Forward& f, float* scratch, void* stream);

}  // namespace mirasol::cuda
