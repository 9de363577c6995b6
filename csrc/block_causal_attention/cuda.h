#pragma once
// Block-causal attention on a GPU, float32: pointers to its memory and a stream, no torch.  The arguments are those of
// the CPU; `parts`, `turns` and
// `dq_share` are not used.  Each returns nullptr, or what went wrong with the launch.
#include "block_causal_attention/kernel.h"

namespace mirasol::cuda {

const char* attention_forward(const attention::Forward& f, void* stream);
const char* attention_backward(const attention::Backward& g, void* stream);

}  // namespace mirasol::cuda
