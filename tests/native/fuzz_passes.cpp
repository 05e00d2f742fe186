// The passes over values through the C ABI, under AddressSanitizer and UBSan: fuzz_passes ROUNDS SEED
//
// Any bytes are legal input here: values of any bits, symbols, contexts and bounds out of range. Every buffer is its own
// allocation of the exact size. Every back-end must give the same bytes; prints the number of rounds and of back-ends, and
// the digest.
#include "fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;

Bytes random_bytes(uint64_t n) {
  Bytes found(n);
  for (uint8_t& byte : found) byte = uint8_t(chance());
  return found;
}

std::unique_ptr<uint8_t[]> copy_of(const Bytes& bytes) { return std::move(exact(bytes)->data); }

void require(int32_t status) {
  if (status != CG_OK) fail("a pass refused its arguments");
}

struct Case {
  uint64_t tokens = below(20), columns = below(4) ? below(80) : 1000 + below(100), group = below(2) ? 2 + below(6) : 0;
  uint32_t dtype = uint32_t(below(3)), n_digits = uint32_t(below(3));
  uint64_t coded = group ? tokens - (tokens + group - 1) / group : tokens;
  uint64_t first = below(coded + 1), cells = coded * columns, blocks = (columns + CG_BLOCK_COLUMNS - 1) / CG_BLOCK_COLUMNS;
  Bytes values = random_bytes(tokens * columns * (dtype == CG_FLOAT32 ? 4 : 2));
  Bytes anchors = random_bytes(group ? (tokens + group - 1) / group * columns * 4 : 0);
  Bytes means = random_bytes(columns * 4), steps = random_bytes(columns * 4);
  Bytes symbols = random_bytes(cells), contexts = random_bytes(cells), low = random_bytes(3 * columns);
  Bytes high = random_bytes(3 * columns);
  bool by_context = below(2);
};

// Everything that the passes write.
std::vector<Bytes> outputs(const Case& c, const cg_run& run) {
  std::vector<Bytes> found;
  const auto values = copy_of(c.values), anchors = copy_of(c.anchors), means = copy_of(c.means), steps = copy_of(c.steps);
  const auto symbols = copy_of(c.symbols), contexts = copy_of(c.contexts), low = copy_of(c.low), high = copy_of(c.high);
  const auto floats = [](const std::unique_ptr<uint8_t[]>& p) { return reinterpret_cast<const float*>(p.get()); };
  const cg_chunk chunk = {c.tokens, c.columns, c.group, c.group ? floats(anchors) : nullptr, floats(means), floats(steps),
                          c.dtype};
  const auto keep = [&](std::unique_ptr<uint8_t[]>& p, uint64_t n) { found.emplace_back(p.get(), p.get() + n); };
  const auto zeros = [](uint64_t n) { return std::unique_ptr<uint8_t[]>(new uint8_t[n]()); };

  auto total = zeros(c.columns * 8), squares = zeros(c.columns * 8);
  require(cg_moments(&chunk, values.get(), c.first, c.coded, reinterpret_cast<double*>(total.get()),
                     reinterpret_cast<double*>(squares.get()), &run));  // not kept: NaNs differ in their bits

  auto base = zeros(c.cells), digits = zeros(c.n_digits * c.cells), signs = zeros(c.n_digits * c.cells);
  auto wide = zeros(c.blocks * c.coded);
  require(cg_quantise(&chunk, values.get(), c.n_digits, base.get(), digits.get(), signs.get(), wide.get(), &run));
  keep(wide, c.blocks * c.coded);
  for (uint64_t i = 0; i < c.coded; i++)  // blocks with a wide symbol hold nothing that counts
    for (uint64_t block = 0; block < c.blocks; block++)
      if (wide[block * c.coded + i])
        for (uint64_t j = block * CG_BLOCK_COLUMNS; j < c.columns && j < (block + 1) * CG_BLOCK_COLUMNS; j++) {
          base[i * c.columns + j] = 0;
          for (uint32_t k = 0; k < c.n_digits; k++)
            digits[k * c.cells + i * c.columns + j] = signs[k * c.cells + i * c.columns + j] = 0;
        }
  keep(base, c.cells), keep(digits, c.n_digits * c.cells), keep(signs, c.n_digits * c.cells);

  const uint8_t* finer[2] = {symbols.get(), contexts.get()};
  auto restored = copy_of(c.values);
  require(cg_restore(&chunk, c.first, c.coded, symbols.get(), finer, c.n_digits, restored.get(), &run));
  if (c.dtype != CG_FLOAT32) keep(restored, c.values.size());  // a NaN of 32 bits keeps bits of its operands

  auto known = zeros(c.cells), inside = zeros(c.cells), changed = zeros(c.blocks * c.coded);
  require(cg_contexts(symbols.get(), 128, c.by_context ? contexts.get() : nullptr, c.cells, known.get(), &run));
  keep(known, c.cells);
  require(cg_clamp(symbols.get(), c.by_context ? contexts.get() : nullptr, c.coded, c.columns, low.get(), high.get(),
                   inside.get(), changed.get(), &run));
  keep(inside, c.cells), keep(changed, c.blocks * c.coded);
  auto bytes = zeros(c.columns * 256 * 4), bins = zeros(c.columns * CG_DIGIT_BINS * 4);
  require(cg_count(symbols.get(), nullptr, c.coded, c.columns, 256, reinterpret_cast<int32_t*>(bytes.get()), &run));
  require(cg_count(symbols.get(), c.by_context ? contexts.get() : nullptr, c.coded, c.columns, CG_DIGIT_BINS,
                   reinterpret_cast<int32_t*>(bins.get()), &run));
  keep(bytes, c.columns * 256 * 4), keep(bins, c.columns * CG_DIGIT_BINS * 4);
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  chance.seed(argc > 2 ? uint64_t(std::atoll(argv[2])) : 1);
  for (int i = 0; i < rounds; i++) {
    const Case sample;
    const std::vector<Bytes> expected = outputs(sample, kRuns[0]);
    for (const Bytes& bytes : expected) digest.add(bytes.data(), bytes.size());
    for (const cg_run& run : kRuns) {
      const std::vector<Bytes> found = outputs(sample, run);
      for (size_t k = 0; k < found.size(); k++)
        if (found[k] != expected[k]) {
          std::fprintf(stderr, "fuzz_passes: round %d, output %d of instruction set %d differs\n", i, int(k), int(run.isa));
          return 1;
        }
    }
  }
  std::printf("%d rounds, %d back-ends, digest %016llx\n", rounds, int(kRuns.size()),
              static_cast<unsigned long long>(digest.value));
}
