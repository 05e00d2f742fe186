// The C ABI of the passes over a chunk's values, on the CPU: arguments are checked here; blocks of columns run in threads.
#include <algorithm>

#include "../core/arguments.h"
#include "backend.h"
#include "threads.h"

using namespace cachegen;

namespace {

// Bytes are counted for so many columns at a time: their counters stay in a core's caches.
constexpr uint64_t kCountedColumns = 16;
// Rows are further apart than hardware prefetches, so that a row is asked for so many rows before it is read.
constexpr uint64_t kAhead = 8;

void prefetch(const uint8_t* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}

void count_bytes(const Block& block, const uint8_t* symbols, int32_t* counts) {
  const uint64_t columns = block.chunk->columns, tokens = block.chunk->tokens, end = block.column + block.columns;
  for (uint64_t first = block.column; first < end; first += kCountedColumns) {
    int32_t seen[kCountedColumns][kMaxSymbols] = {};
    const uint64_t n = std::min(kCountedColumns, end - first);
    for (uint64_t t = 0; t < tokens; t++) {
      const uint8_t* row = symbols + t * columns + first;
      if (t + kAhead < tokens) prefetch(row + kAhead * columns);
      for (uint64_t c = 0; c < n; c++) seen[c][row[c]]++;
    }
    for (uint64_t c = 0; c < n; c++)
      for (uint32_t k = 0; k < kMaxSymbols; k++)
        if (seen[c][k] > 0) counts[(first + c) * kMaxSymbols + k] += seen[c][k];  // few: others need no memory
  }
}

cg_chunk shape_of(uint64_t tokens, uint64_t columns) {
  cg_chunk shape = {};
  shape.tokens = tokens;
  shape.columns = columns;
  return shape;
}

template <class Work>
void for_each_block(const cg_chunk& chunk, uint64_t rows, uint32_t threads, const Work& work) {
  if (rows == 0) return;
  const uint64_t blocks = (chunk.columns + CG_BLOCK_COLUMNS - 1) / CG_BLOCK_COLUMNS;
  for_each(blocks, rows * chunk.columns, threads, [&](uint64_t i) {
    const uint64_t column = i * CG_BLOCK_COLUMNS;
    work(Block{&chunk, column, std::min<uint64_t>(CG_BLOCK_COLUMNS, chunk.columns - column)});
  });
}

}  // namespace

int32_t cg_moments(const cg_chunk* chunk, const void* values, uint64_t first, uint64_t last, double* total,
                   double* squares, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_chunk_of(chunk, values) || first > last || last > coded_rows(*chunk)) return CG_BAD_ARGUMENT;
  if (chunk->columns > 0 && (total == nullptr || squares == nullptr)) return CG_BAD_ARGUMENT;
  for_each_block(*chunk, last - first, run->threads, [&](const Block& block) {
    backend->passes(*chunk).moments(block, values, first, last, total, squares);
  });
  return CG_OK;
}

int32_t cg_quantise(const cg_chunk* chunk, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                    uint8_t* contexts, uint8_t* wide, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_chunk_of(chunk, values) || n_digits > CG_MAX_DIGITS) return CG_BAD_ARGUMENT;
  const uint64_t rows = coded_rows(*chunk);
  if (rows == 0 || chunk->columns == 0) return CG_OK;
  if (base == nullptr || wide == nullptr) return CG_BAD_ARGUMENT;
  if (n_digits > 0 && (digits == nullptr || contexts == nullptr)) return CG_BAD_ARGUMENT;
  for_each_block(*chunk, rows, run->threads, [&](const Block& block) {
    backend->passes(*chunk).quantise(block, values, n_digits, base, digits, contexts, wide);
  });
  return CG_OK;
}

int32_t cg_restore(const cg_chunk* chunk, uint64_t first, uint64_t last, const uint8_t* base,
                   const uint8_t* const* digits, uint32_t n_digits, void* values, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_chunk_of(chunk, values) || n_digits > CG_MAX_DIGITS) return CG_BAD_ARGUMENT;
  if (first > last || last > coded_rows(*chunk)) return CG_BAD_ARGUMENT;
  if (first == last || chunk->columns == 0) return CG_OK;
  if (base == nullptr || (n_digits > 0 && digits == nullptr)) return CG_BAD_ARGUMENT;
  for (uint32_t k = 0; k < n_digits; k++)
    if (digits[k] == nullptr) return CG_BAD_ARGUMENT;
  for_each_block(*chunk, last - first, run->threads, [&](const Block& block) {
    backend->passes(*chunk).restore(block, first, last, base, digits, n_digits, values);
  });
  return CG_OK;
}

int32_t cg_contexts(const uint8_t* symbols, uint8_t zero, const uint8_t* coarser, uint64_t count, uint8_t* contexts,
                    const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || (count > 0 && (symbols == nullptr || contexts == nullptr))) return CG_BAD_ARGUMENT;
  const uint64_t pieces = (count + kSymbolsPerThread - 1) / kSymbolsPerThread;
  for_each(pieces, count, run->threads, [&](uint64_t i) {
    const uint64_t at = i * kSymbolsPerThread, n = std::min(kSymbolsPerThread, count - at);
    backend->contexts(symbols + at, zero, coarser ? coarser + at : coarser, n, contexts + at);
  });
  return CG_OK;
}

int32_t cg_clamp(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns, const uint8_t* low,
                 const uint8_t* high, uint8_t* inside, uint8_t* changed, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || tokens > CG_MAX_TOKENS || columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (tokens == 0 || columns == 0) return CG_OK;
  if (symbols == nullptr || low == nullptr || high == nullptr || inside == nullptr || changed == nullptr)
    return CG_BAD_ARGUMENT;
  const cg_chunk shape = shape_of(tokens, columns);
  for_each_block(shape, tokens, run->threads, [&](const Block& block) {
    backend->clamp(block, symbols, contexts, low, high, inside, changed);
  });
  return CG_OK;
}

int32_t cg_count(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns, uint32_t bins,
                 int32_t* counts, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || tokens > CG_MAX_TOKENS || columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (bins != kMaxSymbols && bins != CG_DIGIT_BINS) return CG_BAD_ARGUMENT;
  if (contexts != nullptr && bins != CG_DIGIT_BINS) return CG_BAD_ARGUMENT;
  if (tokens == 0 || columns == 0) return CG_OK;
  if (symbols == nullptr || counts == nullptr) return CG_BAD_ARGUMENT;
  const cg_chunk shape = shape_of(tokens, columns);
  for_each_block(shape, tokens, run->threads, [&](const Block& block) {
    if (bins == CG_DIGIT_BINS)
      backend->count_digits(block, symbols, contexts, counts);
    else
      count_bytes(block, symbols, counts);
  });
  return CG_OK;
}
