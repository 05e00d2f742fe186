// A tile by a warp: the bodies of the kernels that encode and decode.
//
// Notes:
// 1. What a decoder reads beside the stream (contexts, coarser symbols) and where its symbols go is a Sink's business:
//    open() a token's row of a lane, context() and put() for each of its columns, close() the row.
// 2. A word past the end reads as 0; damage is noted on the way and told at the end. One test for all lanes, once a token,
//    says whether any word of it could lie past the end.
// 3. Lanes without a c-th column (of a narrow tile) vote no, and keep their state.
// 4. A table is looked up by a Lut in memory. One of digits, of which a tile uses more than any near memory holds, is two
//    numbers, which fit in a register: Digits.
#pragma once

#include "state.h"
#include "tables.h"
#include "tile.h"
#include "warp.h"

namespace cachegen {

constexpr uint32_t kMaxPerLane = kTileColumns / kLanes;
static_assert(kLanes == kWarpLanes, "a lane of the coder is a lane of the warp");

// Slot entries of some tables: all of them, or those staged in nearer memory, then rank[id] says where.
struct Lut {
  const SlotEntry* slots;
  const uint8_t* rank;
  uint32_t prob_bits, n_tables;

  // What a lane keeps of a table, and the table's entry of a slot.
  CACHEGEN_DEVICE uint32_t kept(uint8_t id) const { return uint32_t(rank ? rank[id] : id) << prob_bits; }
  CACHEGEN_DEVICE SlotEntry entry(uint32_t kept, uint32_t slot) const { return slots[kept + slot]; }
};

// Tables of three symbols: a lane keeps where the second and the third begin.
struct Digits {
  const SymbolEntry* symbols;
  uint32_t prob_bits, n_tables;

