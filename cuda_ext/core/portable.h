// What lets the same inline functions be compiled for the host and for a device.
#pragma once

#if defined(__CUDACC__)
#define CACHEGEN_HD __host__ __device__ __forceinline__
#else
#define CACHEGEN_HD inline
#endif
