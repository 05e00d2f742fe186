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

constexpr uint32_t kTogether = 32;  // entries whose sums stay in registers
constexpr uint32_t kPair = 2;       // columns that share the costs which are loaded
constexpr uint32_t kNarrow = 16;    // symbols of which a list is not worth making
static_assert(kGroups == kGroup, "the bounds of all groups are summed as costs of a group are");

// Sums of 32 bits take two symbols at a time, as machines multiply 16 bits: the first in the low half of a cost, and of a
// count, and the second in the high half. Sums of 64 bits take one.
template <class Sum>
constexpr uint32_t kSymbols = sizeof(Sum) == sizeof(int32_t) ? 2 : 1;

struct Seen {
  uint32_t row, counts;  // symbols from row * kSymbols on
};

// high: the last symbol that has a count.
template <class Sum>
CACHEGEN_HD uint32_t counts_of(const uint32_t* counts, uint32_t row, uint32_t high) {
  if (kSymbols<Sum> == 1) return counts[row];
  return counts[2 * row] | (2 * row < high ? counts[2 * row + 1] << 16 : 0);
}

// Set before the inclusion: compilers do not say which instruction set a pragma chose.
#if !defined(CACHEGEN_VECTOR_BYTES)
#define CACHEGEN_VECTOR_BYTES 16
#endif
constexpr uint32_t kVectorBytes = CACHEGEN_VECTOR_BYTES;

typedef int32_t Pairs __attribute__((vector_size(kVectorBytes)));

CACHEGEN_HD Pairs multiply_pairs(const int32_t* from, uint32_t counts) {
  Pairs costs;
  memcpy(&costs, from, sizeof costs);
#if CACHEGEN_VECTOR_BYTES == 64
  return Pairs(_mm512_madd_epi16(__m512i(costs), _mm512_set1_epi32(int32_t(counts))));
#elif CACHEGEN_VECTOR_BYTES == 32
  return Pairs(_mm256_madd_epi16(__m256i(costs), _mm256_set1_epi32(int32_t(counts))));
#else
  return (costs & 0xffff) * int32_t(counts & 0xffff) + (costs >> 16) * int32_t(counts >> 16);
#endif
}

// Sums of some entries' costs. Vectors, for compilers leave an array in memory; those that are wider than the
// machine's are ten times as slow.
template <class Sum, uint32_t kEntries>
struct Sums {
  static constexpr uint32_t kWidth = kVectorBytes / sizeof(Sum), kParts = kEntries / kWidth;
  typedef int32_t Costs __attribute__((vector_size(kWidth * sizeof(int32_t))));
  typedef Sum Part __attribute__((vector_size(kVectorBytes)));
  Part part[kParts] = {};

  CACHEGEN_HD void add(const int32_t* costs, uint32_t counts) {
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kParts; i++) {
      if constexpr (kSymbols<Sum> == 2) {
        const Pairs products = multiply_pairs(costs + i * kWidth, counts);
        Part own;
        memcpy(&own, &products, sizeof own);
        part[i] += own;
      } else {
        Costs some;
        memcpy(&some, costs + i * kWidth, sizeof some);
        part[i] += __builtin_convertvector(some, Part) * Sum(counts);
      }
    }
  }
};

// The cheapest of the entries so far from book.first on, lane by lane.
template <class Sum>
struct Cheapest {
  using Part = typename Sums<Sum, kTogether>::Part;
  static constexpr uint32_t kWidth = Sums<Sum, kTogether>::kWidth;
  Part least, entry, lane, allowed;

  explicit CACHEGEN_HD Cheapest(const cg_costs& book) {
    least = Part{} + std::numeric_limits<Sum>::max();
    entry = Part{};
    allowed = Part{} + Sum(book.first);
    for (uint32_t i = 0; i < kWidth; i++) lane[i] = Sum(i);
  }
  // kAnyOrder: entries before these may follow.
  template <bool kAnyOrder = false, uint32_t kEntries>
  CACHEGEN_HD void see(const Sums<Sum, kEntries>& sums, uint32_t first) {
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kEntries / kWidth; i++) {
      const Part number = lane + Sum(first + i * kWidth);
      auto less = sums.part[i] < least;
      if (kAnyOrder) less |= (sums.part[i] == least) & (number < entry);
      less &= number >= allowed;
      least = less ? sums.part[i] : least;
      entry = less ? number : entry;
    }
  }
  void store(uint8_t* found, uint64_t* cost) const {
    Sum sums[kWidth], entries[kWidth], lowest = std::numeric_limits<Sum>::max(), first = kMaxTables;
    memcpy(sums, &least, sizeof sums);
    memcpy(entries, &entry, sizeof entries);
    for (uint32_t i = 0; i < kWidth; i++) lowest = sums[i] < lowest ? sums[i] : lowest;
    for (uint32_t i = 0; i < kWidth; i++) {
      const Sum own = sums[i] == lowest ? entries[i] : Sum(kMaxTables);
      first = own < first ? own : first;
    }
    *found = uint8_t(first);
    *cost = uint64_t(lowest);
  }
};