  CACHEGEN_DEVICE uint32_t frequency(uint8_t id, uint32_t symbol) const {
    return symbols[id * kMaxSymbols + symbol].limit >> (kStateBits - prob_bits);
  }
  CACHEGEN_DEVICE uint32_t kept(uint8_t id) const {
    const uint32_t second = frequency(id, 0);
    return second | (second + frequency(id, 1)) << 16;
  }
  CACHEGEN_DEVICE SlotEntry entry(uint32_t kept, uint32_t slot) const {
    const uint32_t second = kept & 0xffff, third = kept >> 16;
    const bool past_first = slot >= second, past_second = slot >= third;
    const uint32_t first = past_second ? third : past_first ? second : 0;
    const uint32_t last = past_second ? 1u << prob_bits : past_first ? third : second;
    return slot_entry(slot - first, last - first, uint32_t(past_first) + uint32_t(past_second));
  }
};

// What a lane owns of a tile.
CACHEGEN_DEVICE uint32_t own_columns(const Tile& tile, uint32_t lane) {
  const uint32_t first = lane * tile.per_lane;
  return first >= tile.width ? 0 : tile.width - first < tile.per_lane ? tile.width - first : tile.per_lane;
}

CACHEGEN_DEVICE int32_t check_ids(const Warp& warp, const cg_section& section, uint32_t n_tables, const Tile& tile) {
  const uint32_t count = tile.width * uint32_t(section.ids_per_column);
  const uint8_t* ids = section.table_ids + tile.first_column * section.ids_per_column;
  const uint32_t bad = warp.ballot([&](uint32_t lane) {
    bool found = false;
    for (uint32_t i = lane; i < count; i += kLanes) found |= ids[i] >= n_tables;
    return found;
  });
  return bad ? CG_BAD_TABLE_ID : CG_OK;
}

CACHEGEN_DEVICE int32_t check_contexts(const Warp& warp, const cg_section& section, const Tile& tile) {
  if (section.contexts == nullptr) return CG_OK;
  const uint32_t bad = warp.ballot([&](uint32_t lane) {
    bool found = false;
    for (uint64_t t = 0; t < section.tokens; t++)
      for (uint32_t i = lane; i < tile.width; i += kLanes)
        found |= section.contexts[t * section.columns + tile.first_column + i] >= kContexts;
    return found;
  });
  return bad ? CG_BAD_CONTEXT : CG_OK;
}

// Whether all tables of a tile are there, and have three symbols.
CACHEGEN_DEVICE bool are_digits(const Warp& warp, const Digits& digits, const cg_section& section, const Tile& tile) {
  const uint32_t count = tile.width * uint32_t(section.ids_per_column);
  const uint8_t* ids = section.table_ids + tile.first_column * section.ids_per_column;
  return warp.ballot([&](uint32_t lane) {
    bool found = false;
    for (uint32_t i = lane; i < count; i += kLanes) {
      uint32_t sum = 0;
      if (ids[i] < digits.n_tables)
        for (uint32_t symbol = 0; symbol < 3; symbol++) sum += digits.frequency(ids[i], symbol);
      found |= sum != 1u << digits.prob_bits;
    }
    return found;
  }) == 0;
}

template <uint32_t kIds>
struct DecoderLane {
  uint32_t x, own;
  uint32_t kept[kMaxPerLane * kIds];
};

// One token. kTail: some of its words may lie past the end.
template <uint32_t kIds, bool kTail, class Lookup, class Lanes, class Rows, class Sink>
CACHEGEN_DEVICE uint64_t decode_token(const Warp& warp, const Lookup& lut, const uint8_t* stream, uint64_t bytes,
                                      uint64_t at, Lanes& lanes, Rows& rows, const Sink& sink) {
  const uint32_t slot_mask = (1u << lut.prob_bits) - 1;
  CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
    const uint32_t votes = warp.ballot([&](uint32_t lane) {
      DecoderLane<kIds>& own = lanes[lane];
      if (c >= own.own) return false;
      uint32_t kept = own.kept[c * kIds];
      if constexpr (kIds > 1) {
        // Read before one is chosen: a choice among places would keep the array out of registers.
        const uint32_t positive = own.kept[c * kIds + 1], negative = own.kept[c * kIds + 2];
        const uint32_t context = sink.context(rows[lane], c);
        kept = context == 1 ? positive : context == 2 ? negative : kept;
      }
      const SlotEntry entry = lut.entry(kept, own.x & slot_mask);
      sink.put(rows[lane], c, uint8_t(entry));
      own.x = take(own.x, entry, lut.prob_bits);
      return own.x < kMinState;
    });
    warp.each([&](uint32_t lane) {
      if ((votes >> lane & 1) == 0) return;
      const uint64_t word = at + kWordBytes * count_bits(votes & ((1u << lane) - 1));
      lanes[lane].x = refill(lanes[lane].x, kTail && word >= bytes ? 0 : load_word(stream + word));
    });
    at += kWordBytes * count_bits(votes);
  }
  return at;
}

