// What a symbol is worth, and which row of a chunk it stands in: the arithmetic of cg_quantise and cg_restore, one value
// at a time.
//
// Note: symbols are computed in floats, which is exact where they are small: a coarser symbol is f / 3 rounded, and never
// a tie. Those from 2^22 on stay too large for a byte, however they are rounded.
#pragma once

#include "../include/cachegen.h"
#include "value.h"

namespace cachegen {

constexpr int32_t kZeroIndex = 128, kDigitZero = 1;

CACHEGEN_HD uint64_t coded_rows(const cg_chunk& chunk) {
  const uint64_t group = chunk.group_tokens;
  return group == 0 ? chunk.tokens : chunk.tokens - (chunk.tokens + group - 1) / group;
}

CACHEGEN_HD cg_chunk chunk_of(const cg_batch& batch, const cg_job& job) {
  return {job.tokens, batch.columns, batch.group_tokens, job.anchors, batch.means, batch.steps, batch.dtype};
}

// Where coded row i stands in the chunk.
struct Place {
  uint64_t row, anchor;
};
CACHEGEN_HD Place place_of(const cg_chunk& chunk, uint64_t i) {
  if (chunk.group_tokens == 0) return {i, 0};
  const uint64_t group = i / (chunk.group_tokens - 1);
  return {i + group + 1, group};
}

// 1 where x is positive, 2 where it is negative.
CACHEGEN_HD uint8_t sign_of(int32_t x) { return uint8_t((0u - uint32_t(x)) >> 31 | uint32_t(x) >> 31 << 1); }

// Note [Quantisation]: the one definition of what a value's symbols are, and of what value symbols have; the CPU's loops and
// the kernels call these functions, and the tests compare hf_cachegen/codec/quantize.py, which says the same in torch, with
// them. Operations are float32, each rounded, in this order:
//
//     f = round((y - mean) / step)            y = value - anchor; ties to even
//     coarse = floor((f + 1) / 3), digit = f - 3 coarse       once for each digit, the finest first
//     value = symbol * step + mean + anchor

// A digit's index, and the context by which it is coded: the sign of the coarser symbol.
struct Digit {
  uint8_t index, context;
};

// The coarser symbol; and the digit by which it is refined.
CACHEGEN_HD float split(float fine, Digit* digit) {
  const Rounded coarse(fine * (1.0f / 3));
  *digit = {uint8_t(Rounded(fine - 3 * coarse.value).integer + kDigitZero), sign_of(coarse.integer)};
  return coarse.value;
}

// The base index, of any size, and n_digits digits, the coarsest first.
CACHEGEN_HD int32_t quantise(float y, float mean, float step, uint32_t n_digits, Digit* digits) {
  float f = Rounded((y - mean) / step).value;
  if (n_digits > 1) f = split(f, digits + 1);
  if (n_digits > 0) f = split(f, digits);
  return Rounded(f).integer + kZeroIndex;
}

// A base symbol from its index, and a symbol refined by a digit's index.
CACHEGEN_HD int32_t base_symbol(int32_t index) { return index - kZeroIndex; }
CACHEGEN_HD int32_t refine(int32_t symbol, int32_t index) { return 3 * symbol + index - kDigitZero; }

CACHEGEN_HD float dequantise(int32_t symbol, float step, float mean, bool anchored, float anchor) {
  const float y = float(symbol) * step + mean;
  return anchored ? y + anchor : y;
}

// A pair of channels of a key that is turned by an angle.
struct Turned {
  float first, second;
};
CACHEGEN_HD Turned turned(float a, float b, float cosine, float sine) {
  return {a * cosine - b * sine, b * cosine + a * sine};
}

// The coded row of a section's token t.
CACHEGEN_HD uint64_t row_of_token(const cg_output& output, uint64_t t) {
  return output.first + t + (t >= output.gap_at ? output.gap : 0);
}

// Where the coarser symbol of a coded row lies, of `rows`.
CACHEGEN_HD uint64_t coarser_at(uint64_t rows, uint64_t row, uint64_t column) {
  return (column / CG_TILE_COLUMNS * rows + row) * CG_TILE_COLUMNS + column % CG_TILE_COLUMNS;
}

}  // namespace cachegen
