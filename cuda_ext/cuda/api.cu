// The coder's part of the C ABI on CUDA: arguments are checked here; what is found in the data is the tiles' status.
//
// Notes:
// 1. Nothing here waits or allocates: every function checks, launches on the run's queue, and returns.
// 2. Device memory cannot be read here, so tables and offsets are checked by the warps that use them.
#include "../core/arguments.h"
#include "../core/build.h"
#include "../core/output.h"
#include "launch.h"

using namespace cachegen;

namespace {

// A tile's stream, or why there is none.
struct Stream {
  int32_t status;
  const uint8_t* data;
  uint64_t bytes;
};

CACHEGEN_DEVICE Stream stream_at(const uint8_t* streams, uint64_t streams_bytes, const uint64_t* offsets, uint64_t tile) {
  const uint64_t first = offsets[tile], last = offsets[tile + 1];
  if (first > last || last > streams_bytes) return {CG_BAD_ARGUMENT, streams, 0};
  return {first % kWordBytes ? CG_CORRUPT : CG_OK, streams + first, last - first};
}

bool are_streams(const uint8_t* streams, uint64_t bytes, const uint64_t* offsets, const int32_t* tile_status) {
  if (offsets == nullptr || tile_status == nullptr || (streams == nullptr && bytes > 0)) return false;
  return uintptr_t(streams) % kWordBytes == 0;
}

template <class T, uint32_t kCoarser>
int32_t decode_into(const cg_section& section, const uint8_t* streams, uint64_t bytes, const uint64_t* offsets,
                    const cg_output& output, int32_t* tile_status, const cg_run* run) {
  const cg_chunk chunk = *output.chunk;
  const uint64_t tiles = tile_count(section.tokens, section.columns);
  return for_each_tile(
      run, section, tiles, tile_status, kCoarser == 0,
      [=] CACHEGEN_LAMBDA(const Warp& warp, const Tables& tables, const Lut& lut, uint64_t i) -> int32_t {
        const Tile tile = tile_at(i, section.columns);
        const Stream stream = stream_at(streams, bytes, offsets, i);
        if (stream.status) return stream.status;
        OutputSink<T, kCoarser> sink(output, chunk, tile);
        if (const int32_t status = sink.begin(warp)) return status;
        if constexpr (kCoarser > 0) {
          const Digits digits = {tables.symbols, tables.prob_bits, tables.n_tables};
          return are_digits(warp, digits, section, tile)
                     ? decode_tile<kContexts>(warp, digits, section, tile, stream.data, stream.bytes, sink)
                     : decode_tile<kContexts>(warp, lut, section, tile, stream.data, stream.bytes, sink);
        } else {
          return decode_tile<1>(warp, lut, section, tile, stream.data, stream.bytes, sink);
        }
      });
}

template <class T, uint32_t kCoarser>
int32_t fill_into(uint64_t tokens, uint64_t count, const cg_output& output, const cg_run* run) {
  const cg_chunk chunk = *output.chunk;
  return for_each(run, tokens * count, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t t = i / count, column = output.columns ? output.columns[i % count] : i % count;
    if (column < chunk.columns) put_value<T, kCoarser>(output, chunk, t, column, kCoarser ? kDigitZero : kZeroIndex);
  });
}

template <class T, uint32_t kCoarser>
int32_t patch_into(uint64_t tokens, const uint64_t* positions, const int32_t* indices, uint64_t count,
                   const cg_output& output, const cg_run* run) {
  const cg_chunk chunk = *output.chunk;
  return for_each(run, count, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t cell = positions[i];
    if (cell >= tokens * chunk.columns) return;
    if (sizeof(typename T::Stored) == 1 && (indices[i] < 0 || indices[i] > 0xff)) return;
    put_value<T, kCoarser>(output, chunk, cell / chunk.columns, cell % chunk.columns, indices[i]);
  });
}

