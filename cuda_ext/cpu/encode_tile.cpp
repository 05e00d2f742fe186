// Twist: everything runs backwards (tokens, columns, lanes, the write position), so that the decoder reads forwards.
#include "../core/state.h"
#include "tile_coder.h"

namespace cachegen {
namespace {

// Returns the stream's first word, or nullptr where a symbol has no frequency.
template <uint32_t kIds>
uint8_t* encode_tokens(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                       uint8_t* write, uint32_t* state) {
  const SymbolEntry* rows[kTileColumns * kIds];
  const uint8_t* ids = section.table_ids + tile.first_column * kIds;
  for (uint32_t i = 0; i < tile.width * kIds; i++) rows[i] = tables.symbols_of(ids[i]);
  bool unsupported = false;
  for (uint64_t t = section.tokens; t-- > 0;) {
    const uint64_t row = t * section.columns + tile.first_column;
    for (uint32_t c = tile.per_lane; c-- > 0;) {
      for (uint32_t lane = tile.active(c); lane-- > 0;) {
        const uint32_t column = lane * tile.per_lane + c;
        const uint32_t which = kIds == 1 ? column : column * kIds + section.contexts[row + column];
        const SymbolEntry& entry = rows[which][symbols[row + column]];
        uint32_t x = state[lane];
        // A word is always stored, and kept only if the state must give it. At most one per symbol: the slot holds it.
        const bool full = x >= entry.limit;
        store_word(write - kWordBytes, x);
        write -= full ? kWordBytes : 0;
        x = full ? x >> kWordBits : x;
        unsupported |= entry.limit == 0;
        state[lane] = put(x, entry);
      }
    }
  }
  return unsupported ? nullptr : write;
}

}  // namespace

int32_t encode_tile(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                    uint8_t* slot_end, uint64_t* stream_bytes) {
  *stream_bytes = 0;
  if (const int32_t status = check_tile(section, tables, tile)) return status;
  uint32_t state[kLanes];
  for (uint32_t& x : state) x = kMinState;
  const auto encode_tokens_of = section.ids_per_column == 1 ? encode_tokens<1> : encode_tokens<kContexts>;
  uint8_t* write = encode_tokens_of(section, tables, tile, symbols, slot_end, state);
  if (write == nullptr) return CG_BAD_SYMBOL;
  for (uint32_t lane = tile.lanes; lane-- > 0;) store_state(write -= kStateBytes, state[lane]);
  *stream_bytes = uint64_t(slot_end - write);
  return CG_OK;
}

}  // namespace cachegen
