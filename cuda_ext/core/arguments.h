// What both libraries ask of arguments before they look at any data; host code.
#pragma once

#include "chunk.h"
#include "tables.h"
#include "tile.h"

namespace cachegen {

inline bool is_section(const cg_section* section) {
  if (section == nullptr || section->tokens > CG_MAX_TOKENS || section->columns > CG_MAX_COLUMNS) return false;
  if (section->ids_per_column != 1 && section->ids_per_column != kContexts) return false;
  return tile_count(section->tokens, section->columns) == 0 || section->table_ids != nullptr;
}

// One whose symbols [tokens, columns] are coded with the contexts it names.
inline bool is_section_of(const cg_section* section, const void* symbols) {
  if (!is_section(section)) return false;
  if (tile_count(section->tokens, section->columns) == 0) return true;
  return symbols != nullptr && (section->contexts == nullptr) == (section->ids_per_column == 1);
}

inline bool is_chunk(const cg_chunk* chunk) {
  if (chunk == nullptr || chunk->tokens > CG_MAX_TOKENS || chunk->columns > CG_MAX_COLUMNS) return false;
  return chunk->group_tokens != 1;
}

inline bool has_scale(const cg_chunk& chunk) {
  if (chunk.dtype > CG_FLOAT16) return false;
  if (chunk.tokens == 0 || chunk.columns == 0) return true;
  return (chunk.anchors == nullptr) == (chunk.group_tokens == 0) && chunk.means != nullptr && chunk.steps != nullptr;
}

// Values of a chunk, and the scale on which they are symbols.
inline bool is_chunk_of(const cg_chunk* chunk, const void* values) {
  if (!is_chunk(chunk) || !has_scale(*chunk)) return false;
  return chunk->tokens == 0 || chunk->columns == 0 || values != nullptr;
}

// Room for `tokens` coded rows.
inline bool is_output(const cg_output* output, uint64_t tokens) {
  if (output == nullptr || !is_chunk(output->chunk) || output->n_coarser > CG_MAX_DIGITS) return false;
  const cg_chunk& chunk = *output->chunk;
  if (chunk.dtype != CG_UINT8 && !has_scale(chunk)) return false;
  const uint64_t rows = coded_rows(chunk);
  if (output->first > rows || tokens > rows - output->first) return false;
  if (output->gap_at < tokens && output->gap > rows - output->first - tokens) return false;
  if (output->places == nullptr && chunk.columns > 0) return false;
  for (uint32_t i = 0; i < output->n_coarser; i++) {
    if (output->coarser[i] == nullptr && tokens * chunk.columns > 0) return false;
    if (uintptr_t(output->coarser[i]) % 8 != 0) return false;
  }
  return true;
}

// A section that is decoded to such an output: its contexts are the coarser symbols there, if any.
inline bool is_section_into(const cg_section* section, const cg_output* output) {
  if (!is_section(section) || !is_output(output, section->tokens)) return false;
  return section->contexts == nullptr && (section->ids_per_column == 1) == (output->n_coarser == 0);
}

// Rows first, first + every, ... of a chunk, of values.
inline bool are_rows(const cg_output* output, const float* rows, uint64_t n_rows, uint64_t first, uint64_t every) {
  if (output == nullptr || !is_chunk(output->chunk) || output->chunk->dtype > CG_FLOAT16) return false;
  const cg_chunk& chunk = *output->chunk;
  if (n_rows == 0 || chunk.columns == 0) return true;
  if (rows == nullptr || output->places == nullptr || n_rows > chunk.tokens || first >= chunk.tokens) return false;
  return n_rows == 1 || (every > 0 && every <= (chunk.tokens - 1 - first) / (n_rows - 1));
}

// The streams of a section with so many tokens.
inline bool are_streams_of(const cg_streams& streams, uint64_t tokens) {
  if (tokens == 0) return true;
  if (streams.offsets == nullptr || (streams.data == nullptr && streams.bytes > 0)) return false;
  return uintptr_t(streams.data) % kWordBytes == 0;
}

inline bool is_batch(const cg_batch* batch) {
  if (batch == nullptr || batch->columns > CG_MAX_COLUMNS) return false;
  if (batch->group_tokens == 1 || batch->dtype > CG_FLOAT16) return false;
  if (batch->n_digits > CG_MAX_DIGITS || batch->n_end_digits > CG_MAX_DIGITS) return false;
  if (batch->tables_per_tile > kTileColumns) return false;
  if (batch->columns == 0) return true;
  for (uint32_t k = 0; k < batch->n_digits || k < batch->n_end_digits; k++)
    if (batch->digit_ids[k] == nullptr) return false;
  return batch->base_ids != nullptr && batch->places != nullptr && batch->means != nullptr && batch->steps != nullptr &&
         batch->end_steps != nullptr;
}

inline bool is_job(const cg_batch& batch, const cg_job& job) {
  if (job.tokens > CG_MAX_BATCH_TOKENS) return false;
  const uint64_t rows = coded_rows(chunk_of(batch, job));
  if (job.first > job.last || job.last > rows) return false;
  if (batch.columns == 0 || job.tokens == 0) return true;
  if (job.tile_status == nullptr || (job.anchors == nullptr) != (batch.group_tokens == 0)) return false;
  if (job.patches != nullptr && job.patch_offsets == nullptr) return false;
  bool sound = are_streams_of(job.base, rows);
  for (uint32_t k = 0; k < batch.n_digits; k++) sound = sound && are_streams_of(job.digits[k], job.last - job.first);
  for (uint32_t k = 0; k < batch.n_end_digits; k++)
    sound = sound && are_streams_of(job.end_digits[k], rows - (job.last - job.first));
  return sound;
}

inline bool is_heads(const cg_heads& heads) {
  if (heads.tokens > CG_MAX_TOKENS || uint64_t(heads.heads) * heads.dim > CG_MAX_COLUMNS) return false;
  if (heads.tokens == 0 || heads.heads == 0 || heads.dim == 0) return true;
  if ((heads.from_dtype != CG_FLOAT32 && heads.from_dtype != CG_BFLOAT16) || heads.to_dtype > CG_FLOAT16) return false;
  if (heads.pairs > heads.dim / 2 || (heads.pairs > 0 && (heads.cosines == nullptr || heads.sines == nullptr))) return false;
  return heads.rows != nullptr && heads.address != 0;
}

inline bool are_operands(const cg_operands* job) {
  constexpr uint64_t kMost = 1u << 28;
  if (job == nullptr || job->tokens > CG_MAX_TOKENS || job->columns > kMost || job->n_numbers > kMost) return false;
  if (job->products > kMost || job->width > kMost || job->dtype > CG_BFLOAT16) return false;
  if (job->tokens == 0 || job->products == 0 || job->width == 0) return true;
  if (job->sources == nullptr || job->operands == 0 || (job->numbers == nullptr && job->n_numbers > 0)) return false;
  return job->coefficients != nullptr || job->columns == 0;
}

// Whether so many tiles lie one after the other within the streams; offsets are the host's.
inline bool are_offsets(const uint64_t* offsets, uint64_t tiles, uint64_t streams_bytes) {
  for (uint64_t i = 0; i < tiles; i++)
    if (offsets[i] > offsets[i + 1]) return false;
  return offsets[tiles] <= streams_bytes;
}

}  // namespace cachegen
