// What lets the same functions be compiled for the host and for a device.
//
// Note: on the host they are always inlined. Files that are compiled for different instruction sets share them, and a
// copy out of line would be one for all: the linker's choice, maybe one that this machine cannot execute.
#pragma once

#if defined(__CUDACC__)
#define CACHEGEN_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define CACHEGEN_HD __forceinline
#else
#define CACHEGEN_HD __attribute__((always_inline)) inline
#endif

// Reads what no kernel writes meanwhile, from a device's global memory: this tells the compiler that it is that, and need not
// tell memories apart at run time.
#if defined(__CUDA_ARCH__)
#define CACHEGEN_LOAD(address) __ldg(address)
#else
#define CACHEGEN_LOAD(address) (*(address))
#endif

// Loops over a lane's columns, whose arrays are registers only where every index is known.
#if defined(__CUDACC__)
#define CACHEGEN_UNROLL _Pragma("unroll")
#else
#define CACHEGEN_UNROLL
#endif
