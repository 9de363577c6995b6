#pragma once
// For bodies of CUDA kernels that tests run on the host.
#ifdef __CUDACC__
#define MIRASOL_HOST_DEVICE __host__ __device__
#define MIRASOL_ROLLED _Pragma("unroll 1")  // before a loop that seldom goes round twice: code is fetched, too
#else
#define MIRASOL_HOST_DEVICE
#define MIRASOL_ROLLED
#endif
