// Decoding into place through the C ABI, under AddressSanitizer and UBSan: fuzz_into ROUNDS SEED
//
// What lands in a tensor [heads, tokens, head_dim] must be what cg_decode and cg_restore make of the same streams, to the
// bit, and nothing else may change there. Sections cover all of a chunk's columns or some; damaged streams must give the
// faults that cg_decode finds. Prints the number of rounds and of back-ends, and the digest.
#include "fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;

uint64_t size_of(uint32_t dtype) { return dtype == CG_UINT8 ? 1 : dtype == CG_FLOAT32 ? 4 : 2; }

std::vector<float> floats(uint64_t n, float low, float step) {
  std::vector<float> found(n);
  for (float& x : found) x = low + step * float(below(1000));
  return found;
}

struct Case {
  uint64_t columns = below(4) ? 1 + below(600) : 1 + below(20), group = below(2) ? 2 + below(6) : 0;
  uint64_t chunk_tokens = 1 + below(40), coded = group ? chunk_tokens - (chunk_tokens + group - 1) / group : chunk_tokens;
  uint64_t first = below(coded + 1), tokens = below(coded - first + 1), row = below(5);
  uint64_t gap_at = below(2) ? ~uint64_t(0) : below(tokens + 1), gap = below(coded - first - tokens + 1);
  uint64_t head_dim = std::vector<uint64_t>{1, 3, 8, 64, 128}[below(5)], heads = (columns + head_dim - 1) / head_dim;
  uint32_t dtype = uint32_t(below(4)), n_coarser = uint32_t(below(3));
  std::vector<float> means = floats(columns, -5, 1.0f / 64), steps = floats(columns, 0.125f, 1.0f / 32);
  std::vector<float> anchors = floats(group ? (chunk_tokens + group - 1) / group * columns : 0, -9, 1.0f / 32);
  std::vector<uint32_t> live, dead;  // columns
  Bytes base, digits, ids, streams;
  std::vector<uint64_t> offsets;
  std::unique_ptr<Buffer<uint8_t>> tables;

  Case() {
    const uint64_t share = below(3) ? 1000 : below(1000);
    for (uint32_t c = 0; c < columns; c++) (below(1000) < share ? live : dead).push_back(c);
    base.resize(coded * columns), digits.resize(coded * columns);
    for (uint8_t& x : base) x = uint8_t(below(3) ? 126 + below(5) : below(256));
    for (uint8_t& x : digits) x = uint8_t(below(3));
  }

  uint64_t coded_row(uint64_t t) const { return first + t + (t >= gap_at ? gap : 0); }
  cg_chunk chunk() const {
    return {chunk_tokens, columns, group, group ? anchors.data() : nullptr, means.data(), steps.data(), dtype};
  }
  uint64_t memory() const { return heads * (row + chunk_tokens) * head_dim * size_of(dtype); }
  cg_place place(const uint8_t* tensor, uint64_t column) const {
    const uint64_t element = column / head_dim * (row + chunk_tokens) * head_dim + column % head_dim;
    return {uint64_t(uintptr_t(tensor)) + element * size_of(dtype), head_dim * size_of(dtype)};
  }
  cg_section section(const uint8_t* table_ids) const {
    const uint64_t n_ids = n_coarser ? 3 : 1;
    return {tokens, live.size(), n_ids, table_ids, nullptr, tables->get(), tables->size, 0};
  }
};

uint8_t context_of(const Case& c, uint64_t cell) {
  int symbol = c.base[cell] - 128;
  if (c.n_coarser > 1) symbol = 3 * symbol + c.digits[cell] - 1;
  return uint8_t(symbol > 0 ? 1 : symbol < 0 ? 2 : 0);
}

