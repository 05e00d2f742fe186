// How often each symbol of up to 256 columns occurs, and which table codes a column most cheaply. Compiled for every
// instruction set.
//
// Note: what is counted is the fine symbol, once; base and digits are functions of it, and so are their counts. Fine
// symbols of 32 columns at a time are counted, whose counters stay in the nearest cache.
#pragma once

#include <string.h>

#include <limits>

#include "../core/chunk.h"
#include "counter.h"

namespace cachegen {

namespace {

// The fine symbols whose base fits a byte: index = symbol + zero, below bins.
struct Fine {
  uint32_t per_base, bins;
  int32_t zero;

  explicit Fine(uint32_t n_digits)
      : per_base(n_digits == 0 ? 1 : n_digits == 1 ? 3 : 9),
        bins(per_base * kMaxSymbols),
        zero(int32_t(per_base * kZeroIndex + per_base / 2)) {}
};

void use(Counter* counter, uint32_t first, uint32_t last) {
  counter->low = first < counter->low ? first : counter->low;
  counter->high = last > counter->high ? last : counter->high;
}

void add_wide(Counter* counter, uint32_t column, int32_t index, const Digit* found, uint32_t n_digits) {
  const uint32_t bin = index < 0 ? 0 : index > 0xff ? 0xff : uint32_t(index);
  use(counter, bin, bin);
  counter->base[column][bin]++;
  for (uint32_t k = 0; k < n_digits; k++) counter->digits[k][column][3 * found[k].context + found[k].index]++;
}

void add_anchor(Counter* counter, uint32_t width, const uint8_t* symbols) {
  uint8_t low = 0xff, high = 0;
  for (uint32_t j = 0; j < width; j++) {
    low = symbols[j] < low ? symbols[j] : low;
    high = symbols[j] > high ? symbols[j] : high;
  }
  for (uint32_t j = 0; j < width; j++) counter->anchors[j][symbols[j]]++;
  counter->anchor_low = low < counter->anchor_low ? low : counter->anchor_low;
  counter->anchor_high = high > counter->anchor_high ? high : counter->anchor_high;
}

// For the next columns; `all` of new memory.
void clear(Counter* counter, bool all) {
  if (all) memset(counter, 0, sizeof *counter);
  for (uint32_t j = 0; j < kTileColumns && !all; j++) {
    const uint32_t low = counter->low, anchor_low = counter->anchor_low;
    if (low <= counter->high) memset(counter->base[j] + low, 0, (counter->high - low + 1) * sizeof(uint32_t));
    if (anchor_low <= counter->anchor_high)
      memset(counter->anchors[j] + anchor_low, 0, (counter->anchor_high - anchor_low + 1) * sizeof(uint32_t));
  }
  memset(counter->digits, 0, sizeof counter->digits);
  counter->rows = counter->refused = 0;
  counter->low = counter->anchor_low = kMaxSymbols - 1;
  counter->high = counter->anchor_high = 0;
}

// Counts of a column's fine symbols to counts of its base and its digits.
template <uint32_t kDigits>
void fold(Counter* counter, uint32_t column, uint16_t* seen, uint32_t low, uint32_t high) {
  uint32_t* base = counter->base[column];
  uint32_t(*coarse)[3] = reinterpret_cast<uint32_t(*)[3]>(counter->digits[0][column]);
  uint32_t(*finer)[3] = reinterpret_cast<uint32_t(*)[3]>(counter->digits[1][column]);
  for (uint32_t k = low; k <= high; k++) {
    const uint8_t sign = sign_of(int32_t(k) - kZeroIndex);
    if (kDigits == 0) {
      base[k] += seen[k];
    } else if (kDigits == 1) {
      uint32_t sum = 0;
      for (uint32_t d = 0; d < 3; d++) {
        coarse[sign][d] += seen[3 * k + d];
        sum += seen[3 * k + d];
      }
      base[k] += sum;
    } else {
      uint32_t sum = 0;
      for (uint32_t d = 0; d < 3; d++) {
        const uint16_t* at = seen + 9 * k + 3 * d;
        const uint8_t side = sign ? sign : sign_of(int32_t(d) - kDigitZero);
        const uint32_t some = uint32_t(at[0]) + at[1] + at[2];
        for (uint32_t e = 0; e < 3; e++) finer[side][e] += at[e];
        coarse[sign][d] += some;
        sum += some;
      }
      base[k] += sum;
    }
  }
}

void count_rows(Counter* counter, uint32_t width, const Fine& fine) {
  for (uint32_t first = 0; first < width; first += kStrip) {
    const uint32_t n = width - first < kStrip ? width - first : kStrip;
    uint16_t low[kStrip], high[kStrip];
    for (uint32_t c = 0; c < kStrip; c++) low[c] = high[c] = uint16_t(fine.zero);
    for (uint32_t i = 0; i < counter->rows; i++) {
      const uint16_t* __restrict row = counter->fine[i] + first;
      for (uint32_t c = 0; c < kStrip; c++) {
        const uint16_t x = row[c] == fine.bins ? uint16_t(fine.zero) : row[c];  // bins: counted already
        low[c] = x < low[c] ? x : low[c];
        high[c] = x > high[c] ? x : high[c];
      }
      if (n == kStrip) {
#pragma GCC unroll 32
        for (uint32_t c = 0; c < kStrip; c++) counter->seen[c][row[c]]++;
      } else {
        for (uint32_t c = 0; c < n; c++) counter->seen[c][row[c]]++;
      }
    }
    const auto add = fine.per_base == 1 ? fold<0> : fine.per_base == 3 ? fold<1> : fold<2>;
    for (uint32_t c = 0; c < n; c++) {
      const uint32_t base_low = low[c] / fine.per_base, base_high = high[c] / fine.per_base;
      use(counter, base_low, base_high);
      uint16_t* seen = counter->seen[c];
      add(counter, first + c, seen, base_low, base_high);
      memset(seen + base_low * fine.per_base, 0, (base_high - base_low + 1) * fine.per_base * sizeof *seen);
      seen[fine.bins] = 0;
    }
  }
  counter->rows = 0;
}

constexpr uint32_t kTogether = 32;    // entries whose sums stay in registers
constexpr uint32_t kPair = 2;         // columns that share the costs which are loaded
constexpr uint32_t kNarrow = 16;      // symbols of which a list is not worth making

struct Seen {
  uint32_t symbol, count;
};

// Set before the inclusion: compilers do not say which instruction set a pragma chose.
#if !defined(CACHEGEN_VECTOR_BYTES)
#define CACHEGEN_VECTOR_BYTES 16
#endif
constexpr uint32_t kVectorBytes = CACHEGEN_VECTOR_BYTES;

// Sums of kTogether entries' costs. Vectors, for compilers leave an array in memory; those that are wider than the
// machine's are ten times as slow.
template <class Sum>
struct Sums {
  static constexpr uint32_t kWidth = kVectorBytes / sizeof(Sum), kParts = kTogether / kWidth;
  typedef int32_t Costs __attribute__((vector_size(kWidth * sizeof(int32_t))));
  typedef Sum Part __attribute__((vector_size(kVectorBytes)));
  Part part[kParts] = {};

