// Decoding chunks on the CPU, base and digits of a tile together: its symbols stay in a core's cache until they are values,
// and all tiles of all chunks are one parallel loop.
#include <string.h>

#include <vector>

#include "../core/arguments.h"
#include "levels_rows.h"
#include "threads.h"

using namespace cachegen;

namespace {

constexpr uint32_t kVector = CG_VECTOR_COLUMNS, kVectors = kTileColumns / kVector;
constexpr uint64_t kStride = kMaxBatch * kTileColumns;  // of the rows of the tiles that are decoded side by side

// A thread's memory: matrices [rows, kStride].
struct Memory {
  std::unique_ptr<uint8_t[]> cells;
  uint64_t rows = 0;
  uint8_t *base, *digits[CG_MAX_DIGITS], *contexts;

  bool reserve(uint64_t wanted) {
    if (rows >= wanted && cells) return true;
    const uint64_t size = wanted * kStride;
    cells.reset(new (std::nothrow) uint8_t[(2 + CG_MAX_DIGITS) * size]);
    rows = wanted;
    base = cells.get();
    contexts = base + size;
    for (uint32_t k = 0; k < CG_MAX_DIGITS; k++) digits[k] = contexts + (1 + k) * size;
    return cells != nullptr;
  }
};

// Up to kMaxBatch adjacent tiles of one chunk.
struct Work {
  const Backend* backend;
  const cg_batch* batch;
  const cg_job* job;
  cg_chunk chunk;
  Tables base, digits;
  uint64_t tile;
  uint32_t count;
  Memory* memory;
};

// Decodes a section's tiles that are sound so far to symbols [tokens, kStride].
void decode(const Work& work, const cg_streams& streams, const uint8_t* ids, uint32_t n_ids, const Tables& tables,
            const uint8_t* contexts, uint64_t tokens, uint8_t* symbols) {
  if (tokens == 0) return;
  cg_section section = {};
  section.tokens = tokens;
  section.columns = kStride;
  section.ids_per_column = n_ids;
  section.table_ids = ids + work.tile * kTileColumns * n_ids;
  section.contexts = contexts;
  DecodeJob jobs[kMaxBatch];
  uint32_t count = 0;
  for (uint32_t i = 0; i < work.count; i++) {
    int32_t* status = work.job->tile_status + work.tile + i;
    if (*status) continue;
    const uint64_t first = streams.offsets[work.tile + i], last = streams.offsets[work.tile + i + 1];
    Tile tile = tile_at(work.tile + i, work.batch->columns);
    tile.first_column = i * kTileColumns;  // of the symbols
    jobs[count++] = {tile, first % kWordBytes != 0, streams.data + first, streams.data + last, status};
  }
  if (count > 0) work.backend->decode_tiles(section, tables, jobs, count, symbols);
}

// Replaces indices of matrix `number`, of coded rows [first, last): row `first` is the matrix's row `at`.
void patch(const Work& work, uint32_t number, uint64_t first, uint64_t last, uint64_t at, uint8_t* symbols) {
  for (uint32_t i = 0; i < work.count && work.job->n_patches > 0; i++)
    for (uint32_t p = work.job->patch_offsets[work.tile + i]; p < work.job->patch_offsets[work.tile + i + 1]; p++) {
      const uint64_t word = work.job->patches[p], row = word >> 32;
      if ((word >> 8 & 0xff) == number && row >= first && row < last)
        symbols[(at + row - first) * kStride + i * kTileColumns + (word >> 16 & 0xff)] = uint8_t(word);
    }
}

// Values of `tokens` coded rows from `first` on; `at` is their first row in the matrices.
void write(const Work& work, const float* steps, uint32_t n_digits, const uint8_t* base, uint64_t at, uint64_t first,
           uint64_t tokens) {
  cg_chunk chunk = work.chunk;
  chunk.steps = steps;
  for (uint32_t i = 0; i < work.count; i++) {
    if (work.job->tile_status[work.tile + i]) continue;
    Run runs[kVectors];
    const uint32_t n = runs_of(*work.batch, work.tile + i, runs);
    for (uint32_t r = 0; r < n; r++) {
      const uint64_t cell = i * kTileColumns + runs[r].coded;
      LevelRows rows = {&chunk, first, tokens, work.job->row, base + cell, {nullptr, nullptr}, kStride, n_digits};
      for (uint32_t k = 0; k < n_digits; k++) rows.digits[k] = work.memory->digits[k] + at * kStride + cell;
      work.backend->levels_into(rows, runs[r]);
    }
  }
}

// Digits of `tokens` rows, whose base symbols are [tokens, kStride].
void decode_digits(const Work& work, const cg_streams* streams, uint32_t n_digits, const uint8_t* base, uint64_t tokens) {
  for (uint32_t k = 0; k < n_digits; k++) {
    const uint8_t* coarser = k ? work.memory->digits[k - 1] : nullptr;
    work.backend->levels_contexts(base, coarser, tokens * kStride, work.memory->contexts);
    decode(work, streams[k], work.batch->digit_ids[k], kContexts, work.digits, work.memory->contexts, tokens,
           work.memory->digits[k]);
    // The next contexts depend on patched digits.
    const uint64_t a = work.job->first, b = work.job->last, rows = coded_rows(work.chunk);
    if (streams == work.job->digits) {
      patch(work, 1 + k, a, b, 0, work.memory->digits[k]);
    } else {
      patch(work, 1 + k, 0, a, 0, work.memory->digits[k]);
      patch(work, 1 + k, b, rows, a, work.memory->digits[k]);
    }
  }
}

void decode_tiles(const Work& work) {
  const cg_job& job = *work.job;
  const cg_batch& batch = *work.batch;
  const uint64_t rows = coded_rows(work.chunk), a = job.first, b = job.last;
  uint8_t* base = work.memory->base;
  decode(work, job.base, batch.base_ids, 1, work.base, nullptr, rows, base);
  patch(work, 0, 0, rows, 0, base);
  decode_digits(work, job.digits, b > a ? batch.n_digits : 0, base + a * kStride, b - a);
  write(work, batch.steps, batch.n_digits, base + a * kStride, 0, a, b - a);
  const uint64_t ends = rows - (b - a);
  if (ends > 0) {
    memmove(base + a * kStride, base + b * kStride, (rows - b) * kStride);  // the ordinary rows are done
    decode_digits(work, job.end_digits, batch.n_end_digits, base, ends);
    write(work, batch.end_steps, batch.n_end_digits, base, 0, 0, a);
    write(work, batch.end_steps, batch.n_end_digits, base + a * kStride, a, b, rows - b);
  }
  if (batch.group_tokens == 0) return;
  for (uint32_t i = 0; i < work.count; i++) {
    Run runs[kVectors];
    const uint32_t n = runs_of(batch, work.tile + i, runs);
    cg_output output = {};
    output.chunk = &work.chunk;
    output.row = job.row;
    const uint64_t anchors = job.tokens - rows;
    for (uint32_t r = 0; r < n; r++)
      work.backend->rows_into(output, runs[r], job.anchors + runs[r].column, batch.columns, anchors, 0, batch.group_tokens);
  }
}

bool are_within(const cg_streams& streams, uint64_t tiles, uint64_t tokens) {
  return tokens == 0 || are_offsets(streams.offsets, tiles, streams.bytes);
}

// What is_job leaves to a device: offsets, of streams and of patches.
bool has_offsets(const cg_batch& batch, const cg_job& job) {
  const uint64_t rows = coded_rows(chunk_of(batch, job)), tiles = tile_count(1, batch.columns), ordinary = job.last - job.first;
  if (job.n_patches > 0 && job.patches == nullptr) return false;
  for (uint64_t i = 0; i < tiles && job.n_patches > 0; i++)
    if (job.patch_offsets[i] > job.patch_offsets[i + 1] || job.patch_offsets[i + 1] > job.n_patches) return false;
  bool sound = are_within(job.base, tiles, rows);
  for (uint32_t k = 0; k < batch.n_digits; k++) sound = sound && are_within(job.digits[k], tiles, ordinary);
  for (uint32_t k = 0; k < batch.n_end_digits; k++) sound = sound && are_within(job.end_digits[k], tiles, rows - ordinary);
  return sound;
}

}  // namespace

