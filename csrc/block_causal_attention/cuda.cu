// One warp per row; the bodies are in rows.h.  2026-11-22: compiled for sm_80 and sm_90a without spills, the bodies
// tested on the host; it has never run on a GPU.
#include "block_causal_attention/cuda.h"
#include "block_causal_attention/rows.h"

namespace mirasol::cuda {
namespace {

constexpr int WARPS = 4;  // of a block

struct Warp {
  static constexpr int size = 32;
  int lane;
  MIRASOL_HOST_DEVICE float sum(float x) const {
#ifdef __CUDA_ARCH__
    for (int step = size / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
#endif
    return x;
  }
};

// All lanes of a warp have the same item, so that they meet in every shuffle.
__device__ int64_t first_item() { return blockIdx.x * int64_t(WARPS) + threadIdx.y; }
__device__ int64_t item_step() { return gridDim.x * int64_t(WARPS); }

__global__ void forward_kernel(Forward f, int64_t items) {
  const Warp warp{int(threadIdx.x)};
  for (int64_t item = first_item(); item < items; item += item_step()) forward_row(warp, f, item);
}

__global__ void backward_query_kernel(Backward g, int64_t items) {
  const Warp warp{int(threadIdx.x)};
  for (int64_t item = first_item(); item < items; item += item_step()) backward_query_row(warp, g, item);
}

__global__ void backward_key_kernel(Backward g, int64_t items) {
  const Warp warp{int(threadIdx.x)};
  for (int64_t item = first_item(); item < items; item += item_step()) backward_key_row(warp, g, item);
}

template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, int64_t items, void* stream) {
  if (items == 0) return nullptr;
  const int64_t blocks = (items + WARPS - 1) / WARPS, most = 1 << 30;
  kernel<<<unsigned(blocks < most ? blocks : most), dim3(Warp::size, WARPS), 0, static_cast<cudaStream_t>(stream)>>>(
      arguments, items);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* attention_forward(const Forward& f, void* stream) {
  return launch(forward_kernel, f, f.shape.batch * f.shape.q_heads * f.shape.q_len, stream);
}

const char* attention_backward(const Backward& g, void* stream) {
  const Shape& s = g.shape;
  if (const char* error = launch(backward_query_kernel, g, s.batch * s.q_heads * s.q_len, stream)) return error;
  return launch(backward_key_kernel, g, s.batch * s.kv_heads * s.k_len, stream);
}

}  // namespace mirasol::cuda
