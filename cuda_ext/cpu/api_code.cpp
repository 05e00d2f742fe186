// The C ABI of coding a chunk from a source: tiles of columns are quantised into memory that stays in a core's cache, and
// coded from there.
#include <string.h>

#include <mutex>
#include <vector>

#include "../core/tables.h"
#include "source_arguments.h"
#include "threads.h"

using namespace cachegen;

namespace {

constexpr uint32_t kMaxParts = CG_DIGIT_STREAM + CG_MAX_DIGITS;

// Columns to quantise, and the parts that are coded from them, as tile `tile` of each; those that no part codes have none.
struct Piece {
  const uint32_t* list;  // of columns, NULL: all
  uint64_t first, width, tile;
  uint32_t reported, coded;  // bits of parts
};

struct Chunk {
  const Backend* backend;
  const cg_source* source;
  const cg_span* span;
  uint32_t n_digits;
  const cg_part* parts;
  cg_streams_out* out;
  Tables tables[kMaxParts];
  uint64_t tiles;
  std::mutex guard;  // of what follows
  uint64_t used = 0, exceptions = 0;

  bool has(uint32_t part) const { return part == CG_ANCHOR_STREAM ? source->group_tokens > 0 : part < CG_DIGIT_STREAM + n_digits; }
  uint32_t contexts(uint32_t part) const { return part >= CG_DIGIT_STREAM ? kContexts : 1; }
};

void report(void* to, const cg_exception& exception) {
  Chunk& chunk = *static_cast<Chunk*>(to);
  const std::lock_guard<std::mutex> lock(chunk.guard);
  if (chunk.exceptions < chunk.out->max_exceptions) chunk.out->exceptions[chunk.exceptions] = exception;
  chunk.exceptions++;
}

// A thread's memory.
struct Scratch {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t *anchors, *base, *digits, *contexts, *slot_end;
  Columns columns;
  Bounds bounds[kMaxParts];
  uint8_t ids[kTileColumns * kContexts];

  void open(const Chunk& chunk) {
    const uint64_t anchored = anchor_rows(*chunk.source, *chunk.span) * kTileColumns;
    const uint64_t cells = coded_rows(*chunk.source, *chunk.span) * kTileColumns;
    const uint64_t slot = slot_bytes(chunk.span->tokens), digits_bytes = chunk.n_digits * cells;
    memory.reset(new (std::nothrow) uint8_t[anchored + cells + 2 * digits_bytes + slot]);
    anchors = memory.get();
    base = anchors + anchored;
    digits = base + cells;
    contexts = digits + digits_bytes;
    slot_end = contexts + digits_bytes + slot;
  }
};

void open_bounds(const Chunk& chunk, uint32_t part, const Columns& columns, Bounds* found) {
  const cg_part& own = chunk.parts[part];
  found->any = own.low != nullptr;
  for (uint32_t k = 0; k < chunk.contexts(part) && found->any; k++)
    for (uint32_t j = 0; j < columns.width; j++) {
      found->low[k][j] = own.low[k * chunk.source->columns + columns.column[j]];
      found->high[k][j] = own.high[k * chunk.source->columns + columns.column[j]];
    }
}

// Codes `rows` rows of a part's matrix as a tile of a stream.
void code(Chunk& chunk, const Piece& piece, Scratch& scratch, uint32_t part, uint32_t stream, const uint8_t* symbols,
          const uint8_t* contexts, uint64_t rows) {
  if (rows == 0) return;
  const cg_part& own = chunk.parts[part];
  const uint32_t n_ids = chunk.contexts(part);
  cg_section section = {};
  section.tokens = rows;
  section.columns = kTileColumns;
  section.ids_per_column = n_ids;
  section.table_ids = own.table_ids + piece.first * n_ids;
  section.contexts = contexts;
  uint64_t bytes = 0;
  const uint64_t at = stream * chunk.tiles + piece.tile;
  chunk.out->statuses[at] = chunk.backend->encode_tile(section, chunk.tables[part], tile_at(0, piece.width), symbols,
                                                       scratch.slot_end, &bytes);
  uint64_t offset;
  {
    const std::lock_guard<std::mutex> lock(chunk.guard);
    offset = chunk.used;
    chunk.used += bytes;
  }
  chunk.out->offsets[at] = offset;
  chunk.out->bytes[at] = bytes;
  if (offset + bytes <= chunk.out->memory_bytes) memcpy(chunk.out->memory + offset, scratch.slot_end - bytes, bytes);
}

void code_piece(Chunk& chunk, const Piece& piece, Scratch& scratch) {
  const cg_span& span = *chunk.span;
  open_columns(*chunk.source, piece.list, piece.first, piece.width, &scratch.columns);
  for (uint32_t part = 0; part < kMaxParts; part++)
    if (piece.reported >> part & 1) open_bounds(chunk, part, scratch.columns, &scratch.bounds[part]);
  const uint64_t rows = coded_rows(*chunk.source, span), ordinary = span.ordinary_last - span.ordinary_first;
  const CodeJob job = {&scratch.columns, &span, chunk.n_digits, piece.reported, rows, scratch.anchors, scratch.base,
                       scratch.digits, scratch.contexts, scratch.bounds, report, &chunk};
  const bool sound = chunk.backend->source(chunk.source->dtype).symbols(job);
  if (piece.coded >> CG_BASE_STREAM & 1) code(chunk, piece, scratch, 0, CG_BASE_STREAM, scratch.base, nullptr, rows);
  if (piece.coded >> CG_ANCHOR_STREAM & 1)
    code(chunk, piece, scratch, 1, CG_ANCHOR_STREAM, scratch.anchors, nullptr, anchor_rows(*chunk.source, span));
  for (uint32_t k = 0; k < chunk.n_digits; k++) {
    if ((piece.coded >> (CG_DIGIT_STREAM + k) & 1) == 0) continue;
    const uint32_t stream = CG_DIGIT_STREAM + 2 * k;
    const uint8_t *digits = scratch.digits + k * rows * kTileColumns, *contexts = scratch.contexts + k * rows * kTileColumns;
    code(chunk, piece, scratch, CG_DIGIT_STREAM + k, stream, digits, contexts, ordinary);
    code(chunk, piece, scratch, CG_DIGIT_STREAM + k, stream + 1, digits + ordinary * kTileColumns,
         contexts + ordinary * kTileColumns, rows - ordinary);
  }
  if (!sound) chunk.out->statuses[piece.tile] = CG_BAD_SYMBOL;
}

// Where every part codes all columns their tiles are the same, and quantised once.
std::vector<Piece> pieces_of(const Chunk& chunk) {
  const uint64_t columns = chunk.source->columns;
  uint32_t parts = 0;
  bool whole = true;
  for (uint32_t part = 0; part < kMaxParts; part++) {
    if (!chunk.has(part)) continue;
    parts |= 1u << part;
    whole = whole && chunk.parts[part].columns == nullptr;
  }
  std::vector<Piece> pieces;
  const auto add = [&](const uint32_t* list, uint64_t first, uint64_t last, uint32_t reported, uint32_t coded) {
    for (uint64_t at = first; at < last; at += kTileColumns)
      pieces.push_back({list, at, std::min<uint64_t>(kTileColumns, last - at), (at - first) / kTileColumns, reported, coded});
  };
  if (whole) {
    add(nullptr, 0, columns, parts, parts);
    return pieces;
  }
  for (uint32_t part = 0; part < kMaxParts; part++) {
    if ((parts >> part & 1) == 0) continue;
    const cg_part& own = chunk.parts[part];
    add(own.columns, 0, own.n_columns, 1u << part, 1u << part);
    if (own.columns) add(own.columns, own.n_columns, columns, 1u << part, 0);
  }
  return pieces;
}

bool is_part(const cg_source& source, const cg_part& part) {
  if (part.n_columns > source.columns || (part.columns == nullptr && part.n_columns != source.columns)) return false;
  if ((part.low == nullptr) != (part.high == nullptr)) return false;
  for (uint64_t i = 0; i < source.columns && part.columns; i++)
    if (part.columns[i] >= source.columns) return false;
  return part.n_columns == 0 || part.table_ids != nullptr;
}

}  // namespace

