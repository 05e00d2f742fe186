// What the warps of a block share of one tile column, and the streams of a tile: tables staged in shared memory, and chains.
//
// Note [Signs]: digit tables are staged by the coarser symbol's sign, 0 below zero, 1 zero, 2 above. That is min(max(index,
// 127), 129) - 127 for a base, and a digit's own index.
#pragma once

#include "chunk.h"
#include "tables.h"
#include "tile.h"
#include "warp.h"
#include "warp_tile.h"

namespace cachegen {

constexpr uint32_t kBatchSlots = 1u << CG_BATCH_PROB_BITS;
constexpr uint32_t kPairs = kMaxPerLane * kContexts * kLanes;  // of a digit section's tile
static_assert(kMaxPerLane == CG_VECTOR_COLUMNS, "a lane writes its columns together");

// Shared memory of a block, which is one tile of several chunks.
struct TileTables {
  SlotEntry* slots;  // of the base tables that the tile uses, in the order of their ids
  uint32_t* pairs;   // of digit section k, column c of a lane: pairs[((k * 8 + c) * 3 + sign) * 32 + lane]; where the second
                     // symbol of its table begins, and the third << 16
  uint32_t* used;    // a bit for each base table
};

CACHEGEN_HD uint64_t batch_shared_bytes(const cg_batch& batch) {
  return (uint64_t(batch.tables_per_tile) * kBatchSlots + CG_MAX_DIGITS * kPairs) * sizeof(uint32_t);
}

CACHEGEN_DEVICE uint32_t rank_of(const uint32_t* used, uint32_t id) {
  uint32_t rank = count_bits(used[id / 32] & ((1u << id % 32) - 1));
  for (uint32_t i = 0; i < id / 32; i++) rank += count_bits(used[i]);
  return rank;
}

CACHEGEN_DEVICE bool open_batch_tables(const void* memory, uint64_t bytes, Tables* tables) {
  return open_tables(memory, bytes, tables) && tables->prob_bits == CG_BATCH_PROB_BITS;
}

// Stages what the tile's warps look up: base tables only where batch.tables_per_tile says how many. The same value of
// cg_status for every thread of the block.
CACHEGEN_DEVICE int32_t stage_tile(const Crew& crew, const cg_batch& batch, uint64_t tile, const TileTables& to) {
  const Tile shape = tile_at(tile, batch.columns);
  Tables base = {}, digits = {};
  if (!open_batch_tables(batch.base_tables, batch.base_tables_bytes, &base)) return CG_BAD_TABLES;
  const uint32_t n_digits = batch.n_digits > batch.n_end_digits ? batch.n_digits : batch.n_end_digits;
  if (n_digits > 0 && !open_batch_tables(batch.digit_tables, batch.digit_tables_bytes, &digits)) return CG_BAD_TABLES;
  for (uint32_t i = crew.index; i < kMaxTables / 32; i += crew.count) to.used[i] = 0;
  crew.meet();

  bool bad_id = false, bad_digits = false;
  const uint8_t* ids = batch.base_ids + shape.first_column;
  for (uint32_t i = crew.index; i < shape.width; i += crew.count) {
    const uint32_t id = CACHEGEN_LOAD(ids + i);
    if (id < base.n_tables)
      crew.set_bit(to.used + id / 32, id % 32);
    else
      bad_id = true;
  }
  for (uint32_t i = crew.index; i < n_digits * kPairs; i += crew.count) {
    const uint32_t lane = i % kLanes, sign = i / kLanes % kContexts, c = i / (kLanes * kContexts) % kMaxPerLane;
    const uint32_t column = lane * shape.per_lane + c;
    if (c >= shape.per_lane || column >= shape.width) continue;
    const uint32_t context = sign == 1 ? 0 : sign == 2 ? 1 : 2;
    const uint32_t id = CACHEGEN_LOAD(batch.digit_ids[i / kPairs] + (shape.first_column + column) * kContexts + context);
    if (id >= digits.n_tables) {
      bad_id = true;
      continue;
    }
    uint32_t frequency[3];
    for (uint32_t symbol = 0; symbol < 3; symbol++)
      frequency[symbol] = CACHEGEN_LOAD(&digits.symbols_of(id)[symbol].limit) >> (kStateBits - CG_BATCH_PROB_BITS);
    bad_digits |= frequency[0] + frequency[1] + frequency[2] != kBatchSlots;
    to.pairs[i] = frequency[0] | (frequency[0] + frequency[1]) << 16;
  }
  if (crew.any(bad_id)) return CG_BAD_TABLE_ID;
  if (crew.any(bad_digits)) return CG_BAD_TABLES;

  uint32_t place = 0;
  for (uint32_t id = 0; id < base.n_tables && batch.tables_per_tile > 0; id++) {
    if ((to.used[id / 32] >> id % 32 & 1) == 0) continue;
    if (place == batch.tables_per_tile) return CG_BAD_ARGUMENT;
    crew.copy(to.slots + place++ * kBatchSlots, base.slots_of(id), kBatchSlots);
  }
  crew.meet();
  return CG_OK;
}

// One section of the tile while it is decoded: its words, of which `at` are taken.
struct Chain {
  const uint8_t* words;
  uint32_t at, size;
  Warp::PerLane<uint32_t> x;

