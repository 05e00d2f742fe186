// Block sums of a device's memory, what a weight's checksum is made of (hf_cachegen/models/checksum.py has the definition).
//
// Notes:
// 1. A warp sums a block of words. A lane reads two words at a time, so that a warp reads 512 bytes in one access. The sums are
//    modulo 2^64 and so do not depend on the order.
// 2. The keys are the same for every block. They stay in the multiprocessor's first-level cache.
#include "launch.h"

using namespace cachegen;

namespace {

struct Sums {
  uint64_t words, products;
};

struct alignas(16) Pair {
  uint64_t first, second;
};

CACHEGEN_DEVICE void add(Sums& sums, uint64_t word, uint64_t key) {
  const uint64_t x = word ^ key;
  sums.words += word;
  sums.products += uint64_t(int64_t(int32_t(uint32_t(x))) * int64_t(int32_t(uint32_t(x >> 32))));
}

CACHEGEN_DEVICE Pair load_pair(const Pair* from) {
#if defined(__CUDA_ARCH__)
  const ulonglong2 both = __ldg(reinterpret_cast<const ulonglong2*>(from));
  return {both.x, both.y};
#else
  return *from;
#endif
}

// The last bytes of the memory, fewer than a pair, filled up with zeros.
CACHEGEN_DEVICE Pair partial(const uint8_t* from, uint64_t bytes) {
  Pair found = {0, 0};
  for (uint64_t i = 0; i < bytes; i++) {
    const uint64_t byte = uint64_t(from[i]) << 8 * (i % 8);
    (i < 8 ? found.first : found.second) |= byte;
  }
  return found;
}

// A block of `bytes` bytes.
CACHEGEN_DEVICE void sum_block(const Warp& warp, const uint8_t* data, uint64_t bytes, const uint64_t* keys, uint64_t* to) {
  const Pair* pairs = reinterpret_cast<const Pair*>(data);
  const Pair* pair_keys = reinterpret_cast<const Pair*>(keys);
  const uint64_t whole = bytes / sizeof(Pair), rest = bytes % sizeof(Pair);
  Warp::PerLane<Sums> lanes;
  warp.each([&](uint32_t lane) {
    Sums sums = {0, 0};
    for (uint64_t i = lane; i < whole; i += kWarpLanes) {
      const Pair pair = load_pair(pairs + i), key = load_pair(pair_keys + i);
      add(sums, pair.first, key.first);
      add(sums, pair.second, key.second);
    }
    if (rest > 0 && lane == 0) {
      const Pair pair = partial(data + whole * sizeof(Pair), rest);
      add(sums, pair.first, keys[2 * whole]);
      if (rest > 8) add(sums, pair.second, keys[2 * whole + 1]);
    }
    lanes[lane] = sums;
  });
  const uint64_t words = warp.sum([&](uint32_t lane) { return lanes[lane].words; });
  const uint64_t products = warp.sum([&](uint32_t lane) { return lanes[lane].products; });
  warp.once([&] {
    to[0] = words;
    to[1] = products;
  });
}

}  // namespace

int32_t cg_block_sums(const uint8_t* data, uint64_t bytes, const uint64_t* keys, uint64_t block_words, uint64_t* sums,
                      const cg_run* run) noexcept {
  if (run == nullptr || block_words == 0 || block_words > CG_MAX_COLUMNS || block_words % 2 != 0) return CG_BAD_ARGUMENT;
  if (bytes == 0) return CG_OK;
  if (data == nullptr || keys == nullptr || sums == nullptr) return CG_BAD_ARGUMENT;
  if ((uintptr_t(data) | uintptr_t(keys)) % sizeof(Pair) != 0) return CG_BAD_ARGUMENT;
  const uint64_t block_bytes = 8 * block_words, blocks = (bytes - 1) / block_bytes + 1;
  return for_each_warp(run, blocks, [=] CACHEGEN_LAMBDA(const Warp& warp, uint64_t i) {
    const uint64_t size = i + 1 < blocks ? block_bytes : bytes - i * block_bytes;
    sum_block(warp, data + i * block_bytes, size, keys, sums + 2 * i);
  });
}
