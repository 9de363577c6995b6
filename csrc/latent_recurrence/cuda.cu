// One block on every multiprocessor, all there at once (a cooperative launch); step.h has what they do.  2026-11-25:
// compiled for sm_80 and sm_90a without spills, the body tested on the host; it has never run on a GPU.
#include <cooperative_groups.h>
#include "latent_recurrence/cuda.h"
#include "latent_recurrence/plan.h"

namespace mirasol::cuda {
namespace {

struct OnChip {  // a crew
  int number, count, threads;
  float* shared;
  template <class F>
  MIRASOL_HOST_DEVICE void each(F f) const {
#ifdef __CUDA_ARCH__
    f(int(threadIdx.x));
    __syncthreads();
#endif
  }
};

struct WholeGrid {
  OnChip crew;
  template <class F>
  MIRASOL_HOST_DEVICE void phase(F f) {
#ifdef __CUDA_ARCH__
    f(crew);
    cooperative_groups::this_grid().sync();
#endif
  }
};

extern __shared__ float shared_memory[];

__global__ void __launch_bounds__(THREADS, 1) recurrence_kernel(const __grid_constant__ Arguments a) {
  WholeGrid grid{{int(blockIdx.x), int(gridDim.x), THREADS, shared_memory}};
  run_steps(grid, a);
}

struct Chip {
  int blocks = 0, bytes = 0, cooperative = 0;  // multiprocessors, shared memory of a block
  cudaError_t error;
  Chip() {
    int device = 0;
    error = cudaGetDevice(&device);
    const auto ask = [&](int* to, cudaDeviceAttr what) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(to, what, device);
    };
    ask(&blocks, cudaDevAttrMultiProcessorCount);
    ask(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&cooperative, cudaDevAttrCooperativeLaunch);
  }
};

}  // namespace

const char* recurrence_refusal(const Call& call) {
  const Chip chip;
  if (chip.error != cudaSuccess) return cudaGetErrorString(chip.error);
  return chip.cooperative ? refusal(call, chip.blocks, chip.bytes) : "a GPU that can launch a whole grid at once";
}

int64_t recurrence_scratch(const Call& call) { return scratch_floats(call); }

const char* recurrence_forward(const Forward& f, float* scratch, void* stream) {
  const Chip chip;
  Arguments a = arguments_of(f, scratch);
  const size_t bytes = Shared(nullptr, a.s, chip.blocks, THREADS).floats * sizeof(float);
  cudaError_t error = chip.error;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(recurrence_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chip.bytes);
  void* arguments[] = {&a};
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(recurrence_kernel, dim3(chip.blocks), dim3(THREADS), arguments, bytes,
                                        static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mirasol::cuda