int32_t cg_code(const cg_source* source, const cg_span* span, uint32_t n_digits, const cg_part* parts, cg_streams_out* out,
                const cg_run* run) noexcept {
  Chunk chunk;
  chunk.backend = backend_for(run);
  if (chunk.backend == nullptr || !is_source(source, span, 1) || !is_scaled(*source)) return CG_BAD_ARGUMENT;
  if (span == nullptr || n_digits > CG_MAX_DIGITS || parts == nullptr || out == nullptr) return CG_BAD_ARGUMENT;
  out->used = out->n_exceptions = 0;
  chunk.source = source;
  chunk.span = span;
  chunk.n_digits = n_digits;
  chunk.parts = parts;
  chunk.out = out;
  chunk.tiles = (source->columns + kTileColumns - 1) / kTileColumns;
  if (chunk.tiles == 0) return CG_OK;
  for (uint32_t part = 0; part < kMaxParts; part++) {
    if (!chunk.has(part)) continue;
    if (!is_part(*source, parts[part])) return CG_BAD_ARGUMENT;
    if (!open_tables(parts[part].tables, parts[part].tables_bytes, &chunk.tables[part])) return CG_BAD_TABLES;
  }
  if (!are_streams(*out)) return CG_BAD_ARGUMENT;
  std::atomic<bool> failed{false};
  try {
    std::fill_n(out->bytes, CG_MAX_STREAMS * chunk.tiles, 0);
    std::fill_n(out->offsets, CG_MAX_STREAMS * chunk.tiles, 0);
    std::fill_n(out->statuses, CG_MAX_STREAMS * chunk.tiles, 0);
    const std::vector<Piece> pieces = pieces_of(chunk);
    for_each_with<Scratch>(
        pieces.size(), span->tokens * source->columns, run->threads, [&](Scratch* scratch) { scratch->open(chunk); },
        [&](uint64_t i, Scratch* scratch) {
          if (scratch == nullptr || !scratch->memory)
            failed = true;
          else
            code_piece(chunk, pieces[i], *scratch);
        });
  } catch (const std::exception&) {
    return CG_FAILED;
  }
  out->used = chunk.used;
  out->n_exceptions = chunk.exceptions;
  return failed ? CG_FAILED : CG_OK;
}
