// What a tile's table ids and contexts must fulfil.
#pragma once

#include "backend.h"

namespace cachegen {
namespace {

inline int32_t check_ids(const Tables& tables, const uint8_t* ids, uint64_t count) {
  for (uint64_t i = 0; i < count; i++)
    if (ids[i] >= tables.n_tables) return CG_BAD_TABLE_ID;
  return CG_OK;
}

// Every table id and context of the tile, before it is coded.
inline int32_t check_tile(const cg_section& section, const Tables& tables, const Tile& tile) {
  const uint64_t n = section.ids_per_column;
  if (const int32_t status = check_ids(tables, section.table_ids + tile.first_column * n, tile.width * n)) return status;
  if (n == 1) return CG_OK;
  for (uint64_t t = 0; t < section.tokens; t++) {
    const uint8_t* row = section.contexts + t * section.columns + tile.first_column;
    uint8_t bad = 0;
    for (uint32_t i = 0; i < tile.width; i++) bad |= row[i] >= kContexts;  // without a branch: compilers vectorise this
    if (bad) return CG_BAD_CONTEXT;
  }
  return CG_OK;
}

}  // namespace
}  // namespace cachegen
