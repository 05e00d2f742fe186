/* The part of the C ABI that the CPU's library alone has: encoding and decoding of values that stay where they lie. It
 * belongs to cachegen.h, whose version counts for it, too. */
#ifndef CACHEGEN_SOURCE_H_
#define CACHEGEN_SOURCE_H_

#include "cachegen.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Encoding straight from where a context's values lie: the layers' own tensors are read, and no chunk is copied. These
 * functions are the CPU library's alone. They give what the passes above give for the chunks' rows. */

/* A chunk: tokens [first, first + tokens) of the context. Its coded rows [ordinary_first, ordinary_last) are not
 * protected. `anchor` is the row of its first anchor in the scales. */
typedef struct cg_span {
  uint64_t first, tokens;
  uint64_t ordinary_first, ordinary_last;
  uint64_t anchor;
} cg_span;

/* Of a source alone: integers of 16 bits, as cg_fine writes them. */
#define CG_INT16 4

typedef struct cg_source {
  const cg_place* places; /* [columns]; row r is the context's token r */
  uint64_t columns;
  uint64_t group_tokens;   /* as in cg_chunk */
  const uint32_t* vectors; /* [columns], rising, below n_vectors: whose scale a column's anchors have; NULL without anchors */
  const float* scales;     /* [anchors, n_vectors]; NULL without anchors. An anchor is symbol * scale, symbol = round(value /
                            * scale), ties to even, within -127..127 */
  uint64_t n_vectors;
  const float* means; /* [columns] */
  const float* steps; /* [columns] */
  uint32_t dtype;     /* of the values, of enum cg_dtype, or CG_INT16 */
  uint32_t blank;     /* 1: the context's first token has the values of its second one */
} cg_source;

/* peaks [anchors of the spans, n_vectors] takes the largest magnitude of a vector in an anchor's row, or a NaN. Neither
 * scales nor means nor steps are read. */
CG_API int32_t cg_peaks(const cg_source* source, const cg_span* spans, uint64_t n_spans, float* peaks,
                        const cg_run* run) CG_NOEXCEPT;

/* cg_moments of all coded rows: sums [4, columns] takes total and squares of the ordinary ones, then of the others. Each
 * span is added up by itself. Neither means nor steps are read. */
CG_API int32_t cg_spread(const cg_source* source, const cg_span* spans, uint64_t n_spans, double* sums,
                         const cg_run* run) CG_NOEXCEPT;

/* Costs of a codebook's entries: costs [symbols, entries], 0 to 2^15 - 1, symbols being 256 or CG_DIGIT_BINS. A multiple of
 * 32 entries is fastest. */
typedef struct cg_costs {
  const int32_t* costs;
  uint32_t entries; /* 1 to 256 */
  uint32_t first;   /* entries before this one are not chosen */
} cg_costs;

/* Counts the symbols of all spans and chooses the cheapest entry for every column, the first of equal ones. entries and
 * costs are [parts, columns]; the parts are the base, each digit, and with anchors these. *refused takes 1 if a value is
 * not finite or has a fine symbol beyond 2^30, else 0. other_costs [n_others, parts, columns] takes the costs of the entries
 * `others` of that shape. */
CG_API int32_t cg_choose(const cg_source* source, const cg_span* spans, uint64_t n_spans, uint32_t n_digits,
                         const cg_costs* values, const cg_costs* digits, uint8_t* entries, uint64_t* costs,
                         uint32_t* refused, const uint8_t* others, uint32_t n_others, uint64_t* other_costs,
                         const cg_run* run) CG_NOEXCEPT;

/* Fine symbols of a span of a source without anchors: fine [tokens, columns], fine_stride symbols from token to token. base
 * [tokens, columns], which may be NULL or the values themselves, takes the values that the coarsest level decodes, without
 * the means. squares [1 + n_digits, columns], which may be NULL, takes the sums of the squared errors of the values that each level decodes, the coarsest first; the rows that are
 * not ordinary have the finest error at every level. weights [tokens], which may be NULL, multiply the squares. *refused
 * takes 1 if a symbol is not within -32767..32767, else 0; the symbols then mean nothing. */
CG_API int32_t cg_fine(const cg_source* source, const cg_span* span, uint32_t n_digits, const float* weights, int16_t* fine,
                       uint64_t fine_stride, float* base, double* squares, uint32_t* refused, const cg_run* run) CG_NOEXCEPT;

