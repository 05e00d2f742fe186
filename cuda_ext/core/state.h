// One lane's arithmetic: a 32-bit rANS state (Duda 2013, arXiv:1311.2540) in [2^15, 2^31) that takes and gives 16-bit words.
//
// 1. put() runs over the symbols backwards, take() forwards; each undoes the other.
// 2. A state in range stays in range whatever words follow, and needs at most one word per symbol: with x >= 2^15 and
//    f >= 1, f * (x >> p) + slot - start >= 2^(15 - p) >= 8, and 8 << 16 > 2^15. So a decoder checks initial states,
//    and no others.
// 3. The encoder divides by multiplying: floor(x / f) = x * ceil(2^(31 + s) / f) >> (31 + s), s = ceil(log2 f), exact
//    for x < 2^31 (Alverson 1991, as in ryg_rans). f = 1 has no such reciprocal; with 2^32 - 1 the quotient is x - 1,
//    and the bias makes up for it.
#pragma once

#include <stdint.h>

#include "portable.h"

namespace cachegen {

constexpr uint32_t kMinState = 1u << 15;  // where every lane of an encoder starts, and of a decoder ends
constexpr uint32_t kMaxState = 1u << 31;  // first value above the range
constexpr uint32_t kStateBits = 31;
constexpr uint32_t kWordBits = 16;
constexpr uint32_t kMaxFrequency = 4095;  // 12 bits of a slot entry

// A decoder's slot:  [31:20] slot - start   [19:8] frequency   [7:0] symbol
using SlotEntry = uint32_t;

CACHEGEN_HD SlotEntry slot_entry(uint32_t offset, uint32_t frequency, uint32_t symbol) {
  return offset << 20 | frequency << 8 | symbol;
}

// Takes the symbol of `entry`; the state may fall below kMinState and then needs refill().
CACHEGEN_HD uint32_t take(uint32_t x, SlotEntry entry, uint32_t prob_bits) {
  return (entry >> 8 & 0xfff) * (x >> prob_bits) + (entry >> 20);
}

CACHEGEN_HD uint32_t refill(uint32_t x, uint32_t word) { return x << kWordBits | word; }

// What the encoder knows of one symbol of one table; all zeros where the symbol has no frequency.
struct alignas(16) SymbolEntry {
  uint32_t reciprocal;
  uint32_t bias;
  uint32_t limit;        // states from here on must give a word first
  uint16_t complement;   // 2^prob_bits - frequency
  uint16_t shift;
};
static_assert(sizeof(SymbolEntry) == 16, "an entry is one 16-byte load");

CACHEGEN_HD SymbolEntry symbol_entry(uint32_t start, uint32_t frequency, uint32_t prob_bits) {
  if (frequency == 0) return {0, 0, 0, 0, 0};
  const uint32_t total = 1u << prob_bits;
  const uint32_t limit = frequency << (kStateBits - prob_bits);
  const uint16_t complement = uint16_t(total - frequency);
  if (frequency == 1) return {~0u, start + total - 1, limit, complement, 0};
  uint32_t s = 0;
  while ((1u << s) < frequency) s++;
  const uint64_t reciprocal = ((uint64_t(1) << (kStateBits + s)) + frequency - 1) / frequency;
  return {uint32_t(reciprocal), start, limit, complement, uint16_t(s - 1)};
}

// Puts a symbol into a state below its limit: (x / f << p) + x % f + start.
CACHEGEN_HD uint32_t put(uint32_t x, const SymbolEntry& entry) {
  const uint32_t quotient = uint32_t(uint64_t(x) * entry.reciprocal >> 32) >> entry.shift;
  return x + entry.bias + quotient * entry.complement;
}

// Little-endian bytes on every machine; compilers make one load or store of these, on a device, where words must be
// aligned, only when told so.
CACHEGEN_HD uint32_t load_word(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  return CACHEGEN_LOAD(reinterpret_cast<const uint16_t*>(p));
#else
  return p[0] | uint32_t(p[1]) << 8;
#endif
}
CACHEGEN_HD uint32_t load_state(const uint8_t* p) { return load_word(p) | load_word(p + 2) << 16; }
CACHEGEN_HD void store_word(uint8_t* p, uint32_t word) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint16_t*>(p) = uint16_t(word);
#else
  p[0] = uint8_t(word);
  p[1] = uint8_t(word >> 8);
#endif
}
CACHEGEN_HD void store_state(uint8_t* p, uint32_t x) {
  store_word(p, x);
  store_word(p + 2, x >> 16);
}

}  // namespace cachegen
