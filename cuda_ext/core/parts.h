// The parts of a batch's chunks -> the jobs of cg_decode_chunks. Host code of both libraries: untrusted bytes are read here, up
// to where streams begin. hf_cachegen/codec/section.py has the layout of a section, and the same rules for one alone.
#pragma once

#include <string.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "../include/cachegen_parts.h"
#include "chunk.h"
#include "tile.h"

namespace cachegen {

constexpr int32_t kLargestIndex = (1 << 30) + kZeroIndex;
constexpr int64_t kByteSymbols = 256, kDigitSymbols = 3;
constexpr uint32_t kMaxSections = CG_MAX_BATCH * CG_PARTS_SECTIONS;

// Bytes that are read from front to back.
struct Reader {
  const uint8_t* at;
  uint64_t left;

  bool take(uint64_t bytes, const uint8_t** found) {
    if (bytes > left) return false;
    *found = at;
    at += bytes;
    left -= bytes;
    return true;
  }
};

template <class T>
T load_unaligned(const uint8_t* from, uint64_t i) {
  T found;
  memcpy(&found, from + i * sizeof found, sizeof found);
  return found;
}

// A section that has tokens, and what becomes of it.
struct PartSection {
  uint64_t job;
  cg_streams* to;
  uint32_t number;              // in patches
  uint64_t first, gap_at, gap;  // its token t is coded row first + t, and from token gap_at on `gap` rows further
  const uint8_t *sizes = nullptr, *pairs = nullptr, *streams = nullptr;
  uint64_t exceptions = 0, bytes = 0;
};

class PartsReader {
 public:
  PartsReader(const cg_parts& parts, cg_job* jobs, cg_staged* staged)
      : parts_(parts), jobs_(jobs), staged_(staged), tiles_(tile_count(1, parts.columns)) {}

  // What is found in the data, of enum cg_status; CG_BAD_ARGUMENT: the jobs contradict the contract.
  int32_t read() {
    for (uint64_t i = 0; i < parts_.chunks; i++)
      if (const int32_t status = read_chunk(i)) return status;
    return CG_OK;
  }

  // Writes what lies before the streams, the pieces and the addresses.
  int32_t write(uint8_t* to, uint64_t to_bytes, uint64_t address, cg_piece* pieces) {
    const uint64_t row = (tiles_ + 1) * sizeof(uint64_t), jobs = parts_.chunks * (parts_.anchor_bytes > 0 ? 2 : 1);
    const uint64_t scales = n_sections_ * row, patches = scales + aligned(scale_bytes_);
    const uint64_t patch_offsets = patches + n_patches_ * sizeof(uint64_t);
    uint64_t used = patch_offsets + (n_patches_ > 0 ? aligned(jobs * (tiles_ + 1) * sizeof(uint32_t)) : 0);
    if (used > to_bytes || (used > 0 && to == nullptr)) return CG_BAD_ARGUMENT;
    for (uint32_t i = 0; i < n_sections_; i++) {
      const PartSection& own = sections_[i];
      write_offsets(own, to + i * row);
      own.to->data = own.streams;
      if (pieces != nullptr) {
        if (own.bytes > to_bytes - used) return CG_BAD_ARGUMENT;
        pieces[i] = {own.streams, used, own.bytes};
        own.to->data = reinterpret_cast<const uint8_t*>(uintptr_t(address + used));
        used = std::min(used + aligned(own.bytes), to_bytes);
      }
      own.to->bytes = own.bytes;
      own.to->offsets = reinterpret_cast<const uint64_t*>(uintptr_t(address + i * row));
    }
    uint64_t at = scales;
    for (uint64_t i = 0; i < parts_.chunks && scale_bytes_ > 0; i++) {
      const uint64_t size = parts_.anchor_bytes * peaks(i).tokens;
      memcpy(to + at, scales_[i], size);
      at += size;
    }
    staged_->used = used;
    staged_->scales = scales;
    staged_->pieces = pieces != nullptr ? n_sections_ : 0;
    return n_patches_ > 0 ? write_patches(to, address, patches, patch_offsets, jobs) : int32_t(CG_OK);
  }

