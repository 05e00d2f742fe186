// Where decoded symbols go: as indices into a matrix, or as values into the layers' own tensors (cg_output).
//
// Note: a lane's 8 columns are adjacent, so a token's values are one vector store wherever the columns lie
// adjacent too, and so are the loads of what they refine; steps, means and the group's anchors stay in registers.
#pragma once

#include "chunk.h"
#include "tile.h"
#include "warp_tile.h"

namespace cachegen {

struct Index8 {  // CG_UINT8
  using Stored = uint8_t;
};

template <class T>
struct alignas(sizeof(typename T::Stored) == 1 ? 8 : 16) Eight {
  typename T::Stored of[kMaxPerLane];
};

CACHEGEN_DEVICE uint8_t* at_row(const cg_place& place, uint64_t row) {
  return reinterpret_cast<uint8_t*>(uintptr_t(place.address + row * place.stride));
}

// Store a value, which on a device is one store only where the compiler knows that it is aligned.
template <class Stored>
CACHEGEN_DEVICE void store_value(uint8_t* to, Stored value) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Stored*>(to) = value;
#else
  memcpy(to, &value, sizeof value);
#endif
}

// What a refined symbol is before its own index: 0 for a base symbol.
template <uint32_t kCoarser>
CACHEGEN_DEVICE int32_t coarser_symbol(uint8_t base, uint8_t digit) {
  int32_t symbol = kCoarser > 0 ? base_symbol(base) : 0;
  return kCoarser > 1 ? refine(symbol, digit) : symbol;
}

template <class T, uint32_t kCoarser>
CACHEGEN_DEVICE typename T::Stored value_of(int32_t coarser, int32_t index, float step, float mean, float anchor,
                                            bool anchored) {
  if constexpr (sizeof(typename T::Stored) == 1) {
    return uint8_t(index);
  } else {
    const int32_t symbol = kCoarser > 0 ? refine(coarser, index) : base_symbol(index);
    return T::store(dequantise(symbol, step, mean, anchored, anchor));
  }
}

// One value anywhere: of the section's token t, chunk column `column`.
template <class T, uint32_t kCoarser>
CACHEGEN_DEVICE void put_value(const cg_output& output, const cg_chunk& chunk, uint64_t t, uint64_t column, int32_t index) {
  constexpr bool kValues = sizeof(typename T::Stored) > 1;
  const uint64_t row = row_of_token(output, t), cell = coarser_at(coded_rows(chunk), row, column);
  const Place place = place_of(chunk, row);
  const int32_t coarser = coarser_symbol<kCoarser>(kCoarser > 0 ? output.coarser[0][cell] : uint8_t(0),
                                                   kCoarser > 1 ? output.coarser[1][cell] : uint8_t(0));
  const bool anchored = kValues && chunk.group_tokens > 0;
  const float step = kValues ? chunk.steps[column] : 0, mean = kValues ? chunk.means[column] : 0;
  const float anchor = anchored ? chunk.anchors[place.anchor * chunk.columns + column] : 0;
  store_value(at_row(output.places[column], output.row + place.row),
              value_of<T, kCoarser>(coarser, index, step, mean, anchor, anchored));
}

// A Sink of decode_tile, of contexts that are given (or none) and symbols that stay in a matrix [tokens, columns].
struct SymbolSink {
  struct Row {
    uint8_t symbols[kMaxPerLane], contexts[kMaxPerLane];
  };
  const cg_section* section;
  Tile tile;
  uint8_t* symbols;

  CACHEGEN_DEVICE uint64_t cell(uint64_t t, uint32_t lane) const {
    return t * section->columns + tile.first_column + lane * tile.per_lane;
  }
  CACHEGEN_DEVICE void open(Row& row, uint64_t t, uint32_t lane) const {
    if (section->contexts == nullptr) return;
    const uint32_t own = own_columns(tile, lane);
    CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++)
      row.contexts[c] = c < own ? section->contexts[cell(t, lane) + c] : uint8_t(0);
  }
  CACHEGEN_DEVICE uint32_t context(const Row& row, uint32_t c) const { return row.contexts[c]; }
  CACHEGEN_DEVICE void put(Row& row, uint32_t c, uint8_t symbol) const { row.symbols[c] = symbol; }
  CACHEGEN_DEVICE void close(const Row& row, uint64_t t, uint32_t lane) const {
    uint8_t* to = symbols + cell(t, lane);
    const uint32_t own = own_columns(tile, lane);
    if (own == kMaxPerLane && uintptr_t(to) % sizeof(Eight<Index8>) == 0) {
      Eight<Index8> all;
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) all.of[c] = row.symbols[c];
      *reinterpret_cast<Eight<Index8>*>(to) = all;
    } else {
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++)
        if (c < own) to[c] = row.symbols[c];
    }
  }
};

// A Sink that refines what is coarser and writes values (or, for Index8, indices) into their places.
template <class T, uint32_t kCoarser>
class OutputSink {
  using Stored = typename T::Stored;
  static constexpr bool kValues = sizeof(Stored) > 1;

  struct Lane {
    uint32_t own, first;  // columns of the chunk: how many, and the first
    bool adjacent;        // places one after the other, a vector
    bool together;        // coarser symbols one after the other, too
    bool fresh;           // the token opens a group, whose anchors are not here yet
    cg_place at;
    Place place;          // of the token
    uint64_t within;      // of the token in its group
    float step[kMaxPerLane], mean[kMaxPerLane], anchor[kMaxPerLane];
  };

 public:
  struct Row {
    uint8_t indices[kMaxPerLane];
    int32_t coarser[kMaxPerLane];
  };

