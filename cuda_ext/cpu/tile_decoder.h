// What every decoder of a tile does before and after its symbols.
//
// Notes:
// 1. A token takes at most one word per column. reserve() makes sure that so many can be read without a check; near the
//    end it moves on to a copy of the last words that has zeros behind it.
// 2. A word past the end reads as 0: damage is noted on the way, and told at the end.
#pragma once

#include <string.h>

#include "../core/state.h"
#include "check_tile.h"

namespace cachegen {
namespace {

constexpr uint32_t kReserve = kTileColumns * kWordBytes;

struct TileDecoder {
  uint32_t state[kLanes];
  const uint8_t* at;  // the next word
  const uint8_t* end;
  bool past_end, in_tail;
  uint8_t tail[2 * kReserve];

  int32_t begin(const cg_section& section, const Tables& tables, const DecodeJob& job) {
    if (job.odd) return CG_CORRUPT;
    if (const int32_t status = check_tile(section, tables, job.tile)) return status;
    const uint64_t bytes = uint64_t(job.end - job.stream);
    if (bytes < job.tile.head_bytes()) return CG_TRUNCATED;
    if (bytes % kWordBytes != 0) return CG_CORRUPT;
    for (uint32_t lane = 0; lane < job.tile.lanes; lane++) {
      state[lane] = load_state(job.stream + lane * kStateBytes);
      if (state[lane] < kMinState || state[lane] >= kMaxState) return CG_CORRUPT;
    }
    at = job.stream + job.tile.head_bytes();
    end = job.end;
    past_end = in_tail = false;
    return CG_OK;
  }

  // Before every token.
  CACHEGEN_HD void reserve() {
    if (end - at < ptrdiff_t(kReserve)) reserve_near_end();
  }

  void reserve_near_end() {
    if (!in_tail) {
      const size_t left = size_t(end - at);
      memset(tail, 0, sizeof tail);
      if (left > 0) memcpy(tail, at, left);
      at = tail;
      end = tail + left;
      in_tail = true;
    } else if (at > end) {
      past_end = true;
      at = end;
    }
  }

  int32_t finish(const Tile& tile) const {
    if (past_end || at > end) return CG_TRUNCATED;
    uint32_t astray = at != end;
    for (uint32_t lane = 0; lane < tile.lanes; lane++) astray |= state[lane] ^ kMinState;
    return astray ? CG_CORRUPT : CG_OK;
  }
};

}  // namespace
}  // namespace cachegen
