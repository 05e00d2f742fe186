// Hostile bytes through the C ABI, under AddressSanitizer and UBSan: fuzz_decode STREAMS SEED
//
// Method:
// 1. Every buffer is its own allocation of the exact size, so that a read or write one byte outside of it is seen.
// 2. Every stream goes through every back-end of the machine; all must encode to the same bytes, and find the same symbols
//    or the same fault.
// Prints the number of streams and of back-ends and the digest, and exits with 1 where two back-ends, or a round trip,
// differ.
#include "fuzz.h"

namespace {

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
  s.tables = built(rows, n_tables, n_symbols, prob_bits);
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
  s.section = {tokens, columns, n_ids, nullptr, nullptr, s.tables->get(), s.tables->size, 0};
}

struct Side {  // the section's inputs in exact buffers
  explicit Side(Sample& s) : ids(exact(s.ids)), contexts(exact(s.contexts)), section(s.section) {
    section.table_ids = ids->get();
    section.contexts = section.ids_per_column == 3 ? contexts->get() : nullptr;
  }
  std::unique_ptr<Buffer<uint8_t>> ids, contexts;
  cg_section section;
};

void encode(Sample& s) {
  Side side(s);
  const auto symbols = exact(s.symbols);
  for (const cg_run& run : kRuns) {
    const std::vector<uint8_t> streams = encoded(side.section, symbols->get(), run, &s.offsets);
    if (&run != &kRuns[0] && streams != s.streams) fail("two back-ends encode differently");
    s.streams = streams;
  }
  digest.add(s.streams.data(), s.streams.size());
}

// True if every tile is decoded, to `symbols`.
bool decode(Sample& s, std::vector<uint8_t>* symbols) {
  Side side(s);
  const auto streams = exact(s.streams);
  const auto offsets = exact(s.offsets);
  const uint64_t tiles = tiles_of(s.section), columns = s.section.columns;
  std::vector<int32_t> found(tiles + 1), first;
  for (const cg_run& run : kRuns) {
    Buffer<uint8_t> out(s.symbols.size());
    Buffer<int32_t> status(tiles);
    std::fill_n(status.get(), tiles, -1);
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
  // Offsets that contradict are one library's return value, another's status of a tile.
  const bool sound = std::is_sorted(s.offsets.begin(), s.offsets.end()) && s.offsets.back() <= s.streams.size();
  for (uint64_t i = 0; i < tiles && sound; i++) {
    digest.add(&found[i], sizeof found[i]);
    for (uint64_t t = 0; t < s.section.tokens && found[i] == CG_OK; t++)
      digest.add(symbols->data() + t * columns + i * 256, std::min<uint64_t>(256, columns - i * 256));
  }
  return std::count(found.begin(), found.end(), 0) == ptrdiff_t(found.size());
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
      streams += tiles_of(hostile.section);
    }
  }
  std::printf("%.0f hostile streams, %.0f back-ends, %.0f sections decoded, digest %016llx\n", double(streams),
              double(kRuns.size()), double(decoded), static_cast<unsigned long long>(digest.value));
}
