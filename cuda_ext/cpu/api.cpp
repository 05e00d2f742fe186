// The coder's part of the C ABI on the CPU: arguments are checked here, once, and nowhere below.
#include <string.h>

#include "../core/tables.h"
#include "../core/tile.h"
#include "backend.h"
#include "threads.h"

using namespace cachegen;

namespace {

int32_t open_section(const cg_section* section, const void* symbols, Tables* tables) {
  if (section == nullptr) return CG_BAD_ARGUMENT;
  if (section->tokens > CG_MAX_TOKENS || section->columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (section->ids_per_column != 1 && section->ids_per_column != kContexts) return CG_BAD_ARGUMENT;
  if (tile_count(section->tokens, section->columns) > 0) {
    if (section->table_ids == nullptr || symbols == nullptr) return CG_BAD_ARGUMENT;
    if ((section->contexts == nullptr) != (section->ids_per_column == 1)) return CG_BAD_ARGUMENT;
  }
  return open_tables(section->tables, section->tables_bytes, tables) ? CG_OK : CG_BAD_TABLES;
}

}  // namespace

uint32_t cg_abi_version(void) noexcept { return CG_ABI_VERSION; }

int32_t cg_isa_available(uint32_t isa) noexcept { return backend_of(isa) != nullptr; }

uint64_t cg_tables_bytes(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) noexcept {
  return n_symbols - 1 < kMaxSymbols ? tables_bytes(n_tables, prob_bits) : 0;
}

uint64_t cg_slot_bytes(uint64_t tokens) noexcept { return tokens <= CG_MAX_TOKENS ? slot_bytes(tokens) : 0; }

int32_t cg_tables_build(const uint16_t* frequencies, uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits,
                        void* memory, uint64_t memory_bytes) noexcept {
  const uint64_t bytes = cg_tables_bytes(n_tables, n_symbols, prob_bits);
  if (bytes == 0 || bytes != memory_bytes || frequencies == nullptr || memory == nullptr) return CG_BAD_ARGUMENT;
  if (uintptr_t(memory) % kTablesAlignment != 0) return CG_BAD_ARGUMENT;
  uint8_t* base = static_cast<uint8_t*>(memory);
  memset(base, 0, bytes);
  SlotEntry* slot = reinterpret_cast<SlotEntry*>(base + sizeof(TablesHeader));
  SymbolEntry* symbols = reinterpret_cast<SymbolEntry*>(base + symbols_offset(n_tables, prob_bits));
  for (uint32_t table = 0; table < n_tables; table++, symbols += kMaxSymbols) {
    const uint16_t* row = frequencies + uint64_t(table) * n_symbols;
    uint32_t start = 0;
    for (uint32_t symbol = 0; symbol < n_symbols; start += row[symbol++]) {
      if (row[symbol] > kMaxFrequency || start + row[symbol] > 1u << prob_bits) return CG_BAD_FREQUENCIES;
      symbols[symbol] = symbol_entry(start, row[symbol], prob_bits);
      for (uint32_t offset = 0; offset < row[symbol]; offset++) *slot++ = slot_entry(offset, row[symbol], symbol);
    }
    if (start != 1u << prob_bits) return CG_BAD_FREQUENCIES;
  }
  *reinterpret_cast<TablesHeader*>(base) = {kTablesMagic, n_tables, prob_bits, 0};
  return CG_OK;
}

int32_t cg_encode(const cg_section* section, const uint8_t* symbols, uint8_t* slots, uint64_t slots_bytes,
                  uint64_t* tile_bytes, int32_t* tile_status, const cg_run* run) noexcept {
  Tables tables;
  const Backend* backend = backend_for(run);
  if (backend == nullptr) return CG_BAD_ARGUMENT;
  if (const int32_t status = open_section(section, symbols, &tables)) return status;
  const uint64_t tiles = tile_count(section->tokens, section->columns), stride = slot_bytes(section->tokens);
  if (tiles == 0) return CG_OK;
  if (slots == nullptr || tile_bytes == nullptr || tile_status == nullptr) return CG_BAD_ARGUMENT;
  if (slots_bytes % stride != 0 || slots_bytes / stride != tiles) return CG_BAD_ARGUMENT;
  for_each(tiles, section->tokens * section->columns, run->threads, [&](uint64_t i) {
    const Tile tile = tile_at(i, section->columns);
    tile_status[i] = backend->encode_tile(*section, tables, tile, symbols, slots + (i + 1) * stride, &tile_bytes[i]);
  });
  return CG_OK;
}

int32_t cg_pack(const uint8_t* slots, uint64_t slot_bytes, const uint64_t* tile_bytes, uint64_t tiles, uint8_t* streams,
                uint64_t streams_bytes, const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || (tiles > 0 && (slots == nullptr || tile_bytes == nullptr))) return CG_BAD_ARGUMENT;
  if (streams_bytes > 0 && streams == nullptr) return CG_BAD_ARGUMENT;
  for (uint64_t i = 0; i < tiles; i++) {
    if (tile_bytes[i] > slot_bytes || tile_bytes[i] > streams_bytes) return CG_BAD_ARGUMENT;
    if (tile_bytes[i] > 0) memcpy(streams, slots + (i + 1) * slot_bytes - tile_bytes[i], tile_bytes[i]);
    streams += tile_bytes[i];
    streams_bytes -= tile_bytes[i];
  }
  return streams_bytes == 0 ? CG_OK : CG_BAD_ARGUMENT;
}

int32_t cg_decode(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes, const uint64_t* offsets,
                  uint8_t* symbols, int32_t* tile_status, const cg_run* run) noexcept {
  Tables tables;
  const Backend* backend = backend_for(run);
  if (backend == nullptr) return CG_BAD_ARGUMENT;
  if (const int32_t status = open_section(section, symbols, &tables)) return status;
  const uint64_t tiles = tile_count(section->tokens, section->columns);
  if (tiles == 0) return CG_OK;
  if (offsets == nullptr || tile_status == nullptr || (streams == nullptr && streams_bytes > 0)) return CG_BAD_ARGUMENT;
  for (uint64_t i = 0; i < tiles; i++)
    if (offsets[i] > offsets[i + 1]) return CG_BAD_ARGUMENT;
  if (offsets[tiles] > streams_bytes) return CG_BAD_ARGUMENT;
  const uint64_t batches = (tiles + backend->batch - 1) / backend->batch;
  for_each(batches, section->tokens * section->columns, run->threads, [&](uint64_t i) {
    DecodeJob jobs[kMaxBatch];
    uint32_t count = 0;
    for (uint64_t tile = i * backend->batch; tile < tiles && count < backend->batch; tile++)
      jobs[count++] = {tile_at(tile, section->columns), streams + offsets[tile], streams + offsets[tile + 1],
                       &tile_status[tile]};
    backend->decode_tiles(*section, tables, jobs, count, symbols);
  });
  return CG_OK;
}
