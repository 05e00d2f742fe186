// The passes over a chunk's values on CUDA: a thread a value, or a column where something is added up.
#include "../core/arguments.h"
#include "launch.h"

using namespace cachegen;

namespace {

constexpr uint32_t kDigitBins = CG_DIGIT_BINS;

// Calls f(T()) for the type of a chunk's values.
template <class F>
int32_t by_dtype(uint32_t dtype, const F& f) {
  switch (dtype) {
    case CG_FLOAT32: return f(Float32());
    case CG_BFLOAT16: return f(Bfloat16());
    default: return f(Float16());
  }
}

// A value less its group's anchor.
template <class T>
CACHEGEN_DEVICE float difference(const cg_chunk& chunk, const void* values, const Place& place, uint64_t column) {
  const float value = T::load(static_cast<const typename T::Stored*>(values)[place.row * chunk.columns + column]);
  return chunk.group_tokens ? value - chunk.anchors[place.anchor * chunk.columns + column] : value;
}

// Sums in the order of the rows, as on the CPU: the same bits.
template <class T>
int32_t moments(const cg_chunk& chunk, const void* values, uint64_t first, uint64_t last, double* total, double* squares,
                const cg_run* run) {
  return for_each(run, chunk.columns, [=] CACHEGEN_LAMBDA(uint64_t column) {
    double sum = total[column], square = squares[column];
    for (uint64_t i = first; i < last; i++) {
      const double y = difference<T>(chunk, values, place_of(chunk, i), column);
      sum += y;
      square += y * y;
    }
    total[column] = sum;
    squares[column] = square;
  });
}

template <class T>
int32_t quantise_rows(const cg_chunk& chunk, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                 uint8_t* contexts, uint8_t* wide, const cg_run* run) {
  const uint64_t rows = coded_rows(chunk), cells = rows * chunk.columns;
  return for_each(run, cells, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t r = i / chunk.columns, column = i % chunk.columns;
    const float y = difference<T>(chunk, values, place_of(chunk, r), column);
    Digit found[CG_MAX_DIGITS];
    const int32_t index = quantise(y, chunk.means[column], chunk.steps[column], n_digits, found);
    CACHEGEN_UNROLL for (uint32_t k = 0; k < CG_MAX_DIGITS; k++) {
      if (k >= n_digits) break;
      digits[k * cells + i] = found[k].index;
      contexts[k * cells + i] = found[k].context;
    }
    base[i] = uint8_t(index);
    if (index & ~0xff) wide[column / CG_BLOCK_COLUMNS * rows + r] = 1;  // all who write it write the same
  });
}

template <class T>
int32_t restore(const cg_chunk& chunk, uint64_t first, uint64_t last, const uint8_t* base, const uint8_t* digits,
                const uint8_t* finer, void* values, const cg_run* run) {
  auto* to = static_cast<typename T::Stored*>(values);
  return for_each(run, (last - first) * chunk.columns, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t column = i % chunk.columns;
    const Place place = place_of(chunk, first + i / chunk.columns);
    int32_t symbol = base_symbol(base[i]);
    if (digits) symbol = refine(symbol, digits[i]);
    if (finer) symbol = refine(symbol, finer[i]);
    const float anchor = chunk.group_tokens ? chunk.anchors[place.anchor * chunk.columns + column] : 0;
    const float value = dequantise(symbol, chunk.steps[column], chunk.means[column], chunk.group_tokens > 0, anchor);
    to[place.row * chunk.columns + column] = T::store(value);
  });
}

}  // namespace

int32_t cg_moments(const cg_chunk* chunk, const void* values, uint64_t first, uint64_t last, double* total,
                   double* squares, const cg_run* run) noexcept {
  if (run == nullptr || !is_chunk_of(chunk, values) || first > last || last > coded_rows(*chunk)) return CG_BAD_ARGUMENT;
  if (chunk->columns > 0 && (total == nullptr || squares == nullptr)) return CG_BAD_ARGUMENT;
  return by_dtype(chunk->dtype, [&](auto type) {
    return moments<decltype(type)>(*chunk, values, first, last, total, squares, run);
  });
}

