// The C ABI of lossless coding: values are cut into planes of bytes, tile by tile, in memory that stays in a core's cache.
#include <string.h>

#include <mutex>

#include "../core/arguments.h"
#include "../core/tables.h"
#include "counter.h"
#include "encode_chain.h"
#include "source_arguments.h"
#include "threads.h"

using namespace cachegen;

namespace {

constexpr uint32_t kMaxPlanes = 4;

// Bytes of one tile of channels: [planes][tokens, 256].
struct Planes {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* bytes;
  Columns columns;
  uint8_t ids[kMaxPlanes * kTileColumns];
  uint32_t counts[kMaxPlanes][kTileColumns][kMaxSymbols];

  void open(uint64_t tokens, uint64_t planes) {
    memory.reset(new (std::nothrow) uint8_t[planes * tokens * kTileColumns]);
    bytes = memory.get();
  }
};

// The same of some tokens, and what they are coded to.
struct Coding {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t bytes[kMaxPlanes][kBlockTokens][kTileColumns];
  Columns columns;
  EncodeChain chains[kMaxPlanes];

  void open(uint64_t tokens, uint64_t planes) {
    memory.reset(new (std::nothrow) uint8_t[planes * chain_bytes(tokens)]);
    for (uint64_t p = 0; p < planes; p++) chains[p].words = memory.get() + p * chain_bytes(tokens);
  }
};

uint64_t longest(const cg_span* spans, uint64_t n) {
  uint64_t most = 0;
  for (uint64_t i = 0; i < n; i++) most = std::max(most, spans[i].tokens);
  return most;
}

bool is_whole(const cg_source& source) { return source.columns % kTileColumns == 0 && source.group_tokens == 0; }

void split(const Backend& backend, const Columns& columns, uint64_t first, uint64_t tokens, uint8_t* bytes, uint64_t plane) {
  for (uint32_t r = 0; r < columns.n_runs; r++)
    backend.planes(value_bytes(columns.source->dtype)).split(columns.runs[r], first, tokens, bytes, kTileColumns, plane);
}

void count(const uint8_t* bytes, uint64_t tokens, uint32_t (*counts)[kMaxSymbols]) {
  constexpr uint32_t kTogether = 16;  // columns whose counters stay in the nearest cache
  for (uint32_t strip = 0; strip < kTileColumns; strip += kTogether)
    for (uint64_t t = 0; t < tokens; t++) {
      const uint8_t* row = bytes + t * kTileColumns + strip;
#pragma GCC unroll 16
      for (uint32_t c = 0; c < kTogether; c++) counts[strip + c][row[c]]++;
    }
}

template <class Memory, class Work>
bool for_each_tile(const cg_source& source, uint64_t tokens, uint64_t symbols, uint32_t threads, const Work& work) {
  std::atomic<bool> failed{false};
  for_each_with<Memory>(
      source.columns / kTileColumns, symbols, threads, [&](Memory* memory) { memory->open(tokens, value_bytes(source.dtype)); },
      [&](uint64_t tile, Memory* memory) {
        if (memory == nullptr || !memory->memory) {
          failed = true;
          return;
        }
        open_columns(source, nullptr, tile * kTileColumns, kTileColumns, &memory->columns);
        work(tile, *memory);
      });
  return !failed;
}

bool is_values(const cg_output* output) {
  if (output == nullptr || !is_chunk(output->chunk) || output->columns != nullptr) return false;
  return output->chunk->dtype <= CG_FLOAT16 && (output->chunk->columns == 0 || output->places != nullptr);
}

template <class Bits>
void set_byte(const cg_place& place, uint64_t row, uint64_t plane, uint8_t byte) {
  constexpr uint32_t kBits = 8 * sizeof(Bits);
  void* at = reinterpret_cast<void*>(uintptr_t(place.address + row * place.stride));
  Bits x;
  memcpy(&x, at, sizeof x);
  const uint32_t shift = uint32_t(kBits - 8 - 8 * plane);
  x = Bits(x << 1 | x >> (kBits - 1));
  x = Bits((x & ~(Bits(0xff) << shift)) | Bits(byte) << shift);
  x = Bits(x >> 1 | x << (kBits - 1));
  memcpy(at, &x, sizeof x);
}

}  // namespace

