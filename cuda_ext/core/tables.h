// The memory that cg_tables_build writes: no pointers, so it can be copied to a device as it is.
//
//     TablesHeader; SlotEntry[n_tables << prob_bits]; SymbolEntry[n_tables * 256]
//
// Note: the encoder's rows always have 256 entries, so that every byte names one; a symbol without a frequency has
// limit 0.
#pragma once

#include <stdint.h>

#include "portable.h"
#include "state.h"

namespace cachegen {

constexpr uint32_t kTablesMagic = 0x31544743;  // "CGT1"; also tells the byte order
constexpr uint32_t kMaxTables = 256;           // an id is one byte
constexpr uint32_t kMaxSymbols = 256;          // a symbol is one byte
constexpr uint32_t kMinProbBits = 10, kMaxProbBits = 12;
constexpr uint32_t kTablesAlignment = 16;

struct TablesHeader {
  uint32_t magic, n_tables, prob_bits, zero;
};
static_assert(sizeof(TablesHeader) == kTablesAlignment, "slot entries begin at an aligned offset");

// Where things lie, for callers that have checked the header.
struct Tables {
  uint32_t n_tables, prob_bits;
  const SlotEntry* slots;
  const SymbolEntry* symbols;

  CACHEGEN_HD const SlotEntry* slots_of(uint32_t id) const { return slots + (uint64_t(id) << prob_bits); }
  CACHEGEN_HD const SymbolEntry* symbols_of(uint32_t id) const { return symbols + uint64_t(id) * kMaxSymbols; }
};

CACHEGEN_HD uint64_t symbols_offset(uint32_t n_tables, uint32_t prob_bits) {
  return sizeof(TablesHeader) + (uint64_t(n_tables) << prob_bits) * sizeof(SlotEntry);
}

// 0 for sizes that no tables have.
CACHEGEN_HD uint64_t tables_bytes(uint32_t n_tables, uint32_t prob_bits) {
  if (n_tables - 1 >= kMaxTables || prob_bits < kMinProbBits || prob_bits > kMaxProbBits) return 0;
  return symbols_offset(n_tables, prob_bits) + uint64_t(n_tables) * kMaxSymbols * sizeof(SymbolEntry);
}

// The slot entries of tables in memory that holds some.
CACHEGEN_HD const SlotEntry* slots_in(const void* memory) {
  return reinterpret_cast<const SlotEntry*>(static_cast<const uint8_t*>(memory) + sizeof(TablesHeader));
}

// False for memory that holds no tables.
CACHEGEN_HD bool open_tables(const void* memory, uint64_t bytes, Tables* tables) {
  if (memory == nullptr || uintptr_t(memory) % kTablesAlignment != 0 || bytes < sizeof(TablesHeader)) return false;
  const TablesHeader& header = *static_cast<const TablesHeader*>(memory);
  if (header.magic != kTablesMagic || tables_bytes(header.n_tables, header.prob_bits) != bytes) return false;
  const uint8_t* base = static_cast<const uint8_t*>(memory);
  *tables = {header.n_tables, header.prob_bits, slots_in(memory),
             reinterpret_cast<const SymbolEntry*>(base + symbols_offset(header.n_tables, header.prob_bits))};
  return true;
}

}  // namespace cachegen
