// Decoding a batch of chunks through the C ABI, under AddressSanitizer and UBSan: fuzz_batch ROUNDS SEED
//
// What lands in the tensors must be what cg_restore makes of the symbols that were encoded, patched here and there, and
// nothing else may change. A damaged stream must give the fault that cg_decode finds in it, and leave the other chunks alone.
// Prints the number of rounds and of back-ends, and the digest.
#include "fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;
constexpr uint32_t kBits = CG_BATCH_PROB_BITS, kSections = 5;  // base, digits, end digits

struct Section {
  Bytes symbols, contexts, streams;  // of all its tokens
  std::vector<uint64_t> rows;        // the coded rows that its tokens are
  std::vector<uint64_t> offsets;
  std::unique_ptr<Buffer<uint8_t>> data;
  std::unique_ptr<Buffer<uint64_t>> where;
};

struct Shared {
  uint64_t columns = below(2) ? 256 * (1 + below(2)) : 1 + below(600), group = below(2) ? 2 + below(5) : 0;
  uint32_t dtype = uint32_t(below(3)), n_digits = uint32_t(below(3)), n_end_digits = uint32_t(below(3));
  uint32_t n_base_tables = 1 + uint32_t(below(6)), n_digit_tables = 3 + uint32_t(below(7)), n_symbols = 2 + uint32_t(below(255));
  uint32_t tables_per_tile = below(3) ? n_base_tables : 0;
  uint64_t bytes = dtype == CG_FLOAT32 ? 4 : 2, head_dim = 8u << below(6), row = below(4), most_tokens = 1 + below(60);
  std::vector<uint16_t> base_rows = random_tables(n_base_tables, n_symbols, kBits);
  std::vector<uint16_t> digit_rows = random_tables(n_digit_tables, 3, kBits);
  std::unique_ptr<Buffer<uint8_t>> base_tables = built(base_rows, n_base_tables, n_symbols, kBits);
  std::unique_ptr<Buffer<uint8_t>> digit_tables = built(digit_rows, n_digit_tables, 3, kBits);
  Bytes ids[3];
  std::vector<float> means, steps, end_steps;

  uint64_t tiles() const { return (columns + 255) / 256; }
  uint64_t aligned() const { return (columns + CG_VECTOR_COLUMNS - 1) / CG_VECTOR_COLUMNS * CG_VECTOR_COLUMNS; }
  uint64_t dim() const { return std::min(head_dim, aligned()); }

  Shared() {
    for (uint64_t i = 0; i < columns; i++) {
      ids[0].push_back(uint8_t(below(n_base_tables)));
      for (int k = 0; k < 3; k++) ids[1].push_back(uint8_t(below(n_digit_tables))), ids[2].push_back(uint8_t(below(n_digit_tables)));
      means.push_back(float(below(1000)) / 64 - 5);
      steps.push_back(float(1 + below(99)) / 32);
      end_steps.push_back(float(1 + below(99)) / 128);
    }
  }
};

struct Chunk {
  uint64_t tokens, coded, first, last;
  std::vector<float> anchors;
  Bytes index[3];  // of every coded row: base, digits
  Section sections[kSections];
  std::vector<uint64_t> patches;
  std::vector<uint32_t> patch_offsets;

  explicit Chunk(const Shared& s) {
    tokens = below(s.most_tokens + 1);
    coded = s.group ? tokens - (tokens + s.group - 1) / s.group : tokens;
    first = below(2) ? 0 : below(coded + 1);
    last = below(2) ? coded : first + below(coded - first + 1);
    for (uint64_t i = 0; s.group && i < (tokens + s.group - 1) / s.group * s.columns; i++)
      anchors.push_back(float(below(1000)) / 32 - 9);
    for (Bytes& matrix : index) matrix.resize(coded * s.columns);
    draw(s);
  }

  uint64_t digits_of(const Shared& s, uint64_t r) const { return r >= first && r < last ? s.n_digits : s.n_end_digits; }

