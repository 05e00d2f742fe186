// The warp that kernels are written against: 32 lanes that take every step together.
//
// Twist: there are two of it. On a device each lane is a thread, PerLane<T> one register and ballot() an instruction. On
// the host one thread is all lanes, PerLane<T> an array and ballot() a loop: the very bodies of the kernels run there, under
// sanitizers, on machines without a GPU.
#pragma once

#include <stdint.h>

#include "portable.h"

#if defined(__CUDACC__)
#define CACHEGEN_DEVICE __device__ __forceinline__
#else
#define CACHEGEN_DEVICE inline
#endif

namespace cachegen {

constexpr uint32_t kWarpLanes = 32;

CACHEGEN_DEVICE uint32_t count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return uint32_t(__popc(x));
#else
  uint32_t n = 0;
  for (; x != 0; x &= x - 1) n++;
  return n;
#endif
}

#if defined(__CUDACC__)

struct Warp {
  template <class T>
  struct PerLane {
    T own;
    CACHEGEN_DEVICE T& operator[](uint32_t) { return own; }
  };

  // f(lane) of every lane.
  template <class F>
  CACHEGEN_DEVICE void each(const F& f) const {
    f(threadIdx.x % kWarpLanes);
  }
  // Bit `lane` of the result is f(lane).
  template <class F>
  CACHEGEN_DEVICE uint32_t ballot(const F& f) const {
    return __ballot_sync(0xffffffffu, f(threadIdx.x % kWarpLanes));
  }
  // One lane's doing, for what is the same for all.
  template <class F>
  CACHEGEN_DEVICE void once(const F& f) const {
    if (threadIdx.x % kWarpLanes == 0) f();
  }
};

#else

struct Warp {
  template <class T>
  struct PerLane {
    T all[kWarpLanes];
    T& operator[](uint32_t lane) { return all[lane]; }
  };

  template <class F>
  void each(const F& f) const {
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) f(lane);
  }
  template <class F>
  uint32_t ballot(const F& f) const {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) votes |= uint32_t(bool(f(lane))) << lane;
    return votes;
  }
  template <class F>
  void once(const F& f) const {
    f();
  }
};

#endif

}  // namespace cachegen
