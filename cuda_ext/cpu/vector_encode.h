// Encodes whole tiles (256 columns, 8 to a lane) with vectors, for any V: an instruction set's vectors of V::kWidth lanes.
//
// Notes:
// 1. Rows are encoded backwards, so vectors hold lanes in reverse order: then the words of a step go to memory as they are.
// 2. The division by a frequency is one of floats. A state is below its limit, so the quotient is below 2^21. Three
//    roundings, of 2^-24 each, and the factor 1 - 2^-22 leave less than one, and never too much: the remainder tells whether
//    one is missing.
// 3. Zen 4 takes longer for a gather than for as many loads. Intervals of symbols near zero are in every lane's memory, from
//    which each bit of a symbol selects half. Others are copied by scalar code.
#pragma once

#include <utility>

#include "encode_chain.h"

namespace cachegen {
namespace {

// The states of a chain.
template <class V>
struct States {
  static constexpr uint32_t kGroups = kLanes / V::kWidth;
  using Int = typename V::Int;
  Int x[kGroups], least, total, total_bits, limit_bits;
  uint8_t* at;

  explicit CACHEGEN_HD States(const EncodeChain& chain)
      : least(V::all(1)),
        total(V::all(1u << chain.tables.prob_bits)),
        total_bits(V::all(chain.tables.prob_bits)),
        limit_bits(V::all(kStateBits - chain.tables.prob_bits)),
        at(chain.at) {
    for (uint32_t g = 0; g < kGroups; g++) x[g] = V::load(chain.state + g * V::kWidth);
  }
  CACHEGEN_HD void keep(EncodeChain& chain) const {
    for (uint32_t g = 0; g < kGroups; g++) V::store(chain.state + g * V::kWidth, x[g]);
    chain.at = at;
    if (V::any(V::is_zero(least))) chain.status = CG_BAD_SYMBOL;
  }

  // put() for a vector: see Note 2.
  CACHEGEN_HD void put(uint32_t g, Int start, Int frequency) {
    least = V::smaller(least, frequency);
    const Int given = V::give(x[g], V::left_by(frequency, limit_bits), at);
    const Int quotient = V::quotient(given, frequency);
    const Int remainder = V::subtract(given, V::multiply(quotient, frequency));
    const Int found = V::add(V::add(V::left_by(quotient, total_bits), remainder), start);
    x[g] = V::add_where(V::at_least(remainder, frequency), found, V::subtract(total, frequency));
  }
  CACHEGEN_HD void put_interval(uint32_t g, Int interval) {
    put(g, V::both(interval, V::all(0xffff)), V::right(interval, kFrequencyShift));
  }
};

// One token's bytes of a tile, 8 to a lane: half[0] the first four columns of every lane.
template <class V>
struct BytesBack {
  static constexpr uint32_t kGroups = kLanes / V::kWidth;
  typename V::Int half[2][kGroups];

  CACHEGEN_HD void load(const uint8_t* row) {
    for (uint32_t g = 0; g < kGroups; g++) V::load_halves_back(row + g * V::kWidth * kPerLane, half[0][g], half[1][g]);
  }
};

// Encoders: load() a row, then step() through its columns and groups of lanes.

// Symbols of which the lowest kNearBits bits tell one from the other.
template <class V>
struct Near {
  using Int = typename V::Int;
  const EncodeChain& chain;
  States<V> states;
  BytesBack<V> symbols;

  explicit CACHEGEN_HD Near(const EncodeChain& from, uint64_t) : chain(from), states(from) {}
  CACHEGEN_HD void load(uint64_t row) { symbols.load(chain.symbols + row * chain.stride); }

  template <uint32_t kLow>
  static CACHEGEN_HD Int select(const uint32_t (*of)[kLanes], uint32_t g, Int bytes, uint32_t bit) {
    if constexpr (kLow == 0)
      return V::load(of[0] + g * V::kWidth);
    else
      return V::where_bit(bytes, bit + kLow - 1, select<kLow - 1>(of + (1 << (kLow - 1)), g, bytes, bit),
                          select<kLow - 1>(of, g, bytes, bit));
  }
  CACHEGEN_HD void step(uint32_t c, uint32_t g, uint64_t) {
    const Int found = select<kNearBits>(chain.kept + (c << kNearBits), g, symbols.half[c / 4][g], 8 * (c % 4));
    states.put_interval(g, found);
  }
};

template <class V>
struct Ternary {
  using Int = typename V::Int;
  const EncodeChain& chain;
  States<V> states;
  BytesBack<V> symbols, contexts;

  explicit CACHEGEN_HD Ternary(const EncodeChain& from, uint64_t) : chain(from), states(from) {}
  CACHEGEN_HD void load(uint64_t row) {
    symbols.load(chain.symbols + row * chain.stride);
    contexts.load(chain.contexts + row * chain.stride);
  }
  CACHEGEN_HD void step(uint32_t c, uint32_t g, uint64_t) {
    const uint32_t bit = 8 * (c % 4), at = g * V::kWidth;
    const auto* kept = chain.kept + c * kContexts;
    const Int context = contexts.half[c / 4][g], symbol = symbols.half[c / 4][g];
    const Int positive = V::where_bit(context, bit, V::load(kept[1] + at), V::load(kept[0] + at));
    const Int bounds = V::where_bit(context, bit + 1, V::load(kept[2] + at), positive);
    const Int second = V::both(bounds, V::all(0xffff)), third = V::right(bounds, 16);
    const Int start = V::where_bit(symbol, bit + 1, third, V::where_bit(symbol, bit, second, V::all(0)));
    const Int end = V::where_bit(symbol, bit + 1, states.total, V::where_bit(symbol, bit, third, second));
    states.put(g, start, V::subtract(end, start));
  }
};

// Any symbols: their intervals are copied one by one, those of the next row between the steps of this one, for copies keep
// other parts of a core busy.
template <class V, uint32_t kIds>
struct Far {
  using Int = typename V::Int;
  EncodeChain& chain;
  States<V> states;
  uint32_t own = 1;

