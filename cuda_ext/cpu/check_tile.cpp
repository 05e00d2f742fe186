#include "tile_coder.h"

namespace cachegen {

int32_t check_tile(const cg_section& section, const Tables& tables, const Tile& tile) {
  const uint8_t* ids = section.table_ids + tile.first_column * section.ids_per_column;
  for (uint64_t i = 0; i < tile.width * section.ids_per_column; i++)
    if (ids[i] >= tables.n_tables) return CG_BAD_TABLE_ID;
  if (section.ids_per_column == 1) return CG_OK;
  for (uint64_t t = 0; t < section.tokens; t++) {
    const uint8_t* row = section.contexts + t * section.columns + tile.first_column;
    uint8_t bad = 0;
    for (uint32_t i = 0; i < tile.width; i++) bad |= row[i] >= kContexts;  // without a branch: compilers vectorise this
    if (bad) return CG_BAD_CONTEXT;
  }
  return CG_OK;
}

}  // namespace cachegen