// A value of cg_status. The stream begins at an even address.
template <uint32_t kIds, class Lookup, class Sink>
CACHEGEN_DEVICE int32_t decode_tile(const Warp& warp, const Lookup& lut, const cg_section& section, const Tile& tile,
                                    const uint8_t* stream, uint64_t bytes, Sink& sink) {
  if (const int32_t status = check_ids(warp, section, lut.n_tables, tile)) return status;
  if (const int32_t status = check_contexts(warp, section, tile)) return status;
  if (bytes < tile.head_bytes()) return CG_TRUNCATED;
  if (bytes % kWordBytes != 0) return CG_CORRUPT;

  Warp::PerLane<DecoderLane<kIds>> lanes;
  Warp::PerLane<typename Sink::Row> rows;
  const uint32_t astray = warp.ballot([&](uint32_t lane) {
    DecoderLane<kIds>& own = lanes[lane];
    own.own = own_columns(tile, lane);
    own.x = lane < tile.lanes ? load_state(stream + lane * kStateBytes) : kMinState;
    const uint8_t* ids = section.table_ids + (tile.first_column + lane * tile.per_lane) * kIds;
    CACHEGEN_UNROLL for (uint32_t i = 0; i < kMaxPerLane * kIds; i++) own.kept[i] = i < own.own * kIds ? lut.kept(ids[i]) : 0;
    return own.x < kMinState || own.x >= kMaxState;
  });
  if (astray) return CG_CORRUPT;

  uint64_t at = tile.head_bytes();
  for (uint64_t t = 0; t < section.tokens; t++) {
    warp.each([&](uint32_t lane) { sink.open(rows[lane], t, lane); });
    const bool tail = at + kTileColumns * kWordBytes > bytes;
    at = tail ? decode_token<kIds, true>(warp, lut, stream, bytes, at, lanes, rows, sink)
              : decode_token<kIds, false>(warp, lut, stream, bytes, at, lanes, rows, sink);
    warp.each([&](uint32_t lane) { sink.close(rows[lane], t, lane); });
  }
  if (at > bytes) return CG_TRUNCATED;
  const uint32_t unfinished = warp.ballot([&](uint32_t lane) { return lanes[lane].x != kMinState; });
  return unfinished || at != bytes ? CG_CORRUPT : CG_OK;
}

// Writes the stream so that it ends at slot_end, at an even address.
template <uint32_t kIds>
CACHEGEN_DEVICE int32_t encode_tile(const Warp& warp, const Tables& tables, const cg_section& section, const Tile& tile,
                                    const uint8_t* symbols, uint8_t* slot_end, uint64_t* stream_bytes) {
  warp.once([&] { *stream_bytes = 0; });
  if (const int32_t status = check_ids(warp, section, tables.n_tables, tile)) return status;
  if (const int32_t status = check_contexts(warp, section, tile)) return status;
  struct Lane {
    uint32_t x, own;
    bool unsupported;
    SymbolEntry entry;
  };
  Warp::PerLane<Lane> lanes;
  warp.each([&](uint32_t lane) {
    lanes[lane].x = kMinState;
    lanes[lane].own = own_columns(tile, lane);
    lanes[lane].unsupported = false;
  });
  uint8_t* write = slot_end;
  for (uint64_t t = section.tokens; t-- > 0;) {
    const uint64_t row = t * section.columns + tile.first_column;
    CACHEGEN_UNROLL for (uint32_t c = kMaxPerLane; c-- > 0;) {
      const uint32_t votes = warp.ballot([&](uint32_t lane) {
        Lane& own = lanes[lane];
        if (c >= own.own) return false;
        const uint64_t column = lane * tile.per_lane + c;
        const uint32_t context = kIds == 1 ? 0 : section.contexts[row + column];
        const uint8_t id = section.table_ids[(tile.first_column + column) * kIds + context];
        own.entry = tables.symbols_of(id)[symbols[row + column]];
        own.unsupported |= own.entry.limit == 0;
        return own.x >= own.entry.limit;
      });
      warp.each([&](uint32_t lane) {
        Lane& own = lanes[lane];
        if (c >= own.own) return;
        if (votes >> lane & 1) {  // the highest lane's word comes last in memory
          store_word(write - kWordBytes * count_bits(votes >> lane), own.x);
          own.x >>= kWordBits;
        }
        own.x = put(own.x, own.entry);
      });
      write -= kWordBytes * count_bits(votes);
    }
  }
  if (warp.ballot([&](uint32_t lane) { return lanes[lane].unsupported; })) return CG_BAD_SYMBOL;
  write -= tile.head_bytes();
  warp.each([&](uint32_t lane) {
    if (lane < tile.lanes) store_state(write + lane * kStateBytes, lanes[lane].x);
  });
  warp.once([&] { *stream_bytes = uint64_t(slot_end - write); });
  return CG_OK;
}

}  // namespace cachegen
