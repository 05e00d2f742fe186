// The baseline: any machine, tiles of any width, one symbol at a time.
//
// Note: encoding runs backwards (tokens, columns, lanes, the write position), so that the decoder reads forwards.
#include "heads.h"
#include "into.h"
#include "planes.h"
#include "source.h"
#include "tile_decoder.h"

namespace cachegen {
namespace {

template <uint32_t kIds>
void decode_tokens(const cg_section& section, const Tables& tables, const Tile& tile, TileDecoder& decoder,
                   uint8_t* symbols) {
  const SlotEntry* slots[kTileColumns * kIds];
  const uint8_t* ids = section.table_ids + tile.first_column * kIds;
  for (uint32_t i = 0; i < tile.width * kIds; i++) slots[i] = tables.slots_of(ids[i]);
  const uint32_t slot_mask = (1u << tables.prob_bits) - 1;
  for (uint64_t t = 0; t < section.tokens; t++) {
    const uint64_t row = t * section.columns + tile.first_column;
    decoder.reserve();
    const uint8_t* at = decoder.at;
    for (uint32_t c = 0; c < tile.per_lane; c++) {
      const uint32_t active = tile.active(c);
      for (uint32_t lane = 0; lane < active; lane++) {
        const uint32_t column = lane * tile.per_lane + c;
        const uint32_t which = kIds == 1 ? column : column * kIds + section.contexts[row + column];
        const uint32_t before = decoder.state[lane];
        const SlotEntry entry = slots[which][before & slot_mask];
        symbols[row + column] = uint8_t(entry);
        const uint32_t x = take(before, entry, tables.prob_bits), filled = refill(x, load_word(at));
        const bool low = x < kMinState;  // used without a branch, which would be taken at random
        at += low ? kWordBytes : 0;
        decoder.state[lane] = low ? filled : x;
      }
    }
    decoder.at = at;
  }
}

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

void decode_tiles(const cg_section& section, const Tables& tables, const DecodeJob* jobs, uint32_t count,
                  uint8_t* symbols) {
  for (uint32_t i = 0; i < count; i++) decode_scalar(section, tables, jobs[i], symbols);
}

}  // namespace

void decode_scalar(const cg_section& section, const Tables& tables, const DecodeJob& job, uint8_t* symbols) {
  TileDecoder decoder;
  if ((*job.status = decoder.begin(section, tables, job))) return;
  const auto decode = section.ids_per_column == 1 ? decode_tokens<1> : decode_tokens<kContexts>;
  decode(section, tables, job.tile, decoder, symbols);
  *job.status = decoder.finish(job.tile);
}

int32_t encode_scalar(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                      uint8_t* slot_end, uint64_t* stream_bytes) {
  *stream_bytes = 0;
  if (const int32_t status = check_tile(section, tables, tile)) return status;
  uint32_t state[kLanes];
  for (uint32_t& x : state) x = kMinState;
  const auto encode = section.ids_per_column == 1 ? encode_tokens<1> : encode_tokens<kContexts>;
  uint8_t* write = encode(section, tables, tile, symbols, slot_end, state);
  if (write == nullptr) return CG_BAD_SYMBOL;
  for (uint32_t lane = tile.lanes; lane-- > 0;) store_state(write -= kStateBytes, state[lane]);
  *stream_bytes = uint64_t(slot_end - write);
  return CG_OK;
}

const Backend kScalar = {decode_tiles, 1,    encode_scalar, passes,       contexts,     clamp,
                        count_digits, into, rows_into,     run_contexts, levels_into, levels_contexts, source_passes, plane_passes, heads_into};

}  // namespace cachegen
