// The functions of the C ABI that only a host computes: both libraries have them from here.
#pragma once

#include <string.h>

#include "tables.h"
#include "tile.h"

uint32_t cg_abi_version(void) noexcept { return CG_ABI_VERSION; }

uint64_t cg_tables_bytes(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) noexcept {
  return n_symbols - 1 < cachegen::kMaxSymbols ? cachegen::tables_bytes(n_tables, prob_bits) : 0;
}

uint64_t cg_slot_bytes(uint64_t tokens) noexcept { return tokens <= CG_MAX_TOKENS ? cachegen::slot_bytes(tokens) : 0; }

int32_t cg_tables_build(const uint16_t* frequencies, uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits,
                        void* memory, uint64_t memory_bytes) noexcept {
  using namespace cachegen;
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
