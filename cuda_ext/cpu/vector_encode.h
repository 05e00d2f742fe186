// Encodes whole tiles (256 columns, 8 to a lane) with vectors, for any V: an instruction set's vectors of V::kWidth lanes.
//
// Notes:
// 1. Rows are encoded backwards, so vectors hold lanes in reverse order: then the words of a step go to memory as they are.
// 2. The division by a frequency is one of floats. A state is below its limit, so the quotient is below 2^21. Three
//    roundings, of 2^-24 each, and the factor 1 - 2^-22 leave less than one, and never too much: the remainder tells whether
//    one is missing.
// 3. Zen 4 takes longer for a gather than for as many loads. Frequencies of symbols near zero are in every lane's memory,
//    from which each bit of a symbol selects half. Others are copied by scalar code.
#pragma once

#include "encode_chain.h"
#include "vector_lookup.h"

namespace cachegen {
namespace {

constexpr uint32_t kFewSymbols = 8;

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

// Symbols of which the lowest kBits bits tell one from the other.
template <class V, uint32_t kBits>
struct Near {
  using Int = typename V::Int;
  const EncodeChain& chain;
  States<V> states;
  BytesBack<V> symbols;

  explicit CACHEGEN_HD Near(const EncodeChain& from) : chain(from), states(from) {}
  CACHEGEN_HD void load(uint64_t row) { symbols.load(chain.symbols + row * chain.stride); }

  template <uint32_t kLow>
  static CACHEGEN_HD Int select(const uint32_t (*of)[kLanes], uint32_t g, Int bytes, uint32_t bit) {
    if constexpr (kLow == 0)
      return V::load(of[0] + g * V::kWidth);
    else
      return V::where_bit(bytes, bit + kLow - 1, select<kLow - 1>(of + (1 << (kLow - 1)), g, bytes, bit),
                          select<kLow - 1>(of, g, bytes, bit));
  }
  CACHEGEN_HD void step(uint32_t c, uint32_t g) {
    const Int found = select<kBits>(chain.kept + (c << kBits), g, symbols.half[c / 4][g], 8 * (c % 4));
    states.put(g, V::both(found, V::all(0xffff)), V::right(found, 16));
  }
};

template <class V>
struct Ternary {
  using Int = typename V::Int;
  const EncodeChain& chain;
  States<V> states;
  BytesBack<V> symbols, contexts;

