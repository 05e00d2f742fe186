// The baseline: any machine, tiles of any width, one symbol at a time.
#include "check_tile.h"
#include "encode_chain.h"
#include "heads.h"
#include "into.h"
#include "planes.h"
#include "source.h"
#include "sparse.h"
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

template <uint32_t kIds>
void encode_tokens(EncodeChain& chain, uint64_t rows) {
  const Tile tile = chain.tile;
  bool unsupported = false;
  uint8_t* at = chain.at;
  for (uint64_t t = rows; t-- > 0;) {
    const uint8_t *symbols = chain.symbols + t * chain.stride, *contexts = chain.contexts + (kIds > 1 ? t * chain.stride : 0);
    for (uint32_t c = tile.per_lane; c-- > 0;) {
      for (uint32_t lane = tile.active(c); lane-- > 0;) {
        const uint32_t column = lane * tile.per_lane + c;
        const uint32_t which = kIds == 1 ? column : column * kIds + contexts[column];
        const SymbolEntry& entry = chain.tables.symbols[chain.firsts[which] + symbols[column]];
        uint32_t x = chain.state[lane];
        // A word is always stored, and kept only if the state must give it. At most one per symbol: the memory holds it.
        const bool full = x >= entry.limit;
        store_word(at, x);
        at += full ? kWordBytes : 0;
        x = full ? x >> kWordBits : x;
        unsupported |= entry.limit == 0;
        chain.state[lane] = put(x, entry);
      }
    }
  }
  chain.at = at;
  if (unsupported) chain.status = CG_BAD_SYMBOL;
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

Intervals intervals_of(const Tables& tables) {
  const uint32_t n = tables.n_tables * kMaxSymbols, total = 1u << tables.prob_bits;
  Intervals found(new (std::nothrow) uint32_t[n]);
  for (uint32_t i = 0; i < n && found; i++) {
    const SymbolEntry& entry = tables.symbols[i];
    const uint32_t frequency = entry.limit >> (kStateBits - tables.prob_bits);
    found[i] = (entry.bias - (frequency == 1 ? total - 1 : 0)) | frequency << kFrequencyShift;  // see symbol_entry()
  }
  return found;
}

void open_scalar(EncodeChain* chain) {
  chain->at = chain->words;
  chain->ternary = false;
  chain->status = check_ids(chain->tables, chain->ids, chain->tile.width * chain->n_ids);
  chain->near = false;
  chain->turn = 0;
  for (uint32_t& x : chain->state) x = kMinState;
  for (uint32_t i = 0; i < chain->tile.width * chain->n_ids && chain->status == CG_OK; i++)
    chain->firsts[i] = chain->ids[i] * kMaxSymbols;
}

void encode_rows_scalar(EncodeChain* chain, uint64_t rows) {
  (chain->n_ids == 1 ? encode_tokens<1> : encode_tokens<kContexts>)(*chain, rows);
}

const Backend kScalar = {decode_tiles, 1,    open_scalar, encode_rows_scalar, store_stream, passes,       contexts,     clamp,
                        count_digits, into, rows_into,     run_contexts, levels_into, levels_contexts, source_passes, plane_passes, heads_into, multiply_sparse};

}  // namespace cachegen
