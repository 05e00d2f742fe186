// Rows of coefficients, most of which are zero, times a matrix; compiled for every instruction set. Each coefficient that is not
// zero adds a row of the matrix. Channels are taken in blocks: a block's sums stay in registers, and its part of the matrix stays
// in a core's second cache while the tokens pass.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>

#include "../core/value.h"
#include "backend.h"
#include "choice.h"

namespace cachegen {

namespace {

constexpr uint32_t kSums = kVectorBytes == 64 ? 16 : 8;  // vectors of sums in registers
constexpr uint32_t kFewSums = 4;      // the same, for the last channels
constexpr uint32_t kWhole = 16;       // coefficients that are skipped together where all are zero
constexpr uint32_t kFloats = kVectorBytes / sizeof(float);
constexpr uint32_t kBlock = kSums * kFloats;  // channels

typedef float Floats __attribute__((vector_size(kVectorBytes)));

// A coefficient as the coarsest level has it.
CACHEGEN_HD float coarsest(float x, float step, float factor) { return nearbyintf(x / (step * factor)) * step * factor; }

CACHEGEN_HD bool are_zero(const float* some) {
#if CACHEGEN_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(some), _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
#else
  uint32_t bits = 0;
  for (uint32_t j = 0; j < kWhole; j++) bits |= bits_of(some[j]);
  return bits << 1 == 0;
#endif
}

// Appends those of n coefficients, at most kWhole, that are not zero. There is memory for kWhole more.
CACHEGEN_HD uint32_t append_nonzero(const float* some, uint32_t first, float* values, uint32_t* rows) {
#if CACHEGEN_VECTOR_BYTES == 64
  static_assert(kWhole == 16, "a vector of AVX-512");
  const __m512 x = _mm512_loadu_ps(some);
  const __mmask16 found = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(found, x));
  _mm512_storeu_si512(rows, _mm512_maskz_compress_epi32(found, _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first)))));
  return uint32_t(__builtin_popcount(found));
#else
  uint32_t count = 0;
  for (uint32_t j = 0; j < kWhole; j++) {  // without a branch, which would be taken at random
    values[count] = some[j];
    rows[count] = first + j;
    count += some[j] != 0.0f;
  }
  return count;
#endif
}

// Lists a token's from `at` on, and returns where they end.
uint64_t list_nonzero(const cg_sparse& sparse, uint64_t token, uint64_t at, const SparseRows& found) {
  const float* from = sparse.coefficients + token * sparse.coefficient_stride;
  const float step = sparse.steps ? sparse.steps[token] : 0.0f, factor = sparse.steps ? sparse.factors[token] : 1.0f;
  for (uint64_t first = 0; first < sparse.components; first += kWhole) {
    const uint32_t n = uint32_t(std::min<uint64_t>(kWhole, sparse.components - first));
    float some[kWhole] = {};
    if (n < kWhole)
      memcpy(some, from + first, n * sizeof *some);
    else if (are_zero(from + first))
      continue;
    else
      memcpy(some, from + first, sizeof some);
    if (step > 0)
      for (float& x : some) x = coarsest(x, step, factor);
    at += append_nonzero(some, uint32_t(first), found.values + at, found.rows + at);
  }
  return at;
}

// Sums of some vectors of channels. Vectors, for compilers leave an array in memory.
template <uint32_t kVectors>
CACHEGEN_HD void sum_vectors(const cg_sparse& sparse, const SparseRows& found, uint64_t first, uint64_t last, uint64_t channel,
                             float* sums) {
  Floats sum[kVectors] = {};
  for (uint64_t k = first; k < last; k++) {
    const float* row = sparse.matrix + found.rows[k] * sparse.matrix_stride + channel;
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kVectors; i++) {
      Floats some;
      memcpy(&some, row + i * kFloats, sizeof some);
      sum[i] += some * found.values[k];
    }
  }
  memcpy(sums, sum, sizeof sum);
}

// Sums of n channels, at most kBlock.
void sum_channels(const cg_sparse& sparse, const SparseRows& found, uint64_t first, uint64_t last, uint64_t channel, uint32_t n,
                  float* sums) {
  if (n == kBlock) return sum_vectors<kSums>(sparse, found, first, last, channel, sums);
  uint32_t done = 0;
  for (; done + kFewSums * kFloats <= n; done += kFewSums * kFloats)
    sum_vectors<kFewSums>(sparse, found, first, last, channel + done, sums + done);
  for (uint32_t j = done; j < n; j++) {
    sums[j] = 0;
    for (uint64_t k = first; k < last; k++)
      sums[j] += sparse.matrix[found.rows[k] * sparse.matrix_stride + channel + j] * found.values[k];
  }
}

// Adds what the product begins with to n sums, and stores them.
template <class Start>
void finish_sums(const cg_sparse& sparse, uint64_t token, uint64_t channel, uint32_t n, const float* sums) {
  float* to = sparse.rows + token * sparse.channels + channel;
  const auto* start = static_cast<const typename Start::Stored*>(sparse.start);
  if (start == nullptr) return void(memcpy(to, sums, n * sizeof *to));
  start += token * sparse.channels + channel;
  for (uint32_t j = 0; j < n; j++) to[j] = Start::load(start[j]) + sums[j];
}

// Tokens [first, first + tokens), at most those that `found` has memory for.
void multiply_sparse(const cg_sparse& sparse, uint64_t first, uint64_t tokens, const SparseRows& found) {
  found.ends[0] = 0;
  for (uint64_t t = 0; t < tokens; t++) found.ends[t + 1] = list_nonzero(sparse, first + t, found.ends[t], found);
  const auto finish = sparse.start_dtype == CG_BFLOAT16 ? finish_sums<Bfloat16> : finish_sums<Float32>;
  for (uint64_t channel = 0; channel < sparse.channels; channel += kBlock) {
    const uint32_t n = uint32_t(std::min<uint64_t>(kBlock, sparse.channels - channel));
    for (uint64_t t = 0; t < tokens; t++) {
      float sums[kBlock];
      sum_channels(sparse, found, found.ends[t], found.ends[t + 1], channel, n, sums);
      finish(sparse, first + t, channel, n, sums);
    }
  }
}

}  // namespace
}  // namespace cachegen
