// One tile column of a chunk by a warp: base and digits together, from streams to values.
//
// Why together: every section of a tile is a chain of states, each of which waits for the one before. Three chains that do
// not wait for each other keep a multiprocessor busy with a third of the warps, and no matrix of symbols goes to memory and
// back. While the digits of a token are decoded, so is the base of the next.
//
// Note [Fast and slow tokens]: a fast token has the 256 words that a token can take left in every stream, and no patch;
// nothing is tested within it. All others are slow: those near the end of a stream, the last, those with a patch, and those
// of a narrow tile, in which some lanes have no c-th column.
#pragma once

#include "chunk.h"
#include "stage.h"
#include "value.h"

namespace cachegen {

// A lane's values of a row, at an address aligned to 16 bytes.
template <class T>
CACHEGEN_DEVICE void store_eight(uint8_t* to, const float* values) {
  constexpr uint32_t kWords = kMaxPerLane * sizeof(typename T::Stored) / sizeof(uint32_t);
  uint32_t words[kWords];
  CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c += 2)
    T::store_pair(values[c], values[c + 1], words + c * kWords / kMaxPerLane);
  CACHEGEN_UNROLL for (uint32_t i = 0; i < kWords; i += 4) store_four(to + i * sizeof(uint32_t), words + i);
}

// kAny: the tile may be narrow, tables may be looked up in global memory, and some rows may have end digits; else all tiles
// are whole, tables are staged, and all rows have the digits of decode().
template <class T, bool kAny>
class ChunkTile {
  struct Lane {
    uint32_t kept[kMaxPerLane];    // where its base tables lie: see staged_at, or the first slot of those in global memory
    uint32_t pairs;                // and its digit tables
    uint32_t index[kMaxPerLane];   // base indices of the token to come
    float step[kMaxPerLane], mean[kMaxPerLane], anchor[kMaxPerLane];
    uint8_t* to;                   // of the next row, of a whole tile
    uint64_t stride;
  };
  struct Values {
    float of[kMaxPerLane];
  };

 public:
  CACHEGEN_DEVICE ChunkTile(const Warp& warp, const cg_batch& batch, const cg_job& job, const TileTables& tables,
                              uint64_t tile)
      : warp_(warp), batch_(batch), job_(job), tables_(tables), tile_(tile), width_(tile_at(tile, batch.columns).width) {}

  template <uint32_t kDigits>
  CACHEGEN_DEVICE int32_t decode() {
    const uint32_t rows = uint32_t(coded_rows(chunk_of(batch_, job_)));
    if (rows > 0) {
      if (const int32_t status = open_chain(warp_, job_.base, tile_, lanes(), rows, &base_)) return status;
    }
    open_lanes();
    if constexpr (!kAny) {
      Chain digits[kDigits > 0 ? kDigits : 1];
      if (rows > 0) {
        if (const int32_t status = open_digits<kDigits>(job_.digits, rows, digits)) return status;
        run<kDigits>(digits, batch_.steps, 0, rows);
      }
      finish_anchors();
      if (rows == 0) return CG_OK;
      if (const int32_t status = close_chain(warp_, base_)) return status;
      return close_digits<kDigits>(digits);
    } else {
      const uint32_t first = uint32_t(job_.first), last = uint32_t(job_.last), ends = rows - (last - first);
      Chain now[CG_MAX_DIGITS] = {}, other[CG_MAX_DIGITS] = {};  // the digits of this part, and of the others
      if (last > first)
        if (const int32_t status = open_some(batch_.n_digits, job_.digits, last - first, other)) return status;
      if (ends > 0)
        if (const int32_t status = open_some(batch_.n_end_digits, job_.end_digits, ends, now)) return status;
      for (uint32_t part = 0; part < 3; part++) {  // ends, middle, ends: one copy of the code
        const bool middle = part == 1;
        run_some(middle ? batch_.n_digits : batch_.n_end_digits, now, middle ? batch_.steps : batch_.end_steps,
                 part == 0 ? 0 : part == 1 ? first : last, part == 0 ? first : part == 1 ? last : rows);
        CACHEGEN_UNROLL for (uint32_t k = 0; k < CG_MAX_DIGITS; k++) {
          const Chain kept = now[k];
          now[k] = other[k];
          other[k] = kept;
        }
      }
      finish_anchors();
      if (rows == 0) return CG_OK;
      if (const int32_t status = close_chain(warp_, base_)) return status;
      if (last > first)
        if (const int32_t status = close_some(batch_.n_digits, now)) return status;
      return ends > 0 ? close_some(batch_.n_end_digits, other) : CG_OK;
    }
  }

