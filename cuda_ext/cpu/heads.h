// Rows of a matrix product to a layer's keys or values, which are turned to their positions; compiled for every instruction
// set. Plain loops over the channels of a head, which compilers vectorise.
#pragma once

#include <string.h>

#include <type_traits>

#include "../core/chunk.h"
#include "backend.h"

namespace cachegen {
namespace {

// Pairs of channels, first[kStep * i] and second[kStep * i], turned by an angle each.
template <class From, class To, bool kMeans, uint32_t kStep>
void turn_pairs(const typename From::Stored* __restrict first, const typename From::Stored* __restrict second,
                const float* __restrict first_mean, const float* __restrict second_mean, const float* __restrict cosines,
                const float* __restrict sines, uint32_t pairs, typename To::Stored* __restrict first_to,
                typename To::Stored* __restrict second_to) {
  for (uint32_t i = 0; i < pairs; i++) {
    const uint32_t at = kStep * i;
    const float a = From::load(first[at]) + (kMeans ? first_mean[at] : 0.0f);
    const float b = From::load(second[at]) + (kMeans ? second_mean[at] : 0.0f);
    const Turned found = turned(a, b, cosines[i], sines[i]);
    first_to[at] = To::store(found.first);
    second_to[at] = To::store(found.second);
  }
}

template <class From, class To, bool kMeans>
void copy_channels(const typename From::Stored* __restrict from, const float* __restrict mean, uint32_t n,
                   typename To::Stored* __restrict to) {
  if (std::is_same<From, To>::value && !kMeans) return void(memcpy(to, from, n * sizeof *to));
  for (uint32_t j = 0; j < n; j++) to[j] = To::store(From::load(from[j]) + (kMeans ? mean[j] : 0.0f));
}

// One head of a token; the channels behind its pairs are copied.
template <class From, class To, bool kMeans, bool kInterleaved>
void turn_head(const typename From::Stored* from, const float* mean, const float* cosines, const float* sines, uint32_t pairs,
               uint32_t dim, typename To::Stored* to) {
  const uint32_t second = kInterleaved ? 1 : pairs, turned = 2 * pairs;
  turn_pairs<From, To, kMeans, kInterleaved ? 2 : 1>(from, from + second, mean, kMeans ? mean + second : mean, cosines, sines,
                                                     pairs, to, to + second);
  copy_channels<From, To, kMeans>(from + turned, kMeans ? mean + turned : mean, dim - turned, to + turned);
}

template <class From, class To, bool kMeans, bool kInterleaved>
void turn_tokens(const cg_heads& heads, uint64_t first, uint64_t last) {
  const auto* rows = static_cast<const typename From::Stored*>(heads.rows);
  for (uint64_t t = first; t < last; t++) {
    const float* cosines = heads.pairs ? heads.cosines + t * heads.pairs : nullptr;
    const float* sines = heads.pairs ? heads.sines + t * heads.pairs : nullptr;
    for (uint64_t h = 0; h < heads.heads; h++)
      turn_head<From, To, kMeans, kInterleaved>(
          rows + t * heads.row_stride + h * heads.dim, kMeans ? heads.means + h * heads.dim : nullptr, cosines, sines, heads.pairs,
          heads.dim,
          reinterpret_cast<typename To::Stored*>(uintptr_t(heads.address + t * heads.token_stride + h * heads.head_stride)));
  }
}

template <class From, class To>
void turn_to(const cg_heads& heads, uint64_t first, uint64_t last) {
  constexpr decltype(&turn_to<From, To>) kTurn[2][2] = {
      {turn_tokens<From, To, false, false>, turn_tokens<From, To, false, true>},
      {turn_tokens<From, To, true, false>, turn_tokens<From, To, true, true>}};
  kTurn[heads.means != nullptr][heads.interleaved != 0](heads, first, last);
}

template <class From>
void turn_from(const cg_heads& heads, uint64_t first, uint64_t last) {
  switch (heads.to_dtype) {
    case CG_FLOAT32: return turn_to<From, Float32>(heads, first, last);
    case CG_BFLOAT16: return turn_to<From, Bfloat16>(heads, first, last);
    default: return turn_to<From, Float16>(heads, first, last);
  }
}

// Tokens [first, last).
void heads_into(const cg_heads& heads, uint64_t first, uint64_t last) {
  return heads.from_dtype == CG_FLOAT32 ? turn_from<Float32>(heads, first, last) : turn_from<Bfloat16>(heads, first, last);
}

}  // namespace
}  // namespace cachegen
