// Whole tiles (256 columns, 8 to a lane) with vectors, for any V: an instruction set's vectors of V::kWidth lanes.
//
// Notes:
// 1. The dependence from state to state is longer than what a core needs to issue it, so kTiles tiles run side by side.
// 2. A lane's 8 symbols of a token are 8 adjacent bytes: two 32-bit halves, filled byte by byte as columns are decoded.
// 3. The encoder's words of one step go to memory from the top down. A vector of them is stored whole, its valid words
//    uppermost; what lies below is written over later, and the slot is large enough for it.
// 4. Tables of three symbols alone are encoded without a gather: a frequency is the difference of two bounds, and the
//    division by it is one of floats. A state is below its limit, so the quotient is below 2^21. Three roundings, of 2^-24
//    each, and the factor 1 - 2^-22 leave less than one, and never too much: the remainder tells whether one is missing.
#pragma once

#include "tile_decoder.h"
#include "vector_lookup.h"

namespace cachegen {
namespace {

constexpr uint32_t kPerLane = kTileColumns / kLanes;
static_assert(kPerLane == 8, "a lane's symbols of a token are two 32-bit halves");

inline bool is_whole(const Tile& tile) { return tile.width == kTileColumns; }

// What every lane keeps of the tables of its c-th column, by context: kept(id).
struct alignas(64) Bases {
  uint32_t of[kPerLane][kContexts][kLanes];

  template <class F>
  void fill(const cg_section& section, const Tile& tile, const F& kept) {
    const uint64_t n = section.ids_per_column;
    const uint8_t* ids = section.table_ids + tile.first_column * n;
    for (uint32_t lane = 0; lane < kLanes; lane++)
      for (uint32_t c = 0; c < kPerLane; c++)
        for (uint32_t k = 0; k < n; k++) of[c][k][lane] = kept(ids[(lane * kPerLane + c) * n + k]);
  }
};

// One token's bytes of a tile, 8 to a lane: half[0] the first four columns of every lane.
template <class V>
struct TokenBytes {
  static constexpr uint32_t kGroups = kLanes / V::kWidth;
  typename V::Int half[2][kGroups];

