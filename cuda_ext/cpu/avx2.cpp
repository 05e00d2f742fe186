// AVX2: 8 lanes a vector.
#include "backend.h"

#if CACHEGEN_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,popcnt")
#endif

#define CACHEGEN_VECTOR_BYTES 32
#include "heads.h"
#include "into.h"
#include "planes.h"
#include "source.h"
#include "sparse.h"
#include "vector_encode.h"
#include "vector_tiles.h"

namespace cachegen {
namespace {

// By a mask of lanes: from[j] is the lane that is j-th among those of the mask, and to[lane] its number there.
struct LaneOrders {
  uint8_t from[256][8] = {}, to[256][8] = {};

  constexpr LaneOrders() {
    for (uint32_t mask = 0; mask < 256; mask++)
      for (uint32_t lane = 0, n = 0; lane < 8; lane++) {
        to[mask][lane] = uint8_t(n);
        if (mask >> lane & 1) from[mask][n++] = uint8_t(lane);
      }
  }
};
alignas(64) constexpr LaneOrders kOrders;

struct Avx2 {
  using Int = __m256i;
  static constexpr uint32_t kWidth = 8;

  static CACHEGEN_HD Int all(uint32_t x) { return _mm256_set1_epi32(int32_t(x)); }
  static CACHEGEN_HD Int load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
  static CACHEGEN_HD void store(uint32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<Int*>(p), x); }
  static CACHEGEN_HD Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static CACHEGEN_HD Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static CACHEGEN_HD Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static CACHEGEN_HD Int smaller(Int a, Int b) { return _mm256_min_epu32(a, b); }
  static CACHEGEN_HD Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
  static CACHEGEN_HD Int either(Int a, Int b) { return _mm256_or_si256(a, b); }
  static CACHEGEN_HD Int left(Int x, uint32_t bits) { return _mm256_slli_epi32(x, int32_t(bits)); }
  static CACHEGEN_HD Int right(Int x, uint32_t bits) { return _mm256_srli_epi32(x, int32_t(bits)); }
  static CACHEGEN_HD Int left_by(Int x, Int bits) { return _mm256_sllv_epi32(x, bits); }
  static CACHEGEN_HD Int right_by(Int x, Int bits) { return _mm256_srlv_epi32(x, bits); }
  static CACHEGEN_HD Int gather(const uint32_t* p, Int i) {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), i, 4);
  }
  static CACHEGEN_HD Int gather8(const uint32_t* p, Int i) {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), i, 8);
  }
  static CACHEGEN_HD Int choose(Int condition, Int yes, Int no) { return _mm256_blendv_epi8(no, yes, condition); }
  static CACHEGEN_HD Int at_least(Int a, Int b) { return _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a); }
  static CACHEGEN_HD Int add_where(Int condition, Int a, Int b) { return add(a, both(condition, b)); }
  static CACHEGEN_HD uint32_t mask(Int x) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }
  static CACHEGEN_HD Int where_bit(Int x, uint32_t bit, Int yes, Int no) {
    const Int sign = left(x, 31 - bit);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), _mm256_castsi256_ps(sign)));
  }
  static CACHEGEN_HD Int is_zero(Int x) { return _mm256_cmpeq_epi32(x, _mm256_setzero_si256()); }
  static CACHEGEN_HD bool any(Int x) { return _mm256_testz_si256(x, x) == 0; }

  // x / y, or one less, for x < 2^31 and x / y < 2^21: see kBelow.
  static CACHEGEN_HD Int quotient(Int x, Int y) {
    const __m256 about = _mm256_div_ps(_mm256_cvtepi32_ps(x), _mm256_cvtepi32_ps(y));
    return _mm256_cvttps_epi32(_mm256_mul_ps(about, _mm256_set1_ps(kBelow)));
  }

  static CACHEGEN_HD Int multiply_high(Int a, Int b) {
    const Int even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
    const Int odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    return _mm256_blend_epi32(even, odd, 0xaa);
  }

  // 8 bytes a lane, as two vectors of their halves.
  static CACHEGEN_HD void load_halves(const uint8_t* p, Int& low, Int& high) {
    const __m256 a = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const Int*>(p)));
    const __m256 b = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const Int*>(p + 32)));
    low = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
    high = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
  }
  // The same, the last lane first.
  static CACHEGEN_HD void load_halves_back(const uint8_t* p, Int& low, Int& high) {
    const __m256 a = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const Int*>(p)));
    const __m256 b = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const Int*>(p + 32)));
    low = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(b, a, 0x22)), 0x72);
    high = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(b, a, 0x77)), 0x72);
  }
  static CACHEGEN_HD void store_halves(uint8_t* p, Int low, Int high) {
    const Int a = _mm256_unpacklo_epi32(low, high), b = _mm256_unpackhi_epi32(low, high);
    _mm256_storeu_si256(reinterpret_cast<Int*>(p), _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(reinterpret_cast<Int*>(p + 32), _mm256_permute2x128_si256(a, b, 0x31));
  }
  static CACHEGEN_HD Int order(const uint8_t* lanes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
  }

  // States below kMinState take the next words, in lane order.
  static CACHEGEN_HD Int refill(Int x, const uint8_t*& at) {
    const Int low = _mm256_cmpgt_epi32(all(kMinState), x);  // signed: states are below 2^31
    const uint32_t lanes = mask(low);
    const Int words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    at += kWordBytes * unsigned(__builtin_popcount(lanes));
    return choose(low, either(left(x, kWordBits), _mm256_permutevar8x32_epi32(words, order(kOrders.to[lanes]))), x);
  }

  // States from `limit` (0 to 2^31) on give a word, in the order of the vector, to `at`.
  static CACHEGEN_HD Int give(Int x, Int limit, uint8_t*& at) {
    const Int full = _mm256_cmpgt_epi32(x, subtract(limit, all(1)));
    const uint32_t lanes = mask(full);
    const Int words = _mm256_permutevar8x32_epi32(both(x, all(0xffff)), order(kOrders.from[lanes]));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), packed);
    at += kWordBytes * unsigned(__builtin_popcount(lanes));
    return choose(full, right(x, kWordBits), x);
  }
};

}  // namespace

const Backend kAvx2 = {decode_tiles<Avx2, 2>, 2,    open_chain<Avx2>, encode_rows<Avx2>, store_stream, passes, contexts, clamp,
                      count_digits,           into, rows_into, run_contexts, levels_into, levels_contexts, source_passes, plane_passes, heads_into, multiply_sparse};

}  // namespace cachegen

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
