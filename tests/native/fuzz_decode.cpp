// Hostile bytes through the C ABI, under AddressSanitizer and UBSan: fuzz_decode STREAMS SEED
//
// Twists:
// 1. Every buffer is its own allocation of the exact size, so that a read or write one byte outside of it is seen.
// 2. Every stream goes through every back-end of the machine; all must encode to the same bytes, and find the same symbols
//    or the same fault.
// Prints the number of streams and of back-ends, and exits with 1 where two back-ends, or a round trip, differ.
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
uint64_t below(uint64_t n) { return chance() % n; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "fuzz_decode: %s\n", what);
  std::exit(1);
}

template <class T>
struct Buffer {  // exactly `size` elements, aligned for the tables
  explicit Buffer(uint64_t n) : size(n), data(new T[n]) {}
  uint64_t size;
  std::unique_ptr<T[]> data;
  T* get() const { return data.get(); }
};

std::vector<cg_run> runs() {
  std::vector<cg_run> found;
  for (uint32_t isa = CG_SCALAR; isa <= CG_AVX512; isa++)
    if (cg_isa_available(isa)) found.push_back({1 + isa % 2, isa, nullptr});
  return found;
}
const std::vector<cg_run> kRuns = runs();

std::vector<uint16_t> random_tables(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) {
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

struct Sample {
  cg_section section;
  std::vector<uint8_t> ids, contexts, symbols, streams;
  std::vector<uint64_t> offsets;
  std::unique_ptr<Buffer<uint8_t>> tables;
};

void draw(Sample& s) {
  const uint32_t prob_bits = 10 + uint32_t(below(3));
  const uint32_t n_tables = 1 + uint32_t(below(5)), n_symbols = 2 + uint32_t(below(below(2) ? 255 : 4));
  const std::vector<uint16_t> rows = random_tables(n_tables, n_symbols, prob_bits);
  s.tables = std::make_unique<Buffer<uint8_t>>(cg_tables_bytes(n_tables, n_symbols, prob_bits));
  if (cg_tables_build(rows.data(), n_tables, n_symbols, prob_bits, s.tables->get(), s.tables->size)) fail("tables");
  const uint64_t tokens = below(30), columns = below(4) ? below(800) : below(40), n_ids = below(2) ? 1 : 3;
  s.ids.resize(columns * n_ids);
  s.contexts.resize(n_ids == 3 ? tokens * columns : 0);
  s.symbols.resize(tokens * columns);
  for (uint8_t& id : s.ids) id = uint8_t(below(n_tables));
  for (uint8_t& context : s.contexts) context = uint8_t(below(3));
  for (uint64_t i = 0; i < s.symbols.size(); i++) {
    const uint64_t column = i % columns, table = s.ids[column * n_ids + (n_ids == 3 ? s.contexts[i] : 0)];
    do s.symbols[i] = uint8_t(below(n_symbols));
    while (rows[table * n_symbols + s.symbols[i]] == 0);
  }
  s.section = {tokens, columns, n_ids, nullptr, nullptr, s.tables->get(), s.tables->size};
}

template <class T>
std::unique_ptr<Buffer<T>> exact(const std::vector<T>& values) {
  auto buffer = std::make_unique<Buffer<T>>(values.size());
  if (!values.empty()) std::memcpy(buffer->get(), values.data(), values.size() * sizeof(T));
  return buffer;
}

struct Side {  // the section's inputs in exact buffers
  explicit Side(Sample& s) : ids(exact(s.ids)), contexts(exact(s.contexts)), section(s.section) {
    section.table_ids = ids->get();
    section.contexts = section.ids_per_column == 3 ? contexts->get() : nullptr;
  }
  std::unique_ptr<Buffer<uint8_t>> ids, contexts;
  cg_section section;
};

uint64_t tiles_of(const Sample& s) { return s.section.tokens ? (s.section.columns + 255) / 256 : 0; }

void encode(Sample& s) {
  const uint64_t tiles = tiles_of(s), slot = cg_slot_bytes(s.section.tokens);
  Side side(s);
  const auto symbols = exact(s.symbols);
  Buffer<uint64_t> sizes(tiles);
  Buffer<int32_t> status(tiles);
  for (const cg_run& run : kRuns) {
    Buffer<uint8_t> slots(tiles * slot);
    if (cg_encode(&side.section, symbols->get(), slots.get(), slots.size, sizes.get(), status.get(), &run))
      fail("encode");
    s.offsets.assign(1, 0);
    for (uint64_t i = 0; i < tiles; i++) {
      if (status.get()[i]) fail("a tile was not encoded");
      s.offsets.push_back(s.offsets.back() + sizes.get()[i]);
    }
    std::vector<uint8_t> streams(s.offsets.back());
    if (cg_pack(slots.get(), slot, sizes.get(), tiles, streams.data(), streams.size(), &run)) fail("pack");
    if (&run != &kRuns[0] && streams != s.streams) fail("two back-ends encode differently");
    s.streams = streams;
  }
}

// True if every tile is decoded, to `symbols`.
bool decode(Sample& s, std::vector<uint8_t>* symbols) {
  Side side(s);
  const auto streams = exact(s.streams);
  const auto offsets = exact(s.offsets);
  const uint64_t tiles = tiles_of(s), columns = s.section.columns;
  std::vector<int32_t> found(tiles + 1), first;
  for (const cg_run& run : kRuns) {
    Buffer<uint8_t> out(s.symbols.size());
    Buffer<int32_t> status(tiles);
    found[tiles] =
        cg_decode(&side.section, streams->get(), streams->size, offsets->get(), out.get(), status.get(), &run);
    for (uint64_t i = 0; i < tiles; i++) found[i] = found[tiles] ? 0 : status.get()[i];
    if (&run == &kRuns[0]) {
      first = found;
      symbols->assign(out.get(), out.get() + out.size);
    }
    if (found != first) fail("two back-ends find different faults");
    for (uint64_t i = 0; i < out.size && !found[tiles]; i++)
      if (!found[i % columns / 256] && out.get()[i] != (*symbols)[i]) fail("two back-ends decode differently");
  }
  return std::count(found.begin(), found.end(), 0) == ptrdiff_t(found.size());
}

void damage(std::vector<uint8_t>& bytes) {
  if (bytes.empty()) return;
  for (uint64_t n = 1 + below(below(2) ? 2 : 30); n > 0; n--) bytes[below(bytes.size())] ^= uint8_t(1u << below(8));
}

void mutate(Sample& s) {
  switch (below(7)) {
    case 0: damage(s.streams); break;
    case 1: s.streams.resize(below(s.streams.size() + 1)); break;  // offsets now end too late
    case 2:
      for (uint64_t& offset : s.offsets) offset = below(s.streams.size() + 2);
      break;
    case 3: s.offsets[below(s.offsets.size())] ^= uint64_t(1) << below(64); break;
    case 4: damage(s.ids); break;
    case 5: damage(s.contexts); break;
    case 6:
      for (uint8_t& byte : s.streams) byte = uint8_t(chance());
      for (uint64_t i = 3; i < s.streams.size(); i += 4) s.streams[i] &= 0x7f;  // most initial states in range
      break;
  }
  if (below(4) == 0 && s.offsets.size() > 1) {  // the last stream alone is cut, soundly
    s.streams.resize(s.streams.size() - below(s.streams.size() / s.offsets.size() + 1));
    s.offsets.back() = s.streams.size();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t wanted = argc > 1 ? uint64_t(std::atoll(argv[1])) : 10000;
  chance.seed(argc > 2 ? uint64_t(std::atoll(argv[2])) : 1);
  uint64_t streams = 0, decoded = 0;
  while (streams < wanted) {
    Sample sample;
    draw(sample);
    encode(sample);
    std::vector<uint8_t> symbols;
    if (!decode(sample, &symbols) || symbols != sample.symbols) fail("a round trip differs");
    for (int i = 0; i < 20; i++) {
      Sample hostile;
      hostile.section = sample.section;
      hostile.ids = sample.ids, hostile.contexts = sample.contexts, hostile.symbols = sample.symbols;
      hostile.streams = sample.streams, hostile.offsets = sample.offsets;
      mutate(hostile);
      decoded += decode(hostile, &symbols);
      streams += tiles_of(hostile);
    }
  }
  std::printf("%.0f hostile streams, %.0f back-ends, %.0f sections decoded\n", double(streams), double(kRuns.size()),
              double(decoded));
}
