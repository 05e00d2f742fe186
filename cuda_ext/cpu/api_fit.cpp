// The C ABI of the passes that fit tables to a source: arguments are checked here; tiles of columns run in threads.
#include <vector>

#include "counter.h"
#include "source_arguments.h"
#include "threads.h"

using namespace cachegen;

namespace {

uint64_t cells(const cg_source& source, const cg_span* spans, uint64_t n_spans) {
  uint64_t tokens = 0;
  for (uint64_t i = 0; i < n_spans; i++) tokens += spans[i].tokens;
  return tokens * source.columns;
}

uint64_t cost_of(const cg_costs& book, const uint32_t* counts, uint32_t low, uint32_t high, uint32_t entry) {
  uint64_t sum = 0;
  for (uint32_t k = low; k <= high; k++) sum += uint64_t(counts[k]) * uint64_t(book.costs[k * book.entries + entry]);
  return sum;
}

}  // namespace

int32_t cg_peaks(const cg_source* source, const cg_span* spans, uint64_t n_spans, float* peaks, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_source(source, spans, n_spans) || source->group_tokens == 0) return CG_BAD_ARGUMENT;
  if (source->columns == 0 || n_spans == 0) return CG_OK;
  if (peaks == nullptr) return CG_BAD_ARGUMENT;
  std::vector<uint64_t> ends;  // of each vector's columns
  try {
    ends.assign(source->n_vectors, 0);
  } catch (const std::exception&) {
    return CG_FAILED;
  }
  for (uint64_t i = 0; i < source->columns; i++) ends[source->vectors[i]] = i + 1;
  const SourcePasses& passes = backend->source(source->dtype);
  for_each(source->n_vectors, cells(*source, spans, n_spans) / source->group_tokens, run->threads, [&](uint64_t v) {
    uint64_t first = ends[v];
    while (first > 0 && source->vectors[first - 1] == v) first--;
    for (uint64_t s = 0; s < n_spans; s++)
      for (uint64_t i = 0; i < anchor_rows(*source, spans[s]); i++)
        peaks[(spans[s].anchor + i) * source->n_vectors + v] = 0;
    for (uint64_t at = first; at < ends[v]; at += kTileColumns) {
      Columns columns;
      open_columns(*source, nullptr, at, std::min<uint64_t>(kTileColumns, ends[v] - at), &columns);
      for (uint64_t s = 0; s < n_spans; s++)
        for (uint64_t i = 0; i < anchor_rows(*source, spans[s]); i++) {
          const uint64_t token = spans[s].first + i * source->group_tokens;
          float* peak = peaks + (spans[s].anchor + i) * source->n_vectors + v;
          for (uint32_t r = 0; r < columns.n_runs; r++)
            *peak = float_of(std::max(bits_of(*peak), passes.peak(columns.runs[r], token)));
        }
    }
  });
  return CG_OK;
}

int32_t cg_spread(const cg_source* source, const cg_span* spans, uint64_t n_spans, double* sums, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_source(source, spans, n_spans) || !has_scales(*source)) return CG_BAD_ARGUMENT;
  if (source->columns == 0) return CG_OK;
  if (sums == nullptr) return CG_BAD_ARGUMENT;
  const uint64_t tiles = (source->columns + kTileColumns - 1) / kTileColumns;
  const SourcePasses& passes = backend->source(source->dtype);
  for_each(tiles, cells(*source, spans, n_spans), run->threads, [&](uint64_t tile) {
    const uint64_t first = tile * kTileColumns, width = std::min<uint64_t>(kTileColumns, source->columns - first);
    Columns columns;
    open_columns(*source, nullptr, first, width, &columns);
    for (uint32_t k = 0; k < 4; k++) std::fill_n(sums + k * source->columns + first, width, 0.0);
    for (uint64_t s = 0; s < n_spans; s++) {
      alignas(64) double own[4 * kTileColumns] = {};
      passes.spread(columns, spans[s], own);
      for (uint32_t k = 0; k < 4; k++)
        for (uint64_t j = 0; j < width; j++) sums[k * source->columns + first + j] += own[k * kTileColumns + j];
    }
  });
  return CG_OK;
}

