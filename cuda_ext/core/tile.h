// Who owns which column of a tile.
//
// Note: a lane owns ADJACENT columns (per_lane of them), so that its outputs of one token are one store. The last lane
// may own fewer, so at the c-th step of a token the lanes that take part are the first `active(c)` ones.
#pragma once

#include <stdint.h>

#include "../include/cachegen.h"
#include "portable.h"

namespace cachegen {

constexpr uint32_t kTileColumns = CG_TILE_COLUMNS;
constexpr uint32_t kLanes = 32;      // one warp
constexpr uint32_t kStateBytes = 4;  // of a lane's initial state, at the head of a stream
constexpr uint32_t kWordBytes = 2;
constexpr uint32_t kContexts = 3;  // ids of a column whose symbols have contexts

struct Tile {
  uint64_t first_column;
  uint32_t width, per_lane, lanes;

  CACHEGEN_HD uint32_t active(uint32_t c) const {  // lanes that have a c-th column
    return (width - c + per_lane - 1) / per_lane;
  }
  CACHEGEN_HD uint32_t head_bytes() const { return kStateBytes * lanes; }
};

CACHEGEN_HD uint64_t tile_count(uint64_t tokens, uint64_t columns) {
  return tokens == 0 ? 0 : (columns + kTileColumns - 1) / kTileColumns;
}

CACHEGEN_HD Tile tile_at(uint64_t index, uint64_t columns) {
  const uint64_t first = index * kTileColumns, rest = columns - first;
  const uint32_t width = rest < kTileColumns ? uint32_t(rest) : kTileColumns;
  const uint32_t per_lane = (width + kLanes - 1) / kLanes;
  return {first, width, per_lane, (width + per_lane - 1) / per_lane};
}

// The head, and at most one word per symbol.
CACHEGEN_HD uint64_t slot_bytes(uint64_t tokens) {
  return uint64_t(kLanes) * kStateBytes + tokens * kTileColumns * kWordBytes;
}

}  // namespace cachegen