// Draws tables, ids and symbols, encodes them, and returns the indices of all columns [tokens, columns].
Bytes draw(Case& c, Bytes* contexts) {
  const uint32_t bits = 10 + uint32_t(below(3)), n_tables = 1 + uint32_t(below(6));
  // Digits are three, but nothing keeps their tables from having more.
  const uint32_t n_symbols = c.n_coarser ? 3 + uint32_t(below(8) ? 0 : below(20)) : 2 + uint32_t(below(255));
  const std::vector<uint16_t> rows = random_tables(n_tables, n_symbols, bits);
  c.tables = built(rows, n_tables, n_symbols, bits);
  const uint64_t n_ids = c.n_coarser ? 3 : 1, width = c.live.size();
  c.ids.resize(width * n_ids);
  for (uint8_t& id : c.ids) id = uint8_t(below(n_tables));
  Bytes all(c.tokens * c.columns, c.n_coarser ? 1 : 128), symbols(c.tokens * width);
  contexts->assign(c.n_coarser ? c.tokens * width : 0, 0);
  for (uint64_t t = 0; t < c.tokens; t++)
    for (uint64_t j = 0; j < width; j++) {
      const uint64_t cell = t * c.columns + c.live[j], at = t * width + j;
      if (c.n_coarser) (*contexts)[at] = context_of(c, c.coded_row(t) * c.columns + c.live[j]);
      const uint16_t* table = rows.data() + c.ids[j * n_ids + (c.n_coarser ? (*contexts)[at] : 0)] * uint64_t(n_symbols);
      do all[cell] = symbols[at] = uint8_t(below(n_symbols));
      while (table[symbols[at]] == 0);
    }
  cg_section section = c.section(c.ids.data());
  section.contexts = c.n_coarser ? contexts->data() : nullptr;
  c.streams = encoded(section, symbols.data(), kRuns[0], &c.offsets);
  return all;
}

// What the tensor must hold: `indices` restored, in place; the rest as it was.
Bytes expected(const Case& c, const Bytes& indices) {
  Bytes tensor(c.memory(), 0xab), rows(c.chunk_tokens * c.columns * size_of(c.dtype)), all(c.coded * c.columns);
  for (uint64_t i = 0; i < indices.size(); i++) all[c.coded_row(i / c.columns) * c.columns + i % c.columns] = indices[i];
  const uint8_t* one = c.n_coarser > 1 ? c.digits.data() : all.data();
  const uint8_t* finer[2] = {one, all.data()};
  const cg_chunk chunk = c.chunk();
  if (c.dtype != CG_UINT8 && cg_restore(&chunk, 0, c.coded, c.n_coarser ? c.base.data() : all.data(), finer, c.n_coarser,
                                        rows.data(), &kRuns[0]))
    fail("restore");
  for (uint64_t t = 0; t < c.tokens; t++)
    for (uint64_t column = 0; column < c.columns; column++) {
      const uint64_t i = c.coded_row(t), r = c.group ? i + i / (c.group - 1) + 1 : i, bytes = size_of(c.dtype);
      const cg_place place = c.place(tensor.data(), column);
      const uint8_t* from = c.dtype == CG_UINT8 ? indices.data() + t * c.columns + column
                                                : rows.data() + (r * c.columns + column) * bytes;
      std::memcpy(reinterpret_cast<uint8_t*>(uintptr_t(place.address + (c.row + r) * place.stride)), from, bytes);
    }
  return tensor;
}

// A matrix [coded rows, columns] as cg_output has what is coarser; what pads the last block does not matter.
std::unique_ptr<Buffer<uint8_t>> in_blocks(const Case& c, const Bytes& matrix) {
  auto found = std::make_unique<Buffer<uint8_t>>((c.columns + 255) / 256 * c.coded * 256);
  std::fill_n(found->get(), found->size, uint8_t(0xcd));
  for (uint64_t t = 0; t < c.coded; t++)
    for (uint64_t j = 0; j < c.columns; j++)
      found->get()[(j / 256 * c.coded + t) * 256 + j % 256] = matrix[t * c.columns + j];
  return found;
}