  explicit CACHEGEN_HD Far(EncodeChain& from, uint64_t rows) : chain(from), states(from) {
    for (uint32_t c = 0; c < kPerLane && rows > 0; c++)
      for (uint32_t g = 0; g < kLanes / V::kWidth; g++) copy(c, g, rows - 1);
  }
  CACHEGEN_HD void copy(uint32_t c, uint32_t g, uint64_t row) {
    const uint8_t *symbols = chain.symbols + row * chain.stride, *contexts = chain.contexts + (kIds > 1 ? row * chain.stride : 0);
    const uint32_t *intervals = chain.intervals, *firsts = chain.firsts;
    uint32_t* to = chain.copied[own ^ 1][c];
#pragma GCC unroll 16
    for (uint32_t i = 0; i < V::kWidth; i++) {
      const uint32_t lane = g * V::kWidth + i, column = (lane ^ (V::kWidth - 1)) * kPerLane + c;
      to[lane] = intervals[firsts[kIds == 1 ? column : column * kIds + contexts[column]] + symbols[column]];
    }
  }
  CACHEGEN_HD void load(uint64_t) { own ^= 1; }
  CACHEGEN_HD void step(uint32_t c, uint32_t g, uint64_t row) {
    copy(c, g, row > 0 ? row - 1 : 0);
    states.put_interval(g, V::load(chain.copied[own][c] + g * V::kWidth));
  }
};

// The steps of a row. Their numbers are constants, or the states would not stay in registers.
template <class V, class Encoder, size_t... kSteps>
CACHEGEN_HD void take_steps(Encoder& encoder, uint64_t row, std::index_sequence<kSteps...>) {
  constexpr uint32_t kGroups = kLanes / V::kWidth;
  (encoder.step(uint32_t(kPerLane - 1 - kSteps / kGroups), uint32_t(kGroups - 1 - kSteps % kGroups), row), ...);
}

template <class V, class Encoder>
void encode_with(EncodeChain& chain, uint64_t rows) {
  Encoder encoder(chain, rows);
  for (uint64_t t = rows; t-- > 0;) {
    encoder.load(t);
    take_steps<V>(encoder, t, std::make_index_sequence<kPerLane * kLanes / V::kWidth>());
  }
  encoder.states.keep(chain);
}

// The largest of symbol - first, modulo 256, in these rows.
inline uint8_t most_above(const EncodeChain& chain, uint64_t rows, uint8_t first) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  Bytes most = {};
  for (uint32_t j = 0; j < kTileColumns; j += kVectorBytes)
    for (uint64_t t = 0; t < rows; t++) {
      Bytes row;
      memcpy(&row, chain.symbols + t * chain.stride + j, sizeof row);
      row -= first;
      most = row > most ? row : most;
    }
  uint8_t found = 0;
  for (uint32_t i = 0; i < kVectorBytes; i++) found = most[i] > found ? most[i] : found;
  return found;
}

constexpr uint8_t kFirstNear = kZeroIndex - kNearSymbols / 2;

// Fills `kept` for the symbols around zero.
inline void keep_near(EncodeChain& chain) {
  if (chain.near) return;
  chain.near = true;
  for (uint32_t column = 0; column < kTileColumns; column++) {
    const uint32_t* of = chain.intervals + chain.firsts[column];
    const uint32_t lane = column / kPerLane ^ chain.turn;
    for (uint32_t i = kFirstNear; i < kFirstNear + kNearSymbols; i++)
      chain.kept[column % kPerLane * kNearSymbols + i % kNearSymbols][lane] = of[i];
  }
}

template <class V>
void open_chain(EncodeChain* chain) {
  open_scalar(chain);
  if (chain->status || chain->tile.width != kTileColumns) return;
  chain->turn = V::kWidth - 1;
  chain->ternary = chain->n_ids == kContexts;
  for (uint32_t i = 0; i < kTileColumns * kContexts && chain->ternary; i++) {
    const uint32_t column = i / kContexts, lane = column / kPerLane ^ chain->turn;
    const uint32_t* of = chain->intervals + chain->firsts[i];
    const uint32_t second = of[0] >> kFrequencyShift, third = second + (of[1] >> kFrequencyShift);
    chain->ternary = third + (of[2] >> kFrequencyShift) == 1u << chain->tables.prob_bits;
    chain->kept[column % kPerLane * kContexts + i % kContexts][lane] = second | third << 16;
  }
}

template <class V>
void encode_rows(EncodeChain* chain, uint64_t rows) {
  if (chain->tile.width != kTileColumns) return encode_rows_scalar(chain, rows);
  if (chain->n_ids == kContexts)
    return chain->ternary && most_above(*chain, rows, 0) < 3 ? encode_with<V, Ternary<V>>(*chain, rows)
                                                             : encode_with<V, Far<V, kContexts>>(*chain, rows);
  if (most_above(*chain, rows, kFirstNear) >= kNearSymbols) return encode_with<V, Far<V, 1>>(*chain, rows);
  keep_near(*chain);
  encode_with<V, Near<V>>(*chain, rows);
}

}  // namespace
}  // namespace cachegen