  CACHEGEN_DEVICE OutputSink(const cg_output& output, const cg_chunk& chunk, const Tile& tile)
      : output_(output), chunk_(chunk), rows_(coded_rows(chunk)), tile_(tile) {}

  // Before decode_tile: CG_OK, or CG_BAD_ARGUMENT for a column that is not the chunk's.
  CACHEGEN_DEVICE int32_t begin(const Warp& warp) {
    const uint32_t outside = warp.ballot([&](uint32_t lane) {
      Lane& own = lanes_[lane];
      own.own = own_columns(tile_, lane);
      own.adjacent = own.together = own.own == kMaxPerLane;
      stand(own, row_of_token(output_, 0));
      bool found = false;
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        if (c >= own.own) continue;
        const uint64_t column = listed(lane, c);
        if (c == 0) own.first = uint32_t(column);
        if (column >= chunk_.columns) {
          found = true;
          continue;
        }
        const cg_place at = output_.places[column];
        if (c == 0) own.at = at;
        own.together &= column == own.first + c;
        own.adjacent &= at.stride == own.at.stride && at.address == own.at.address + c * sizeof(Stored);
        if (kValues) {
          own.step[c] = chunk_.steps[column];
          own.mean[c] = chunk_.means[column];
        }
      }
      own.together = own.together && own.first % kMaxPerLane == 0;  // a vector, that no block's end cuts
      own.adjacent = own.adjacent && (own.at.address | own.at.stride) % alignof(Eight<T>) == 0;
      return found;
    });
    return outside ? CG_BAD_ARGUMENT : CG_OK;
  }

  CACHEGEN_DEVICE void open(Row& row, uint64_t t, uint32_t lane) {
    Lane& own = lanes_[lane];
    if (kValues && own.fresh && chunk_.group_tokens > 0) {
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++)
        if (c < own.own) own.anchor[c] = chunk_.anchors[own.place.anchor * chunk_.columns + column_of(own, lane, c)];
    }
    if constexpr (kCoarser > 0) {
      Eight<Index8> base, digits;
      if (own.together) {
        const uint64_t cell = coarser_at(rows_, row_of_token(output_, t), own.first);
        base = *reinterpret_cast<const Eight<Index8>*>(output_.coarser[0] + cell);
        if (kCoarser > 1) digits = *reinterpret_cast<const Eight<Index8>*>(output_.coarser[1] + cell);
      } else {
        CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
          base.of[c] = digits.of[c] = 0;
          if (c >= own.own) continue;
          const uint64_t cell = coarser_at(rows_, row_of_token(output_, t), listed(lane, c));
          base.of[c] = output_.coarser[0][cell];
          if (kCoarser > 1) digits.of[c] = output_.coarser[1][cell];
        }
      }
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        row.coarser[c] = coarser_symbol<kCoarser>(base.of[c], kCoarser > 1 ? digits.of[c] : uint8_t(0));
      }
    }
  }

  CACHEGEN_DEVICE uint32_t context(const Row& row, uint32_t c) const { return sign_of(row.coarser[c]); }
  CACHEGEN_DEVICE void put(Row& row, uint32_t c, uint8_t symbol) const { row.indices[c] = symbol; }

  CACHEGEN_DEVICE void close(const Row& row, uint64_t t, uint32_t lane) {
    Lane& own = lanes_[lane];
    const bool anchored = kValues && chunk_.group_tokens > 0;
    const uint64_t r = output_.row + own.place.row;
    if (own.adjacent) {
      Eight<T> all;
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) all.of[c] = value(row, own, c, anchored);
      *reinterpret_cast<Eight<T>*>(at_row(own.at, r)) = all;
    } else {
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        if (c >= own.own) continue;
        store_value(at_row(output_.places[column_of(own, lane, c)], r), value(row, own, c, anchored));
      }
    }
    own.fresh = chunk_.group_tokens > 0 && ++own.within == chunk_.group_tokens - 1;
    own.place.row += own.fresh ? 2 : 1;
    if (own.fresh) {
      own.within = 0;
      own.place.anchor++;
    }
    if (t + 1 == output_.gap_at) stand(own, row_of_token(output_, t + 1));
  }

 private:
  // Which column of the chunk a lane's c-th is. Read again where it is needed, which is seldom: registers are few.
  CACHEGEN_DEVICE uint64_t listed(uint32_t lane, uint32_t c) const {
    const uint64_t coded = tile_.first_column + lane * tile_.per_lane + c;
    return output_.columns ? output_.columns[coded] : coded;
  }
  CACHEGEN_DEVICE uint64_t column_of(const Lane& own, uint32_t lane, uint32_t c) const {
    return own.together ? own.first + c : listed(lane, c);
  }

  // The next token is this coded row.
  CACHEGEN_DEVICE void stand(Lane& own, uint64_t row) const {
    own.fresh = true;
    own.place = place_of(chunk_, row);
    own.within = chunk_.group_tokens ? row % (chunk_.group_tokens - 1) : 0;
  }

  CACHEGEN_DEVICE Stored value(const Row& row, const Lane& own, uint32_t c, bool anchored) const {
    return value_of<T, kCoarser>(kCoarser > 0 ? row.coarser[c] : 0, row.indices[c], own.step[c], own.mean[c],
                                 own.anchor[c], anchored);
  }

  const cg_output& output_;
  const cg_chunk& chunk_;
  uint64_t rows_;
  const Tile& tile_;
  Warp::PerLane<Lane> lanes_;
};

}  // namespace cachegen