int32_t cg_choose(const cg_source* source, const cg_span* spans, uint64_t n_spans, uint32_t n_digits,
                  const cg_costs* values, const cg_costs* digits, uint8_t* entries, uint64_t* costs, uint32_t* refused,
                  const uint8_t* others, uint32_t n_others, uint64_t* other_costs, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || !is_source(source, spans, n_spans) || !is_scaled(*source)) return CG_BAD_ARGUMENT;
  if (n_digits > CG_MAX_DIGITS || !is_book(values) || (n_digits > 0 && !is_book(digits)) || refused == nullptr)
    return CG_BAD_ARGUMENT;
  *refused = 0;
  if (source->columns == 0) return CG_OK;
  if (entries == nullptr || costs == nullptr) return CG_BAD_ARGUMENT;
  if (n_others > 0 && (others == nullptr || other_costs == nullptr)) return CG_BAD_ARGUMENT;
  const uint64_t tiles = (source->columns + kTileColumns - 1) / kTileColumns, n = source->columns;
  const uint64_t parts = 1 + n_digits + (source->group_tokens > 0);
  for (uint64_t i = 0; i < n_others * parts * n; i++)
    if (others[i] >= (i / n % parts == 0 || i / n % parts > n_digits ? values : digits)->entries) return CG_BAD_ARGUMENT;
  const uint64_t all = cells(*source, spans, n_spans);
  const bool small = all / n < kSmallTokens;
  const SourcePasses& passes = backend->source(source->dtype);
  std::atomic<uint32_t> bad{0}, failed{0};
  const auto base_rows = rows_of(*values, kMaxSymbols, small);
  const auto digit_rows = n_digits > 0 ? rows_of(*digits, CG_DIGIT_BINS, small) : nullptr;
  if (!base_rows || (n_digits > 0 && !digit_rows)) return CG_FAILED;
  for_each_with<Counter>(
      tiles, all, run->threads, [&](Counter* counter) { passes.clear(counter, true); },
      [&](uint64_t tile, Counter* counter) {
        if (counter == nullptr) {
          failed = 1;
          return;
        }
        const uint64_t first = tile * kTileColumns, width = std::min<uint64_t>(kTileColumns, n - first);
        Columns columns;
        open_columns(*source, nullptr, first, width, &columns);
        passes.clear(counter, false);
        for (uint64_t s = 0; s < n_spans; s++) passes.count(columns, spans[s], n_digits, counter);
        if (counter->refused) bad = 1;
        const auto choose = [&](uint64_t part, const CostRows& book, const uint32_t* counts, uint32_t bins, uint32_t low,
                                uint32_t high) {
          const uint64_t at = part * n + first;
          passes.choose(book, counts, bins, low, high, uint32_t(width), entries + at, costs + at);
          for (uint64_t k = 0; k < n_others; k++)
            for (uint64_t j = 0; j < width; j++) {
              const uint64_t other = k * parts * n + at + j;
              other_costs[other] = cost_of(*book.book, counts + j * bins, low, high, others[other]);
            }
        };
        choose(0, *base_rows, counter->base[0], kMaxSymbols, counter->low, counter->high);
        for (uint32_t k = 0; k < n_digits; k++)
          choose(1 + k, *digit_rows, counter->digits[k][0], CG_DIGIT_BINS, 0, CG_DIGIT_BINS - 1);
        if (source->group_tokens > 0)
          choose(1 + n_digits, *base_rows, counter->anchors[0], kMaxSymbols, counter->anchor_low, counter->anchor_high);
      });
  *refused = bad;
  return failed ? CG_FAILED : CG_OK;
}

int32_t cg_fine(const cg_source* source, const cg_span* span, uint32_t n_digits, const float* weights, int16_t* fine,
                uint64_t fine_stride, float* base, double* squares, uint32_t* refused, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || span == nullptr || !is_source(source, span, 1) || !is_scaled(*source)) return CG_BAD_ARGUMENT;
  if (source->group_tokens > 0 || n_digits > CG_MAX_DIGITS || refused == nullptr) return CG_BAD_ARGUMENT;
  *refused = 0;
  const uint64_t n = source->columns, tiles = (n + kTileColumns - 1) / kTileColumns;
  if (span->tokens * n == 0) return CG_OK;
  if (fine == nullptr || fine_stride < n) return CG_BAD_ARGUMENT;
  const SourcePasses& passes = backend->source(source->dtype);
  std::atomic<uint32_t> bad{0};
  for_each(tiles, span->tokens * n, run->threads, [&](uint64_t tile) {
    const uint64_t first = tile * kTileColumns, width = std::min<uint64_t>(kTileColumns, n - first);
    Columns columns;
    open_columns(*source, nullptr, first, width, &columns);
    alignas(64) double own[(1 + CG_MAX_DIGITS) * kTileColumns] = {};
    float* own_base = base ? base + first : nullptr;
    if (!passes.fine(columns, *span, n_digits, weights, fine + first, fine_stride, own_base, own)) bad = 1;
    for (uint32_t k = 0; k <= n_digits && squares != nullptr; k++)
      for (uint64_t j = 0; j < width; j++) squares[k * n + first + j] = own[k * kTileColumns + j];
  });
  *refused = bad;
  return CG_OK;
}