  CACHEGEN_HD void add(const int32_t* costs, uint32_t count) {
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kParts; i++) {
      Costs some;
      memcpy(&some, costs + i * kWidth, sizeof some);
      part[i] += __builtin_convertvector(some, Part) * Sum(count);
    }
  }
};

// The cheapest of the entries so far from book.first on, lane by lane.
template <class Sum>
struct Cheapest {
  using Part = typename Sums<Sum>::Part;
  static constexpr uint32_t kWidth = Sums<Sum>::kWidth, kParts = Sums<Sum>::kParts;
  Part least, entry, lane, allowed;

  explicit CACHEGEN_HD Cheapest(const cg_costs& book) {
    least = Part{} + std::numeric_limits<Sum>::max();
    entry = Part{};
    allowed = Part{} + Sum(book.first);
    for (uint32_t i = 0; i < kWidth; i++) lane[i] = Sum(i);
  }
  CACHEGEN_HD void see(const Sums<Sum>& sums, uint32_t first) {
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kParts; i++) {
      const Part number = lane + Sum(first + i * kWidth);
      const auto less = (sums.part[i] < least) & (number >= allowed);
      least = less ? sums.part[i] : least;
      entry = less ? number : entry;
    }
  }
  void store(uint8_t* found, uint64_t* cost) const {
    static_assert(kMaxTables == 1 << 8, "an entry is the lowest byte of a key");
    uint64_t best = UINT64_MAX;
    for (uint32_t i = 0; i < kWidth; i++) {
      const uint64_t key = uint64_t(least[i]) << 8 | uint64_t(entry[i]);
      best = key < best ? key : best;
    }
    *found = uint8_t(best);
    *cost = best >> 8;
  }
};

