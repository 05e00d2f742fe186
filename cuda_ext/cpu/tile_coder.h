// A tile on the CPU: scalar loops over tokens, columns and lanes around core/.
#pragma once

#include <stdint.h>

#include "../core/tables.h"
#include "../core/tile.h"

namespace cachegen {

// Each returns a value of cg_status.

// Writes the stream so that it ends at slot_end, after at most slot_bytes(tokens); *stream_bytes is its length.
int32_t encode_tile(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* symbols,
                    uint8_t* slot_end, uint64_t* stream_bytes);

// Reads the stream [stream, end) and writes the tile's columns of symbols [tokens, columns].
int32_t decode_tile(const cg_section& section, const Tables& tables, const Tile& tile, const uint8_t* stream,
                    const uint8_t* end, uint8_t* symbols);

// Every table id and context of the tile, before it is coded.
int32_t check_tile(const cg_section& section, const Tables& tables, const Tile& tile);

}  // namespace cachegen
