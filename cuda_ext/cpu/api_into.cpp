// Decoding into place, on the CPU: tiles into scratch memory that stays in a core's cache, and from there, by runs of
// columns, into the layers' tensors.
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../core/arguments.h"
#include "../core/output.h"
#include "backend.h"
#include "threads.h"

using namespace cachegen;

namespace {

uint64_t bytes_of(uint32_t dtype) { return dtype == CG_UINT8 ? 1 : dtype == CG_FLOAT32 ? 4 : 2; }

uint64_t column_of(const cg_output& output, uint64_t coded) { return output.columns ? output.columns[coded] : coded; }

// The runs of coded columns [first, last); anywhere: those that need not lie one after the other in memory.
std::vector<Run> runs_of(const cg_output& output, uint64_t first, uint64_t last, bool anywhere = false) {
  const uint64_t bytes = bytes_of(output.chunk->dtype);
  std::vector<Run> runs;
  for (uint64_t coded = first; coded < last; coded++) {
    const uint64_t column = column_of(output, coded);
    const cg_place& place = output.places[column];
    Run* run = runs.empty() ? nullptr : &runs.back();
    const bool cut = output.n_coarser > 0 && column % kTileColumns == 0;  // coarser symbols go on elsewhere
    const bool next = anywhere || (run && place.stride == run->stride &&
                                   place.address == run->address + run->columns * bytes);
    if (run && !cut && column == run->column + run->columns && next)
      run->columns++;
    else
      runs.push_back({coded - first, column, 1, place.address, place.stride});
  }
  return runs;
}

// f(run) for the runs of `count` coded columns, blocks of them in threads.
template <class F>
void for_each_run(const cg_output& output, uint64_t count, uint64_t rows, uint32_t threads, const F& f) {
  for_each((count + kTileColumns - 1) / kTileColumns, rows * count, threads, [&](uint64_t i) {
    const uint64_t first = i * kTileColumns;
    for (const Run& run : runs_of(output, first, std::min(first + kTileColumns, count))) f(run);
  });
}

// The tokens before and after the gap: f(output without a gap, their first token, their number).
template <class F>
void without_gap(const cg_output& output, uint64_t tokens, const F& f) {
  cg_output part = output;
  const uint64_t before = std::min(tokens, output.gap_at);
  part.gap = 0;
  f(part, uint64_t(0), before);
  if (before == tokens) return;
  part.first = row_of_token(output, before);
  f(part, before, tokens - before);
}

bool are_columns(const cg_output& output, uint64_t count) {
  if (output.columns == nullptr) return count <= output.chunk->columns;
  return std::all_of(output.columns, output.columns + count, [&](uint32_t c) { return c < output.chunk->columns; });
}

// Decodes a batch of adjacent tiles, and writes those that are sound.
void decode_batch(const Backend& backend, const cg_section& section, const Tables& tables, const cg_output& output,
                  DecodeJob* jobs, uint32_t count) {
  const uint64_t first = jobs[0].tile.first_column, stride = uint64_t(count) * kTileColumns;
  const uint64_t cells = section.tokens * stride;
  const bool digits = output.n_coarser > 0;
  const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[digits ? 2 * cells : cells]);
  if (!memory) {
    for (uint32_t i = 0; i < count; i++) *jobs[i].status = CG_FAILED;
    return;
  }
  uint8_t *symbols = memory.get(), *contexts = digits ? symbols + cells : nullptr;
  std::vector<Run> runs[kMaxBatch];
  for (uint32_t i = 0; i < count; i++) {
    Tile& tile = jobs[i].tile;
    runs[i] = runs_of(output, tile.first_column, tile.first_column + tile.width);
    tile.first_column -= first;  // of the scratch memory from here on
    if (!digits) continue;
    const std::vector<Run> wider = runs_of(output, first + tile.first_column, first + tile.first_column + tile.width, true);
    without_gap(output, section.tokens, [&](const cg_output& part, uint64_t t, uint64_t n) {
      for (const Run& run : wider)
        backend.run_contexts(part, run, n, contexts + t * stride + tile.first_column + run.coded, stride);
    });
  }
  cg_section local = section;
  local.columns = stride;
  local.table_ids += first * section.ids_per_column;
  local.contexts = contexts;
  backend.decode_tiles(local, tables, jobs, count, symbols);
  for (uint32_t i = 0; i < count; i++) {
    if (*jobs[i].status) continue;
    without_gap(output, section.tokens, [&](const cg_output& part, uint64_t t, uint64_t n) {
      for (const Run& run : runs[i])
        backend.into(part, run, symbols + t * stride + jobs[i].tile.first_column + run.coded, stride, n);
    });
  }
}

