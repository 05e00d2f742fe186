// The warp that kernels are written against: 32 lanes that take every step together.
//
// Note: there are two of it. On a device each lane is a thread, PerLane<T> one register and ballot() an instruction. On
// the host one thread is all lanes, PerLane<T> an array and ballot() a loop: the very bodies of the kernels run there, under
// sanitizers, on machines without a GPU.
#pragma once

#include <stdint.h>
#include <string.h>

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
    CACHEGEN_DEVICE const T& operator[](uint32_t) const { return own; }
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
  // The sum of f(lane) over all lanes, modulo 2^64.
  template <class F>
  CACHEGEN_DEVICE uint64_t sum(const F& f) const {
    uint64_t x = f(threadIdx.x % kWarpLanes);
    for (uint32_t distance = kWarpLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }
  // One lane's doing, for what is the same for all.
  template <class F>
  CACHEGEN_DEVICE void once(const F& f) const {
    if (threadIdx.x % kWarpLanes == 0) f();
  }
  // The bits of the lanes before this one.
  CACHEGEN_DEVICE uint32_t below(uint32_t) const {
    uint32_t bits;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(bits));
    return bits;
  }
};

// All threads of a block, which prepare shared memory together.
struct Crew {
  uint32_t index = threadIdx.x, count = blockDim.x;

  CACHEGEN_DEVICE void meet() const { __syncthreads(); }
  // Whether it holds for any thread; all have met then.
  CACHEGEN_DEVICE bool any(bool x) const { return __syncthreads_or(x); }
  CACHEGEN_DEVICE void set_bit(uint32_t* word, uint32_t bit) const { atomicOr(word, 1u << bit); }
  // `words` words, a multiple of 4, between addresses aligned to 16 bytes, from global to shared memory.
  CACHEGEN_DEVICE void copy(uint32_t* to, const uint32_t* from, uint32_t words) const {
    for (uint32_t i = index; i < words / 4; i += count)
      reinterpret_cast<uint4*>(to)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
};

#else

struct Warp {
  template <class T>
  struct PerLane {
    T all[kWarpLanes];
    T& operator[](uint32_t lane) { return all[lane]; }
    const T& operator[](uint32_t lane) const { return all[lane]; }
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
  uint64_t sum(const F& f) const {
    uint64_t x = 0;
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) x += f(lane);
    return x;
  }
  template <class F>
  void once(const F& f) const {
    f();
  }
  uint32_t below(uint32_t lane) const { return (1u << lane) - 1; }
};

struct Crew {
  uint32_t index = 0, count = 1;

  void meet() const {}
  bool any(bool x) const { return x; }
  void set_bit(uint32_t* word, uint32_t bit) const { *word |= 1u << bit; }
  void copy(uint32_t* to, const uint32_t* from, uint32_t words) const { memcpy(to, from, words * sizeof *to); }
};

#endif

// x, of which the compiler knows nothing: what follows from it is computed where it is used, not once ahead of a loop.
CACHEGEN_DEVICE uint64_t unknown(uint64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Where a word of a block's shared memory lies, and the word at such an address. On a device that is its 32-bit address, hidden
// from the compiler, which would else compute it again for every word.
CACHEGEN_DEVICE uint32_t staged_at(const uint32_t* words, uint32_t i) {
#if defined(__CUDA_ARCH__)
  uint32_t at = uint32_t(__cvta_generic_to_shared(words + i));
  asm volatile("" : "+r"(at));
  return at;
#else
  (void)words;
  return i * uint32_t(sizeof *words);
#endif
}
CACHEGEN_DEVICE uint32_t load_staged(const uint32_t* words, uint32_t at) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
  return word;
#else
  return words[at / sizeof *words];
#endif
}

}  // namespace cachegen
