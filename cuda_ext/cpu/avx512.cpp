// AVX-512 (F, BW, DQ, VL): 16 lanes a vector.
#include "backend.h"

#if CACHEGEN_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own intrinsics, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define CACHEGEN_VECTOR_BYTES 64
#include "heads.h"
#include "into.h"
#include "planes.h"
#include "source.h"
#include "sparse.h"
#include "vector_encode.h"
#include "vector_tiles.h"

namespace cachegen {
namespace {

struct Avx512 {
  using Int = __m512i;
  static constexpr uint32_t kWidth = 16;

  static CACHEGEN_HD Int all(uint32_t x) { return _mm512_set1_epi32(int32_t(x)); }
  static CACHEGEN_HD Int load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static CACHEGEN_HD void store(uint32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static CACHEGEN_HD Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static CACHEGEN_HD Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static CACHEGEN_HD Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static CACHEGEN_HD Int smaller(Int a, Int b) { return _mm512_min_epu32(a, b); }
  static CACHEGEN_HD Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
  static CACHEGEN_HD Int either(Int a, Int b) { return _mm512_or_si512(a, b); }
  static CACHEGEN_HD Int left(Int x, uint32_t bits) { return _mm512_slli_epi32(x, bits); }
  static CACHEGEN_HD Int right(Int x, uint32_t bits) { return _mm512_srli_epi32(x, bits); }
  static CACHEGEN_HD Int left_by(Int x, Int bits) { return _mm512_sllv_epi32(x, bits); }
  static CACHEGEN_HD Int right_by(Int x, Int bits) { return _mm512_srlv_epi32(x, bits); }
  static CACHEGEN_HD Int gather(const uint32_t* p, Int i) { return _mm512_i32gather_epi32(i, p, 4); }
  static CACHEGEN_HD Int gather8(const uint32_t* p, Int i) { return _mm512_i32gather_epi32(i, p, 8); }
  static CACHEGEN_HD Int where_bit(Int x, uint32_t bit, Int yes, Int no) {
    return _mm512_mask_mov_epi32(no, _mm512_test_epi32_mask(x, all(1u << bit)), yes);
  }
  static CACHEGEN_HD __mmask16 at_least(Int a, Int b) { return _mm512_cmpge_epu32_mask(a, b); }
  static CACHEGEN_HD Int choose(__mmask16 condition, Int yes, Int no) { return _mm512_mask_mov_epi32(no, condition, yes); }
  static CACHEGEN_HD Int add_where(__mmask16 condition, Int a, Int b) { return _mm512_mask_add_epi32(a, condition, a, b); }
  static CACHEGEN_HD Int is_zero(Int x) { return _mm512_maskz_mov_epi32(_mm512_testn_epi32_mask(x, x), all(1)); }
  static CACHEGEN_HD bool any(Int x) { return _mm512_test_epi32_mask(x, x) != 0; }

  // x / y, or one less, for x < 2^31 and x / y < 2^21. A reciprocal of 14 bits takes a step of Newton's, which falls short by
  // 2^-28 of it at most. All is rounded down: three times by less than 2^-23 of it.
  static CACHEGEN_HD Int quotient(Int x, Int y) {
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 divisor = _mm512_cvtepi32_ps(y), about = _mm512_rcp14_ps(divisor);
    const __m512 error = _mm512_fnmadd_round_ps(divisor, about, _mm512_set1_ps(1), kDown);
    const __m512 reciprocal = _mm512_fmadd_round_ps(about, error, about, kDown);
    return _mm512_cvttps_epi32(_mm512_mul_round_ps(_mm512_cvt_roundepi32_ps(x, kDown), reciprocal, kDown));
  }
  static CACHEGEN_HD Int multiply_high(Int a, Int b) {
    const Int even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
    const Int odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    return _mm512_mask_mov_epi32(even, 0xaaaa, odd);
  }

  // 8 bytes a lane, as two vectors of their halves.
  static CACHEGEN_HD void load_halves(const uint8_t* p, Int& low, Int& high) {
    const Int a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    const Int even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    low = _mm512_permutex2var_epi32(a, even, b);
    high = _mm512_permutex2var_epi32(a, add(even, all(1)), b);
  }
  // The same, the last lane first.
  static CACHEGEN_HD void load_halves_back(const uint8_t* p, Int& low, Int& high) {
    const Int a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    const Int even = _mm512_setr_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    low = _mm512_permutex2var_epi32(a, even, b);
    high = _mm512_permutex2var_epi32(a, add(even, all(1)), b);
  }
  static CACHEGEN_HD void store_halves(uint8_t* p, Int low, Int high) {
    const Int first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi32(low, first, high));
    _mm512_storeu_si512(p + 64, _mm512_permutex2var_epi32(low, add(first, all(8)), high));
  }

  // States below kMinState take the next words, in lane order.
  static CACHEGEN_HD Int refill(Int x, const uint8_t*& at) {
    const __mmask16 low = _mm512_cmplt_epu32_mask(x, all(kMinState));
    const Int words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    at += kWordBytes * unsigned(__builtin_popcount(low));
    return _mm512_mask_or_epi32(x, low, left(x, kWordBits), _mm512_maskz_expand_epi32(low, words));
  }

  // States from `limit` on give a word, in the order of the vector, to `at`.
  static CACHEGEN_HD Int give(Int x, Int limit, uint8_t*& at) {
    const __mmask16 full = _mm512_cmpge_epu32_mask(x, limit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x)));
    at += kWordBytes * unsigned(__builtin_popcount(full));
    return _mm512_mask_srli_epi32(x, full, x, kWordBits);
  }
};

}  // namespace

const Backend kAvx512 = {decode_tiles<Avx512, 2>, 2,    open_chain<Avx512>, encode_rows<Avx512>, store_stream, passes, contexts, clamp,
                        count_digits,           into, rows_into, run_contexts, levels_into, levels_contexts, source_passes, plane_passes, heads_into, multiply_sparse};

}  // namespace cachegen

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