template <class T>
int32_t rows_into(const float* rows, uint64_t n_rows, uint64_t first, uint64_t every, const cg_output& output,
                  const cg_run* run) {
  const uint64_t columns = output.chunk->columns;
  return for_each(run, n_rows * columns, [=] CACHEGEN_LAMBDA(uint64_t i) {
    store_value(at_row(output.places[i % columns], output.row + first + i / columns * every), T::store(rows[i]));
  });
}

// Calls f.run<T, kCoarser>() for the types that an output names.
template <class F>
int32_t by_output(const cg_output& output, const F& f) {
  const auto by_coarser = [&](auto type) {
    using T = decltype(type);
    switch (output.n_coarser) {
      case 0: return f.template run<T, 0>();
      case 1: return f.template run<T, 1>();
      default: return f.template run<T, 2>();
    }
  };
  switch (output.chunk->dtype) {
    case CG_FLOAT32: return by_coarser(Float32());
    case CG_BFLOAT16: return by_coarser(Bfloat16());
    case CG_FLOAT16: return by_coarser(Float16());
    default: return by_coarser(Index8());
  }
}

struct DecodeInto {
  const cg_section& section;
  const uint8_t* streams;
  uint64_t bytes;
  const uint64_t* offsets;
  const cg_output& output;
  int32_t* tile_status;
  const cg_run* how;
  template <class T, uint32_t kCoarser>
  int32_t run() const {
    return decode_into<T, kCoarser>(section, streams, bytes, offsets, output, tile_status, how);
  }
};

struct FillInto {
  uint64_t tokens, count;
  const cg_output& output;
  const cg_run* how;
  template <class T, uint32_t kCoarser>
  int32_t run() const {
    return fill_into<T, kCoarser>(tokens, count, output, how);
  }
};

struct PatchInto {
  uint64_t tokens;
  const uint64_t* positions;
  const int32_t* indices;
  uint64_t count;
  const cg_output& output;
  const cg_run* how;
  template <class T, uint32_t kCoarser>
  int32_t run() const {
    return patch_into<T, kCoarser>(tokens, positions, indices, count, output, how);
  }
};

}  // namespace

int32_t cg_isa_available(uint32_t isa) noexcept { return isa == CG_BEST; }

int32_t cg_encode(const cg_section* section, const uint8_t* symbols, uint8_t* slots, uint64_t slots_bytes,
                  uint64_t* tile_bytes, int32_t* tile_status, const cg_run* run) noexcept {
  if (run == nullptr || !is_section_of(section, symbols)) return CG_BAD_ARGUMENT;
  const cg_section s = *section;
  const uint64_t tiles = tile_count(s.tokens, s.columns), stride = slot_bytes(s.tokens);
  if (tiles == 0) return CG_OK;
  if (slots == nullptr || tile_bytes == nullptr || tile_status == nullptr) return CG_BAD_ARGUMENT;
  if (slots_bytes % stride != 0 || slots_bytes / stride != tiles || uintptr_t(slots) % kWordBytes) return CG_BAD_ARGUMENT;
  return for_each_tile(run, s, tiles, tile_status, false,
                       [=] CACHEGEN_LAMBDA(const Warp& warp, const Tables& tables, const Lut&, uint64_t i) -> int32_t {
                         const Tile tile = tile_at(i, s.columns);
                         uint8_t* end = slots + (i + 1) * stride;
                         return s.ids_per_column == 1
                                    ? encode_tile<1>(warp, tables, s, tile, symbols, end, tile_bytes + i)
                                    : encode_tile<kContexts>(warp, tables, s, tile, symbols, end, tile_bytes + i);
                       });
}

