// What is compiled once for every instruction set, and how one is chosen at run time.
#pragma once

#include <stdint.h>

#include "../core/chunk.h"
#include "../core/tables.h"
#include "../core/tile.h"
#include "../include/cachegen_source.h"

namespace cachegen {

// A tile to decode: its stream is [stream, end), and `status` takes a value of cg_status.
struct DecodeJob {
  Tile tile;
  bool odd;  // it begins at an odd offset, which no stream does
  const uint8_t* stream;
  const uint8_t* end;
  int32_t* status;
};

// Part of a chunk's coded rows: columns [column, column + columns), at most CG_BLOCK_COLUMNS.
struct Block {
  const cg_chunk* chunk;
  uint64_t column, columns;
};

// The functions of the ABI of these names, for one block.
struct RowPasses {
  void (*moments)(const Block& block, const void* values, uint64_t first, uint64_t last, double* total, double* squares);
  void (*quantise)(const Block& block, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                   uint8_t* contexts, uint8_t* wide);
  void (*restore)(const Block& block, uint64_t first, uint64_t last, const uint8_t* base, const uint8_t* const* digits,
                  uint32_t n_digits, void* values);
};

// Columns [coded, coded + columns) of a tile that lie one after the other: in the chunk, from `column` on, and in memory.
struct Run {
  uint64_t coded, column, columns;
  uint64_t address, stride;
};

struct EncodeChain;
struct LevelRows;
struct Columns;
struct CostRows;
struct Counter;
struct CodeJob;

// The coefficients of some tokens that are not zero: those of token t are [ends[t], ends[t + 1]).
struct SparseRows {
  float* values;
  uint32_t* rows;  // of the matrix
  uint64_t* ends;
};

// Values as bytes, for values of one size.
struct PlanePasses {
  // Rows of a run's bits to bytes [tokens, stride] of each plane, `plane` bytes further, and back.
  void (*split)(const Run& run, uint64_t first, uint64_t tokens, uint8_t* bytes, uint64_t stride, uint64_t plane);
  void (*join)(const Run& run, uint64_t first, uint64_t tokens, const uint8_t* bytes, uint64_t stride, uint64_t plane);
  bool (*outside)(const uint8_t* symbols, const uint8_t* low, const uint8_t* high, uint32_t n);
};

// The passes over a source, for values of one type.
struct SourcePasses {
  uint32_t (*peak)(const Run& run, uint64_t token);  // bits of the largest magnitude
  void (*spread)(const Columns& columns, const cg_span& span, double* sums);  // [4, 256]
  void (*count)(const Columns& columns, const cg_span& span, uint32_t n_digits, Counter* counter);
  // Symbols of the chunk's tokens [first, last), at most kBlockTokens; false where a value has none.
  bool (*symbols)(const CodeJob& job, uint64_t first, uint64_t last);
  // squares [1 + n_digits, 256], and base as cg_fine's; false where a symbol is too large
  bool (*fine)(const Columns& columns, const cg_span& span, uint32_t n_digits, const float* weights, int16_t* fine,
               uint64_t fine_stride, float* base, double* squares);
  void (*clear)(Counter* counter, bool all);
  // For `width` columns, whose counts are `stride` apart.
  void (*choose)(const CostRows& rows, const uint32_t* counts, uint32_t stride, uint32_t low, uint32_t high, uint32_t width,
                 uint8_t* entries, uint64_t* costs);
};

struct Backend {
  // Decodes up to `batch` tiles, side by side where that hides latency, into symbols [tokens, columns].
  void (*decode_tiles)(const cg_section& section, const Tables& tables, const DecodeJob* jobs, uint32_t count,
                       uint8_t* symbols);
  uint32_t batch;
  // Encoding: see encode_chain.h.
  void (*open_chain)(EncodeChain* chain);
  void (*encode_rows)(EncodeChain* chain, uint64_t rows);
  void (*store_stream)(const EncodeChain& chain, uint8_t* to);  // chain.bytes()
  const RowPasses& (*passes)(const cg_chunk& chunk);
  void (*contexts)(const uint8_t* symbols, uint8_t zero, const uint8_t* coarser, uint64_t count, uint8_t* contexts);
  void (*clamp)(const Block& block, const uint8_t* symbols, const uint8_t* contexts, const uint8_t* low,
                const uint8_t* high, uint8_t* inside, uint8_t* changed);
  void (*count_digits)(const Block& block, const uint8_t* symbols, const uint8_t* contexts, int32_t* counts);
  // symbols, and contexts, are a run's, with `stride` bytes from token to token.
  void (*into)(const cg_output& output, const Run& run, const uint8_t* symbols, uint64_t stride, uint64_t tokens);
  // Rows of a run, `stride` floats apart, to the chunk's rows first, first + every, ...
  void (*rows_into)(const cg_output& output, const Run& run, const float* rows, uint64_t stride, uint64_t n_rows,
                    uint64_t first, uint64_t every);
  void (*run_contexts)(const cg_output& output, const Run& run, uint64_t tokens, uint8_t* contexts, uint64_t stride);
  void (*levels_into)(const LevelRows& rows, const Run& run);
  void (*levels_contexts)(const uint8_t* base, const uint8_t* digits, uint64_t n, uint8_t* contexts);
  const SourcePasses& (*source)(uint32_t dtype);
  const PlanePasses& (*planes)(uint64_t value_bytes);
  void (*heads)(const cg_heads& heads, uint64_t first, uint64_t last);  // tokens
  void (*sparse)(const cg_sparse& sparse, uint64_t first, uint64_t tokens, const SparseRows& found);
};

constexpr uint32_t kMaxBatch = 2;

extern const Backend kScalar;
#if defined(__x86_64__) && defined(__GNUC__)
#define CACHEGEN_X86 1
extern const Backend kAvx2, kAvx512;
#elif defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define CACHEGEN_NEON 1
extern const Backend kNeon;
#endif

inline DecodeJob job_of(const cg_section& section, uint64_t tile, const uint8_t* streams, const uint64_t* offsets,
                        int32_t* tile_status) {
  const uint64_t first = offsets[tile];
  return {tile_at(tile, section.columns), first % kWordBytes != 0, streams + first, streams + offsets[tile + 1],
          tile_status + tile};
}

// nullptr for an instruction set that this machine has not.
const Backend* backend_of(uint32_t isa);
// nullptr too for a run that is none of the CPU's.
const Backend* backend_for(const cg_run* run);

// Tiles of any width, one symbol at a time; the vector back-ends leave narrow tiles to this.
void decode_scalar(const cg_section& section, const Tables& tables, const DecodeJob& job, uint8_t* symbols);

}  // namespace cachegen
