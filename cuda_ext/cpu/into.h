// Decoded symbols into their places, run by run; compiled for every instruction set, as rows.h is.
//
// Note: a run is columns that are adjacent in the section, in the chunk and in memory, mostly one head's. Its tokens are
// written one after the other, which is how a layer's tensor lies. Here tokens have no gap: a caller takes two turns.
#pragma once

#include "levels_rows.h"
#include "rows.h"

namespace cachegen {
namespace {

template <class T, bool kAnchors, uint32_t kCoarser>
void run_into(const cg_output& output, const Run& run, const uint8_t* symbols, uint64_t stride, uint64_t tokens) {
  const cg_chunk& chunk = *output.chunk;
  const uint64_t rows = coded_rows(chunk);
  const float *mean = chunk.means + run.column, *step = chunk.steps + run.column;
  Place place = place_of(chunk, output.first);
  for (uint64_t t = 0; t < tokens; t++, symbols += stride) {
    if (kAnchors ? place.row % chunk.group_tokens == 0 : false) {
      place.row++;
      place.anchor++;
    }
    const float* anchor = kAnchors ? chunk.anchors + place.anchor * chunk.columns + run.column : nullptr;
    const uint64_t cell = coarser_at(rows, output.first + t, run.column);
    const uint8_t* base = kCoarser > 0 ? output.coarser[0] + cell : symbols;
    const uint8_t* digits = kCoarser > 1 ? output.coarser[1] + cell : symbols;
    restore_row<T, kAnchors, kCoarser>(base, digits, symbols, {0, anchor, mean, step}, run.columns,
                                       reinterpret_cast<typename T::Stored*>(row_at(run, output.row + place.row)));
    place.row++;
  }
}

void indices_into(const cg_output& output, const Run& run, const uint8_t* symbols, uint64_t stride, uint64_t tokens) {
  for (uint64_t t = 0; t < tokens; t++)
    memcpy(row_at(run, output.row + place_of(*output.chunk, output.first + t).row), symbols + t * stride, run.columns);
}

template <class T, bool kAnchors>
constexpr decltype(&indices_into) kInto[] = {run_into<T, kAnchors, 0>, run_into<T, kAnchors, 1>, run_into<T, kAnchors, 2>};

void into(const cg_output& output, const Run& run, const uint8_t* symbols, uint64_t stride, uint64_t tokens) {
  const bool anchors = output.chunk->group_tokens > 0;
  const uint32_t n = output.n_coarser;
  switch (output.chunk->dtype) {
    case CG_FLOAT32: return (anchors ? kInto<Float32, true> : kInto<Float32, false>)[n](output, run, symbols, stride, tokens);
    case CG_BFLOAT16:
      return (anchors ? kInto<Bfloat16, true> : kInto<Bfloat16, false>)[n](output, run, symbols, stride, tokens);
    case CG_FLOAT16: return (anchors ? kInto<Float16, true> : kInto<Float16, false>)[n](output, run, symbols, stride, tokens);
    default: return indices_into(output, run, symbols, stride, tokens);
  }
}

template <class T>
void rows_of(const cg_output& output, const Run& run, const float* rows, uint64_t stride, uint64_t n_rows, uint64_t first,
             uint64_t every) {
  for (uint64_t r = 0; r < n_rows; r++) {
    const float* __restrict from = rows + r * stride;
    auto* __restrict to = reinterpret_cast<typename T::Stored*>(row_at(run, output.row + first + r * every));
    for (uint64_t j = 0; j < run.columns; j++) to[j] = T::store(from[j]);
  }
}

void rows_into(const cg_output& output, const Run& run, const float* rows, uint64_t stride, uint64_t n_rows, uint64_t first,
               uint64_t every) {
  switch (output.chunk->dtype) {
    case CG_FLOAT32: return rows_of<Float32>(output, run, rows, stride, n_rows, first, every);
    case CG_BFLOAT16: return rows_of<Bfloat16>(output, run, rows, stride, n_rows, first, every);
    default: return rows_of<Float16>(output, run, rows, stride, n_rows, first, every);
  }
}

// 1 where an index is above that of zero, 2 where it is below: in bytes, of which vectors hold most.
CACHEGEN_HD uint8_t side_of(uint8_t index, uint8_t zero) { return uint8_t((index > zero) + 2 * (index < zero)); }

template <bool kDigits>
void contexts_of_row(const uint8_t* __restrict base, const uint8_t* __restrict digits, uint64_t n, uint8_t* __restrict found) {
  for (uint64_t j = 0; j < n; j++) {
    const uint8_t side = side_of(base[j], kZeroIndex);  // a digit turns no symbol to the other side of zero
    found[j] = kDigits ? uint8_t(side ? side : side_of(digits[j], kDigitZero)) : side;
  }
}

// The contexts of a run's digits, by the coarser symbols.
void run_contexts(const cg_output& output, const Run& run, uint64_t tokens, uint8_t* contexts_out, uint64_t stride) {
  const uint64_t rows = coded_rows(*output.chunk);
  const auto row = output.n_coarser > 1 ? contexts_of_row<true> : contexts_of_row<false>;
  for (uint64_t t = 0; t < tokens; t++) {
    const uint64_t cell = coarser_at(rows, output.first + t, run.column);
    row(output.coarser[0] + cell, output.coarser[output.n_coarser - 1] + cell, run.columns, contexts_out + t * stride);
  }
}

// Rows at all their levels, as run_into has them for one level's symbols.
template <class T, bool kAnchors, uint32_t kDigits>
void levels_of(const LevelRows& rows, const Run& run) {
  const cg_chunk& chunk = *rows.chunk;
  const float *mean = chunk.means + run.column, *step = chunk.steps + run.column;
  Place place = place_of(chunk, rows.first);
  for (uint64_t t = 0; t < rows.tokens; t++) {
    if (kAnchors ? place.row % chunk.group_tokens == 0 : false) {
      place.row++;
      place.anchor++;
    }
    const float* anchor = kAnchors ? chunk.anchors + place.anchor * chunk.columns + run.column : nullptr;
    const uint64_t at = t * rows.stride;
    restore_row<T, kAnchors, kDigits>(rows.base + at, rows.digits[0] + at, rows.digits[1] + at, {0, anchor, mean, step},
                                      run.columns,
                                      reinterpret_cast<typename T::Stored*>(row_at(run, rows.row + place.row)));
    place.row++;
  }
}

template <class T, bool kAnchors>
constexpr void (*kLevels[])(const LevelRows&, const Run&) = {levels_of<T, kAnchors, 0>, levels_of<T, kAnchors, 1>,
                                                             levels_of<T, kAnchors, 2>};

void levels_into(const LevelRows& rows, const Run& run) {
  const bool anchors = rows.chunk->group_tokens > 0;
  switch (rows.chunk->dtype) {
    case CG_FLOAT32: return (anchors ? kLevels<Float32, true> : kLevels<Float32, false>)[rows.n_digits](rows, run);
    case CG_BFLOAT16: return (anchors ? kLevels<Bfloat16, true> : kLevels<Bfloat16, false>)[rows.n_digits](rows, run);
    default: return (anchors ? kLevels<Float16, true> : kLevels<Float16, false>)[rows.n_digits](rows, run);
  }
}

// The contexts of n digits, by base symbols and maybe the coarser digits.
void levels_contexts(const uint8_t* base, const uint8_t* digits, uint64_t n, uint8_t* contexts_out) {
  (digits ? contexts_of_row<true> : contexts_of_row<false>)(base, digits, n, contexts_out);
}

}  // namespace
}  // namespace cachegen