int32_t cg_pack(const uint8_t* slots, uint64_t slot_bytes, const uint64_t* tile_bytes, uint64_t tiles, uint8_t* streams,
                uint64_t streams_bytes, const cg_run* run) noexcept {
  if (run == nullptr || (tiles > 0 && (slots == nullptr || tile_bytes == nullptr))) return CG_BAD_ARGUMENT;
  if (streams_bytes == 0 || tiles == 0) return streams_bytes == 0 ? CG_OK : CG_BAD_ARGUMENT;
  if (streams == nullptr) return CG_BAD_ARGUMENT;
  // A few threads per tile, each of which adds up what lies before: tiles are few, and their streams short.
  constexpr uint64_t kParts = 64;
  return for_each(run, tiles * kParts, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const uint64_t tile = i / kParts, length = tile_bytes[tile];
    uint64_t before = 0;
    for (uint64_t k = 0; k < tile; k++) before += tile_bytes[k];
    if (length > slot_bytes) return;
    const uint8_t* from = slots + (tile + 1) * slot_bytes - length;
    for (uint64_t k = i % kParts; k < length && before + k < streams_bytes; k += kParts) streams[before + k] = from[k];
  });
}

int32_t cg_decode(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes, const uint64_t* offsets,
                  uint8_t* symbols, int32_t* tile_status, const cg_run* run) noexcept {
  if (run == nullptr || !is_section_of(section, symbols)) return CG_BAD_ARGUMENT;
  const cg_section s = *section;
  const uint64_t tiles = tile_count(s.tokens, s.columns);
  if (tiles == 0) return CG_OK;
  if (!are_streams(streams, streams_bytes, offsets, tile_status)) return CG_BAD_ARGUMENT;
  return for_each_tile(run, s, tiles, tile_status, true,
                       [=] CACHEGEN_LAMBDA(const Warp& warp, const Tables&, const Lut& lut, uint64_t i) -> int32_t {
                         const Tile tile = tile_at(i, s.columns);
                         const Stream stream = stream_at(streams, streams_bytes, offsets, i);
                         if (stream.status) return stream.status;
                         SymbolSink sink = {&s, tile, symbols};
                         return s.ids_per_column == 1
                                    ? decode_tile<1>(warp, lut, s, tile, stream.data, stream.bytes, sink)
                                    : decode_tile<kContexts>(warp, lut, s, tile, stream.data, stream.bytes, sink);
                       });
}

int32_t cg_decode_into(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                       const uint64_t* offsets, const cg_output* output, int32_t* tile_status,
                       const cg_run* run) noexcept {
  if (run == nullptr || !is_section_into(section, output)) return CG_BAD_ARGUMENT;
  if (tile_count(section->tokens, section->columns) == 0) return CG_OK;
  if (!are_streams(streams, streams_bytes, offsets, tile_status)) return CG_BAD_ARGUMENT;
  return by_output(*output, DecodeInto{*section, streams, streams_bytes, offsets, *output, tile_status, run});
}

int32_t cg_fill_into(uint64_t tokens, uint64_t count, const cg_output* output, const cg_run* run) noexcept {
  if (run == nullptr || !is_output(output, tokens) || count > CG_MAX_COLUMNS) return CG_BAD_ARGUMENT;
  return by_output(*output, FillInto{tokens, count, *output, run});
}

int32_t cg_patch_into(uint64_t tokens, const uint64_t* positions, const int32_t* indices, uint64_t count,
                      const cg_output* output, const cg_run* run) noexcept {
  if (run == nullptr || !is_output(output, tokens) || output->columns != nullptr) return CG_BAD_ARGUMENT;
  if (count > 0 && (positions == nullptr || indices == nullptr)) return CG_BAD_ARGUMENT;
  return by_output(*output, PatchInto{tokens, positions, indices, count, *output, run});
}

int32_t cg_rows_into(const float* rows, uint64_t n_rows, uint64_t first, uint64_t every, const cg_output* output,
                     const cg_run* run) noexcept {
  if (run == nullptr || !are_rows(output, rows, n_rows, first, every)) return CG_BAD_ARGUMENT;
  switch (output->chunk->dtype) {
    case CG_FLOAT32: return rows_into<Float32>(rows, n_rows, first, every, *output, run);
    case CG_BFLOAT16: return rows_into<Bfloat16>(rows, n_rows, first, every, *output, run);
    default: return rows_into<Float16>(rows, n_rows, first, every, *output, run);
  }
}