int32_t cg_choose_planes(const cg_source* source, const cg_span* spans, uint64_t n_spans, const cg_costs* book,
                         uint8_t* entries, uint64_t* costs, int32_t* counts, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_source(source, spans, n_spans) || !is_whole(*source)) return CG_BAD_ARGUMENT;
  if (source->columns == 0) return CG_OK;
  if (book != nullptr && (!is_book(book) || entries == nullptr || costs == nullptr)) return CG_BAD_ARGUMENT;
  const uint64_t planes = value_bytes(source->dtype), n = source->columns;
  const SourcePasses& passes = backend->source(source->dtype);
  uint64_t tokens = 0;
  for (uint64_t i = 0; i < n_spans; i++) tokens += spans[i].tokens;
  const auto rows = book ? rows_of(*book, kMaxSymbols, tokens < kSmallTokens) : nullptr;
  if (book != nullptr && !rows) return CG_FAILED;
  const bool done = for_each_tile<Planes>(*source, longest(spans, n_spans), tokens * n * planes, run->threads,
                                  [&](uint64_t tile, Planes& own) {
    memset(own.counts, 0, planes * sizeof own.counts[0]);
    for (uint64_t s = 0; s < n_spans; s++) {
      split(*backend, own.columns, spans[s].first, spans[s].tokens, own.bytes, spans[s].tokens * kTileColumns);
      for (uint64_t p = 0; p < planes; p++)
        count(own.bytes + p * spans[s].tokens * kTileColumns, spans[s].tokens, own.counts[p]);
    }
    for (uint64_t p = 0; p < planes; p++) {
      const uint64_t at = p * n + tile * kTileColumns;
      if (counts != nullptr) memcpy(counts + at * kMaxSymbols, own.counts[p], sizeof own.counts[p]);
      if (book == nullptr) continue;
      uint32_t any[kMaxSymbols] = {}, low = kMaxSymbols - 1, high = 0;
      for (uint32_t c = 0; c < kTileColumns; c++)
        for (uint32_t k = 0; k < kMaxSymbols; k++) any[k] |= own.counts[p][c][k];
      for (uint32_t k = 0; k < kMaxSymbols; k++) {
        low = any[k] && k < low ? k : low;
        high = any[k] ? k : high;
      }
      passes.choose(*rows, own.counts[p][0], kMaxSymbols, std::min(low, high), high, kTileColumns, entries + at, costs + at);
    }
  });
  return done ? CG_OK : CG_FAILED;
}

int32_t cg_code_planes(const cg_source* source, const cg_span* span, const cg_part* part, cg_streams_out* out,
                       const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || span == nullptr || !is_source(source, span, 1) || !is_whole(*source)) return CG_BAD_ARGUMENT;
  if (part == nullptr || out == nullptr) return CG_BAD_ARGUMENT;
  const uint64_t planes = value_bytes(source->dtype), n = source->columns, tiles = n / kTileColumns;
  out->used = out->n_exceptions = 0;
  if (tiles == 0) return CG_OK;
  if (part->columns != nullptr || part->n_columns != planes * n || part->table_ids == nullptr) return CG_BAD_ARGUMENT;
  if ((part->low == nullptr) != (part->high == nullptr) || !are_streams(*out)) return CG_BAD_ARGUMENT;
  Tables tables;
  if (!open_tables(part->tables, part->tables_bytes, &tables)) return CG_BAD_TABLES;
  const Intervals intervals = intervals_of(tables);
  if (!intervals) return CG_FAILED;
  std::mutex guard;  // of used and n_exceptions
  const bool done = for_each_tile<Coding>(*source, span->tokens, span->tokens * n * planes, run->threads,
                                          [&](uint64_t tile, Coding& own) {
    for (uint64_t p = 0; p < planes; p++) {
      EncodeChain& chain = own.chains[p];
      chain.tables = tables;
      chain.intervals = intervals.get();
      chain.ids = part->table_ids + p * n + tile * kTileColumns;
      chain.n_ids = 1;
      chain.tile = tile_at(0, kTileColumns);
      chain.stride = kTileColumns;
      backend->open_chain(&chain);
    }
    for (uint64_t last = span->tokens, from; last > 0; last = from) {
      from = (last - 1) / kBlockTokens * kBlockTokens;
      for (uint64_t t = from - std::min(from, kBlockTokens); t < from; t++) prefetch_row(own.columns, span->first + t);
      split(*backend, own.columns, span->first + from, last - from, own.bytes[0][0], sizeof own.bytes[0]);
      for (uint64_t p = 0; p < planes; p++) {
        const uint64_t first = p * n + tile * kTileColumns;
        const uint8_t *low = part->low + first, *high = part->high + first;
        for (uint64_t t = from; t < last && part->low != nullptr; t++) {
          uint8_t* row = own.bytes[p][t - from];
          if (!backend->planes(planes).outside(row, low, high, kTileColumns)) continue;
          const std::lock_guard<std::mutex> lock(guard);
          for (uint32_t j = 0; j < kTileColumns; j++) {
            const uint8_t inside = row[j] < low[j] ? low[j] : row[j] > high[j] ? high[j] : row[j];
            if (inside == row[j]) continue;
            if (out->n_exceptions < out->max_exceptions)
              out->exceptions[out->n_exceptions] = {t * planes * n + first + j, row[j], 0};
            out->n_exceptions++;
            row[j] = inside;
          }
        }
      }
      for (uint64_t p = 0; p < planes; p++) {
        own.chains[p].symbols = own.bytes[p][0];
        if (own.chains[p].status != CG_BAD_TABLE_ID) backend->encode_rows(&own.chains[p], last - from);
      }
    }
    for (uint64_t p = 0; p < planes; p++) {
      const EncodeChain& chain = own.chains[p];
      const uint64_t at = p * tiles + tile, bytes = chain.status ? 0 : chain.bytes();
      out->statuses[at] = chain.status;
      uint64_t offset;
      {
        const std::lock_guard<std::mutex> lock(guard);
        offset = out->used;
        out->used += bytes;
      }
      out->offsets[at] = offset;
      out->bytes[at] = bytes;
      if (bytes > 0 && offset + bytes <= out->memory_bytes) backend->store_stream(chain, out->memory + offset);
    }
  });
  return done ? CG_OK : CG_FAILED;
}

