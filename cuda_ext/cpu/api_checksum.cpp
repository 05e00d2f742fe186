// Block sums of raw memory, what a weight's checksum is made of (hf_cachegen/models/checksum.py has the definition).
//
// Every word is read once and costs one multiplication, so that memory is the limit on one core. The hardware fetches
// ahead within a page of 4 KiB alone, which left a third of the memory's speed unused: so the vector loops fetch AHEAD
// bytes ahead themselves. The vector code is here, not in the back-ends: it shares nothing with them.
#include <string.h>

#include "backend.h"
#include "threads.h"

#if CACHEGEN_X86
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own intrinsics, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

using namespace cachegen;

namespace {

struct Sums {
  uint64_t words, products;
};

uint64_t product(uint64_t x) { return uint64_t(int64_t(int32_t(x)) * int64_t(int32_t(x >> 32))); }

Sums scalar(const uint8_t* data, const uint64_t* keys, uint64_t count) {
  Sums sums{0, 0};
  for (uint64_t i = 0; i < count; i++) {
    uint64_t word;
    memcpy(&word, data + 8 * i, 8);
    sums.words += word;
    sums.products += product(word ^ keys[i]);
  }
  return sums;
}

#if CACHEGEN_X86
constexpr uint64_t AHEAD = 4096, LINE = 64;

// Addresses after the end of the data are only hinted at: a prefetch reads nothing and never faults.
inline void fetch_ahead(const uint8_t* data, uint64_t at) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(data) + at + AHEAD), _MM_HINT_T0);
}

__attribute__((target("avx2"))) Sums avx2(const uint8_t* data, const uint64_t* keys, uint64_t count) {
  __m256i words[2] = {}, products[2] = {};
  uint64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    fetch_ahead(data, 8 * i);
    for (int half = 0; half < 2; half++) {
      const uint64_t at = i + 4 * half;
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 8 * at));
      const __m256i x = _mm256_xor_si256(word, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + at)));
      words[half] = _mm256_add_epi64(words[half], word);
      products[half] = _mm256_add_epi64(products[half], _mm256_mul_epi32(x, _mm256_srli_epi64(x, 32)));
    }
  }
  uint64_t lanes[2][4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes[0]), _mm256_add_epi64(words[0], words[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes[1]), _mm256_add_epi64(products[0], products[1]));
  Sums sums = scalar(data + 8 * i, keys + i, count - i);
  for (int lane = 0; lane < 4; lane++) {
    sums.words += lanes[0][lane];
    sums.products += lanes[1][lane];
  }
  return sums;
}

__attribute__((target("avx512f"))) Sums avx512(const uint8_t* data, const uint64_t* keys, uint64_t count) {
  __m512i words[2] = {}, products[2] = {};
  uint64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    fetch_ahead(data, 8 * i);
    fetch_ahead(data, 8 * i + LINE);
    for (int half = 0; half < 2; half++) {
      const uint64_t at = i + 8 * half;
      const __m512i word = _mm512_loadu_si512(data + 8 * at);
      const __m512i x = _mm512_xor_si512(word, _mm512_loadu_si512(keys + at));
      words[half] = _mm512_add_epi64(words[half], word);
      products[half] = _mm512_add_epi64(products[half], _mm512_mul_epi32(x, _mm512_srli_epi64(x, 32)));
    }
  }
  Sums sums = scalar(data + 8 * i, keys + i, count - i);
  sums.words += uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(words[0], words[1])));
  sums.products += uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(products[0], products[1])));
  return sums;
}
#endif

using Function = Sums (*)(const uint8_t*, const uint64_t*, uint64_t);

Function function_for([[maybe_unused]] const cg_run* run) {
#if CACHEGEN_X86
  if (run->isa != CG_SCALAR && run->isa != CG_AVX2 && backend_of(CG_AVX512) != nullptr) return avx512;
  if (run->isa != CG_SCALAR && backend_of(CG_AVX2) != nullptr) return avx2;
#endif
  return scalar;
}

}  // namespace

int32_t cg_block_sums(const uint8_t* data, uint64_t bytes, const uint64_t* keys, uint64_t block_words, uint64_t* sums,
                      const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || block_words == 0 || block_words > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (bytes == 0) return CG_OK;
  if (data == nullptr || keys == nullptr || sums == nullptr) return CG_BAD_ARGUMENT;
  const Function function = function_for(run);
  const uint64_t block_bytes = 8 * block_words, blocks = (bytes - 1) / block_bytes + 1;
  for_each(blocks, bytes, run->threads, [&](uint64_t i) {
    const uint64_t size = i + 1 < blocks ? block_bytes : bytes - i * block_bytes;
    const uint8_t* from = data + i * block_bytes;
    Sums found = function(from, keys, size / 8);
    if (size % 8 != 0) {  // the last word, filled up with zeros
      uint64_t word = 0;
      memcpy(&word, from + size / 8 * 8, size % 8);
      const Sums last = scalar(reinterpret_cast<const uint8_t*>(&word), keys + size / 8, 1);
      found.words += last.words;
      found.products += last.products;
    }
    sums[2 * i] = found.words;
    sums[2 * i + 1] = found.products;
  });
  return CG_OK;
}