  CACHEGEN_DEVICE bool has_token() const { return int32_t(size - at) >= int32_t(kTileColumns); }
  CACHEGEN_DEVICE const uint8_t* word(uint32_t i) const { return words + uint64_t(i) * kWordBytes; }
};

CACHEGEN_DEVICE int32_t open_chain(const Warp& warp, const cg_streams& streams, uint64_t tile, uint32_t lanes, uint64_t tokens,
                                   Chain* chain) {
  const uint64_t first = CACHEGEN_LOAD(streams.offsets + tile), last = CACHEGEN_LOAD(streams.offsets + tile + 1);
  if (first > last || last > streams.bytes) return CG_BAD_ARGUMENT;
  const uint64_t bytes = last - first;
  if (first % kWordBytes != 0) return CG_CORRUPT;
  const uint32_t head = lanes * kStateBytes;
  if (bytes < head) return CG_TRUNCATED;
  if (bytes % kWordBytes != 0 || bytes > slot_bytes(tokens)) return CG_CORRUPT;
  const uint8_t* data = streams.data + first;
  chain->words = data + head;
  chain->at = 0;
  chain->size = uint32_t(bytes - head) / kWordBytes;
  const uint32_t astray = warp.ballot([&](uint32_t lane) {
    const uint32_t x = lane < lanes ? load_state(data + lane * kStateBytes) : kMinState;
    chain->x[lane] = x;
    return x < kMinState || x >= kMaxState;
  });
  return astray ? CG_CORRUPT : CG_OK;
}

CACHEGEN_DEVICE int32_t close_chain(const Warp& warp, const Chain& chain) {
  if (chain.at > chain.size) return CG_TRUNCATED;
  const uint32_t unfinished = warp.ballot([&](uint32_t lane) { return chain.x[lane] != kMinState; });
  return unfinished || chain.at != chain.size ? CG_CORRUPT : CG_OK;
}

// One step of a chain: f(lane) takes a symbol; the lanes whose state has fallen then take a word each, in their order. Of a
// slow step only lanes with has(lane) take part. A fast step loads a word for every lane, which is there.
template <bool kSlow, class Has, class F>
CACHEGEN_DEVICE void step_chain(const Warp& warp, Chain& chain, const Has& has, const F& f) {
  Warp::PerLane<bool> low;
  const uint32_t votes = warp.ballot([&](uint32_t lane) {
    if (kSlow && !has(lane)) return low[lane] = false;
    f(lane);
    return low[lane] = chain.x[lane] < kMinState;
  });
  warp.each([&](uint32_t lane) {
    uint32_t& x = chain.x[lane];
    const uint32_t i = chain.at + count_bits(votes & warp.below(lane));
    const uint32_t word = !kSlow || (low[lane] && i < chain.size) ? load_word(chain.word(i)) : 0;
    x = low[lane] ? refill(x, word) : x;
  });
  chain.at += count_bits(votes);
}

}  // namespace cachegen
