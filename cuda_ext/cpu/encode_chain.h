// A tile of a section while it is encoded.
//
// Note: encoding runs backwards (tokens, columns, lanes), so that the decoder reads forwards. A chain's words lie in the
// order in which they are given, and store_stream() turns them round.
#pragma once

#include <memory>
#include <new>

#include "../core/chunk.h"
#include "../core/tables.h"
#include "backend.h"

namespace cachegen {

constexpr uint32_t kPerLane = kTileColumns / kLanes;  // of a whole tile
constexpr uint32_t kNearBits = 3, kNearSymbols = 1 << kNearBits;  // around zero, whose intervals every lane keeps
constexpr uint32_t kSpareBytes = 64;                  // behind the words, which a vector of them may reach

// A quotient of floats below 2^21 becomes too small by less than one: three roundings, of 2^-24 each, and this factor.
constexpr float kBelow = 1 - 0x1p-22f;

struct alignas(64) EncodeChain {
  // Set before open_chain: the tables and their intervals_of(), the tile's table ids, [width, n_ids], and memory of
  // chain_bytes().
  Tables tables;
  const uint32_t* intervals;
  const uint8_t* ids;
  uint32_t n_ids;
  Tile tile;
  uint8_t* words;
  // Set before encode_rows, which takes the last row first.
  const uint8_t *symbols, *contexts;
  uint64_t stride;
  // Kept from row to row.
  uint8_t* at;
  int32_t status;  // a value of cg_status; chains of bad ids must not be encoded
  bool ternary;   // all tables have three symbols alone
  bool near;      // `kept` has intervals
  uint32_t turn;  // lane i's state is state[i ^ turn]
  alignas(64) uint32_t state[kLanes];
  uint32_t firsts[kTileColumns * kContexts];  // the first entries of the tile's tables, among all
  alignas(64) uint32_t copied[2][kPerLane][kLanes];  // intervals of two rows
  // Of each column of a lane. By symbol: its interval. By context, of ternary tables: start of the second symbol, and of the
  // third << 16.
  alignas(64) uint32_t kept[kPerLane * kNearSymbols][kLanes];

  uint64_t bytes() const { return tile.head_bytes() + uint64_t(at - words); }
};

// The most that the words of so many rows take.
inline uint64_t chain_bytes(uint64_t rows) { return slot_bytes(rows) + kSpareBytes; }

// Every symbol's interval in its table, [n_tables, 256]: start, and frequency << 16. NULL without memory.
constexpr uint32_t kFrequencyShift = 16;
using Intervals = std::unique_ptr<uint32_t[]>;
Intervals intervals_of(const Tables& tables);

// Any tile, one symbol at a time; the vector back-ends leave narrow tiles to these.
void open_scalar(EncodeChain* chain);
void encode_rows_scalar(EncodeChain* chain, uint64_t rows);

namespace {

inline void store_stream(const EncodeChain& chain, uint8_t* to) {
  typedef uint16_t Word __attribute__((aligned(1), may_alias));
  const auto* __restrict from = reinterpret_cast<const Word*>(chain.at);
  auto* __restrict words = reinterpret_cast<Word*>(to + chain.tile.head_bytes());
  const int64_t n = (chain.at - chain.words) / kWordBytes;
  for (int64_t i = 0; i < n; i++) words[i] = from[-1 - i];
  for (uint32_t lane = 0; lane < chain.tile.lanes; lane++) store_state(to + lane * kStateBytes, chain.state[lane ^ chain.turn]);
}

}  // namespace
}  // namespace cachegen