/* The tables of one part of a chunk. */
typedef struct cg_part {
  const uint32_t* columns; /* [columns]: those that are coded, rising, then the others; NULL: all are coded */
  uint64_t n_columns;      /* that are coded; of the others only exceptions are found */
  const uint8_t* table_ids; /* [n_columns, 1]; of digits [n_columns, 3] */
  const void* tables;       /* as in cg_section */
  uint64_t tables_bytes;
  const uint8_t* low; /* [1, columns], of digits [3, columns]: bounds of the support; NULL: all is supported */
  const uint8_t* high;
} cg_part;

/* An index outside its table's support: position = token of the stream * columns + column. */
typedef struct cg_exception {
  uint64_t position;
  int32_t index;
  uint32_t stream;
} cg_exception;

/* Streams of a chunk: the base, the anchors, then of each digit the ordinary and the protected rows. */
#define CG_BASE_STREAM 0
#define CG_ANCHOR_STREAM 1
#define CG_DIGIT_STREAM 2
#define CG_MAX_STREAMS (CG_DIGIT_STREAM + 2 * CG_MAX_DIGITS)

/* Quantises and encodes one chunk. parts: base, anchors (not read without them), each digit. Tile i of stream s is
 * memory[offsets[s * tiles + i]], bytes[s * tiles + i] long, with tiles = ceil(columns / 256); its status is a value of
 * cg_status, as cg_encode has it. *used takes how much of the memory is taken, *n_exceptions their number, in no order.
 * Where memory_bytes or max_exceptions are too few, both still take what is needed, and the rest means nothing. A value
 * that is not finite gives a tile CG_BAD_SYMBOL. */
typedef struct cg_streams_out {
  uint8_t* memory;
  uint64_t memory_bytes;
  uint64_t* offsets;
  uint64_t* bytes;
  int32_t* statuses;
  cg_exception* exceptions;
  uint64_t max_exceptions;
  uint64_t used, n_exceptions;
} cg_streams_out;

CG_API int32_t cg_code(const cg_source* source, const cg_span* span, uint32_t n_digits, const cg_part* parts,
                       cg_streams_out* out, const cg_run* run) CG_NOEXCEPT;

/* Lossless: the bits of a value, rotated left by one, are cut into bytes. Plane 0 is the most significant byte. The symbol
 * of section column plane * columns + column is that byte. columns is a multiple of 256, and all of them are coded. */

/* Counts the bytes of all tokens of the spans and chooses the cheapest entry of every section column. book may be NULL,
 * and so may counts [planes, columns, 256]; entries and costs are [planes, columns]. */
CG_API int32_t cg_choose_planes(const cg_source* source, const cg_span* spans, uint64_t n_spans, const cg_costs* book,
                                uint8_t* entries, uint64_t* costs, int32_t* counts, const cg_run* run) CG_NOEXCEPT;

/* cg_code of one chunk's planes. Of `part` columns is NULL and n_columns counts those of the section, as do low and high.
 * There is one stream per section tile; exceptions have stream 0. */
CG_API int32_t cg_code_planes(const cg_source* source, const cg_span* span, const cg_part* part, cg_streams_out* out,
                              const cg_run* run) CG_NOEXCEPT;

/* cg_decode of such a section, straight into values; output->columns is NULL and of chunk only tokens, columns and dtype
 * count. tile_status has an entry for each tile of the section. */
CG_API int32_t cg_decode_planes(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                                const uint64_t* offsets, const cg_output* output, int32_t* tile_status,
                                const cg_run* run) CG_NOEXCEPT;

/* Sets single bytes of values: position = token * planes * columns + section column; others are left out. */
CG_API int32_t cg_patch_planes(const uint64_t* positions, const int32_t* indices, uint64_t count, const cg_output* output,
                               const cg_run* run) CG_NOEXCEPT;

/* Calls work(data) in each of `threads` threads, of which the caller is one, and returns when all have: GOMP_parallel of
 * libgomp. Fewer threads may do it. */
typedef void (*cg_team)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);

/* Names the pool that this process's calls take their threads from: the address of a cg_team. NULL: each call starts its own. */
CG_API int32_t cg_use_team(void* team) CG_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