  explicit CACHEGEN_HD Ternary(const EncodeChain& from) : chain(from), states(from) {}
  CACHEGEN_HD void load(uint64_t row) {
    symbols.load(chain.symbols + row * chain.stride);
    contexts.load(chain.contexts + row * chain.stride);
  }
  CACHEGEN_HD void step(uint32_t c, uint32_t g) {
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

// Any symbols.
template <class V, uint32_t kIds>
struct Far {
  using Int = typename V::Int;
  const EncodeChain& chain;
  States<V> states;
  alignas(64) uint64_t entries[kPerLane][kLanes];  // bias, limit << 32

  explicit CACHEGEN_HD Far(const EncodeChain& from) : chain(from), states(from) {}
  CACHEGEN_HD void load(uint64_t row) {
    const uint8_t *symbols = chain.symbols + row * chain.stride, *contexts = chain.contexts + (kIds > 1 ? row * chain.stride : 0);
    for (uint32_t lane = 0; lane < kLanes; lane++)
#pragma GCC unroll 8
      for (uint32_t c = 0; c < kPerLane; c++) {
        const uint32_t column = lane * kPerLane + c;
        const SymbolEntry* of = chain.rows[kIds == 1 ? column : column * kIds + contexts[column]];
        memcpy(&entries[c][lane ^ (V::kWidth - 1)], &of[symbols[column]].bias, sizeof entries[0][0]);
      }
  }
  CACHEGEN_HD void step(uint32_t c, uint32_t g) {
    Int bias, limit;
    V::load_halves(reinterpret_cast<const uint8_t*>(&entries[c][g * V::kWidth]), bias, limit);
    const Int frequency = V::right_by(limit, states.limit_bits), one = V::all(1);
    // The bias of a frequency of 1 makes up for its reciprocal.
    const Int start = V::add_where(V::at_least(one, frequency), bias, V::subtract(one, states.total));
    states.put(g, start, frequency);
  }
};

template <class V, class Encoder>
void encode_with(EncodeChain& chain, uint64_t rows) {
  constexpr uint32_t kGroups = kLanes / V::kWidth;
  Encoder encoder(chain);
  for (uint64_t t = rows; t-- > 0;) {
    encoder.load(t);
#pragma GCC unroll 32
    for (uint32_t step = 0; step < kPerLane * kGroups; step++)
      encoder.step(kPerLane - 1 - step / kGroups, kGroups - 1 - step % kGroups);
  }
  encoder.states.keep(chain);
}

struct Range {
  uint8_t low, high;
};
inline Range range_of(const EncodeChain& chain, uint64_t rows) {
  uint8_t low[kTileColumns], high[kTileColumns];
  memset(low, 0xff, sizeof low);
  memset(high, 0, sizeof high);
  for (uint64_t t = 0; t < rows; t++) {
    const uint8_t* __restrict row = chain.symbols + t * chain.stride;
    for (uint32_t j = 0; j < kTileColumns; j++) {
      low[j] = row[j] < low[j] ? row[j] : low[j];
      high[j] = row[j] > high[j] ? row[j] : high[j];
    }
  }
  Range found = {0xff, 0};
  for (uint32_t j = 0; j < kTileColumns; j++) {
    found.low = low[j] < found.low ? low[j] : found.low;
    found.high = high[j] > found.high ? high[j] : found.high;
  }
  return found;
}

inline bool is_near(const Range& range, uint32_t symbols) {
  const int32_t half = int32_t(symbols / 2);
  return range.low >= kZeroIndex - half && range.high < kZeroIndex + half;
}

// Fills `kept` for the symbols around zero.
inline void keep_near(EncodeChain& chain, uint32_t symbols) {
  if (chain.near == symbols) return;
  chain.near = symbols;
  for (uint32_t column = 0; column < kTileColumns; column++) {
    const SymbolEntry* row = chain.rows[column];
    const uint32_t lane = column / kPerLane ^ chain.turn, total = 1u << chain.tables.prob_bits;
    for (uint32_t i = 0; i < symbols; i++) {
      const uint32_t symbol = uint32_t(kZeroIndex) - symbols / 2 + i;
      const uint32_t frequency = row[symbol].limit >> (kStateBits - chain.tables.prob_bits);
      const uint32_t start = row[symbol].bias - (frequency == 1 ? total - 1 : 0);
      chain.kept[column % kPerLane * symbols + symbol % symbols][lane] = start | frequency << 16;
    }
  }
}

template <class V>
void open_chain(EncodeChain* chain) {
  open_scalar(chain);
  if (chain->status || chain->tile.width != kTileColumns) return;
  chain->turn = V::kWidth - 1;
  chain->ternary = chain->n_ids == kContexts && Compared<V>::serves(chain->tables, chain->ids, kTileColumns * kContexts);
  for (uint32_t i = 0; i < kTileColumns * kContexts && chain->ternary; i++) {
    const uint32_t column = i / kContexts, lane = column / kPerLane ^ chain->turn;
    chain->kept[column % kPerLane * kContexts + i % kContexts][lane] = Compared<V>::kept(chain->tables, chain->ids[i]);
  }
}

template <class V>
void encode_rows(EncodeChain* chain, uint64_t rows) {
  if (chain->tile.width != kTileColumns) return encode_rows_scalar(chain, rows);
  const Range range = range_of(*chain, rows);
  if (chain->n_ids == kContexts)
    return chain->ternary && range.high < 3 ? encode_with<V, Ternary<V>>(*chain, rows)
                                            : encode_with<V, Far<V, kContexts>>(*chain, rows);
  if (!is_near(range, kNearSymbols)) return encode_with<V, Far<V, 1>>(*chain, rows);
  const bool few = is_near(range, kFewSymbols) && chain->near != kNearSymbols;
  keep_near(*chain, few ? kFewSymbols : kNearSymbols);
  few ? encode_with<V, Near<V, 3>>(*chain, rows) : encode_with<V, Near<V, 4>>(*chain, rows);
}

}  // namespace
}  // namespace cachegen