  // The sign of what digit k refines, as a context.
  uint8_t context(uint32_t k, uint64_t cell) const {
    int symbol = index[0][cell] - 128;
    if (k > 1) symbol = 3 * symbol + index[1][cell] - 1;
    return uint8_t(symbol > 0 ? 1 : symbol < 0 ? 2 : 0);
  }

  void draw(const Shared& s) {
    struct Patch {
      uint64_t tile, word;
    };
    std::vector<Patch> found;
    const uint64_t share = below(2) ? 0 : 1 + below(20);  // of 1000
    for (uint64_t r = 0; r < coded; r++)
      for (uint32_t k = 0; k <= digits_of(s, r); k++) {
        const bool ends = r < first || r >= last;
        Section& section = sections[k == 0 ? 0 : (ends ? 2 : 0) + k];
        section.rows.push_back(r);
        for (uint64_t j = 0; j < s.columns; j++) {
          const uint64_t cell = r * s.columns + j;
          const uint8_t given = k ? context(k, cell) : uint8_t(0), id = s.ids[k][k ? j * 3 + given : j];
          const uint16_t* table = (k ? s.digit_rows.data() : s.base_rows.data()) + id * (k ? 3u : s.n_symbols);
          uint8_t symbol;
          do symbol = uint8_t(below(k ? 3 : s.n_symbols));
          while (table[symbol] == 0);
          section.symbols.push_back(symbol);
          section.contexts.push_back(given);
          index[k][cell] = symbol;
          if (below(1000) >= share) continue;
          index[k][cell] = uint8_t(below(k ? 3 : 256));
          found.push_back({j / 256, r << 32 | j % 256 << 16 | k << 8 | index[k][cell]});
        }
      }
    std::stable_sort(found.begin(), found.end(), [](const Patch& a, const Patch& b) { return a.tile < b.tile; });
    patch_offsets.assign(s.tiles() + 1, 0);
    for (const Patch& patch : found) {
      patches.push_back(patch.word);
      for (uint64_t tile = patch.tile; tile < s.tiles(); tile++) patch_offsets[tile + 1]++;
    }
    for (uint32_t i = 0; i < kSections; i++) {
      Section& section = sections[i];
      cg_section view = view_of(s, i);
      section.streams = encoded(view, section.symbols.data(), kRuns[0], &section.offsets);
      place(i);
    }
  }

  static uint32_t digit_of(uint32_t i) { return i == 0 ? 0 : (i - 1) % 2 + 1; }
  cg_section view_of(const Shared& s, uint32_t i) const {
    const uint32_t k = digit_of(i);
    const auto& tables = k ? s.digit_tables : s.base_tables;
    return {sections[i].rows.size(), s.columns, k ? 3u : 1u, s.ids[k].data(), k ? sections[i].contexts.data() : nullptr,
            tables->get(), tables->size, 0};
  }
  void place(uint32_t i) {  // exact buffers of what the streams are now
    sections[i].data = exact(sections[i].streams);
    sections[i].where = exact(sections[i].offsets);
  }
  cg_streams streams_of(uint32_t i) const {
    return {sections[i].data->get(), sections[i].data->size, sections[i].where->get()};
  }
};

struct Tensor {  // [heads, rows, head_dim], aligned to 16 bytes: every chunk has rows of its own
  Tensor(const Shared& s, uint64_t chunks) : rows(s.row + chunks * s.most_tokens), memory((s.columns + s.dim() - 1) / s.dim() * s.dim() * rows * s.bytes + 16, 0xab) {}
  uint64_t rows;
  Bytes memory;

  cg_place place(const Shared& s, uint64_t column) const {
    const uint64_t dim = s.dim(), at = (uint64_t(uintptr_t(memory.data())) + 15) / 16 * 16;
    return {at + (column / dim * rows * dim + column % dim) * s.bytes, dim * s.bytes};
  }
  uint8_t* value(const Shared& s, uint64_t row, uint64_t column) const {
    const cg_place at = place(s, column);
    return reinterpret_cast<uint8_t*>(uintptr_t(at.address + row * at.stride));
  }
};

