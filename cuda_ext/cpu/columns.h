// Up to 256 columns of a source that are taken together, and how they lie in memory.
#pragma once

#include "../core/chunk.h"
#include "backend.h"

namespace cachegen {

struct Columns {
  const cg_source* source;
  uint32_t width, n_runs;
  Run runs[kTileColumns];
  alignas(64) float mean[kTileColumns], step[kTileColumns];
  uint32_t column[kTileColumns], vector[kTileColumns];
};

inline uint64_t value_bytes(uint32_t dtype) { return dtype == CG_FLOAT32 ? 4 : 2; }

// Columns first .. first + width of a list, or of all columns for NULL.
inline void open_columns(const cg_source& source, const uint32_t* list, uint64_t first, uint64_t width, Columns* found) {
  const uint64_t bytes = value_bytes(source.dtype);
  found->source = &source;
  found->width = uint32_t(width);
  found->n_runs = 0;
  for (uint32_t i = 0; i < width; i++) {
    const uint64_t column = list ? list[first + i] : first + i;
    const cg_place& place = source.places[column];
    found->column[i] = uint32_t(column);
    found->vector[i] = source.vectors ? source.vectors[column] : 0;
    found->mean[i] = source.means ? source.means[column] : 0;
    found->step[i] = source.steps ? source.steps[column] : 1;
    Run* run = found->n_runs ? &found->runs[found->n_runs - 1] : nullptr;
    if (run && place.stride == run->stride && place.address == run->address + run->columns * bytes)
      run->columns++;
    else
      found->runs[found->n_runs++] = {i, column, 1, place.address, place.stride};
  }
}

// Asks for a row before it is loaded: the hardware does not foresee another page, nor rows that are coded from the last one on.
CACHEGEN_HD void prefetch_row(const Columns& columns, uint64_t token) {
  constexpr uint64_t kLine = 64;
  const uint64_t bytes = value_bytes(columns.source->dtype);
  for (uint32_t r = 0; r < columns.n_runs; r++) {
    const Run& run = columns.runs[r];
    for (uint64_t at = 0; at < run.columns * bytes; at += kLine)
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(run.address + token * run.stride + at)));
  }
}

CACHEGEN_HD uint64_t anchor_rows(const cg_source& source, const cg_span& span) {
  return source.group_tokens ? (span.tokens + source.group_tokens - 1) / source.group_tokens : 0;
}
CACHEGEN_HD uint64_t coded_before(const cg_source& source, uint64_t tokens) {  // of a chunk
  return source.group_tokens ? tokens - (tokens + source.group_tokens - 1) / source.group_tokens : tokens;
}
CACHEGEN_HD uint64_t coded_rows(const cg_source& source, const cg_span& span) { return coded_before(source, span.tokens); }

// The support of a part's tables, by context and column; any: whether something is outside of it.
struct Bounds {
  bool any;
  uint8_t low[kContexts][kTileColumns], high[kContexts][kTileColumns];
};

constexpr uint64_t kBlockTokens = 16;  // that are quantised before they are coded, so that they stay in the nearest cache

// Symbols of some tokens: matrices [rows, 256].
struct SymbolBlock {
  uint8_t base[kBlockTokens][kTileColumns];
  uint8_t digits[CG_MAX_DIGITS][kBlockTokens][kTileColumns], contexts[CG_MAX_DIGITS][kBlockTokens][kTileColumns];
};

// Columns of a chunk to quantise.
struct CodeJob {
  const Columns* columns;
  const cg_span* span;
  uint32_t n_digits;
  uint32_t parts;  // a bit for each whose exceptions are reported
  SymbolBlock* block;
  uint8_t* anchors;  // [anchors, 256], of all tokens
  const Bounds* bounds;  // of each part
  void (*report)(void* to, const cg_exception& exception);
  void* to_report;
};

}  // namespace cachegen
