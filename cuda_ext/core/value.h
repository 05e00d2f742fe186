// Values of a cache and their 16-bit types, without a branch, so that compilers vectorise loops over them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "portable.h"

namespace cachegen {

CACHEGEN_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
CACHEGEN_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// store_pair() writes two values, the first of which comes first in memory, to 32-bit words. Devices from sm_80 on convert a
// pair in one instruction, which writes another NaN than store() does, and else the same.

struct Float32 {
  using Stored = float;
  static CACHEGEN_HD float load(float x) { return x; }
  static CACHEGEN_HD float store(float x) { return x; }
  static CACHEGEN_HD void store_pair(float x, float y, uint32_t* to) {
    to[0] = bits_of(x);
    to[1] = bits_of(y);
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static CACHEGEN_HD float load(uint16_t x) { return float_of(uint32_t(x) << 16); }
  static CACHEGEN_HD uint16_t store(float x) {
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t(x != x ? 0x7fc0 : rounded);
  }
  static CACHEGEN_HD void store_pair(float x, float y, uint32_t* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*to) : "f"(y), "f"(x));
#else
    *to = store(x) | uint32_t(store(y)) << 16;
#endif
  }
};

// Exact in both directions: multiplication by powers of two denormalises and rounds as fp16 would (Maratyszcza's FP16).
struct Float16 {
  using Stored = uint16_t;
  static CACHEGEN_HD float load(uint16_t x) {
    const uint32_t wide = uint32_t(x) << 16, twice = wide + wide;
    const float normal = float_of((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const float subnormal = float_of((twice >> 17) | (126u << 23)) - 0.5f;
    return float_of((wide & 0x80000000) | bits_of(twice < (1u << 27) ? subnormal : normal));
  }
  static CACHEGEN_HD uint16_t store(float x) {
    const uint32_t wide = bits_of(x), sign = wide & 0x80000000, twice = wide + wide;
    const float magnitude = float_of(wide & 0x7fffffff) * 0x1p+112f * 0x1p-110f;
    const uint32_t exponent = twice & 0xff000000, bias = exponent < 0x71000000 ? 0x71000000 : exponent;
    const uint32_t bits = bits_of(float_of((bias >> 1) + 0x07800000) + magnitude);
    const uint32_t half = (bits >> 13 & 0x7c00) + (bits & 0x0fff);
    return uint16_t(sign >> 16 | (twice > 0xff000000 ? 0x7e00 : half));
  }
  static CACHEGEN_HD void store_pair(float x, float y, uint32_t* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*to) : "f"(y), "f"(x));
#else
    *to = store(x) | uint32_t(store(y)) << 16;
#endif
  }
};

// Four words to an address aligned to 16 bytes, of a device's global memory.
CACHEGEN_HD void store_four(void* to, const uint32_t* words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  memcpy(to, words, 4 * sizeof *words);
#endif
}

// A value to such an address, aligned to its size.
template <class T>
CACHEGEN_HD void store_one(uint64_t address, float x) {
  const typename T::Stored value = T::store(x);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof value == sizeof(uint32_t))
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(bits_of(value)) : "memory");
  else
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
#else
  memcpy(reinterpret_cast<void*>(uintptr_t(address)), &value, sizeof value);
#endif
}

// Symbols, which are only read.
struct Int16 {
  using Stored = int16_t;
  static CACHEGEN_HD float load(int16_t x) { return float(x); }
};

// To the nearest integer, ties to even, for |x| < 2^22. Others keep about their value, and no small integer.
struct Rounded {
  float value;
  int32_t integer;

  explicit CACHEGEN_HD Rounded(float x) {
    constexpr float kMagic = 12582912;  // 1.5 x 2^23: around it floats are the integers, in the lowest bits
    constexpr uint32_t kMagicBits = 0x4b400000;
    const float shifted = x + kMagic;
    value = shifted - kMagic;
    integer = int32_t(bits_of(shifted) - kMagicBits);
  }
};

}  // namespace cachegen