template <class T>
void patch(const cg_output& output, uint64_t tokens, const uint64_t* positions, const int32_t* indices, uint64_t count) {
  const cg_chunk& chunk = *output.chunk;
  for (uint64_t i = 0; i < count; i++) {
    if (positions[i] >= tokens * chunk.columns) continue;
    if (sizeof(typename T::Stored) == 1 && (indices[i] < 0 || indices[i] > 0xff)) continue;
    const uint64_t t = positions[i] / chunk.columns, column = positions[i] % chunk.columns;
    const auto put = output.n_coarser == 0   ? put_value<T, 0>
                     : output.n_coarser == 1 ? put_value<T, 1>
                                             : put_value<T, 2>;
    put(output, chunk, t, column, indices[i]);
  }
}

}  // namespace

int32_t cg_decode_into(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                       const uint64_t* offsets, const cg_output* output, int32_t* tile_status,
                       const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_section_into(section, output)) return CG_BAD_ARGUMENT;
  Tables tables;
  if (!open_tables(section->tables, section->tables_bytes, &tables)) return CG_BAD_TABLES;
  const uint64_t tiles = tile_count(section->tokens, section->columns);
  if (tiles == 0) return CG_OK;
  if (offsets == nullptr || tile_status == nullptr || (streams == nullptr && streams_bytes > 0)) return CG_BAD_ARGUMENT;
  if (!are_offsets(offsets, tiles, streams_bytes) || !are_columns(*output, section->columns)) return CG_BAD_ARGUMENT;
  const uint64_t batches = (tiles + backend->batch - 1) / backend->batch;
  for_each(batches, section->tokens * section->columns, run->threads, [&](uint64_t i) {
    DecodeJob jobs[kMaxBatch];
    const uint64_t end = std::min(tiles, (i + 1) * backend->batch);
    uint32_t count = 0;
    for (uint64_t tile = i * backend->batch; tile < end; tile++)
      jobs[count++] = job_of(*section, tile, streams, offsets, tile_status);
    decode_batch(*backend, *section, tables, *output, jobs, count);
  });
  return CG_OK;
}

int32_t cg_fill_into(uint64_t tokens, uint64_t count, const cg_output* output, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_output(output, tokens) || !are_columns(*output, count)) return CG_BAD_ARGUMENT;
  uint8_t zeros[kTileColumns];
  memset(zeros, output->n_coarser ? kDigitZero : kZeroIndex, sizeof zeros);
  for_each_run(*output, count, tokens, run->threads, [&](const Run& one) {
    without_gap(*output, tokens, [&](const cg_output& part, uint64_t, uint64_t n) {
      backend->into(part, one, zeros, 0, n);
    });
  });
  return CG_OK;
}

int32_t cg_patch_into(uint64_t tokens, const uint64_t* positions, const int32_t* indices, uint64_t count,
                      const cg_output* output, const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || !is_output(output, tokens) || output->columns != nullptr) return CG_BAD_ARGUMENT;
  if (count > 0 && (positions == nullptr || indices == nullptr)) return CG_BAD_ARGUMENT;
  switch (output->chunk->dtype) {
    case CG_FLOAT32: patch<Float32>(*output, tokens, positions, indices, count); break;
    case CG_BFLOAT16: patch<Bfloat16>(*output, tokens, positions, indices, count); break;
    case CG_FLOAT16: patch<Float16>(*output, tokens, positions, indices, count); break;
    default: patch<Index8>(*output, tokens, positions, indices, count);
  }
  return CG_OK;
}

int32_t cg_rows_into(const float* rows, uint64_t n_rows, uint64_t first, uint64_t every, const cg_output* output,
                     const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !are_rows(output, rows, n_rows, first, every)) return CG_BAD_ARGUMENT;
  const uint64_t columns = output->chunk->columns;
  for_each_run(*output, columns, n_rows, run->threads, [&](const Run& one) {
    backend->rows_into(*output, one, rows + one.column, columns, n_rows, first, every);
  });
  return CG_OK;
}
