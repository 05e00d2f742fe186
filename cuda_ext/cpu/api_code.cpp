// The C ABI of coding a chunk from a source. Some tokens of a tile of columns at a time, from the last on, are quantised into
// memory that stays in a core's nearest cache, and coded from there.
#include <string.h>

#include <mutex>
#include <vector>

#include "../core/tables.h"
#include "encode_chain.h"
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
  Intervals intervals[kMaxParts];
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
  std::unique_ptr<uint8_t[]> anchors, words;
  SymbolBlock block;
  EncodeChain chains[CG_MAX_STREAMS];
  Columns columns;
  Bounds bounds[kMaxParts];

  void open(const Chunk& chunk) {
    const uint64_t tokens = chunk.span->tokens, streams = CG_DIGIT_STREAM + 2 * chunk.n_digits;
    anchors.reset(new (std::nothrow) uint8_t[anchor_rows(*chunk.source, *chunk.span) * kTileColumns]);
    words.reset(new (std::nothrow) uint8_t[streams * chain_bytes(tokens)]);
    for (uint64_t i = 0; i < streams; i++) chains[i].words = words.get() + i * chain_bytes(tokens);
  }
};

void open_bounds(const Chunk& chunk, uint32_t part, const Columns& columns, Bounds* found) {
  const cg_part& own = chunk.parts[part];
  found->any = false;
  const uint8_t last = part < CG_DIGIT_STREAM ? kMaxSymbols - 1 : kDigitZero + 1;
  for (uint32_t k = 0; k < chunk.contexts(part) && own.low != nullptr; k++)
    for (uint32_t j = 0; j < columns.width; j++) {
      const uint64_t at = k * chunk.source->columns + columns.column[j];
      found->low[k][j] = own.low[at];
      found->high[k][j] = own.high[at];
      found->any |= own.low[at] > 0 || own.high[at] < last;
    }
}

// The part of a stream.
uint32_t part_of(uint32_t stream) { return stream < CG_DIGIT_STREAM ? stream : CG_DIGIT_STREAM + (stream - CG_DIGIT_STREAM) / 2; }

EncodeChain* open_chain(const Chunk& chunk, const Piece& piece, Scratch& scratch, uint32_t stream) {
  const uint32_t part = part_of(stream);
  EncodeChain* chain = &scratch.chains[stream];
  chain->tables = chunk.tables[part];
  chain->intervals = chunk.intervals[part].get();
  chain->n_ids = chunk.contexts(part);
  chain->ids = chunk.parts[part].table_ids + piece.first * chain->n_ids;
  chain->tile = tile_at(0, piece.width);
  chain->stride = kTileColumns;
  chunk.backend->open_chain(chain);
  return chain;
}

// Writes a stream behind the others.
void close_chain(Chunk& chunk, const Piece& piece, const EncodeChain& chain, uint32_t stream) {
  const uint64_t at = stream * chunk.tiles + piece.tile, bytes = chain.status ? 0 : chain.bytes();
  chunk.out->statuses[at] = chain.status;
  uint64_t offset;
  {
    const std::lock_guard<std::mutex> lock(chunk.guard);
    offset = chunk.used;
    chunk.used += bytes;
  }
  chunk.out->offsets[at] = offset;
  chunk.out->bytes[at] = bytes;
  if (bytes > 0 && offset + bytes <= chunk.out->memory_bytes) chunk.backend->store_stream(chain, chunk.out->memory + offset);
}

// Codes rows [first, last) of the block, whose digits are those of streams CG_DIGIT_STREAM + 2 k + protect.
void code_rows(Chunk& chunk, Scratch& scratch, uint32_t coded, uint32_t protect, uint64_t first, uint64_t last) {
  if (first >= last) return;
  const auto encode = [&](uint32_t stream, const uint8_t* symbols, const uint8_t* contexts) {
    EncodeChain* chain = &scratch.chains[stream];
    if (chain->status == CG_BAD_TABLE_ID) return;
    chain->symbols = symbols;
    chain->contexts = contexts;
    chunk.backend->encode_rows(chain, last - first);
  };
  if (coded >> CG_BASE_STREAM & 1) encode(CG_BASE_STREAM, scratch.block.base[first], nullptr);
  for (uint32_t k = 0; k < chunk.n_digits; k++)
    if (coded >> (CG_DIGIT_STREAM + k) & 1)
      encode(CG_DIGIT_STREAM + 2 * k + protect, scratch.block.digits[k][first], scratch.block.contexts[k][first]);
}

void code_piece(Chunk& chunk, const Piece& piece, Scratch& scratch) {
  const cg_source& source = *chunk.source;
  const cg_span& span = *chunk.span;
  open_columns(source, piece.list, piece.first, piece.width, &scratch.columns);
  for (uint32_t part = 0; part < kMaxParts; part++)
    if (piece.reported >> part & 1) open_bounds(chunk, part, scratch.columns, &scratch.bounds[part]);
  const uint64_t a = span.ordinary_first, b = span.ordinary_last, anchors = anchor_rows(source, span), rows = span.tokens - anchors;
  const uint64_t rows_of[] = {rows, anchors, b - a, rows - (b - a)};  // of a stream, those of digits being alike
  const auto is_coded = [&](uint32_t stream) {
    return (piece.coded >> part_of(stream) & 1) && rows_of[stream < CG_DIGIT_STREAM ? stream : CG_DIGIT_STREAM + stream % 2] > 0;
  };
  for (uint32_t stream = 0; stream < CG_MAX_STREAMS; stream++)
    if (is_coded(stream)) open_chain(chunk, piece, scratch, stream);

  const CodeJob job = {&scratch.columns,      &span,          chunk.n_digits, piece.reported, &scratch.block,
                       scratch.anchors.get(), scratch.bounds, report,         &chunk};
  const uint64_t group = source.group_tokens;  // a block of whole groups reads no anchor twice
  const uint64_t tokens = group == 0 || group > kBlockTokens ? kBlockTokens : kBlockTokens / group * group;
  bool sound = true;
  for (uint64_t last = span.tokens, first; last > 0; last = first) {
    first = (last - 1) / tokens * tokens;
    sound = chunk.backend->source(source.dtype).symbols(job, first, last) && sound;
    const uint64_t from = coded_before(source, first), to = coded_before(source, last);
    code_rows(chunk, scratch, piece.coded, 1, std::max(from, b) - from, std::max(to, b) - from);
    code_rows(chunk, scratch, piece.coded, 0, std::max(from, a) - from, std::max(std::min(to, b), from) - from);
    code_rows(chunk, scratch, piece.coded, 1, 0, std::min(to, a) - std::min(from, a));
  }
  EncodeChain* chain = &scratch.chains[CG_ANCHOR_STREAM];
  if (is_coded(CG_ANCHOR_STREAM) && chain->status == CG_OK) {
    chain->symbols = scratch.anchors.get();
    chunk.backend->encode_rows(chain, anchors);
  }
  for (uint32_t stream = 0; stream < CG_MAX_STREAMS; stream++)
    if (is_coded(stream)) close_chain(chunk, piece, scratch.chains[stream], stream);
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
    if (!(chunk.intervals[part] = intervals_of(chunk.tables[part]))) return CG_FAILED;
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
          if (scratch == nullptr || !scratch->anchors || !scratch->words)
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
