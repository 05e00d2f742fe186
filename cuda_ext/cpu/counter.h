// The memory in which the symbols of up to 256 columns are counted.
#pragma once

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

}  // namespace cachegen