 private:
  static uint64_t aligned(uint64_t bytes) { return (bytes + 7) / 8 * 8; }
  cg_job& peaks(uint64_t i) { return jobs_[parts_.chunks + i]; }

  int32_t read_chunk(uint64_t i) {
    cg_job& job = jobs_[i];
    const uint64_t anchors = parts_.anchor_bytes > 0 ? peaks(i).tokens : 0;
    if (anchors > job.tokens || job.tokens > CG_MAX_BATCH_TOKENS) return CG_BAD_ARGUMENT;
    const uint64_t coded = job.tokens - anchors, middle = job.last - job.first;
    if (job.first > job.last || job.last > coded) return CG_BAD_ARGUMENT;
    Reader reader = {parts_.segments[i].data, parts_.segments[i].bytes};
    if (parts_.anchor_bytes > 0) {
      const uint64_t size = parts_.anchor_bytes * anchors;
      if (!reader.take(size, &scales_[i])) return CG_TRUNCATED;
      scale_bytes_ += size;
      const int32_t status = read_section(reader, anchors, {parts_.chunks + i, &peaks(i).base, 0, 0, 0, 0});
      if (status) return status;
    }
    if (const int32_t status = read_section(reader, coded, {i, &job.base, 0, 0, 0, 0}, &staged_->wide[i])) return status;
    for (uint32_t k = 0; k < parts_.n_end_digits; k++) {
      const PartSection ends = {i, job.end_digits + k, k + 1, 0, job.first, middle};
      if (const int32_t status = read_section(reader, coded - middle, ends)) return status;
    }
    if (reader.left > 0) return CG_CORRUPT;
    for (uint32_t k = 0; k < parts_.n_digits; k++) {
      const cg_segment& segment = parts_.segments[(k + 1) * parts_.chunks + i];
      reader = {segment.data, segment.bytes};
      if (const int32_t status = read_section(reader, middle, {i, job.digits + k, k + 1, job.first, 0, 0})) return status;
      if (reader.left > 0) return CG_CORRUPT;
    }
    return CG_OK;
  }

  // wide: counts the exceptions whose index no byte holds. NULL: there must be none outside the section's tables.
  int32_t read_section(Reader& reader, uint64_t tokens, PartSection found, uint32_t* wide = nullptr) {
    const uint8_t* head;
    if (!reader.take(sizeof(uint32_t), &head)) return CG_TRUNCATED;
    found.exceptions = load_unaligned<uint32_t>(head, 0);
    if (tokens == 0) return found.exceptions > 0 ? CG_CORRUPT : CG_OK;
    if (!reader.take(tiles_ * sizeof(uint32_t), &found.sizes)) return CG_TRUNCATED;
    if (!reader.take(found.exceptions * 2 * sizeof(uint32_t), &found.pairs)) return CG_TRUNCATED;
    for (uint64_t tile = 0; tile < tiles_; tile++) found.bytes += load_unaligned<uint32_t>(found.sizes, tile);
    if (!reader.take(found.bytes, &found.streams)) return CG_TRUNCATED;
    const int64_t symbols = found.number > 0 ? kDigitSymbols : kByteSymbols;
    for (uint64_t k = 0; k < found.exceptions; k++) {
      const uint64_t position = position_of(found, k);
      if (position >= tokens * parts_.columns || (k > 0 && position <= position_of(found, k - 1))) return CG_CORRUPT;
      const int64_t index = index_of(found, k);
      if (index < -kLargestIndex || index > kLargestIndex) return CG_CORRUPT;
      if (index >= 0 && index < symbols) continue;
      if (wide == nullptr) return CG_CORRUPT;
      ++*wide;
    }
    n_patches_ += found.exceptions;
    sections_[n_sections_++] = found;
    return CG_OK;
  }

  static uint64_t position_of(const PartSection& section, uint64_t k) { return load_unaligned<uint32_t>(section.pairs, 2 * k); }
  static int32_t index_of(const PartSection& section, uint64_t k) { return load_unaligned<int32_t>(section.pairs, 2 * k + 1); }