int32_t cg_quantise(const cg_chunk* chunk, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                    uint8_t* contexts, uint8_t* wide, const cg_run* run) noexcept {
  if (run == nullptr || !is_chunk_of(chunk, values) || n_digits > CG_MAX_DIGITS) return CG_BAD_ARGUMENT;
  const uint64_t rows = coded_rows(*chunk), blocks = (chunk->columns + CG_BLOCK_COLUMNS - 1) / CG_BLOCK_COLUMNS;
  if (rows == 0 || chunk->columns == 0) return CG_OK;
  if (base == nullptr || wide == nullptr) return CG_BAD_ARGUMENT;
  if (n_digits > 0 && (digits == nullptr || contexts == nullptr)) return CG_BAD_ARGUMENT;
  if (const int32_t status = set_zero(run, wide, blocks * rows)) return status;
  return by_dtype(chunk->dtype, [&](auto type) {
    return quantise_rows<decltype(type)>(*chunk, values, n_digits, base, digits, contexts, wide, run);
  });
}

int32_t cg_restore(const cg_chunk* chunk, uint64_t first, uint64_t last, const uint8_t* base,
                   const uint8_t* const* digits, uint32_t n_digits, void* values, const cg_run* run) noexcept {
  if (run == nullptr || !is_chunk_of(chunk, values) || n_digits > CG_MAX_DIGITS) return CG_BAD_ARGUMENT;
  if (first > last || last > coded_rows(*chunk)) return CG_BAD_ARGUMENT;
  if (first == last || chunk->columns == 0) return CG_OK;
  if (base == nullptr || (n_digits > 0 && digits == nullptr)) return CG_BAD_ARGUMENT;
  for (uint32_t k = 0; k < n_digits; k++)
    if (digits[k] == nullptr) return CG_BAD_ARGUMENT;
  const uint8_t* one = n_digits > 0 ? digits[0] : nullptr;
  const uint8_t* two = n_digits > 1 ? digits[1] : nullptr;
  return by_dtype(chunk->dtype, [&](auto type) {
    return restore<decltype(type)>(*chunk, first, last, base, one, two, values, run);
  });
}

int32_t cg_contexts(const uint8_t* symbols, uint8_t zero, const uint8_t* coarser, uint64_t count, uint8_t* contexts,
                    const cg_run* run) noexcept {
  if (run == nullptr || (count > 0 && (symbols == nullptr || contexts == nullptr))) return CG_BAD_ARGUMENT;
  return for_each(run, count, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint8_t given = coarser ? coarser[i] : uint8_t(0);
    contexts[i] = given ? given : sign_of(int32_t(symbols[i]) - zero);
  });
}

int32_t cg_clamp(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns, const uint8_t* low,
                 const uint8_t* high, uint8_t* inside, uint8_t* changed, const cg_run* run) noexcept {
  if (run == nullptr || tokens > CG_MAX_TOKENS || columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (tokens == 0 || columns == 0) return CG_OK;
  if (symbols == nullptr || low == nullptr || high == nullptr || inside == nullptr || changed == nullptr)
    return CG_BAD_ARGUMENT;
  const uint64_t blocks = (columns + CG_BLOCK_COLUMNS - 1) / CG_BLOCK_COLUMNS;
  if (const int32_t status = set_zero(run, changed, blocks * tokens)) return status;
  return for_each(run, tokens * columns, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t t = i / columns, column = i % columns;
    const uint8_t context = contexts ? contexts[i] : uint8_t(0);
    const uint64_t bound = column + (context < 2 ? context : 2) * columns;  // as on the CPU for contexts out of range
    const uint8_t symbol = symbols[i], least = low[bound], most = high[bound];
    const uint8_t below = symbol < most ? symbol : most, found = below > least ? below : least;
    inside[i] = found;
    if (found != symbol) changed[column / CG_BLOCK_COLUMNS * tokens + t] = 1;  // all who write it write the same
  });
}

int32_t cg_count(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns, uint32_t bins,
                 int32_t* counts, const cg_run* run) noexcept {
  if (run == nullptr || tokens > CG_MAX_TOKENS || columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (bins != kMaxSymbols && bins != kDigitBins) return CG_BAD_ARGUMENT;
  if (contexts != nullptr && bins != kDigitBins) return CG_BAD_ARGUMENT;
  if (tokens == 0 || columns == 0) return CG_OK;
  if (symbols == nullptr || counts == nullptr) return CG_BAD_ARGUMENT;
  return for_each(run, columns, [=] CACHEGEN_LAMBDA(uint64_t column) {
    for (uint64_t t = 0; t < tokens; t++) {
      const uint64_t cell = t * columns + column;
      const uint8_t symbol = symbols[cell], bin = uint8_t(contexts ? 3 * contexts[cell] + symbol : symbol);
      counts[column * bins + (bin < bins - 1 ? bin : bins - 1)]++;
    }
  });
}
