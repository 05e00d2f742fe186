// Decodes whole tiles (256 columns, 8 to a lane) with vectors, for any V: an instruction set's vectors of V::kWidth lanes.
//
// Notes:
// 1. The dependence from state to state is longer than what a core needs to issue it, so kTiles tiles run side by side.
// 2. A lane's 8 symbols of a token are 8 adjacent bytes: two 32-bit halves, filled byte by byte as columns are decoded.
#pragma once

#include "encode_chain.h"
#include "tile_decoder.h"
#include "vector_lookup.h"

namespace cachegen {
namespace {

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
    if (!Compared<V>::serves(tables, section.table_ids + tiles[i]->first_column * kContexts, kTileColumns * kContexts))
      return decode_whole<V, Gathered<V>, kContexts, kTiles>;
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

}  // namespace
}  // namespace cachegen