 private:
  CACHEGEN_DEVICE uint32_t per_lane() const { return kAny ? (width_ + kLanes - 1) / kLanes : kMaxPerLane; }
  CACHEGEN_DEVICE uint32_t lanes() const { return kAny ? (width_ + per_lane() - 1) / per_lane() : kLanes; }
  CACHEGEN_DEVICE uint64_t first_column(uint32_t lane) const { return tile_ * kTileColumns + lane * per_lane(); }
  CACHEGEN_DEVICE bool is_narrow() const { return kAny && width_ < kTileColumns; }
  CACHEGEN_DEVICE bool is_staged() const { return !kAny || batch_.tables_per_tile > 0; }
  CACHEGEN_DEVICE bool has(uint32_t lane, uint32_t c) const {
    return !kAny || (c < per_lane() && lane * per_lane() + c < width_);
  }

  CACHEGEN_DEVICE void open_lanes() {
    warp_.each([&](uint32_t lane) {
      Lane& own = lanes_[lane];
      const uint64_t column = first_column(lane);
      if (!is_narrow()) {
        const cg_place* place = batch_.places + column / kMaxPerLane;
        own.stride = CACHEGEN_LOAD(&place->stride);
        own.to = reinterpret_cast<uint8_t*>(uintptr_t(CACHEGEN_LOAD(&place->address) + job_.row * own.stride));
      }
      own.pairs = staged_at(tables_.pairs, lane);
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        own.anchor[c] = 0;
        if (kAny) own.kept[c] = 0, own.index[c] = kZeroIndex, own.mean[c] = own.step[c] = 0;
        if (!has(lane, c)) continue;
        const uint32_t id = CACHEGEN_LOAD(batch_.base_ids + column + c);
        own.kept[c] = is_staged() ? staged_at(tables_.slots, rank_of(tables_.used, id) * kBatchSlots) : id * kBatchSlots;
        own.mean[c] = CACHEGEN_LOAD(batch_.means + column + c);
      }
    });
    anchor_ = 0;
    row_ = 0;
    left_ = batch_.group_tokens > 0 ? 0 : kNever;
    patch_ = last_patch_ = 0;
    next_patch_ = kNoPatch;
    if (job_.patches == nullptr) return;
    const uint32_t first = CACHEGEN_LOAD(job_.patch_offsets + tile_), last = CACHEGEN_LOAD(job_.patch_offsets + tile_ + 1);
    if (first >= last || last > job_.n_patches) return;
    patch_ = first;
    last_patch_ = last;
    next_patch_ = patch_row();
  }

  template <uint32_t kDigits>
  CACHEGEN_DEVICE int32_t open_digits(const cg_streams* streams, uint64_t tokens, Chain* chains) {
    CACHEGEN_UNROLL for (uint32_t k = 0; k != kDigits; k++)
      if (const int32_t status = open_chain(warp_, streams[k], tile_, lanes(), tokens, chains + k)) return status;
    return CG_OK;
  }
  template <uint32_t kDigits>
  CACHEGEN_DEVICE int32_t close_digits(const Chain* chains) const {
    CACHEGEN_UNROLL for (uint32_t k = 0; k != kDigits; k++)
      if (const int32_t status = close_chain(warp_, chains[k])) return status;
    return CG_OK;
  }

  // The same for a number of digits that only the batch knows.
  CACHEGEN_DEVICE int32_t open_some(uint32_t n, const cg_streams* streams, uint64_t tokens, Chain* chains) {
    if (n > 0)
      if (const int32_t status = open_chain(warp_, streams[0], tile_, lanes(), tokens, chains)) return status;
    return n > 1 ? open_chain(warp_, streams[1], tile_, lanes(), tokens, chains + 1) : CG_OK;
  }
  CACHEGEN_DEVICE int32_t close_some(uint32_t n, const Chain* chains) const {
    if (n > 0)
      if (const int32_t status = close_chain(warp_, chains[0])) return status;
    return n > 1 ? close_chain(warp_, chains[1]) : CG_OK;
  }
  CACHEGEN_DEVICE void run_some(uint32_t n, Chain* chains, const float* steps, uint32_t first, uint32_t last) {
    if (n == 0) run<0>(chains, steps, first, last);
    if (n == 1) run<1>(chains, steps, first, last);
    if (n == 2) run<2>(chains, steps, first, last);
  }

  // Coded rows [first, last), whose digits are these.
  template <uint32_t kDigits>
  CACHEGEN_DEVICE void run(Chain* digits, const float* steps, uint32_t first, uint32_t last) {
    if (first >= last) return;
    warp_.each([&](uint32_t lane) {
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++)
        if (has(lane, c)) lanes_[lane].step[c] = CACHEGEN_LOAD(steps + first_column(lane) + c);
    });
    slow_base(first);
    for (uint32_t t = first; t < last; t++) {
      open_row();
      bool fast = !is_narrow() && base_.has_token() && t + 1 < last && t + 1 < next_patch_;
      CACHEGEN_UNROLL for (uint32_t k = 0; k != kDigits; k++) fast = fast && digits[k].has_token();
      if (fast) {
        CACHEGEN_UNROLL for (uint32_t k = 0; k != kDigits; k++) prefetch(digits[k]);
        prefetch(base_);
        fast_token<kDigits>(digits);
      } else {
        slow_token<kDigits>(digits, t);
        if (t + 1 < last) slow_base(t + 1);
      }
      close_row();
    }
  }

  // The words of about the token after the next: a line ahead of what is read.
  CACHEGEN_DEVICE void prefetch(const Chain& chain) const {
#if defined(__CUDA_ARCH__)
    const uint32_t ahead = chain.at + 64 + threadIdx.x % 4 * 16;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(chain.word(ahead < chain.size ? ahead : chain.at)));
