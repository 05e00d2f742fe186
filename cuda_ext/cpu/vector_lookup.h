// What a slot says of a whole tile's lanes: their symbols, and their states after these.
//
// Notes:
// 1. Tables of many symbols are gathered from memory. They are larger than a core's nearest cache, so that is what a
//    decoder waits for most.
// 2. A table of three symbols, a digit's, is two numbers: where the second and the third begin. These are compared, and
//    nothing is gathered.
#pragma once

#include "../core/tables.h"

namespace cachegen {
namespace {

// Both have kept(), what a lane keeps of a table; and take(), which puts the lanes' symbols into the `at`-th byte of
// `bytes` (zero before the first) and returns their states, which may then need V::refill.

template <class V>
struct Gathered {
  using Int = typename V::Int;
  const SlotEntry* slots;
  Int slot_mask, frequency_mask, byte, prob_bits;

  explicit CACHEGEN_HD Gathered(const Tables& tables)
      : slots(tables.slots),
        slot_mask(V::all((1u << tables.prob_bits) - 1)),
        frequency_mask(V::all(0xfff)),
        byte(V::all(0xff)),
        prob_bits(V::all(tables.prob_bits)) {}

  static CACHEGEN_HD uint32_t kept(const Tables& tables, uint8_t id) { return uint32_t(id) << tables.prob_bits; }

  CACHEGEN_HD Int take(Int x, Int kept, uint32_t at, Int& bytes) const {
    const Int entry = V::gather(slots, V::add(V::both(x, slot_mask), kept));
    bytes = V::either(bytes, V::left(V::both(entry, byte), 8 * at));
    const Int frequency = V::both(V::right(entry, 8), frequency_mask);
    return V::add(V::multiply(frequency, V::right_by(x, prob_bits)), V::right(entry, 20));
  }
};

template <class V>
struct Compared {
  using Int = typename V::Int;
  Int slot_mask, low_half, prob_bits, total;

  explicit CACHEGEN_HD Compared(const Tables& tables)
      : slot_mask(V::all((1u << tables.prob_bits) - 1)),
        low_half(V::all(0xffff)),
        prob_bits(V::all(tables.prob_bits)),
        total(V::all(1u << tables.prob_bits)) {}

  static CACHEGEN_HD uint32_t frequency(const Tables& tables, uint8_t id, uint32_t symbol) {
    return tables.symbols_of(id)[symbol].limit >> (kStateBits - tables.prob_bits);
  }
  static CACHEGEN_HD uint32_t kept(const Tables& tables, uint8_t id) {
    const uint32_t second = frequency(tables, id, 0);
    return second | (second + frequency(tables, id, 1)) << 16;
  }
  // Whether all of these tables have these three symbols alone.
  static CACHEGEN_HD bool serves(const Tables& tables, const uint8_t* ids, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
      if ((kept(tables, ids[i]) >> 16) + frequency(tables, ids[i], 2) != 1u << tables.prob_bits) return false;
    return true;
  }

  CACHEGEN_HD Int take(Int x, Int kept, uint32_t at, Int& bytes) const {
    const Int slot = V::both(x, slot_mask), second = V::both(kept, low_half), third = V::right(kept, 16);
    const auto past_first = V::at_least(slot, second), past_second = V::at_least(slot, third);
    const Int one = V::all(1u << 8 * at);
    bytes = V::add_where(past_second, V::add_where(past_first, bytes, one), one);
    const Int first = V::choose(past_second, third, V::choose(past_first, second, V::all(0)));
    const Int last = V::choose(past_second, total, V::choose(past_first, third, second));
    return V::add(V::multiply(V::subtract(last, first), V::right_by(x, prob_bits)), V::subtract(slot, first));
  }
};

}  // namespace
}  // namespace cachegen
