// The passes over a chunk's values, block of columns by block of columns; plain loops that compilers vectorise, so every
// back-end includes them for its own instruction set.
//
// Twist: symbols are computed in floats, which is exact: a coarser symbol is f / 3 rounded, and never a tie.
#pragma once

#include "../core/value.h"
#include "backend.h"

namespace cachegen {
namespace {

constexpr int32_t kZeroIndex = 128, kDigitZero = 1;
constexpr float kWidest = 1 << 20;  // more than any byte's symbol, little enough for rounded()

// Where coded row i stands in the chunk.
struct Place {
  uint64_t row, anchor;
};
inline Place place_of(const cg_chunk& chunk, uint64_t i) {
  if (chunk.group_tokens == 0) return {i, 0};
  const uint64_t group = i / (chunk.group_tokens - 1);
  return {i + group + 1, group};
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

template <class T>
void add_moments(const typename T::Stored* values, const float* anchor, uint64_t n, double* total, double* squares) {
  for (uint64_t j = 0; j < n; j++) {
    const double y = T::load(values[j]) - (anchor ? anchor[j] : 0.0f);
    total[j] += y;
    squares[j] += y * y;
  }
}

template <class T>
void moments_of(const Block& block, const typename T::Stored* values, uint64_t first, uint64_t last, double* total,
                double* squares) {
  for (uint64_t i = first; i < last; i++) {
    const Row row = row_of(block, i);
    add_moments<T>(values + row.offset, row.anchor, block.columns, total + block.column, squares + block.column);
  }
}

template <class T, uint32_t kDigits>
bool quantise_row(const typename T::Stored* __restrict values, const Row& row, uint64_t n, uint8_t* __restrict base,
                  uint8_t* __restrict digits, uint8_t* __restrict contexts, uint64_t stride) {
  const float *anchor = row.anchor, *mean = row.mean, *step = row.step;
  uint32_t wide = 0;
  for (uint64_t j = 0; j < n; j++) {
    const float y = T::load(values[j]) - (anchor ? anchor[j] : 0.0f) - mean[j];
    float f = y / step[j];
    f = f < -kWidest ? -kWidest : f;
    f = rounded(f > kWidest ? kWidest : f);
    for (uint32_t k = kDigits; k-- > 0;) {
      const float coarse = rounded(f * (1.0f / 3));
      digits[k * stride + j] = uint8_t(int32_t(f - 3 * coarse) + kDigitZero);
      contexts[k * stride + j] = uint8_t(int32_t(coarse > 0) + 2 * int32_t(coarse < 0));
      f = coarse;
    }
    const int32_t index = int32_t(f) + kZeroIndex;
    wide |= uint32_t(index) >> 8;
    base[j] = uint8_t(index);
  }
  return wide != 0;
}

template <class T>
void quantise_of(const Block& block, const typename T::Stored* values, uint32_t n_digits, uint8_t* base,
                 uint8_t* digits, uint8_t* contexts, uint8_t* wide) {
  const uint64_t columns = block.chunk->columns, rows = coded_rows(*block.chunk), stride = rows * columns;
  const auto quantise = n_digits == 0   ? quantise_row<T, 0>
                        : n_digits == 1 ? quantise_row<T, 1>
                                        : quantise_row<T, 2>;
  for (uint64_t i = 0; i < rows; i++) {
    const Row row = row_of(block, i);
    const uint64_t to = i * columns + block.column;
    wide[block.column / CG_BLOCK_COLUMNS * rows + i] = quantise(
        values + row.offset, row, block.columns, base + to, digits ? digits + to : digits,
        contexts ? contexts + to : contexts, stride);
  }
}

template <class T, uint32_t kDigits>
void restore_row(const uint8_t* __restrict base, const uint8_t* __restrict first, const uint8_t* __restrict second,
                 const Row& row, uint64_t n, typename T::Stored* __restrict values) {
  const float *anchor = row.anchor, *mean = row.mean, *step = row.step;
  for (uint64_t j = 0; j < n; j++) {
    int32_t symbol = base[j] - kZeroIndex;
    if (kDigits > 0) symbol = 3 * symbol + first[j] - kDigitZero;
    if (kDigits > 1) symbol = 3 * symbol + second[j] - kDigitZero;
    const float y = float(symbol) * step[j] + mean[j];
    values[j] = T::store(anchor ? y + anchor[j] : y);
  }
}

template <class T>
void restore_of(const Block& block, uint64_t first, uint64_t last, const uint8_t* base, const uint8_t* const* digits,
                uint32_t n_digits, typename T::Stored* values) {
  const auto restore = n_digits == 0 ? restore_row<T, 0> : n_digits == 1 ? restore_row<T, 1> : restore_row<T, 2>;
  for (uint64_t i = first; i < last; i++) {
    const Row row = row_of(block, i);
    const uint64_t from = (i - first) * block.chunk->columns + block.column;
    const uint8_t *one = n_digits > 0 ? digits[0] + from : nullptr, *two = n_digits > 1 ? digits[1] + from : nullptr;
    restore(base + from, one, two, row, block.columns, values + row.offset);
  }
}

// By type of the values.

void moments(const Block& block, const void* values, uint64_t first, uint64_t last, double* total, double* squares) {
  switch (block.chunk->dtype) {
    case CG_FLOAT32: return moments_of<Float32>(block, static_cast<const float*>(values), first, last, total, squares);
    case CG_BFLOAT16:
      return moments_of<Bfloat16>(block, static_cast<const uint16_t*>(values), first, last, total, squares);
    default: return moments_of<Float16>(block, static_cast<const uint16_t*>(values), first, last, total, squares);
  }
}

void quantise(const Block& block, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
              uint8_t* contexts, uint8_t* wide) {
  const uint16_t* halves = static_cast<const uint16_t*>(values);
  switch (block.chunk->dtype) {
    case CG_FLOAT32:
      return quantise_of<Float32>(block, static_cast<const float*>(values), n_digits, base, digits, contexts, wide);
    case CG_BFLOAT16: return quantise_of<Bfloat16>(block, halves, n_digits, base, digits, contexts, wide);
    default: return quantise_of<Float16>(block, halves, n_digits, base, digits, contexts, wide);
  }
}

void restore(const Block& block, uint64_t first, uint64_t last, const uint8_t* base, const uint8_t* const* digits,
             uint32_t n_digits, void* values) {
  uint16_t* halves = static_cast<uint16_t*>(values);
  switch (block.chunk->dtype) {
    case CG_FLOAT32:
      return restore_of<Float32>(block, first, last, base, digits, n_digits, static_cast<float*>(values));
    case CG_BFLOAT16: return restore_of<Bfloat16>(block, first, last, base, digits, n_digits, halves);
    default: return restore_of<Float16>(block, first, last, base, digits, n_digits, halves);
  }
}

void contexts(const uint8_t* symbols, uint8_t zero, const uint8_t* coarser, uint64_t count, uint8_t* found) {
  for (uint64_t i = 0; i < count; i++) {
    const uint8_t own = uint8_t((symbols[i] > zero) + 2 * (symbols[i] < zero));
    found[i] = coarser && coarser[i] ? coarser[i] : own;
  }
}

}  // namespace
}  // namespace cachegen
