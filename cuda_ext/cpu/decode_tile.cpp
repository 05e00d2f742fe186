// Twists:
// 1. A token takes at most one word per column. While so many are left nothing is checked; the last tokens are checked
//    word by word.
// 2. A word past the end reads as 0: damage is noted on the way, and told at the end.
#include "../core/state.h"
#include "tile_coder.h"

namespace cachegen {
namespace {

struct Reader {
  const uint8_t* at;
  const uint8_t* end;
  bool past_end;
};

template <bool kChecked>
inline uint32_t next_state(uint32_t x, Reader& words) {
  if (kChecked) {
    if (x >= kMinState) return x;
    if (words.at == words.end) {
      words.past_end = true;
      return refill(x, 0);
    }
    words.at += kWordBytes;
    return refill(x, load_word(words.at - kWordBytes));
  }
  const uint32_t filled = refill(x, load_word(words.at));  // without a branch, which would be taken at random
  const bool low = x < kMinState;
  words.at += low ? kWordBytes : 0;
  return low ? filled : x;
}

template <uint32_t kIds, bool kChecked>
inline void decode_token(const Tile& tile, const SlotEntry* const* slots, uint32_t prob_bits, const uint8_t* contexts,
                         uint32_t* state, Reader& words, uint8_t* symbols) {
  const uint32_t slot_mask = (1u << prob_bits) - 1;
  for (uint32_t c = 0; c < tile.per_lane; c++) {
    const uint32_t active = tile.active(c);
    for (uint32_t lane = 0; lane < active; lane++) {
      const uint32_t column = lane * tile.per_lane + c;
      const uint32_t which = kIds == 1 ? column : column * kIds + contexts[column];
      const uint32_t x = state[lane];
      const SlotEntry entry = slots[which][x & slot_mask];
      symbols[column] = uint8_t(entry);
      state[lane] = next_state<kChecked>(take(x, entry, prob_bits), words);
    }
  }
}

template <uint32_t kIds>
void decode_tokens(const cg_section& section, const Tables& tables, const Tile& tile, uint32_t* state, Reader& words,
                   uint8_t* symbols) {
  const SlotEntry* slots[kTileColumns * kIds];
  const uint8_t* ids = section.table_ids + tile.first_column * kIds;
  for (uint32_t i = 0; i < tile.width * kIds; i++) slots[i] = tables.slots_of(ids[i]);
  for (uint64_t t = 0; t < section.tokens; t++) {
    const uint64_t row = t * section.columns + tile.first_column;
    const uint8_t* contexts = kIds == 1 ? nullptr : section.contexts + row;
    if (uint64_t(words.end - words.at) >= kWordBytes * uint64_t(tile.width))
      decode_token<kIds, false>(tile, slots, tables.prob_bits, contexts, state, words, symbols + row);
    else
      decode_token<kIds, true>(tile, slots, tables.prob_bits, contexts, state, words, symbols + row);
  }
}

}  // namespace

int32_t decode_tile(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* stream,
                    const uint8_t* end, uint8_t* symbols) {
  if (const int32_t status = check_tile(section, tables, tile)) return status;
  const uint64_t bytes = uint64_t(end - stream);
  if (bytes < tile.head_bytes()) return CG_TRUNCATED;
  if (bytes % kWordBytes != 0) return CG_CORRUPT;
  uint32_t state[kLanes] = {};
  for (uint32_t lane = 0; lane < tile.lanes; lane++) {
    state[lane] = load_state(stream + lane * kStateBytes);
    if (state[lane] < kMinState || state[lane] >= kMaxState) return CG_CORRUPT;
  }
  Reader words = {stream + tile.head_bytes(), end, false};
  const auto decode_tokens_of = section.ids_per_column == 1 ? decode_tokens<1> : decode_tokens<kContexts>;
  decode_tokens_of(section, tables, tile, state, words, symbols);
  if (words.past_end) return CG_TRUNCATED;
  uint32_t astray = words.at != words.end;
  for (uint32_t lane = 0; lane < tile.lanes; lane++) astray |= state[lane] ^ kMinState;
  return astray ? CG_CORRUPT : CG_OK;
}

}  // namespace cachegen
