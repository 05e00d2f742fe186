// The passes over a source: rows of up to 256 columns, read where they lie. Compiled for every instruction set, as rows.h
// is.
//
// Note: a row becomes floats in a buffer in the nearest cache; all else works on that, so only its reader depends on the
// type of the values. Loops run over columns and have no branch, so that compilers vectorise them.
#pragma once

#include "choice.h"
#include "columns.h"
#include "rows.h"

namespace cachegen {
namespace {

constexpr float kAnchorPeak = 127;

template <class T>
void load_row(const Columns& columns, uint64_t token, float* __restrict y) {
  for (uint32_t r = 0; r < columns.n_runs; r++) {
    const Run& run = columns.runs[r];
    const auto* __restrict from =
        reinterpret_cast<const typename T::Stored*>(uintptr_t(run.address + token * run.stride));
    float* __restrict to = y + run.coded;
    for (uint64_t j = 0; j < run.columns; j++) to[j] = T::load(from[j]);
  }
}

// Symbols of an anchor's row, and the values that they decode to.
inline void quantise_anchor(const Columns& columns, const float* scales, const float* __restrict y,
                            uint8_t* __restrict symbols, float* __restrict values) {
  for (uint32_t j = 0; j < columns.width; j++) {
    const float scale = scales[columns.vector[j]], f = Rounded(y[j] / scale).value;
    const float symbol = f > kAnchorPeak ? kAnchorPeak : f < -kAnchorPeak ? -kAnchorPeak : f;
    symbols[j] = uint8_t(Rounded(symbol).integer + kZeroIndex);
    values[j] = scale * symbol;
  }
}

constexpr uint32_t kRowsTogether = 4;

// anchor(number, symbols) and coded(number, y less its anchor) for every row of a span's tokens [first, last). The last
// kRowsTogether coded rows stay where they are.
// kBackwards: the next call is for the tokens before these, and not for those behind.
template <class T, bool kBackwards = false, class Anchor, class Coded>
CACHEGEN_HD void for_each_row(const Columns& columns, const cg_span& span, uint64_t first, uint64_t last, const Anchor& anchor,
                              const Coded& coded) {
  const cg_source& source = *columns.source;
  const uint64_t group = source.group_tokens;
  alignas(64) float buffers[kRowsTogether][kTileColumns], value[kTileColumns];
  alignas(64) uint8_t symbols[kTileColumns];
  float* y = buffers[0];
  const auto read = [&](uint64_t t) {
    const uint64_t token = span.first + t;
    const uint64_t ahead = kBackwards ? t - kBlockTokens : t + kBlockTokens;
    if (ahead < span.tokens) prefetch_row(columns, span.first + ahead);
    load_row<T>(columns, token == 0 && source.blank ? 1 : token, y);
  };
  alignas(64) float anchor_row[kTileColumns];
  const auto read_anchor = [&](uint64_t t) {
    y = anchor_row;
    read(t);
    quantise_anchor(columns, source.scales + (span.anchor + t / group) * source.n_vectors, y, symbols, value);
  };
  uint64_t within = group > 0 ? first % group : 0, rows = coded_before(source, first);
  if (within > 0) read_anchor(first - within);
  for (uint64_t t = first; t < last; t++) {
    if (group > 0 && within == 0) {
      read_anchor(t);
      anchor(t / group, symbols);
    } else {
      y = buffers[rows % kRowsTogether];
      read(t);
      if (group > 0)
        for (uint32_t j = 0; j < columns.width; j++) y[j] -= value[j];
      coded(rows++, y);
    }
    if (++within == group) within = 0;
  }
}

template <uint32_t kRows>
void add_rows(const float* const* rows, uint32_t n, double* __restrict total, double* __restrict squares) {
  for (uint32_t j = 0; j < n; j++) {
    double sum = total[j], square = squares[j];
#pragma GCC unroll 4
    for (uint32_t r = 0; r < kRows; r++) {
      const double value = rows[r][j];
      sum += value;
      square += value * value;
    }
    total[j] = sum;
    squares[j] = square;
  }
}

template <class T>
void spread_of(const Columns& columns, const cg_span& span, double* sums) {
  const float* rows[kRowsTogether];
  uint32_t waiting = 0;
  double* to = sums;
  const auto add = [&] {
    for (uint32_t r = 0; r < waiting && waiting < kRowsTogether; r++) add_rows<1>(rows + r, columns.width, to, to + kTileColumns);
    if (waiting == kRowsTogether) add_rows<kRowsTogether>(rows, columns.width, to, to + kTileColumns);
    waiting = 0;
  };
  for_each_row<T>(columns, span, 0, span.tokens, [](uint64_t, const uint8_t*) {}, [&](uint64_t i, const float* y) {
    double* own = sums + (i >= span.ordinary_first && i < span.ordinary_last ? 0 : 2 * kTileColumns);
    if (own != to) add();
    to = own;
    rows[waiting++] = y;
    if (waiting == kRowsTogether) add();
  });
  add();
}

template <class T>
uint32_t peak_of(const Run& run, uint64_t token) {
  const auto* from = reinterpret_cast<const typename T::Stored*>(uintptr_t(run.address + token * run.stride));
  uint32_t most = 0;  // the bits of a magnitude; a NaN's are above all others
  for (uint64_t j = 0; j < run.columns; j++) {
    const uint32_t bits = bits_of(T::load(from[j])) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

// Symbols as codec/passes.py has them exactly, of any size. False for a value that is refused.
inline bool exact_symbols(float y, float mean, float step, uint32_t n_digits, int32_t* base, Digit* digits) {
  constexpr float kLargest = 1 << 30;
  const float f = __builtin_nearbyintf((y - mean) / step);
  const bool sound = f > -kLargest && f < kLargest;
  int32_t fine = sound ? int32_t(f) : 0;
  for (uint32_t k = n_digits; k-- > 0;) {
    const int32_t shifted = fine + 1, coarse = shifted >= 0 ? shifted / 3 : -((2 - shifted) / 3);
    digits[k] = {uint8_t(fine - 3 * coarse + kDigitZero), sign_of(coarse)};
    fine = coarse;
  }
  *base = fine + kZeroIndex;
  return sound;
}

// Counting: rows become fine symbols, 16 bits each, which are counted by strips of columns.

inline bool fine_row(const Columns& columns, const float* __restrict y, uint32_t bins, int32_t zero,
                         uint16_t* __restrict fine) {
  const float *__restrict mean = columns.mean, *__restrict step = columns.step;
  uint32_t most = 0;
  for (uint32_t j = 0; j < columns.width; j++) {
    const uint32_t index = uint32_t(Rounded((y[j] - mean[j]) / step[j]).integer + zero);
    most = index > most ? index : most;
    fine[j] = uint16_t(index);
  }
  return most >= bins;
}

template <class T>
void count_of(const Columns& columns, const cg_span& span, uint32_t n_digits, Counter* counter) {
  const Fine fine(n_digits);
  for_each_row<T>(
      columns, span, 0, span.tokens, [&](uint64_t, const uint8_t* symbols) { add_anchor(counter, columns.width, symbols); },
      [&](uint64_t, const float* y) {
        uint16_t* row = counter->fine[counter->rows++];
        if (fine_row(columns, y, fine.bins, fine.zero, row))
          for (uint32_t j = 0; j < columns.width; j++) {
            const Rounded f((y[j] - columns.mean[j]) / columns.step[j]);
            if (uint32_t(f.integer + fine.zero) < fine.bins) continue;
            int32_t base;
            Digit digits[CG_MAX_DIGITS];
            counter->refused |= !exact_symbols(y[j], columns.mean[j], columns.step[j], n_digits, &base, digits);
            add_wide(counter, j, base, digits, n_digits);
            row[j] = uint16_t(fine.bins);  // counted, and not looked at
          }
        if (counter->rows == kCountedRows) count_rows(counter, columns.width, fine);
      });
  count_rows(counter, columns.width, fine);
}

// Quantising for the coder: symbols are clamped to the support of their tables, and what was outside is reported.

template <bool kByContext>
bool is_outside(const uint8_t* __restrict symbols, const uint8_t* __restrict contexts, const Bounds& bounds, uint32_t n) {
  uint8_t outside = 0;
  for (uint32_t j = 0; j < n; j++) {
    uint8_t low = bounds.low[0][j], high = bounds.high[0][j];
    if (kByContext) {
      const uint8_t context = contexts[j], low1 = bounds.low[1][j], low2 = bounds.low[2][j];
      const uint8_t high1 = bounds.high[1][j], high2 = bounds.high[2][j];
      low = context == 0 ? low : context == 1 ? low1 : low2;
      high = context == 0 ? high : context == 1 ? high1 : high2;
    }
    outside |= uint8_t((symbols[j] < low) | (symbols[j] > high));
  }
  return outside != 0;
}

// Clamps a row, of `row` in its stream; index_of(j) is what an exception of column j keeps, `always` whether it may differ
// from the symbol.
template <bool kByContext, class Index>
void clamp_symbols(const CodeJob& job, uint32_t part, uint32_t stream, uint64_t row, uint8_t* symbols, const uint8_t* contexts,
                   bool always, const Index& index_of) {
  const Bounds& bounds = job.bounds[part];
  const uint32_t width = job.columns->width;
  if (!always && (!bounds.any || !is_outside<kByContext>(symbols, contexts, bounds, width))) return;
  for (uint32_t j = 0; j < width; j++) {
    const uint32_t context = kByContext ? contexts[j] : 0;
    const uint8_t low = bounds.any ? bounds.low[context][j] : 0, high = bounds.any ? bounds.high[context][j] : 0xff;
    const uint8_t symbol = symbols[j], inside = symbol < low ? low : symbol > high ? high : symbol;
    const int32_t index = index_of(j);
    if (index == inside) continue;
    symbols[j] = inside;
    job.report(job.to_report, {row * job.columns->source->columns + job.columns->column[j], index, stream});
  }
}

// Fine symbols to base and digits, with the contexts of these.
template <uint32_t kDigits>
void split_fine(const uint16_t* __restrict fine, uint32_t n, uint8_t* __restrict base, uint8_t* __restrict digits,
               uint8_t* __restrict contexts, uint8_t* __restrict finer, uint8_t* __restrict finer_contexts) {
  for (uint32_t j = 0; j < n; j++) {
    uint16_t index = fine[j];
    uint8_t last = 0;
    if (kDigits > 1) {
      const uint16_t coarser = uint16_t(index / 3);
      last = uint8_t(index - 3 * coarser);
      index = coarser;
    }
    if (kDigits > 0) {
      const uint16_t coarser = uint16_t(index / 3);
      digits[j] = uint8_t(index - 3 * coarser);
      index = coarser;
    }
    if (kDigits > 1) finer[j] = last;
    base[j] = uint8_t(index);
  }
  for (uint32_t j = 0; j < n && kDigits > 0; j++) {
    const uint8_t sign = uint8_t((base[j] > kZeroIndex ? 1 : 0) | (base[j] < kZeroIndex ? 2 : 0));
    contexts[j] = sign;
    const uint8_t own = uint8_t((digits[j] > kDigitZero ? 1 : 0) | (digits[j] < kDigitZero ? 2 : 0));
    if (kDigits > 1) finer_contexts[j] = sign ? sign : own;
  }
}

template <class T>
bool symbols_of(const CodeJob& job, uint64_t first, uint64_t last) {
  const Columns& columns = *job.columns;
  const uint32_t n_digits = job.n_digits, width = columns.width;
  const auto split = n_digits == 0 ? split_fine<0> : n_digits == 1 ? split_fine<1> : split_fine<2>;
  const uint64_t begin = coded_before(*columns.source, first), a = job.span->ordinary_first, b = job.span->ordinary_last;
  const Fine bins(n_digits);
  bool sound = true;
  for_each_row<T, true>(
      columns, *job.span, first, last,
      [&](uint64_t i, const uint8_t* row) {
        uint8_t* symbols = job.anchors + i * kTileColumns;
        memcpy(symbols, row, width);
        if (job.parts >> CG_ANCHOR_STREAM & 1)
          clamp_symbols<false>(job, CG_ANCHOR_STREAM, CG_ANCHOR_STREAM, i, symbols, nullptr, false,
                               [&](uint32_t j) { return symbols[j]; });
      },
      [&](uint64_t i, const float* y) {
        SymbolBlock& block = *job.block;
        const uint64_t r = i - begin;
        uint8_t *base = block.base[r], *digits = block.digits[0][r], *finer = block.digits[1][r];
        uint8_t *contexts = block.contexts[0][r], *finer_contexts = block.contexts[1][r];
        uint16_t fine[kTileColumns];
        const bool wide = fine_row(columns, y, bins.bins, bins.zero, fine);
        split(fine, width, base, digits, contexts, finer, finer_contexts);
        int32_t exact[kTileColumns];
        for (uint32_t j = 0; j < width && wide; j++) {
          Digit found[CG_MAX_DIGITS];
          sound &= exact_symbols(y[j], columns.mean[j], columns.step[j], n_digits, &exact[j], found);
          for (uint32_t k = 0; k < n_digits; k++) {
            block.digits[k][r][j] = found[k].index;
            block.contexts[k][r][j] = found[k].context;
          }
          base[j] = uint8_t(exact[j] < 0 ? 0 : exact[j] > 0xff ? 0xff : exact[j]);
        }
        if (job.parts >> CG_BASE_STREAM & 1)
          clamp_symbols<false>(job, CG_BASE_STREAM, CG_BASE_STREAM, i, base, nullptr, wide,
                               [&](uint32_t j) { return wide ? exact[j] : base[j]; });
        const bool ordinary = i >= a && i < b;
        for (uint32_t k = 0; k < n_digits; k++)
          if (job.parts >> (CG_DIGIT_STREAM + k) & 1)
            clamp_symbols<true>(job, CG_DIGIT_STREAM + k, CG_DIGIT_STREAM + 2 * k + !ordinary,
                                ordinary || i >= b ? i - (ordinary ? a : b - a) : i, block.digits[k][r], block.contexts[k][r],
                                false, [&](uint32_t j) { return block.digits[k][r][j]; });
      });
  return sound;
}

// Fine symbols of a row, what the coarsest level decodes, and the squared errors of its levels. Sums of a few rows are floats, which vectors hold twice as
// many of.

constexpr uint64_t kFloatRows = 64;

template <uint32_t kDigits>
uint32_t fine_symbols(const Columns& columns, const float* __restrict y, float weight, int16_t* __restrict fine,
                      float* __restrict base, float* __restrict squares) {
  const float *__restrict mean = columns.mean, *__restrict step = columns.step;
  float *__restrict second = squares + (kDigits > 0) * kTileColumns, *__restrict third = second + (kDigits > 1) * kTileColumns;
  constexpr int32_t kLargest = 32767;
  uint32_t outside = 0;
  for (uint32_t j = 0; j < columns.width; j++) {
    const float d = y[j] - mean[j], unit = step[j];
    const Rounded f(d / unit);
    outside |= uint32_t(f.integer + kLargest) > uint32_t(2 * kLargest);
    fine[j] = int16_t(f.integer);
    const float coarser = Rounded(f.value * (1.0f / 3)).value, coarsest = Rounded(coarser * (1.0f / 3)).value;
    const float finest = f.value * unit, middle = coarser * (3 * unit), most = coarsest * (9 * unit);
    const float one = d - finest, two = d - middle, three = d - most;
    base[j] = kDigits == 0 ? finest : kDigits == 1 ? middle : most;
    if (kDigits == 2) squares[j] += weight * three * three;
    if (kDigits > 0) (kDigits == 1 ? squares : second)[j] += weight * two * two;
    third[j] += weight * one * one;
  }
  return outside;
}

template <class T>
bool fine_of(const Columns& columns, const cg_span& span, uint32_t n_digits, const float* weights, int16_t* fine,
             uint64_t fine_stride, float* base, double* squares) {
  const auto levels = n_digits == 0 ? fine_symbols<0> : n_digits == 1 ? fine_symbols<1> : fine_symbols<2>;
  alignas(64) float own[(2 + CG_MAX_DIGITS) * kTileColumns] = {};
  float *finest = own + (1 + CG_MAX_DIGITS) * kTileColumns, unread[kTileColumns];
  uint32_t outside = 0;
  for_each_row<T>(columns, span, 0, span.tokens, [](uint64_t, const uint8_t*) {}, [&](uint64_t i, const float* y) {
    const bool ordinary = i >= span.ordinary_first && i < span.ordinary_last;
    int16_t* row = fine + i * fine_stride;
    float* base_row = base ? base + i * columns.source->columns : unread;
    outside |= (ordinary ? levels : fine_symbols<0>)(columns, y, weights ? weights[i] : 1, row, base_row, ordinary ? own : finest);
    if (i % kFloatRows != kFloatRows - 1 && i + 1 < span.tokens) return;
    for (uint32_t k = 0; k <= n_digits; k++)
      for (uint32_t j = 0; j < columns.width; j++)
        squares[k * kTileColumns + j] += double(own[k * kTileColumns + j]) + double(finest[j]);
    memset(own, 0, sizeof own);
  });
  return outside == 0;
}

// By type of the values.

template <class T>
constexpr SourcePasses kSourceOf = {peak_of<T>, spread_of<T>, count_of<T>, symbols_of<T>, fine_of<T>, clear, choose};

const SourcePasses& source_passes(uint32_t dtype) {
  switch (dtype) {
    case CG_FLOAT32: return kSourceOf<Float32>;
    case CG_BFLOAT16: return kSourceOf<Bfloat16>;
    case CG_INT16: return kSourceOf<Int16>;
    default: return kSourceOf<Float16>;
  }
}

}  // namespace
}  // namespace cachegen
