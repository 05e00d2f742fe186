// Reading the parts of a batch's chunks through the C ABI, under AddressSanitizer and UBSan: fuzz_parts ROUNDS SEED
//
// The jobs of sound parts must have what was written into them. Damaged parts may be refused. The streams of all others must lie
// within the parts and within `to`, for which the room that the contract names must do. Prints the number of rounds and of
// back-ends, and the digest.
#include "../../cuda_ext/include/cachegen_parts.h"
#include "fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;

template <class T>
void append(Bytes& to, T value) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), from, from + sizeof value);
}

struct Written {
  uint64_t at, bytes;  // of the streams in their segment
};

struct Parts {
  uint64_t columns = 1 + below(700), chunks = 1 + below(CG_MAX_BATCH), anchor_bytes = below(2) ? 2 * (1 + below(9)) : 0;
  uint32_t n_digits = uint32_t(below(3)), n_end_digits = uint32_t(below(3));
  uint64_t tiles = (columns + 255) / 256, exceptions = 0, wide = 0;
  std::vector<cg_job> jobs = std::vector<cg_job>(chunks * (anchor_bytes ? 2 : 1));
  std::vector<Bytes> segments = std::vector<Bytes>((1 + n_digits) * chunks);
  std::vector<std::pair<const cg_streams*, Written>> expected;
  std::vector<uint64_t> segment_of;

  Parts() {
    for (uint64_t i = 0; i < chunks; i++) {
      const uint64_t anchors = anchor_bytes ? below(4) : 0, coded = below(40);
      cg_job& job = jobs[i];
      job.tokens = anchors + coded;
      job.first = below(2) ? 0 : below(coded + 1);
      job.last = below(2) ? coded : job.first + below(coded - job.first + 1);
      const uint64_t middle = job.last - job.first;
      if (anchor_bytes) {
        jobs[chunks + i].tokens = jobs[chunks + i].last = anchors;
        for (uint64_t k = 0; k < anchors * anchor_bytes; k++) segments[i].push_back(uint8_t(below(256)));
        section(i, anchors, 256, &jobs[chunks + i].base);
      }
      section(i, coded, 0, &job.base);
      for (uint32_t k = 0; k < n_end_digits; k++) section(i, coded - middle, 3, job.end_digits + k);
      for (uint32_t k = 0; k < n_digits; k++) section((k + 1) * chunks + i, middle, 3, job.digits + k);
    }
  }

  // symbols: of its tables; 0: some exceptions may be wide.
  void section(uint64_t segment, uint64_t tokens, int32_t symbols, const cg_streams* streams) {
    Bytes& to = segments[segment];
    std::vector<uint32_t> positions;
    for (uint64_t n = tokens && below(3) == 0 ? below(9) : 0; n > 0; n--) positions.push_back(uint32_t(below(tokens * columns)));
    std::sort(positions.begin(), positions.end());
    positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
    append(to, uint32_t(positions.size()));
    if (tokens == 0) return;
    Written own = {0, 0};
    for (uint64_t tile = 0; tile < tiles; tile++) {
      const uint32_t size = uint32_t(2 * below(20));
      append(to, size);
      own.bytes += size;
    }
    for (const uint32_t position : positions) {
      const int32_t index = symbols ? int32_t(below(uint64_t(symbols))) : int32_t(below(600)) - 150;
      append(to, position);
      append(to, index);
      wide += index < 0 || index > 255;
    }
    exceptions += positions.size();
    own.at = to.size();
    for (uint64_t k = 0; k < own.bytes; k++) to.push_back(uint8_t(below(256)));
    expected.push_back({streams, own});
    segment_of.push_back(segment);
  }
};

void require(bool sound, const char* what) {
  if (!sound) fail(what);
}

void round() {
  Parts parts;
  const bool damaged = below(2), copied = below(2);
  if (damaged) {
    Bytes& one = parts.segments[below(parts.segments.size())];
    if (below(2)) one.resize(below(one.size() + 1));
    if (below(2)) damage(one);
  }
  std::vector<std::unique_ptr<Buffer<uint8_t>>> kept;
  std::vector<cg_segment> segments;
  uint64_t room = parts.chunks * CG_PARTS_SECTIONS * (16 + 8 * parts.tiles) + parts.jobs.size() * (8 + 4 * parts.tiles);
  for (const Bytes& own : parts.segments) {
    kept.push_back(exact(own));
    segments.push_back({kept.back()->get(), own.size()});
    room += own.size();
  }
  Buffer<uint8_t> to(room);
  Buffer<cg_piece> pieces(CG_PARTS_SECTIONS * parts.chunks);
  const cg_parts given = {parts.columns, parts.anchor_bytes, parts.chunks, parts.n_digits, parts.n_end_digits, segments.data()};
  const uint64_t address = uint64_t(uintptr_t(to.get()));
  cg_staged staged;
  const int32_t status = cg_read_parts(&given, parts.jobs.data(), to.get(), to.size, address, copied ? pieces.get() : nullptr,
                                       &staged, kRuns.data());
  require(status == CG_OK, "the call failed");
  digest.add(&staged.status, sizeof staged.status);
  if (staged.status != CG_OK) return require(damaged, "sound parts were refused");
  require(staged.used <= to.size, "more was used than there is");
  for (uint64_t i = 0; i < staged.pieces; i++) {
    require(pieces.get()[i].at + pieces.get()[i].bytes <= staged.used, "a piece lies outside");
    std::memcpy(to.get() + pieces.get()[i].at, pieces.get()[i].from, pieces.get()[i].bytes);
  }
  uint64_t patches = 0, wide = 0;
  for (uint64_t i = 0; i < parts.chunks; i++) wide += staged.wide[i];
  for (const cg_job& job : parts.jobs) {
    patches += job.n_patches;
    for (uint64_t tile = 0; job.patches && tile < parts.tiles; tile++)
      for (uint32_t k = job.patch_offsets[tile]; k < job.patch_offsets[tile + 1]; k++) {
        require(k == job.patch_offsets[tile] || job.patches[k - 1] >> 32 <= job.patches[k] >> 32, "patches out of order");
        digest.add(job.patches + k, sizeof *job.patches);
      }
  }
  for (size_t i = 0; i < parts.expected.size(); i++) {
    const auto& [streams, own] = parts.expected[i];
    for (uint64_t k = 0; k < streams->bytes; k++) digest.add(streams->data + k, 1);
    require(streams->offsets[0] == 0 && streams->offsets[parts.tiles] == streams->bytes, "offsets");
    if (damaged) continue;
    require(streams->bytes == own.bytes, "a section has another size");
    require(!std::memcmp(streams->data, parts.segments[parts.segment_of[i]].data() + own.at, own.bytes), "other streams");
  }
  if (!damaged) require(patches == parts.exceptions && wide == parts.wide, "exceptions were lost");
}

}  // namespace

int main(int, char** arguments) {
  const uint64_t rounds = uint64_t(std::atoll(arguments[1]));
  chance.seed(uint64_t(std::atoll(arguments[2])));
  for (uint64_t i = 0; i < rounds; i++) round();
  std::printf("%llu rounds, %zu back-ends, digest %016llx\n", static_cast<unsigned long long>(rounds), kRuns.size(),
              static_cast<unsigned long long>(digest.value));
}