// kBlocks times kTogether entries, for a column's listed symbols.
template <uint32_t kBlocks, class Sum>
void see_listed(const cg_costs& book, const Seen* list, uint32_t seen, uint32_t first, Cheapest<Sum>* best) {
  Sums<Sum> sums[kBlocks];
  for (uint32_t i = 0; i < seen; i++)
#pragma GCC unroll 2
    for (uint32_t b = 0; b < kBlocks; b++)
      sums[b].add(book.costs + list[i].symbol * book.entries + first + b * kTogether, list[i].count);
  for (uint32_t b = 0; b < kBlocks; b++) best->see(sums[b], first + b * kTogether);
}

// The last entries, fewer than kTogether.
template <class Sum>
void see_rest(const cg_costs& book, const uint32_t* counts, uint32_t low, uint32_t high, uint32_t first, Cheapest<Sum>* best) {
  Sums<Sum> sums;
  for (uint32_t e = 0; e < kTogether; e++) {
    Sum sum = 0;
    for (uint32_t k = low; k <= high && first + e < book.entries; k++)
      sum += Sum(counts[k]) * book.costs[k * book.entries + first + e];
    sums.part[e / Sums<Sum>::kWidth][e % Sums<Sum>::kWidth] = first + e < book.entries ? sum : std::numeric_limits<Sum>::max();
  }
  best->see(sums, first);
}

// The cheapest entry of each of kPair columns, whose counts are counts[j], and its cost; of equal ones, the first.
template <class Sum>
void cheapest(const cg_costs& book, const uint32_t* const* counts, uint32_t low, uint32_t high, uint8_t* entries,
              uint64_t* costs) {
  const bool listed = high - low >= kNarrow && book.entries > kTogether;
  Cheapest<Sum> best[kPair] = {Cheapest<Sum>(book), Cheapest<Sum>(book)};
  uint32_t first = 0;
  for (uint32_t j = 0; j < kPair && listed; j++) {
    Seen list[kMaxSymbols];
    uint32_t seen = 0;
    for (uint32_t k = low; k <= high; k++) {
      list[seen] = {k, counts[j][k]};
      seen += counts[j][k] > 0;
    }
    for (first = 0; book.entries - first >= 2 * kTogether; first += 2 * kTogether)
      see_listed<2>(book, list, seen, first, &best[j]);
    for (; book.entries - first >= kTogether; first += kTogether) see_listed<1>(book, list, seen, first, &best[j]);
  }
  for (; book.entries - first >= kTogether; first += kTogether) {
    Sums<Sum> sums[kPair];
    for (uint32_t k = low; k <= high; k++)
#pragma GCC unroll 2
      for (uint32_t j = 0; j < kPair; j++) sums[j].add(book.costs + k * book.entries + first, counts[j][k]);
    for (uint32_t j = 0; j < kPair; j++) best[j].see(sums[j], first);
  }
  for (uint32_t j = 0; j < kPair; j++) {
    if (first < book.entries) see_rest(book, counts[j], low, high, first, &best[j]);
    best[j].store(entries + j, costs + j);
  }
}

void choose(const cg_costs& book, const uint32_t* counts, uint32_t stride, uint32_t low, uint32_t high, uint32_t width,
            bool small, uint8_t* entries, uint64_t* costs) {
  for (uint32_t j = 0; j < width; j += kPair) {
    const uint32_t* own[kPair];
    uint8_t found[kPair];
    uint64_t cost[kPair];
    for (uint32_t i = 0; i < kPair; i++) own[i] = counts + (j + i < width ? j + i : j) * stride;
    (small ? cheapest<int32_t> : cheapest<int64_t>)(book, own, low, high, found, cost);
    for (uint32_t i = 0; i < kPair && j + i < width; i++) {
      entries[j + i] = found[i];
      costs[j + i] = cost[i];
    }
  }
}

}  // namespace
}  // namespace cachegen
