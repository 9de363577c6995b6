#include "block_causal_attention/backward.h"
#include "block_causal_attention/forward.h"