  void write_offsets(const PartSection& own, uint8_t* to) const {
    uint64_t sum = 0;
    for (uint64_t tile = 0; tile <= tiles_; tile++) {
      memcpy(to + tile * sizeof sum, &sum, sizeof sum);
      if (tile < tiles_) sum += load_unaligned<uint32_t>(own.sizes, tile);
    }
  }

  // By job, tile and row: cg_job has their layout.
  int32_t write_patches(uint8_t* to, uint64_t address, uint64_t patches, uint64_t patch_offsets, uint64_t jobs) {
    std::vector<std::pair<uint64_t, uint64_t>> found;  // tile of all jobs and row, patch
    std::vector<uint32_t> counts;                      // by job and tile
    try {
      found.reserve(n_patches_);
      counts.resize(jobs * tiles_);
    } catch (const std::bad_alloc&) {
      return CG_FAILED;
    }
    for (uint32_t i = 0; i < n_sections_; i++) {
      const PartSection& own = sections_[i];
      for (uint64_t k = 0; k < own.exceptions; k++) {
        const uint64_t token = position_of(own, k) / parts_.columns, column = position_of(own, k) % parts_.columns;
        const uint64_t row = own.first + token + (token >= own.gap_at ? own.gap : 0);
        const uint64_t tile = own.job * tiles_ + column / kTileColumns;
        const uint64_t index = uint64_t(std::min(std::max(index_of(own, k), 0), int32_t(kByteSymbols - 1)));
        found.push_back({tile << 32 | row, row << 32 | column % kTileColumns << 16 | uint64_t(own.number) << 8 | index});
        counts[tile]++;
      }
    }
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (uint64_t i = 0; i < n_patches_; i++) memcpy(to + patches + i * sizeof(uint64_t), &found[i].second, sizeof(uint64_t));
    uint64_t before = 0;
    for (uint64_t j = 0; j < jobs; j++) {
      const uint64_t row = patch_offsets + j * (tiles_ + 1) * sizeof(uint32_t);
      uint32_t own = 0;
      for (uint64_t tile = 0; tile <= tiles_; tile++) {
        memcpy(to + row + tile * sizeof own, &own, sizeof own);
        if (tile < tiles_) own += counts[j * tiles_ + tile];
      }
      jobs_[j].patches = reinterpret_cast<const uint64_t*>(uintptr_t(address + patches + before * sizeof(uint64_t)));
      jobs_[j].patch_offsets = reinterpret_cast<const uint32_t*>(uintptr_t(address + row));
      jobs_[j].n_patches = own;
      before += own;
    }
    return CG_OK;
  }

  const cg_parts& parts_;
  cg_job* jobs_;
  cg_staged* staged_;
  const uint64_t tiles_;
  PartSection sections_[kMaxSections];
  uint32_t n_sections_ = 0;
  const uint8_t* scales_[CG_MAX_BATCH];
  uint64_t scale_bytes_ = 0, n_patches_ = 0;
};

inline int32_t read_parts(const cg_parts* parts, cg_job* jobs, uint8_t* to, uint64_t to_bytes, uint64_t address,
                          cg_piece* pieces, cg_staged* staged) {
  if (parts == nullptr || jobs == nullptr || staged == nullptr || parts->segments == nullptr) return CG_BAD_ARGUMENT;
  if (parts->chunks > CG_MAX_BATCH || parts->columns == 0 || parts->columns > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  if (parts->n_digits > CG_MAX_DIGITS || parts->n_end_digits > CG_MAX_DIGITS || parts->anchor_bytes > CG_MAX_COLUMNS)
    return CG_BAD_ARGUMENT;
  *staged = {};
  PartsReader reader(*parts, jobs, staged);
  const int32_t status = reader.read();
  if (status == CG_BAD_ARGUMENT) return status;
  if (status != CG_OK) {
    staged->status = status;
    return CG_OK;
  }
  return reader.write(to, to_bytes, address, pieces);
}

}  // namespace cachegen
