// The memory in which the symbols of up to 256 columns are counted.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "backend.h"

namespace cachegen {

constexpr uint32_t kStrip = 32;                  // columns whose fine symbols are counted together
constexpr uint32_t kFineBins = 9 * kMaxSymbols;  // of two digits
constexpr uint32_t kCountedRows = 512;           // below 2^16, which `seen` holds

constexpr uint32_t kGroup = 16;  // entries of a book with one lower bound
constexpr uint32_t kGroups = kMaxTables / kGroup;

struct Counter {
  uint32_t rows, refused;
  uint32_t low, high;                // base symbols in use, of any column
  uint32_t anchor_low, anchor_high;  // the same of anchors
  uint32_t base[kTileColumns][kMaxSymbols];
  uint32_t digits[CG_MAX_DIGITS][kTileColumns][CG_DIGIT_BINS];
  uint32_t anchors[kTileColumns][kMaxSymbols];
  uint16_t fine[kCountedRows][kTileColumns];
  uint16_t seen[kStrip][kFineBins + 1];
};

// A book's costs as columns' sums take them: rows of two symbols, packed, or of one.
struct CostRows {
  const cg_costs* book;
  bool pairs;
  const int32_t* costs;  // [rows, entries]
  int32_t bounds[kMaxSymbols * kGroups];  // [rows, kGroups]: of each group's entries that may be chosen, the lowest costs
  std::vector<int32_t> packed;

  CostRows(const cg_costs& of, uint32_t symbols, bool two) : book(&of), pairs(two), costs(of.costs) {
    for (uint32_t k = 0; k < symbols; k++)
      for (uint32_t g = 0; g < kGroups; g++) bounds[k * kGroups + g] = bound(k, g);
    if (!two) return;
    packed.resize((symbols + 1) / 2 * of.entries);
    pack(of.costs, symbols, of.entries, packed.data());
    pack(bounds, symbols, kGroups, bounds);
    costs = packed.data();
  }

 private:
  int32_t bound(uint32_t symbol, uint32_t group) const {
    int32_t least = INT32_MAX;
    for (uint32_t e = std::max(group * kGroup, book->first); e < (group + 1) * kGroup && e < book->entries; e++)
      least = std::min(least, book->costs[symbol * book->entries + e]);
    return least == INT32_MAX ? 0 : least;
  }
  // `to` may be `from`.
  static void pack(const int32_t* from, uint32_t symbols, uint32_t width, int32_t* to) {
    for (uint32_t k = 0; k < symbols; k += 2)
      for (uint32_t e = 0; e < width; e++) {
        const int32_t second = k + 1 < symbols ? from[(k + 1) * width + e] : 0;
        to[k / 2 * width + e] = int32_t(uint32_t(from[k * width + e]) | uint32_t(second) << 16);
      }
  }
};

// NULL without memory.
inline std::unique_ptr<const CostRows> rows_of(const cg_costs& book, uint32_t symbols, bool pairs) {
  try {
    return std::make_unique<const CostRows>(book, symbols, pairs);
  } catch (const std::exception&) {
    return nullptr;
  }
}

}  // namespace cachegen