struct Output {  // cg_output with every array in an exact buffer
  Output(const Case& c, const uint8_t* tensor)
      : places(c.columns), live(exact(c.live)), dead(exact(c.dead)), base(in_blocks(c, c.base)), digits(in_blocks(c, c.digits)),
        chunk(c.chunk()) {
    for (uint64_t i = 0; i < c.columns; i++) places.get()[i] = c.place(tensor, i);
    view = {&chunk, c.first, c.gap_at, c.gap, c.row, places.get(), nullptr, {base->get(), digits->get()}, c.n_coarser};
  }
  const cg_output* of(const Buffer<uint32_t>* columns) {
    view.columns = columns ? columns->get() : nullptr;
    return &view;
  }
  Buffer<cg_place> places;
  std::unique_ptr<Buffer<uint32_t>> live, dead;
  std::unique_ptr<Buffer<uint8_t>> base, digits;
  cg_chunk chunk;
  cg_output view;
};

std::vector<int32_t> decode_into(const Case& c, const cg_run& run, Bytes* tensor) {
  Output output(c, tensor->data());
  const auto ids = exact(c.ids), streams = exact(c.streams);
  const auto offsets = exact(c.offsets);
  const cg_section section = c.section(ids->get());
  std::vector<int32_t> status(tiles_of(section), -1);
  const bool all = c.dead.empty() && below(2);
  if (cg_decode_into(&section, streams->get(), streams->size, offsets->get(), output.of(all ? nullptr : output.live.get()),
                     status.data(), &run))
    fail("decode_into");
  if (cg_fill_into(c.tokens, c.dead.size(), output.of(output.dead.get()), &run)) fail("fill_into");
  return status;
}

void patch_into(const Case& c, const cg_run& run, Bytes* indices, Bytes* tensor) {
  std::vector<uint64_t> positions;
  std::vector<int32_t> found;
  for (uint64_t n = below(20); n > 0 && !indices->empty(); n--) {
    positions.push_back(below(indices->size()));
    found.push_back(int32_t(below(c.n_coarser ? 3 : 256)));
    (*indices)[positions.back()] = uint8_t(found.back());
  }
  positions.push_back(indices->size() + below(9));  // outside: left out
  found.push_back(0);
  Output output(c, tensor->data());
  const auto where = exact(positions);
  const auto what = exact(found);
  if (cg_patch_into(c.tokens, where->get(), what->get(), where->size, output.of(nullptr), &run)) fail("patch_into");
}

std::vector<int32_t> faults(const Case& c, const Bytes& contexts, const cg_run& run) {
  const auto ids = exact(c.ids), known = exact(contexts), streams = exact(c.streams);
  const auto offsets = exact(c.offsets);
  cg_section section = c.section(ids->get());
  section.contexts = c.n_coarser ? known->get() : nullptr;
  std::vector<int32_t> status(tiles_of(section), -1);
  Buffer<uint8_t> symbols(c.tokens * c.live.size());
  if (cg_decode(&section, streams->get(), streams->size, offsets->get(), symbols.get(), status.data(), &run)) fail("decode");
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  chance.seed(argc > 2 ? uint64_t(std::atoll(argv[2])) : 1);
  for (int i = 0; i < rounds; i++) {
    Case c;
    Bytes contexts;
    Bytes indices = draw(c, &contexts);
    const auto state = chance;
    for (const cg_run& run : kRuns) {
      chance = state;  // every back-end has the same luck
      Bytes tensor(c.memory(), 0xab), patched = indices;
      for (const int32_t status : decode_into(c, run, &tensor))
        if (status) fail("a tile was not decoded");
      if (tensor != expected(c, patched)) fail("decoding into place gives other values than decoding and restoring");
      patch_into(c, run, &patched, &tensor);
      if (tensor != expected(c, patched)) fail("a patched value differs");
      if (&run == &kRuns[0]) digest.add(tensor.data(), tensor.size());
    }
    damage(c.streams);
    if (below(2) && !c.ids.empty()) damage(c.ids);
    const auto later = chance;
    for (const cg_run& run : kRuns) {
      chance = later;
      Bytes tensor(c.memory(), 0xab);
      const std::vector<int32_t> found = decode_into(c, run, &tensor);
      if (found != faults(c, contexts, run)) fail("decoding into place finds other faults than decoding");
      if (&run == &kRuns[0]) digest.add(found.data(), found.size() * sizeof found[0]);
    }
  }
  std::printf("%d rounds, %d back-ends, digest %016llx\n", rounds, int(kRuns.size()),
              static_cast<unsigned long long>(digest.value));
}
