// Rows of a tile at all its levels, and where they are written.
#pragma once

#include "../core/chunk.h"
#include "backend.h"

namespace cachegen {

// Symbols of coded rows first .. first + tokens of a chunk: base, then n_digits digits, each with `stride` bytes from row
// to row. `row` is the target's row of the chunk's first.
struct LevelRows {
  const cg_chunk* chunk;
  uint64_t first, tokens, row;
  const uint8_t* base;
  const uint8_t* digits[CG_MAX_DIGITS];
  uint64_t stride;
  uint32_t n_digits;
};

// The runs of a tile's columns, of which every CG_VECTOR_COLUMNS lie one after the other.
inline uint32_t runs_of(const cg_batch& batch, uint64_t tile, Run* runs) {
  const uint64_t bytes = batch.dtype == CG_FLOAT32 ? 4 : 2;
  uint32_t n = 0;
  const Tile shape = tile_at(tile, batch.columns);
  for (uint64_t coded = 0; coded < shape.width; coded += CG_VECTOR_COLUMNS) {
    const uint64_t column = shape.first_column + coded, left = shape.width - coded;
    const uint64_t columns = left < CG_VECTOR_COLUMNS ? left : CG_VECTOR_COLUMNS;
    const cg_place& place = batch.places[column / CG_VECTOR_COLUMNS];
    if (n > 0 && place.stride == runs[n - 1].stride && place.address == runs[n - 1].address + runs[n - 1].columns * bytes)
      runs[n - 1].columns += columns;
    else
      runs[n++] = {coded, column, columns, place.address, place.stride};
  }
  return n;
}

}  // namespace cachegen
