// The coder's part of the C ABI on the CPU: arguments are checked here, once, and nowhere below.
#include <string.h>

#include "../core/arguments.h"
#include "../core/build.h"
#include "backend.h"
#include "check_tile.h"
#include "encode_chain.h"
#include "threads.h"

using namespace cachegen;

namespace {

int32_t open_section(const cg_section* section, const void* symbols, Tables* tables) {
  if (!is_section_of(section, symbols)) return CG_BAD_ARGUMENT;
  return open_tables(section->tables, section->tables_bytes, tables) ? CG_OK : CG_BAD_TABLES;
}

// A thread's memory.
struct Encoding {
  EncodeChain chain;
  std::unique_ptr<uint8_t[]> words;
};

int32_t encode_tile(const Backend& backend, const cg_section& section, const Tables& tables, const uint32_t* intervals,
                    const Tile& tile, const uint8_t* symbols, Encoding* memory, uint8_t* slot_end, uint64_t* stream_bytes) {
  *stream_bytes = 0;
  if (memory == nullptr || !memory->words || intervals == nullptr) return CG_FAILED;
  if (const int32_t status = check_tile(section, tables, tile)) return status;
  EncodeChain* chain = &memory->chain;
  chain->tables = tables;
  chain->intervals = intervals;
  chain->ids = section.table_ids + tile.first_column * section.ids_per_column;
  chain->n_ids = uint32_t(section.ids_per_column);
  chain->tile = tile;
  chain->words = memory->words.get();
  chain->symbols = symbols + tile.first_column;
  chain->contexts = section.ids_per_column > 1 ? section.contexts + tile.first_column : nullptr;
  chain->stride = section.columns;
  backend.open_chain(chain);
  if (chain->status == CG_OK) backend.encode_rows(chain, section.tokens);
  if (chain->status) return chain->status;
  *stream_bytes = chain->bytes();
  backend.store_stream(*chain, slot_end - *stream_bytes);
  return CG_OK;
}

}  // namespace

int32_t cg_probe(char* reason, uint64_t bytes, uint64_t* shared_bytes) noexcept {
  if (reason == nullptr || bytes == 0 || shared_bytes == nullptr) return CG_BAD_ARGUMENT;
  reason[0] = 0;
  *shared_bytes = UINT64_MAX;  // tables stay where they are
  return CG_OK;
}

int32_t cg_isa_available(uint32_t isa) noexcept { return backend_of(isa) != nullptr; }

int32_t cg_encode(const cg_section* section, const uint8_t* symbols, uint8_t* slots, uint64_t slots_bytes,
                  uint64_t* tile_bytes, int32_t* tile_status, const cg_run* run) noexcept {
  Tables tables;
  const Backend* backend = backend_for(run);
  if (backend == nullptr) return CG_BAD_ARGUMENT;
  if (const int32_t status = open_section(section, symbols, &tables)) return status;
  const uint64_t tiles = tile_count(section->tokens, section->columns), stride = slot_bytes(section->tokens);
  if (tiles == 0) return CG_OK;
  if (slots == nullptr || tile_bytes == nullptr || tile_status == nullptr) return CG_BAD_ARGUMENT;
  if (slots_bytes % stride != 0 || slots_bytes / stride != tiles) return CG_BAD_ARGUMENT;
  const Intervals intervals = intervals_of(tables);
  for_each_with<Encoding>(
      tiles, section->tokens * section->columns, run->threads,
      [&](Encoding* memory) { memory->words.reset(new (std::nothrow) uint8_t[chain_bytes(section->tokens)]); },
      [&](uint64_t i, Encoding* memory) {
        tile_status[i] = encode_tile(*backend, *section, tables, intervals.get(), tile_at(i, section->columns), symbols,
                                     memory, slots + (i + 1) * stride, &tile_bytes[i]);
      });
  return CG_OK;
}

int32_t cg_pack(const uint8_t* slots, uint64_t slot_bytes, const uint64_t* tile_bytes, uint64_t tiles, uint8_t* streams,
                uint64_t streams_bytes, const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || (tiles > 0 && (slots == nullptr || tile_bytes == nullptr))) return CG_BAD_ARGUMENT;
  if (streams_bytes > 0 && streams == nullptr) return CG_BAD_ARGUMENT;
  for (uint64_t i = 0; i < tiles; i++) {
    if (tile_bytes[i] > slot_bytes || tile_bytes[i] > streams_bytes) return CG_BAD_ARGUMENT;
    if (tile_bytes[i] > 0) memcpy(streams, slots + (i + 1) * slot_bytes - tile_bytes[i], tile_bytes[i]);
    streams += tile_bytes[i];
    streams_bytes -= tile_bytes[i];
  }
  return streams_bytes == 0 ? CG_OK : CG_BAD_ARGUMENT;
}

int32_t cg_decode(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes, const uint64_t* offsets,
                  uint8_t* symbols, int32_t* tile_status, const cg_run* run) noexcept {
  Tables tables;
  const Backend* backend = backend_for(run);
  if (backend == nullptr) return CG_BAD_ARGUMENT;
  if (const int32_t status = open_section(section, symbols, &tables)) return status;
  const uint64_t tiles = tile_count(section->tokens, section->columns);
  if (tiles == 0) return CG_OK;
  if (offsets == nullptr || tile_status == nullptr || (streams == nullptr && streams_bytes > 0)) return CG_BAD_ARGUMENT;
  if (!are_offsets(offsets, tiles, streams_bytes)) return CG_BAD_ARGUMENT;
  const uint64_t batches = (tiles + backend->batch - 1) / backend->batch;
  for_each(batches, section->tokens * section->columns, run->threads, [&](uint64_t i) {
    DecodeJob jobs[kMaxBatch];
    uint32_t count = 0;
    for (uint64_t tile = i * backend->batch; tile < tiles && count < backend->batch; tile++)
      jobs[count++] = job_of(*section, tile, streams, offsets, tile_status);
    backend->decode_tiles(*section, tables, jobs, count, symbols);
  });
  return CG_OK;
}
