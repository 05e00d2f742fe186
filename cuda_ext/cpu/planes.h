// Values as planes of bytes, compiled for every instruction set.
//
// Note: bits are rotated left by one, so that the sign is last. The compiler vectorises the loops over a run's columns.
#pragma once

#include "rows.h"

namespace cachegen {
namespace {

// kColumns columns of a row, or n for 0.
template <class Bits, uint64_t kColumns>
void split_row(const Bits* __restrict from, uint64_t n, uint8_t* __restrict bytes, uint64_t plane) {
  constexpr uint32_t kBits = 8 * sizeof(Bits);
  const uint64_t count = kColumns ? kColumns : n;
  for (uint32_t p = 0; p < sizeof(Bits); p++)
    for (uint64_t j = 0; j < count; j++) {
      const Bits x = from[j], rotated = Bits(x << 1 | x >> (kBits - 1));
      bytes[p * plane + j] = uint8_t(rotated >> (kBits - 8 - 8 * p));
    }
}

template <class Bits>
void split_run(const Run& run, uint64_t first, uint64_t tokens, uint8_t* bytes, uint64_t stride, uint64_t plane) {
  constexpr uint64_t kTogether = 64;
  for (uint64_t t = 0; t < tokens; t++, bytes += stride) {
    const Bits* from = reinterpret_cast<const Bits*>(row_at(run, first + t));
    uint64_t j = 0;
    for (; j + kTogether <= run.columns; j += kTogether)
      split_row<Bits, kTogether>(from + j, kTogether, bytes + run.coded + j, plane);
    split_row<Bits, 0>(from + j, run.columns - j, bytes + run.coded + j, plane);
  }
}

template <class Bits>
void join_run(const Run& run, uint64_t first, uint64_t tokens, const uint8_t* bytes, uint64_t stride, uint64_t plane) {
  constexpr uint32_t kBits = 8 * sizeof(Bits), kPlanes = sizeof(Bits);
  for (uint64_t t = 0; t < tokens; t++, bytes += stride) {
    Bits* __restrict to = reinterpret_cast<Bits*>(row_at(run, first + t));
    const uint8_t* __restrict from = bytes + run.coded;
    for (uint64_t j = 0; j < run.columns; j++) {
      Bits rotated = 0;
      for (uint32_t p = 0; p < kPlanes; p++) rotated = Bits(rotated << 8 | from[p * plane + j]);
      to[j] = Bits(rotated >> 1 | rotated << (kBits - 1));
    }
  }
}

bool outside_row(const uint8_t* __restrict symbols, const uint8_t* __restrict low, const uint8_t* __restrict high, uint32_t n) {
  uint8_t outside = 0;
  for (uint32_t j = 0; j < n; j++) outside |= uint8_t((symbols[j] < low[j]) | (symbols[j] > high[j]));
  return outside != 0;
}

template <class Bits>
constexpr PlanePasses kPlanesOf = {split_run<Bits>, join_run<Bits>, outside_row};

const PlanePasses& plane_passes(uint64_t bytes) { return bytes == 4 ? kPlanesOf<uint32_t> : kPlanesOf<uint16_t>; }

}  // namespace
}  // namespace cachegen
