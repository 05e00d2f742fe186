// What the passes over a source ask of their arguments.
#pragma once

#include "columns.h"

namespace cachegen {

inline bool is_source(const cg_source* source, const cg_span* spans, uint64_t n_spans) {
  if (source == nullptr || (source->dtype > CG_FLOAT16 && source->dtype != CG_INT16) || source->blank > 1 || source->group_tokens == 1) return false;
  if (source->columns > CG_MAX_COLUMNS || n_spans > CG_MAX_TOKENS || (n_spans > 0 && spans == nullptr)) return false;
  if (source->columns > 0 && source->places == nullptr) return false;
  if (source->group_tokens > 0 && source->columns > 0) {
    if (source->vectors == nullptr) return false;
    for (uint64_t i = 0; i < source->columns; i++)
      if (source->vectors[i] >= source->n_vectors || (i > 0 && source->vectors[i] < source->vectors[i - 1])) return false;
  }
  for (uint64_t i = 0; i < n_spans; i++) {
    if (spans[i].tokens > CG_MAX_TOKENS || spans[i].ordinary_first > spans[i].ordinary_last) return false;
    if (spans[i].ordinary_last > coded_rows(*source, spans[i])) return false;
  }
  return true;
}

inline bool has_scales(const cg_source& source) {
  return source.columns == 0 || (source.scales == nullptr) == (source.group_tokens == 0);
}

inline bool is_scaled(const cg_source& source) {
  return source.columns == 0 || (has_scales(source) && source.means != nullptr && source.steps != nullptr);
}

constexpr uint64_t kSmallTokens = 1 << 15;  // below it counts and costs fit 15 bits, and their sums 31

inline bool is_book(const cg_costs* book) {
  return book != nullptr && book->costs != nullptr && book->entries >= 1 && book->entries <= kMaxTables &&
         book->first < book->entries;
}

inline bool are_streams(const cg_streams_out& out) {
  if (out.offsets == nullptr || out.bytes == nullptr || out.statuses == nullptr) return false;
  if (out.memory_bytes > 0 && out.memory == nullptr) return false;
  return out.max_exceptions == 0 || out.exceptions != nullptr;
}

}  // namespace cachegen
