#pragma once
// For bodies of CUDA kernels that tests run on the host.
#ifdef __CUDACC__
#define MIRASOL_HOST_DEVICE __host__ __device__
#else
#define MIRASOL_HOST_DEVICE
#endif