  CACHEGEN_HD void load(const uint8_t* row) {
    for (uint32_t g = 0; g < kGroups; g++) V::load_halves(row + g * V::kWidth * kPerLane, half[0][g], half[1][g]);
  }
  CACHEGEN_HD void store(uint8_t* row) const {
    for (uint32_t g = 0; g < kGroups; g++) V::store_halves(row + g * V::kWidth * kPerLane, half[0][g], half[1][g]);
  }
};

// What group g keeps at column c, by the context of every lane.
template <class V, uint32_t kIds>
CACHEGEN_HD typename V::Int base_of(const Bases& bases, const TokenBytes<V>& contexts, uint32_t c, uint32_t g) {
  const auto& of = bases.of[c];
  const typename V::Int zero = V::load(of[0] + g * V::kWidth);
  if (kIds == 1) return zero;
  const typename V::Int which = contexts.half[c / 4][g];
  const typename V::Int positive = V::where_bit(which, 8 * (c % 4), V::load(of[1] + g * V::kWidth), zero);
  return V::where_bit(which, 8 * (c % 4) + 1, V::load(of[2] + g * V::kWidth), positive);
}

template <class V, class Lookup, uint32_t kIds, uint32_t kTiles>
void decode_whole(const cg_section& section, const Tables& tables, const Tile* const* tiles,
                  TileDecoder* const* decoders, uint8_t* symbols) {
  constexpr uint32_t kGroups = kLanes / V::kWidth;
  using Int = typename V::Int;
  const Lookup lookup(tables);
  Bases bases[kTiles];
  for (uint32_t i = 0; i < kTiles; i++)
    bases[i].fill(section, *tiles[i], [&](uint8_t id) { return Lookup::kept(tables, id); });
  Int x[kTiles][kGroups];
  for (uint32_t i = 0; i < kTiles; i++)
    for (uint32_t g = 0; g < kGroups; g++) x[i][g] = V::load(decoders[i]->state + g * V::kWidth);
  for (uint64_t t = 0; t < section.tokens; t++) {
    const uint8_t* at[kTiles];
    TokenBytes<V> contexts[kTiles], out[kTiles];
    for (uint32_t i = 0; i < kTiles; i++) {
      decoders[i]->reserve();
      at[i] = decoders[i]->at;
      if (kIds > 1) contexts[i].load(section.contexts + t * section.columns + tiles[i]->first_column);
    }
#pragma GCC unroll 8
    for (uint32_t c = 0; c < kPerLane; c++) {
#pragma GCC unroll 8
      for (uint32_t i = 0; i < kTiles; i++)
#pragma GCC unroll 8
        for (uint32_t g = 0; g < kGroups; g++) {
          Int& bytes = out[i].half[c / 4][g];
          if (c % 4 == 0) bytes = V::all(0);
          x[i][g] = lookup.take(x[i][g], base_of<V, kIds>(bases[i], contexts[i], c, g), c % 4, bytes);
        }
#pragma GCC unroll 8
      for (uint32_t i = 0; i < kTiles; i++)
#pragma GCC unroll 8
        for (uint32_t g = 0; g < kGroups; g++) x[i][g] = V::refill(x[i][g], at[i]);
    }
    for (uint32_t i = 0; i < kTiles; i++) {
      decoders[i]->at = at[i];
      out[i].store(symbols + t * section.columns + tiles[i]->first_column);
    }
  }
  for (uint32_t i = 0; i < kTiles; i++)
    for (uint32_t g = 0; g < kGroups; g++) V::store(decoders[i]->state + g * V::kWidth, x[i][g]);
}

template <class V, uint32_t kTiles>
auto decoder_of(const cg_section& section, const Tables& tables, const Tile* const* tiles) {
  if (section.ids_per_column == 1) return decode_whole<V, Gathered<V>, 1, kTiles>;
  for (uint32_t i = 0; i < kTiles; i++)
    if (!Compared<V>::serves(tables, section, *tiles[i])) return decode_whole<V, Gathered<V>, kContexts, kTiles>;
  return decode_whole<V, Compared<V>, kContexts, kTiles>;
}

// Narrow tiles go to the scalar code; whole ones wait for company, the last maybe in vain.
template <class V, uint32_t kTiles>
void decode_tiles(const cg_section& section, const Tables& tables, const DecodeJob* jobs, uint32_t count,
                  uint8_t* symbols) {
  TileDecoder decoders[kTiles];
  TileDecoder* ready[kTiles] = {};
  const DecodeJob* mine[kTiles] = {};
  const Tile* tiles[kTiles] = {};
  uint32_t n = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (!is_whole(jobs[i].tile)) {
      decode_scalar(section, tables, jobs[i], symbols);
    } else if ((*jobs[i].status = decoders[n].begin(section, tables, jobs[i])) == CG_OK) {
      ready[n] = &decoders[n];
      mine[n] = &jobs[i];
      tiles[n++] = &jobs[i].tile;
    }
  }
  if (n == kTiles)
    decoder_of<V, kTiles>(section, tables, tiles)(section, tables, tiles, ready, symbols);
  else
    for (uint32_t i = 0; i < n; i++)
      decoder_of<V, 1>(section, tables, tiles + i)(section, tables, tiles + i, ready + i, symbols);
  for (uint32_t i = 0; i < n; i++) *mine[i]->status = decoders[i].finish(mine[i]->tile);
}

// put() for a vector; `bad` takes what is nonzero where a symbol has no frequency.
template <class V, uint32_t kIds>
uint8_t* encode_whole(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                      uint8_t* write, uint32_t* state) {
  constexpr uint32_t kGroups = kLanes / V::kWidth;
  using Int = typename V::Int;
  constexpr uint32_t kEntryUnits = sizeof(SymbolEntry) / 8;  // a gather scales by 8 at most
  Bases bases;
  bases.fill(section, tile, [](uint8_t id) { return id * kMaxSymbols * kEntryUnits; });
  const Int byte = V::all(0xff), low_half = V::all(0xffff), total = V::all(1u << tables.prob_bits);
  const uint32_t limit_shift = kStateBits - tables.prob_bits;
  const Int limit_bits = V::all(limit_shift);
  const uint32_t* entries = reinterpret_cast<const uint32_t*>(tables.symbols);
  Int x[kGroups], bad = V::all(0);
  for (uint32_t g = 0; g < kGroups; g++) x[g] = V::all(kMinState);
  for (uint64_t t = section.tokens; t-- > 0;) {
    const uint64_t row = t * section.columns + tile.first_column;
    TokenBytes<V> in, contexts;
    in.load(symbols + row);
    if (kIds > 1) contexts.load(section.contexts + row);
#pragma GCC unroll 32
    for (uint32_t step = 0; step < kPerLane * kGroups; step++) {
      const uint32_t c = kPerLane - 1 - step / kGroups, g = kGroups - 1 - step % kGroups;
      const Int symbol = V::both(V::right(in.half[c / 4][g], 8 * (c % 4)), byte);
      const Int entry = V::add(V::left(symbol, 1), base_of<V, kIds>(bases, contexts, c, g));
      const Int reciprocal = V::gather8(entries, entry), bias = V::gather8(entries + 1, entry);
      const Int packed = V::gather8(entries + 3, entry);  // complement, shift
      const Int complement = V::both(packed, low_half), shift = V::right(packed, 16);
      bad = V::either(bad, V::is_zero(reciprocal));
      x[g] = V::give(x[g], V::left_by(V::subtract(total, complement), limit_bits), write);
      const Int quotient = V::right_by(V::multiply_high(x[g], reciprocal), shift);
      x[g] = V::add(V::add(x[g], bias), V::multiply(quotient, complement));
    }
  }
  for (uint32_t g = 0; g < kGroups; g++) V::store(state + g * V::kWidth, x[g]);
  return V::any(bad) ? nullptr : write;
}

// The same with tables that Compared serves: see Note 4.
template <class V>
uint8_t* encode_ternary(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                        uint8_t* write, uint32_t* state) {
  constexpr uint32_t kGroups = kLanes / V::kWidth;
  constexpr float kBelow = 1 - 0x1p-22f;
  using Int = typename V::Int;
  Bases bases;
  bases.fill(section, tile, [&](uint8_t id) { return Compared<V>::kept(tables, id); });
  const uint32_t prob_bits = tables.prob_bits;
  const Int byte = V::all(0xff), low_half = V::all(0xffff), total = V::all(1u << prob_bits), limit_bits = V::all(kStateBits - prob_bits);
  const Int one = V::all(1), two = V::all(2), none = V::all(0), beyond = V::all(0x1fc), total_bits = V::all(prob_bits);
  Int x[kGroups], bad = V::all(0);
  for (uint32_t g = 0; g < kGroups; g++) x[g] = V::all(kMinState);
  for (uint64_t t = section.tokens; t-- > 0;) {
    const uint64_t row = t * section.columns + tile.first_column;
    TokenBytes<V> in, contexts;
    in.load(symbols + row);
    contexts.load(section.contexts + row);
#pragma GCC unroll 32
    for (uint32_t step = 0; step < kPerLane * kGroups; step++) {
      const uint32_t c = kPerLane - 1 - step / kGroups, g = kGroups - 1 - step % kGroups;
      const Int symbol = V::both(V::right(in.half[c / 4][g], 8 * (c % 4)), byte);
      const Int kept = base_of<V, kContexts>(bases, contexts, c, g);
      const Int second = V::both(kept, low_half), third = V::right(kept, 16);
      const auto past_first = V::at_least(symbol, one), past_second = V::at_least(symbol, two);
      const Int start = V::choose(past_second, third, V::choose(past_first, second, none));
      const Int end = V::choose(past_second, total, V::choose(past_first, third, second));
      const Int frequency = V::subtract(end, start);
      bad = V::either(bad, V::either(V::is_zero(frequency), V::both(V::add(symbol, one), beyond)));  // 3 or more
      x[g] = V::give(x[g], V::left_by(frequency, limit_bits), write);
      const Int quotient = V::quotient(x[g], frequency, kBelow);
      const Int remainder = V::subtract(x[g], V::multiply(quotient, frequency));
      const Int found = V::add(V::add(V::left_by(quotient, total_bits), remainder), start);
      x[g] = V::add_where(V::at_least(remainder, frequency), found, V::subtract(total, frequency));
    }
  }
  for (uint32_t g = 0; g < kGroups; g++) V::store(state + g * V::kWidth, x[g]);
  return V::any(bad) ? nullptr : write;
}

template <class V>
int32_t encode_tile(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                    uint8_t* slot_end, uint64_t* stream_bytes) {
  if (!is_whole(tile)) return encode_scalar(section, tables, tile, symbols, slot_end, stream_bytes);
  *stream_bytes = 0;
  if (const int32_t status = check_tile(section, tables, tile)) return status;
  uint32_t state[kLanes];
  const bool ternary = section.ids_per_column == kContexts && Compared<V>::serves(tables, section, tile);
  const auto encode = ternary                       ? encode_ternary<V>
                      : section.ids_per_column == 1 ? encode_whole<V, 1>
                                                    : encode_whole<V, kContexts>;
  uint8_t* write = encode(section, tables, tile, symbols, slot_end, state);
  if (write == nullptr) return CG_BAD_SYMBOL;
  for (uint32_t lane = kLanes; lane-- > 0;) store_state(write -= kStateBytes, state[lane]);
  *stream_bytes = uint64_t(slot_end - write);
  return CG_OK;
}

}  // namespace
}  // namespace cachegen
