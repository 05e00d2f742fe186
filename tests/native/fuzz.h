// Shared by the fuzzers: random numbers, exact buffers, back-ends, tables, and a digest of the results.
//
// The CPU library has several back-ends, and a fuzzer compares them with each other. The library of the kernels has one. Two
// programs of the same source and seed, one with each library, must print the same digest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../cuda_ext/include/cachegen.h"

namespace {

std::mt19937_64 chance;
inline uint64_t below(uint64_t n) { return chance() % n; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <class T>
struct Buffer {  // exactly `size` elements in an allocation of their own, aligned for the tables
  explicit Buffer(uint64_t n) : size(n), data(new T[n]) {}
  uint64_t size;
  std::unique_ptr<T[]> data;
  T* get() const { return data.get(); }
};

template <class T>
std::unique_ptr<Buffer<T>> exact(const std::vector<T>& values) {
  auto buffer = std::make_unique<Buffer<T>>(values.size());
  if (!values.empty()) std::memcpy(buffer->get(), values.data(), values.size() * sizeof(T));
  return buffer;
}

const std::vector<cg_run> kRuns = [] {
  std::vector<cg_run> found;
  for (uint32_t isa = CG_SCALAR; isa <= CG_NEON; isa++)
    if (cg_isa_available(isa)) found.push_back({1 + isa % 2, isa, nullptr});
  if (found.empty()) found.push_back({1, CG_BEST, nullptr});
  return found;
}();

inline std::vector<uint16_t> random_tables(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) {
  std::vector<uint16_t> rows;
  for (uint32_t table = 0; table < n_tables; table++) {
    std::vector<uint16_t> row(n_symbols, 0);
    const uint64_t grain = 1 + below(below(2) ? 16 : 4000);  // uniform or skewed
    for (uint32_t left = 1u << prob_bits; left > 0;) {
      uint16_t& f = row[below(n_symbols)];
      const uint32_t more = uint32_t(std::min<uint64_t>({left, grain, uint64_t(4095) - f}));
      f = uint16_t(f + more);
      left -= more;
    }
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}

inline std::unique_ptr<Buffer<uint8_t>> built(const std::vector<uint16_t>& rows, uint32_t n_tables,
                                              uint32_t n_symbols, uint32_t prob_bits) {
  auto memory = std::make_unique<Buffer<uint8_t>>(cg_tables_bytes(n_tables, n_symbols, prob_bits));
  if (cg_tables_build(rows.data(), n_tables, n_symbols, prob_bits, memory->get(), memory->size)) fail("tables");
  return memory;
}

inline uint64_t tiles_of(const cg_section& section) {
  return section.tokens ? (section.columns + CG_TILE_COLUMNS - 1) / CG_TILE_COLUMNS : 0;
}

// The section's symbols in streams back to back, their offsets first.
inline std::vector<uint8_t> encoded(const cg_section& section, const uint8_t* symbols, const cg_run& run,
                                    std::vector<uint64_t>* offsets) {
  const uint64_t tiles = tiles_of(section), slot = cg_slot_bytes(section.tokens);
  Buffer<uint64_t> sizes(tiles);
  Buffer<int32_t> status(tiles);
  Buffer<uint8_t> slots(tiles * slot);
  if (cg_encode(&section, symbols, slots.get(), slots.size, sizes.get(), status.get(), &run)) fail("encode");
  offsets->assign(1, 0);
  for (uint64_t i = 0; i < tiles; i++) {
    if (status.get()[i]) fail("a tile was not encoded");
    offsets->push_back(offsets->back() + sizes.get()[i]);
  }
  std::vector<uint8_t> streams(offsets->back());
  if (cg_pack(slots.get(), slot, sizes.get(), tiles, streams.data(), streams.size(), &run)) fail("pack");
  return streams;
}

inline void damage(std::vector<uint8_t>& bytes) {
  if (bytes.empty()) return;
  for (uint64_t n = 1 + below(below(2) ? 2 : 30); n > 0; n--) bytes[below(bytes.size())] ^= uint8_t(1u << below(8));
}

struct Digest {  // FNV-1a
  uint64_t value = 0xcbf29ce484222325;
  void add(const void* data, uint64_t bytes) {
    for (uint64_t i = 0; i < bytes; i++) value = (value ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3;
  }
} digest;

}  // namespace