// A chunk's values, row by row.
Bytes restored(const Shared& s, const Chunk& c) {
  Bytes rows(c.tokens * s.columns * s.bytes);
  const auto chunk_at = [&](const std::vector<float>& steps) -> cg_chunk {
    return {c.tokens, s.columns, s.group, s.group ? c.anchors.data() : nullptr, s.means.data(), steps.data(), s.dtype};
  };
  const auto part = [&](uint64_t first, uint64_t last, const std::vector<float>& steps, uint32_t n) {
    const cg_chunk chunk = chunk_at(steps);
    const uint64_t at = first * s.columns;
    const uint8_t* digits[2] = {c.index[1].data() + at, c.index[2].data() + at};
    if (cg_restore(&chunk, first, last, c.index[0].data() + at, digits, n, rows.data(), &kRuns[0])) fail("restore");
  };
  part(0, c.first, s.end_steps, s.n_end_digits);
  part(c.first, c.last, s.steps, s.n_digits);
  part(c.last, c.coded, s.end_steps, s.n_end_digits);
  if (s.group == 0) return rows;
  std::vector<cg_place> places;
  for (uint64_t j = 0; j < s.columns; j++)
    places.push_back({uint64_t(uintptr_t(rows.data())) + j * s.bytes, s.columns * s.bytes});
  const cg_chunk chunk = chunk_at(s.steps);
  const cg_output output = {&chunk, 0, 0, 0, 0, places.data(), nullptr, {nullptr, nullptr}, 0};
  const uint64_t n = (c.tokens + s.group - 1) / s.group;
  if (n && cg_rows_into(c.anchors.data(), n, 0, s.group, &output, &kRuns[0])) fail("rows_into");
  return rows;
}

using Statuses = std::vector<std::vector<int32_t>>;  // of every chunk's tiles

Statuses decode(const Shared& s, const std::vector<Chunk>& chunks, const Tensor& tensor) {
  const auto base_ids = exact(s.ids[0]), one = exact(s.ids[1]), two = exact(s.ids[2]);
  const auto means = exact(s.means), steps = exact(s.steps), end_steps = exact(s.end_steps);
  std::vector<std::unique_ptr<Buffer<uint64_t>>> patches;
  std::vector<std::unique_ptr<Buffer<uint32_t>>> offsets;
  std::vector<std::unique_ptr<Buffer<float>>> anchors;
  std::vector<cg_place> places;
  for (uint64_t j = 0; j < s.columns; j += CG_VECTOR_COLUMNS) places.push_back(tensor.place(s, j));
  const auto at = exact(places);
  Statuses statuses(chunks.size(), std::vector<int32_t>(s.tiles(), -1));
  std::vector<cg_job> jobs;
  for (size_t i = 0; i < chunks.size(); i++) {
    const Chunk& c = chunks[i];
    patches.push_back(exact(c.patches));
    offsets.push_back(exact(c.patch_offsets));
    anchors.push_back(exact(c.anchors));
    jobs.push_back({c.tokens, c.first, c.last, s.row + i * s.most_tokens, s.group ? anchors[i]->get() : nullptr,
                    c.streams_of(0), {c.streams_of(1), c.streams_of(2)}, {c.streams_of(3), c.streams_of(4)},
                    c.patches.empty() ? nullptr : patches[i]->get(), offsets[i]->get(), uint32_t(c.patches.size()),
                    statuses[i].data()});
  }
  const cg_batch batch = {s.columns, s.group, base_ids->get(), {one->get(), two->get()},
                          s.base_tables->get(), s.base_tables->size, s.digit_tables->get(), s.digit_tables->size,
                          means->get(), steps->get(), end_steps->get(), at->get(),
                          s.tables_per_tile, s.n_digits, s.n_end_digits, s.dtype};
  if (cg_decode_chunks(&batch, jobs.data(), uint32_t(jobs.size()), &kRuns[0])) fail("decode_chunks");
  return statuses;
}