int32_t cg_decode_planes(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes, const uint64_t* offsets,
                         const cg_output* output, int32_t* tile_status, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_section(section) || section->ids_per_column != 1 || !is_values(output)) return CG_BAD_ARGUMENT;
  const cg_chunk& chunk = *output->chunk;
  const uint64_t planes = value_bytes(chunk.dtype), n = chunk.columns;
  if (n % kTileColumns != 0 || section->columns != planes * n || section->tokens != chunk.tokens) return CG_BAD_ARGUMENT;
  Tables tables;
  if (!open_tables(section->tables, section->tables_bytes, &tables)) return CG_BAD_TABLES;
  const uint64_t tiles = tile_count(section->tokens, section->columns), tokens = section->tokens;
  if (tiles == 0) return CG_OK;
  if (offsets == nullptr || tile_status == nullptr || (streams == nullptr && streams_bytes > 0)) return CG_BAD_ARGUMENT;
  if (!are_offsets(offsets, tiles, streams_bytes)) return CG_BAD_ARGUMENT;
  cg_source target = {};
  target.places = output->places;
  target.columns = n;
  target.dtype = chunk.dtype;
  const bool done = for_each_tile<Planes>(target, tokens, tokens * n * planes, run->threads, [&](uint64_t tile, Planes& own) {
    const uint64_t stride = planes * kTileColumns;
    cg_section local = *section;
    local.columns = stride;
    local.table_ids = own.ids;
    bool sound = true;
    for (uint64_t p = 0; p < planes; p++)
      memcpy(own.ids + p * kTileColumns, section->table_ids + p * n + tile * kTileColumns, kTileColumns);
    for (uint64_t p = 0; p < planes;) {
      DecodeJob jobs[kMaxBatch];
      uint32_t count = 0;
      for (; p < planes && count < backend->batch; p++) {
        jobs[count] = job_of(*section, p * (n / kTileColumns) + tile, streams, offsets, tile_status);
        jobs[count++].tile.first_column = p * kTileColumns;
      }
      backend->decode_tiles(local, tables, jobs, count, own.bytes);
      for (uint32_t i = 0; i < count; i++) sound = sound && *jobs[i].status == CG_OK;
    }
    for (uint32_t r = 0; r < own.columns.n_runs && sound; r++)
      backend->planes(planes).join(own.columns.runs[r], output->row, tokens, own.bytes, stride, kTileColumns);
  });
  return done ? CG_OK : CG_FAILED;
}

int32_t cg_patch_planes(const uint64_t* positions, const int32_t* indices, uint64_t count, const cg_output* output,
                        const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || !is_values(output)) return CG_BAD_ARGUMENT;
  if (count > 0 && (positions == nullptr || indices == nullptr)) return CG_BAD_ARGUMENT;
  const cg_chunk& chunk = *output->chunk;
  const uint64_t planes = value_bytes(chunk.dtype), width = planes * chunk.columns;
  for (uint64_t i = 0; i < count && width > 0; i++) {
    const uint64_t token = positions[i] / width, column = positions[i] % width;
    if (token >= chunk.tokens || indices[i] < 0 || indices[i] > 0xff) continue;
    const auto set = planes == 4 ? set_byte<uint32_t> : set_byte<uint16_t>;
    set(output->places[column % chunk.columns], output->row + token, column / chunk.columns, uint8_t(indices[i]));
  }
  return CG_OK;
}