#else
    (void)chain;
#endif
  }

  template <bool kSlow>
  CACHEGEN_DEVICE void base_step(uint32_t c) {
    step_chain<kSlow>(warp_, base_, [&](uint32_t lane) { return has(lane, c); }, [&](uint32_t lane) {
      Lane& own = lanes_[lane];
      uint32_t& x = base_.x[lane];
      const uint32_t slot = x % kBatchSlots;
      const SlotEntry entry = is_staged()
                                  ? load_staged(tables_.slots, own.kept[c] + slot * uint32_t(sizeof(SlotEntry)))
                                  : CACHEGEN_LOAD(slots_in(batch_.base_tables) + own.kept[c] + slot);
      own.index[c] = entry & 0xff;
      x = take(x, entry, CG_BATCH_PROB_BITS);
    });
  }

  // Decodes digit k of every lane's column c into `index`, by the sign of what it refines.
  template <bool kSlow>
  CACHEGEN_DEVICE void digit_step(Chain& chain, uint32_t k, uint32_t c, Warp::PerLane<uint32_t>& sign,
                                  Warp::PerLane<uint32_t>& index) {
    step_chain<kSlow>(warp_, chain, [&](uint32_t lane) { return has(lane, c); }, [&](uint32_t lane) {
      uint32_t& x = chain.x[lane];
      const uint32_t at = (k * kMaxPerLane + c) * kContexts * kLanes + sign[lane] * kLanes;
      const uint32_t pair = load_staged(tables_.pairs, lanes_[lane].pairs + at * uint32_t(sizeof(uint32_t)));
      const uint32_t second = pair & 0xffff, third = pair >> 16, slot = x % kBatchSlots;
      uint32_t found = 0, offset = slot, frequency = second;
      if (slot >= second) {
        found = 1;
        offset = slot - second;
        frequency = third - second;
      }
      if (slot >= third) {
        found = 2;
        offset = slot - third;
        frequency = kBatchSlots - third;
      }
      index[lane] = found;
      x = frequency * (x >> CG_BATCH_PROB_BITS) + offset;
    });
  }

  static CACHEGEN_DEVICE uint32_t sign_of_base(uint32_t index) {
    const uint32_t low = kZeroIndex - 1, high = kZeroIndex + 1;
    return (index < low ? low : index > high ? high : index) - low;
  }
  static CACHEGEN_DEVICE uint32_t sign_of_refined(uint32_t sign, uint32_t digit) { return sign == 1 ? digit : sign; }

  // The digits of the token, and the base of the next: see Note [Fast and slow tokens].
  template <uint32_t kDigits>
  CACHEGEN_DEVICE void fast_token(Chain* digits) {
    CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
      Warp::PerLane<uint32_t> sign, one, two;
      if constexpr (kDigits > 0) {
        warp_.each([&](uint32_t lane) { sign[lane] = sign_of_base(lanes_[lane].index[c]); });
        digit_step<false>(digits[0], 0, c, sign, one);
      }
      if constexpr (kDigits > 1) {
        warp_.each([&](uint32_t lane) { sign[lane] = sign_of_refined(sign[lane], one[lane]); });
        digit_step<false>(digits[1], 1, c, sign, two);
      }
      warp_.each([&](uint32_t lane) {
        put<kDigits>(lane, c, kDigits > 0 ? one[lane] : 0, kDigits > 1 ? two[lane] : 0);
      });
      base_step<false>(c);
    }
  }

  template <uint32_t kDigits>
  CACHEGEN_DEVICE void slow_token(Chain* digits, uint32_t t) {
    CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
      Warp::PerLane<uint32_t> sign, one = {}, two = {};
      if constexpr (kDigits > 0) {
        warp_.each([&](uint32_t lane) { sign[lane] = sign_of_base(lanes_[lane].index[c]); });
        digit_step<true>(digits[0], 0, c, sign, one);
        patch(t, 1, c, one);
      }
      if constexpr (kDigits > 1) {
        warp_.each([&](uint32_t lane) { sign[lane] = sign_of_refined(sign[lane], one[lane]); });
        digit_step<true>(digits[1], 1, c, sign, two);
        patch(t, 2, c, two);
      }
      warp_.each([&](uint32_t lane) {
        put<kDigits>(lane, c, kDigits > 0 ? one[lane] : 0, kDigits > 1 ? two[lane] : 0);
      });
    }
  }

  CACHEGEN_DEVICE void slow_base(uint32_t t) {
    pass_patches(t);
    CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
      base_step<true>(c);
      Warp::PerLane<uint32_t> index;
      warp_.each([&](uint32_t lane) { index[lane] = lanes_[lane].index[c]; });
      patch(t, 0, c, index);
      warp_.each([&](uint32_t lane) { lanes_[lane].index[c] = index[lane]; });
    }
  }

  // Patches of the rows before t are done with.
  CACHEGEN_DEVICE void pass_patches(uint32_t t) {
    while (next_patch_ < t) {
      patch_++;
      next_patch_ = patch_ < last_patch_ ? patch_row() : kNoPatch;
    }
  }
  CACHEGEN_DEVICE uint32_t patch_row() const {
    const uint64_t row = CACHEGEN_LOAD(job_.patches + patch_) >> 32;
    return row < kNoPatch ? uint32_t(row) : kNoPatch;
  }
  // Applies the patches of row t to column c of every lane, in one section.
  CACHEGEN_DEVICE void patch(uint32_t t, uint32_t section, uint32_t c, Warp::PerLane<uint32_t>& index) const {
    if (next_patch_ != t) return;
    for (uint32_t i = patch_; i < last_patch_; i++) {
      const uint64_t found = CACHEGEN_LOAD(job_.patches + i);
      if (found >> 32 != t) return;
      const uint32_t column = uint32_t(found >> 16) & 0xff;
      if ((uint32_t(found >> 8) & 0xff) != section || column % per_lane() != c) continue;
      const uint32_t wanted = section == 0 ? uint32_t(found) & 0xff : (uint32_t(found) & 0xff) % kDigitSymbols;
      warp_.each([&](uint32_t lane) {
        if (lane == column / per_lane()) index[lane] = wanted;
      });
    }
  }

  template <uint32_t kDigits>
  CACHEGEN_DEVICE void put(uint32_t lane, uint32_t c, uint32_t one, uint32_t two) {
    Lane& own = lanes_[lane];
    int32_t symbol = base_symbol(int32_t(own.index[c]));
    if (kDigits > 0) symbol = refine(symbol, int32_t(one));
    if (kDigits > 1) symbol = refine(symbol, int32_t(two));
    // Without anchors 0 is added, which changes nothing: y is never -0.
    out_[lane].of[c] = dequantise(symbol, own.step[c], own.mean[c], true, own.anchor[c]);
  }

  // Before a row's values: a group's anchor comes first.
  CACHEGEN_DEVICE void open_row() {
    if (left_ == 0) put_anchor();
  }
  CACHEGEN_DEVICE void close_row() {
    write();
    left_--;
  }
  CACHEGEN_DEVICE void put_anchor() {
    warp_.each([&](uint32_t lane) {
      Lane& own = lanes_[lane];
      const float* from = job_.anchors + uint64_t(anchor_) * batch_.columns + first_column(lane);
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        if (!has(lane, c)) continue;
        own.anchor[c] = CACHEGEN_LOAD(from + c);
        out_[lane].of[c] = own.anchor[c];
      }
    });
    anchor_++;
    left_ = batch_.group_tokens <= CG_MAX_BATCH_TOKENS ? uint32_t(batch_.group_tokens) - 1 : kNever;
    write();
  }
  CACHEGEN_DEVICE void finish_anchors() {
    if (batch_.group_tokens > 0 && job_.tokens % batch_.group_tokens == 1) put_anchor();  // of a group that is it alone
  }
  CACHEGEN_DEVICE void write() {
    warp_.each([&](uint32_t lane) {
      if (!is_narrow()) {
        store_eight<T>(lanes_[lane].to, out_[lane].of);
        lanes_[lane].to += lanes_[lane].stride;
        return;
      }
      CACHEGEN_UNROLL for (uint32_t c = 0; c < kMaxPerLane; c++) {
        if (!has(lane, c)) continue;
        const uint64_t column = unknown(first_column(lane) + c);  // places would be kept in registers
        const cg_place* place = batch_.places + column / kMaxPerLane;
        const uint64_t within = column % kMaxPerLane * sizeof(typename T::Stored);
        store_one<T>(CACHEGEN_LOAD(&place->address) + (job_.row + row_) * CACHEGEN_LOAD(&place->stride) + within, out_[lane].of[c]);
      }
    });
    row_++;
  }

  static constexpr uint32_t kNoPatch = ~0u, kNever = ~0u, kDigitSymbols = 3;
  const Warp& warp_;
  const cg_batch& batch_;
  const cg_job& job_;
  const TileTables& tables_;
  const uint64_t tile_;
  const uint32_t width_;
  Chain base_;
  Warp::PerLane<Lane> lanes_;
  Warp::PerLane<Values> out_;
  uint32_t row_;   // of the chunk, to be written next
  uint32_t left_;  // coded rows before the next anchor
  uint32_t anchor_, patch_, last_patch_, next_patch_;
};

}  // namespace cachegen