// Those of tiles that are CG_OK hold their values; what belongs to no chunk is as it was.
void check(const Shared& s, const std::vector<Chunk>& chunks, const Tensor& tensor, const Statuses& statuses) {
  Tensor wanted(s, chunks.size());
  for (size_t i = 0; i < chunks.size(); i++) {
    const Bytes rows = restored(s, chunks[i]);
    for (uint64_t t = 0; t < chunks[i].tokens; t++)
      for (uint64_t j = 0; j < s.columns; j++) {
        const uint64_t row = s.row + i * s.most_tokens + t;
        const void* from = statuses[i][j / 256] ? tensor.value(s, row, j) : rows.data() + (t * s.columns + j) * s.bytes;
        std::memcpy(wanted.value(s, row, j), from, s.bytes);
      }
  }
  for (uint64_t row = 0; row < tensor.rows; row++)
    for (uint64_t j = 0; j < s.aligned(); j++)
      if (std::memcmp(wanted.value(s, row, j), tensor.value(s, row, j), s.bytes)) fail("a value differs");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  chance.seed(argc > 2 ? uint64_t(std::atoll(argv[2])) : 1);
  for (int i = 0; i < rounds; i++) {
    const Shared s;
    std::vector<Chunk> chunks;
    for (uint64_t n = 1 + below(CG_MAX_BATCH); n > 0; n--) chunks.emplace_back(s);
    Tensor tensor(s, chunks.size());
    Statuses statuses = decode(s, chunks, tensor);
    for (const auto& of_chunk : statuses)
      for (const int32_t status : of_chunk)
        if (status) fail("a tile was not decoded");
    check(s, chunks, tensor, statuses);
    digest.add(tensor.memory.data(), tensor.memory.size());

    Chunk& hurt = chunks[below(chunks.size())];
    const uint32_t which = uint32_t(below(kSections));
    Section& section = hurt.sections[which];
    damage(section.streams);
    if (below(4) == 0 && !section.offsets.empty()) section.offsets[below(section.offsets.size())] += 2 * below(40);
    hurt.place(which);
    Tensor again(s, chunks.size());
    statuses = decode(s, chunks, again);
    const uint32_t k = Chunk::digit_of(which);
    const bool used = !section.rows.empty() && k <= (which > 2 ? s.n_end_digits : which > 0 ? s.n_digits : 0);
    for (uint64_t tile = 0; used && tile < s.tiles(); tile++) {
      const uint64_t first = section.offsets[tile], last = section.offsets[tile + 1], size = section.streams.size();
      int32_t wanted = CG_BAD_ARGUMENT;
      if (first <= last && last <= size) {  // as cg_decode finds it, of this tile alone
        cg_section view = hurt.view_of(s, which);
        std::vector<uint64_t> offsets(s.tiles() + 1, first);
        for (uint64_t later = tile + 1; later < offsets.size(); later++) offsets[later] = last;
        Buffer<uint8_t> symbols(view.tokens * view.columns);
        std::vector<int32_t> found(s.tiles(), -1);
        if (cg_decode(&view, section.data->get(), size, offsets.data(), symbols.get(), found.data(), &kRuns[0])) fail("decode");
        wanted = found[tile];
      }
      int32_t& status = statuses[size_t(&hurt - chunks.data())][tile];
      if (wanted && status != wanted) fail("a batch finds other faults than decoding");
      digest.add(&status, sizeof status);
      status = CG_CORRUPT;  // its values mean nothing, found or not
    }
    check(s, chunks, again, statuses);
  }
  std::printf("%d rounds, %d back-ends, digest %016llx\n", rounds, int(kRuns.size()),
              static_cast<unsigned long long>(digest.value));
}