// Lists the symbols that occur; most do not, and are passed over eight at a time.
template <class Sum>
uint32_t list_of(const uint32_t* counts, uint32_t low, uint32_t high, Seen* list) {
  constexpr uint32_t kStep = 8;
  uint32_t seen = 0;
  for (uint32_t k = low / kStep * kStep; k <= high; k += kStep) {
    uint64_t some[kStep / 2];
    memcpy(some, counts + k, sizeof some);
    if ((some[0] | some[1] | some[2] | some[3]) == 0) continue;
#pragma GCC unroll 8
    for (uint32_t i = k; i < k + kStep; i += kSymbols<Sum>) {
      const uint32_t row = i / kSymbols<Sum>;
      list[seen] = {row, counts_of<Sum>(counts, row, kMaxSymbols)};
      seen += list[seen].counts > 0;
    }
  }
  return seen;
}

template <class Sum>
Sums<Sum, kGroup> sums_of(const int32_t* costs, uint64_t stride, const Seen* list, uint32_t seen) {
  Sums<Sum, kGroup> sums;
  for (uint32_t i = 0; i < seen; i++) sums.add(costs + list[i].row * stride, list[i].counts);
  return sums;
}

// The cheapest entry of a column of many symbols. Few groups of entries have a bound below the cost of that with the lowest one.
template <class Sum>
void cheapest_bounded(const CostRows& rows, const uint32_t* counts, uint32_t low, uint32_t high, uint8_t* entry,
                      uint64_t* cost) {
  const cg_costs& book = *rows.book;
  Seen list[kMaxSymbols + 1];
  const uint32_t seen = list_of<Sum>(counts, low, high, list);
  Sum bound[kGroups];
  const auto found = sums_of<Sum>(rows.bounds, kGroups, list, seen);
  memcpy(bound, &found, sizeof bound);
  const uint32_t groups = book.entries / kGroup;
  uint32_t lowest = book.first / kGroup;
  for (uint32_t g = lowest + 1; g < groups; g++) lowest = bound[g] < bound[lowest] ? g : lowest;
  Cheapest<Sum> best(book);
  best.template see<true>(sums_of<Sum>(rows.costs + lowest * kGroup, book.entries, list, seen), lowest * kGroup);
  best.store(entry, cost);
  const Sum most = Sum(*cost);
  for (uint32_t g = book.first / kGroup; g < groups; g++)
    if (g != lowest && bound[g] <= most)
      best.template see<true>(sums_of<Sum>(rows.costs + g * kGroup, book.entries, list, seen), g * kGroup);
  best.store(entry, cost);
}

// The last entries, fewer than kTogether.
template <class Sum>
void see_rest(const cg_costs& book, const uint32_t* counts, uint32_t low, uint32_t high, uint32_t first, Cheapest<Sum>* best) {
  Sums<Sum, kTogether> sums;
  constexpr uint32_t kWidth = Cheapest<Sum>::kWidth;
  for (uint32_t e = 0; e < kTogether; e++) {
    Sum sum = 0;
    for (uint32_t k = low; k <= high && first + e < book.entries; k++)
      sum += Sum(counts[k]) * book.costs[k * book.entries + first + e];
    sums.part[e / kWidth][e % kWidth] = first + e < book.entries ? sum : std::numeric_limits<Sum>::max();
  }
  best->see(sums, first);
}

// The cheapest entry of each of kPair columns, whose counts are counts[j], and its cost; of equal ones, the first.
template <class Sum>
void cheapest(const CostRows& rows, const uint32_t* const* counts, uint32_t low, uint32_t high, uint8_t* entries,
              uint64_t* costs) {
  const cg_costs& book = *rows.book;
  Cheapest<Sum> best[kPair] = {Cheapest<Sum>(book), Cheapest<Sum>(book)};
  uint32_t first = 0;
  for (; book.entries - first >= kTogether; first += kTogether) {
    Sums<Sum, kTogether> sums[kPair];
    for (uint32_t row = low / kSymbols<Sum>; row <= high / kSymbols<Sum>; row++)
#pragma GCC unroll 2
      for (uint32_t j = 0; j < kPair; j++)
        sums[j].add(rows.costs + row * book.entries + first, counts_of<Sum>(counts[j], row, high));
    for (uint32_t j = 0; j < kPair; j++) best[j].see(sums[j], first);
  }
  for (uint32_t j = 0; j < kPair; j++) {
    if (first < book.entries) see_rest(book, counts[j], low, high, first, &best[j]);
    best[j].store(entries + j, costs + j);
  }
}

void choose(const CostRows& rows, const uint32_t* counts, uint32_t stride, uint32_t low, uint32_t high, uint32_t width,
            uint8_t* entries, uint64_t* costs) {
  const cg_costs& book = *rows.book;
  if (high - low >= kNarrow && book.entries > kTogether && book.entries % kGroup == 0) {
    for (uint32_t j = 0; j < width; j++)
      (rows.pairs ? cheapest_bounded<int32_t> : cheapest_bounded<int64_t>)(rows, counts + j * stride, low, high, entries + j,
                                                                           costs + j);
    return;
  }
  for (uint32_t j = 0; j < width; j += kPair) {
    const uint32_t* own[kPair];
    uint8_t found[kPair];
    uint64_t cost[kPair];
    for (uint32_t i = 0; i < kPair; i++) own[i] = counts + (j + i < width ? j + i : j) * stride;
    (rows.pairs ? cheapest<int32_t> : cheapest<int64_t>)(rows, own, low, high, found, cost);
    for (uint32_t i = 0; i < kPair && j + i < width; i++) {
      entries[j + i] = found[i];
      costs[j + i] = cost[i];
    }
  }
}

}  // namespace
}  // namespace cachegen