int32_t cg_decode_chunks(const cg_batch* batch, const cg_job* jobs, uint32_t n_jobs, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_batch(batch) || n_jobs > CG_MAX_BATCH || (n_jobs > 0 && jobs == nullptr))
    return CG_BAD_ARGUMENT;
  const uint64_t tiles = tile_count(1, batch->columns), pairs = (tiles + backend->batch - 1) / backend->batch;
  uint64_t tokens = 0;
  if (tiles == 0) return CG_OK;
  for (uint32_t i = 0; i < n_jobs; i++) {
    if (!is_job(*batch, jobs[i]) || (jobs[i].tokens > 0 && !has_offsets(*batch, jobs[i]))) return CG_BAD_ARGUMENT;
    if (jobs[i].tokens == 0) continue;
    tokens += jobs[i].tokens;
    std::fill_n(jobs[i].tile_status, tiles, int32_t(CG_OK));
  }
  Work shared = {};
  shared.backend = backend;
  shared.batch = batch;
  bool sound = open_tables(batch->base_tables, batch->base_tables_bytes, &shared.base);
  if (batch->n_digits + batch->n_end_digits > 0)
    sound = open_tables(batch->digit_tables, batch->digit_tables_bytes, &shared.digits) && sound;
  if (!sound) {
    for (uint32_t i = 0; i < n_jobs; i++)
      if (jobs[i].tokens > 0) std::fill_n(jobs[i].tile_status, tiles, int32_t(CG_BAD_TABLES));
    return CG_OK;
  }
  std::atomic<bool> failed{false};
  for_each_with<Memory>(
      pairs * n_jobs, tokens * batch->columns, run->threads, [](Memory*) {},
      [&](uint64_t i, Memory* memory) {
        if (jobs[i / pairs].tokens == 0) return;
        Work work = shared;
        work.job = &jobs[i / pairs];
        work.chunk = chunk_of(*batch, *work.job);
        work.tile = i % pairs * backend->batch;
        work.count = uint32_t(std::min<uint64_t>(backend->batch, tiles - work.tile));
        work.memory = memory;
        if (memory == nullptr || !memory->reserve(coded_rows(work.chunk)))
          failed = true;
        else
          decode_tiles(work);
      });
  return failed ? CG_FAILED : CG_OK;
}
