// The passes over a chunk's values, block of columns by block of columns; plain loops that compilers vectorise, so every
// back-end includes them for its own instruction set. What one value becomes is core/chunk.h's.
#pragma once

#include "../core/chunk.h"
#include "backend.h"

namespace cachegen {
namespace {

CACHEGEN_HD uint8_t* row_at(const Run& run, uint64_t row) {
  return reinterpret_cast<uint8_t*>(uintptr_t(run.address + row * run.stride));
}

// What a block of one coded row needs.
struct Row {
  uint64_t offset;  // of its values
  const float *anchor, *mean, *step;
};
inline Row row_of(const Block& block, uint64_t i) {
  const cg_chunk& chunk = *block.chunk;
  const Place place = place_of(chunk, i);
  const float* anchor = chunk.group_tokens ? chunk.anchors + place.anchor * chunk.columns + block.column : nullptr;
  return {place.row * chunk.columns + block.column, anchor, chunk.means + block.column, chunk.steps + block.column};
}

// The loops over columns. kAnchors and the number of digits are constants, for without branches they are vectorised.

template <class T, bool kAnchors>
void moments_row(const typename T::Stored* __restrict values, const Row& row, uint64_t n, double* __restrict total,
                 double* __restrict squares) {
  const float* anchor = row.anchor;
  for (uint64_t j = 0; j < n; j++) {
    const float value = T::load(values[j]);
    const double y = kAnchors ? value - anchor[j] : value;
    total[j] += y;
    squares[j] += y * y;
  }
}

template <class T, bool kAnchors, uint32_t kDigits>
bool quantise_row(const typename T::Stored* __restrict values, const Row& row, uint64_t n, uint8_t* __restrict base,
                  uint8_t* __restrict digits, uint8_t* __restrict contexts, uint64_t stride) {
  const float *anchor = row.anchor, *mean = row.mean, *step = row.step;
  uint8_t *__restrict finer_digits = digits + stride, *__restrict finer_contexts = contexts + stride;
  int32_t wide = 0;
  for (uint64_t j = 0; j < n; j++) {
    const float value = T::load(values[j]);
    Digit found[CG_MAX_DIGITS];
    const int32_t index = quantise(kAnchors ? value - anchor[j] : value, mean[j], step[j], kDigits, found);
    if (kDigits > 0) digits[j] = found[0].index;
    if (kDigits > 0) contexts[j] = found[0].context;
    if (kDigits > 1) finer_digits[j] = found[1].index;
    if (kDigits > 1) finer_contexts[j] = found[1].context;
    wide |= index & ~0xff;
    base[j] = uint8_t(index);
  }
  return wide != 0;
}

template <class T, bool kAnchors, uint32_t kDigits>
void restore_row(const uint8_t* __restrict base, const uint8_t* __restrict digits, const uint8_t* __restrict finer,
                 const Row& row, uint64_t n, typename T::Stored* __restrict values) {
  const float *anchor = row.anchor, *mean = row.mean, *step = row.step;
  for (uint64_t j = 0; j < n; j++) {
    int32_t symbol = base_symbol(base[j]);
    if (kDigits > 0) symbol = refine(symbol, digits[j]);
    if (kDigits > 1) symbol = refine(symbol, finer[j]);
    values[j] = T::store(dequantise(symbol, step[j], mean[j], kAnchors, kAnchors ? anchor[j] : 0));
  }
}

// The loops over coded rows.

template <class T, bool kAnchors>
void moments_of(const Block& block, const void* values, uint64_t first, uint64_t last, double* total, double* squares) {
  const auto* from = static_cast<const typename T::Stored*>(values);
  for (uint64_t i = first; i < last; i++) {
    const Row row = row_of(block, i);
    moments_row<T, kAnchors>(from + row.offset, row, block.columns, total + block.column, squares + block.column);
  }
}

template <class T, bool kAnchors>
void quantise_of(const Block& block, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                 uint8_t* contexts, uint8_t* wide) {
  const auto* from = static_cast<const typename T::Stored*>(values);
  const uint64_t columns = block.chunk->columns, rows = coded_rows(*block.chunk);
  const auto quantise = n_digits == 0   ? quantise_row<T, kAnchors, 0>
                        : n_digits == 1 ? quantise_row<T, kAnchors, 1>
                                        : quantise_row<T, kAnchors, 2>;
  for (uint64_t i = 0; i < rows; i++) {
    const Row row = row_of(block, i);
    const uint64_t to = i * columns + block.column;
    wide[block.column / CG_BLOCK_COLUMNS * rows + i] =
        quantise(from + row.offset, row, block.columns, base + to, digits + to, contexts + to, rows * columns);
  }
}

template <class T, bool kAnchors>
void restore_of(const Block& block, uint64_t first, uint64_t last, const uint8_t* base, const uint8_t* const* digits,
                uint32_t n_digits, void* values) {
  auto* to = static_cast<typename T::Stored*>(values);
  const auto restore = n_digits == 0   ? restore_row<T, kAnchors, 0>
                       : n_digits == 1 ? restore_row<T, kAnchors, 1>
                                       : restore_row<T, kAnchors, 2>;
  for (uint64_t i = first; i < last; i++) {
    const Row row = row_of(block, i);
    const uint64_t from = (i - first) * block.chunk->columns + block.column;
    const uint8_t* one = n_digits > 0 ? digits[0] + from : nullptr;
    const uint8_t* two = n_digits > 1 ? digits[1] + from : nullptr;
    restore(base + from, one, two, row, block.columns, to + row.offset);
  }
}

void contexts(const uint8_t* __restrict symbols, uint8_t zero, const uint8_t* __restrict coarser, uint64_t count,
              uint8_t* __restrict found) {
  const uint8_t known = coarser ? 0xff : 0;
  if (coarser == nullptr) coarser = symbols;
  for (uint64_t i = 0; i < count; i++) {
    const int32_t given = coarser[i] & known, unknown = (given - 1) >> 8;  // all ones where none is given
    found[i] = uint8_t(given | (sign_of(int32_t(symbols[i]) - zero) & unknown));
  }
}

template <bool kByContext>
bool clamp_row(const uint8_t* __restrict symbols, const uint8_t* __restrict contexts, const uint8_t* __restrict low,
               const uint8_t* __restrict high, uint64_t stride, uint64_t n, uint8_t* __restrict inside) {
  uint8_t changed = 0;
  for (uint64_t j = 0; j < n; j++) {
    uint8_t least = low[j], most = high[j];
    if (kByContext) {
      const uint8_t context = contexts[j];
      const uint8_t least1 = low[stride + j], most1 = high[stride + j];
      const uint8_t least2 = low[2 * stride + j], most2 = high[2 * stride + j];
      least = context == 0 ? least : context == 1 ? least1 : least2;
      most = context == 0 ? most : context == 1 ? most1 : most2;
    }
    const uint8_t symbol = symbols[j];
    const uint8_t below = symbol < most ? symbol : most, found = below > least ? below : least;
    changed |= uint8_t(found ^ symbol);
    inside[j] = found;
  }
  return changed != 0;
}

void clamp(const Block& block, const uint8_t* symbols, const uint8_t* contexts, const uint8_t* low, const uint8_t* high,
           uint8_t* inside, uint8_t* changed) {
  const uint64_t columns = block.chunk->columns, tokens = block.chunk->tokens;
  for (uint64_t t = 0; t < tokens; t++) {
    const uint64_t at = t * columns + block.column;
    changed[block.column / CG_BLOCK_COLUMNS * tokens + t] =
        contexts ? clamp_row<true>(symbols + at, contexts + at, low + block.column, high + block.column, columns,
                                   block.columns, inside + at)
                 : clamp_row<false>(symbols + at, contexts, low + block.column, high + block.column, columns,
                                    block.columns, inside + at);
  }
}

// Counts of one block of columns over all tokens. Few bins, those of digits, are counted side by side by comparison, in
// bytes that are added up before they can overflow; many one by one.

constexpr uint32_t kDigitBins = CG_DIGIT_BINS;
constexpr uint64_t kByteTokens = 255;

inline void add_matches(const uint8_t* __restrict bins, uint8_t wanted, uint64_t n, uint8_t* __restrict seen) {
  for (uint64_t j = 0; j < n; j++) {
    const uint8_t match = bins[j] == wanted ? 1 : 0;
    seen[j] = uint8_t(seen[j] + match);
  }
}

void count_digits(const Block& block, const uint8_t* symbols, const uint8_t* contexts, int32_t* counts) {
  const uint64_t columns = block.chunk->columns, tokens = block.chunk->tokens, n = block.columns;
  for (uint64_t first = 0; first < tokens; first += kByteTokens) {
    const uint64_t last = tokens - first < kByteTokens ? tokens : first + kByteTokens;
    uint8_t seen[kDigitBins][CG_BLOCK_COLUMNS] = {}, bins[CG_BLOCK_COLUMNS];
    for (uint64_t t = first; t < last; t++) {
      const uint8_t* row = symbols + t * columns + block.column;
      const uint8_t* context = contexts ? contexts + t * columns + block.column : contexts;
      for (uint64_t j = 0; j < n; j++) {
        const uint8_t bin = uint8_t(context ? 3 * context[j] + row[j] : row[j]);
        bins[j] = bin < kDigitBins - 1 ? bin : kDigitBins - 1;
      }
      for (uint8_t k = 0; k < kDigitBins; k++) add_matches(bins, k, n, seen[k]);
    }
    for (uint64_t j = 0; j < n; j++)
      for (uint32_t k = 0; k < kDigitBins; k++) counts[(block.column + j) * kDigitBins + k] += seen[k][j];
  }
}

// By type of the values, and whether there are anchors.

template <class T>
constexpr RowPasses kPassesOf[2] = {{moments_of<T, false>, quantise_of<T, false>, restore_of<T, false>},
                                    {moments_of<T, true>, quantise_of<T, true>, restore_of<T, true>}};

const RowPasses& passes(const cg_chunk& chunk) {
  const bool anchors = chunk.group_tokens > 0;
  switch (chunk.dtype) {
    case CG_FLOAT32: return kPassesOf<Float32>[anchors];
    case CG_BFLOAT16: return kPassesOf<Bfloat16>[anchors];
    default: return kPassesOf<Float16>[anchors];
  }
}

}  // namespace
}  // namespace cachegen
