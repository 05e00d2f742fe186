/* The C ABI of the native code: the whole contract. Two libraries have it, one for the CPU and one for CUDA.
 *
 * Notes:
 * 1. A return value speaks of the arguments alone. What is found in the data (bytes, ids, contexts, symbols) is
 *    reported tile by tile in `tile_status`, so that a device can report it without a synchronisation.
 * 2. Memory is the caller's, always: no function keeps a pointer or returns memory of its own. CUDA's allocates none.
 * 3. `run` says how. Its queue is a CUDA stream; on the CPU it must be NULL and everything is done on return. On CUDA all
 *    pointers that are not marked [host] are device memory, and results are valid once the queue has been waited for.
 * 4. A stream's length is not known before it is written, backwards: the encoder fills the END of a slot of the
 *    worst-case size, one slot per tile, and cg_pack then puts the streams back to back.
 *
 * What a stream is, is spelt out in hf_cachegen/codec/rans_reference.py, and the passes over values in codec/passes.py:
 * every back-end gives the same bytes.
 *
 * No input makes a function read or write outside the buffers it is given. All may be called from several threads at
 * once.
 */
#ifndef CACHEGEN_H_
#define CACHEGEN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define CG_NOEXCEPT noexcept
extern "C" {
#else
#define CG_NOEXCEPT
#endif

#if defined(_WIN32)
#define CG_API __declspec(dllexport)
#else
#define CG_API __attribute__((visibility("default")))
#endif

/* Raised by any change of this file that an older caller cannot bear. */
#define CG_ABI_VERSION 8

#define CG_TILE_COLUMNS 256 /* of the widest tile */
/* With these, products of sizes stay within 64 bits. */
#define CG_MAX_TOKENS (1u << 31)
#define CG_MAX_COLUMNS (1u << 31)

/* Return values, and (from CG_BAD_TABLES on) values of tile_status. */
enum cg_status {
  CG_OK = 0,
  CG_BAD_ARGUMENT = 1,    /* a size, count or pointer that contradicts the contract */
  CG_BAD_FREQUENCIES = 2, /* a table that does not sum to 2^prob_bits, or a frequency above 4095 */
  CG_BAD_TABLES = 3,      /* memory that cg_tables_build has not written */
  CG_TRUNCATED = 4,       /* the stream ends before its last symbol */
  CG_CORRUPT = 5,         /* a stream that no encoder wrote */
  CG_BAD_TABLE_ID = 6,    /* a table id >= n_tables */
  CG_BAD_CONTEXT = 7,     /* a context >= ids_per_column */
  CG_BAD_SYMBOL = 8,      /* to be encoded: a symbol without a frequency in its table */
  CG_FAILED = 9           /* no memory for a scratch buffer, or the device refused a launch */
};

/* Instruction sets of the CPU. */
enum cg_isa {
  CG_BEST = 0, /* the last of the following that this machine has */
  CG_SCALAR = 1,
  CG_AVX2 = 2,
  CG_AVX512 = 3,
  CG_NEON = 4 /* of 64-bit Arm */
};

/* How to run: every function that takes one reads it before it returns. */
typedef struct cg_run { /* [host] */
  uint32_t threads;     /* at most so many, 0 counts as 1; ignored by CUDA */
  uint32_t isa;         /* of enum cg_isa, an available one; ignored by CUDA */
  void* queue;
} cg_run;

/* A matrix of symbols [tokens, columns], row-major, that is coded as ceil(columns / 256) tiles of all tokens each.
 * Every tile is 256 columns wide but the last, which has the rest. Without tokens there are no tiles. */
typedef struct cg_section {
  uint64_t tokens;
  uint64_t columns;
  uint64_t ids_per_column;  /* 1, or 3: then contexts chooses among them */
  const uint8_t* table_ids; /* [columns, ids_per_column] */
  const uint8_t* contexts;  /* [tokens, columns], values 0..2; NULL where ids_per_column is 1 */
  const void* tables;       /* written by cg_tables_build (or a copy), aligned to 16 bytes */
  uint64_t tables_bytes;
  uint32_t tables_per_tile; /* at most so many different tables in any tile; 0: not known. Only sizes CUDA's shared memory */
} cg_section;
/* Memory that holds no tables is CG_BAD_TABLES: the return value on the CPU, every tile's status on CUDA. */

CG_API uint32_t cg_abi_version(void) CG_NOEXCEPT;

/* Checks that this machine can run the library: on CUDA, runs an empty kernel on the current device and waits for it.
 * reason [host, bytes] takes the cause of a failure, the text of cudaGetErrorString, cut to fit and ended by a 0; shared_bytes
 * [host] the shared memory that a block can have there, on the CPU without a limit. Returns CG_OK, CG_BAD_ARGUMENT or CG_FAILED. */
CG_API int32_t cg_probe(char* reason, uint64_t bytes, uint64_t* shared_bytes) CG_NOEXCEPT;

/* Whether this library and this machine have an instruction set: 0 or 1. */
CG_API int32_t cg_isa_available(uint32_t isa) CG_NOEXCEPT;

/* Bytes that cg_tables_build writes. 0 for n_tables or n_symbols outside 1..256, or prob_bits outside 10..12. */
CG_API uint64_t cg_tables_bytes(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) CG_NOEXCEPT;

/* Derives what the coder looks up from frequencies [n_tables, n_symbols] [host]. Each row sums to 2^prob_bits, no
 * frequency is above 4095. memory [host], aligned to 16 bytes, takes cg_tables_bytes(...) bytes: opaque, without
 * pointers, free to be copied to another address or a device of the same byte order.
 * Returns CG_OK, CG_BAD_ARGUMENT or CG_BAD_FREQUENCIES. */
CG_API int32_t cg_tables_build(const uint16_t* frequencies, uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits,
                               void* memory, uint64_t memory_bytes) CG_NOEXCEPT;

/* Bytes of a tile's slot: the longest stream of so many tokens. 0 for tokens above CG_MAX_TOKENS. */
CG_API uint64_t cg_slot_bytes(uint64_t tokens) CG_NOEXCEPT;

/* Encodes symbols [tokens, columns]. Tile i's stream is the last tile_bytes[i] bytes of slot i; slots holds exactly
 * tiles * cg_slot_bytes(tokens) bytes. tile_bytes and tile_status have an entry per tile; tile_status[i] is CG_OK, or
 * CG_BAD_TABLE_ID, CG_BAD_CONTEXT or CG_BAD_SYMBOL and then tile_bytes[i] is 0. Returns CG_OK, CG_BAD_ARGUMENT or CG_BAD_TABLES. */
CG_API int32_t cg_encode(const cg_section* section, const uint8_t* symbols, uint8_t* slots, uint64_t slots_bytes,
                         uint64_t* tile_bytes, int32_t* tile_status, const cg_run* run) CG_NOEXCEPT;

/* Copies the streams of `tiles` slots back to back. streams_bytes is the sum of tile_bytes. Values that disagree, with
 * each other or with slot_bytes, give CG_BAD_ARGUMENT on the CPU, and are cut off on CUDA. */
CG_API int32_t cg_pack(const uint8_t* slots, uint64_t slot_bytes, const uint64_t* tile_bytes, uint64_t tiles,
                       uint8_t* streams, uint64_t streams_bytes, const cg_run* run) CG_NOEXCEPT;

/* Decodes into symbols [tokens, columns]. Tile i's stream is streams[offsets[i] .. offsets[i + 1]); offsets has
 * tiles + 1 entries, never falls and ends at or before streams_bytes: otherwise CG_BAD_ARGUMENT, the return value on the
 * CPU, the tile's status on CUDA. Every stream has an even length, so one that begins at an odd offset is CG_CORRUPT; on
 * CUDA streams must be aligned to 2 bytes. tile_status[i] is CG_OK, CG_TRUNCATED, CG_CORRUPT, CG_BAD_TABLE_ID or
 * CG_BAD_CONTEXT; where it is not CG_OK the tile's symbols mean nothing and may be unwritten. Returns CG_OK,
 * CG_BAD_ARGUMENT or CG_BAD_TABLES. */
CG_API int32_t cg_decode(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                         const uint64_t* offsets, uint8_t* symbols, int32_t* tile_status,
                         const cg_run* run) CG_NOEXCEPT;

/* Types of values; 16-bit ones are rounded to nearest, ties to even. */
enum cg_dtype { CG_FLOAT32 = 0, CG_BFLOAT16 = 1, CG_FLOAT16 = 2 };

/* A chunk's values [tokens, columns], row-major, and the scale on which they are symbols. The first of every
 * group_tokens rows is an anchor, the others are coded; with group_tokens 0 there are no anchors. "Coded rows [first,
 * last)" counts coded rows alone. Arithmetic is float32, in the order that is written here. */
typedef struct cg_chunk {
  uint64_t tokens;
  uint64_t columns;
  uint64_t group_tokens; /* 0, or 2 and above */
  const float* anchors;  /* decoded: [ceil(tokens / group_tokens), columns]; NULL without anchors */
  const float* means;    /* [columns] */
  const float* steps;    /* [columns] */
  uint32_t dtype;        /* of the values, of enum cg_dtype */
} cg_chunk;

/* Adds to total and squares [columns] the sums of y and y * y over coded rows [first, last), y = value - anchor. */
CG_API int32_t cg_moments(const cg_chunk* chunk, const void* values, uint64_t first, uint64_t last, double* total,
                          double* squares, const cg_run* run) CG_NOEXCEPT;

/* All coded rows to symbols. fine = round((value - anchor - mean) / step), ties to even; coarse = floor((fine + 1) / 3)
 * and digit = fine - 3 coarse, as often as there are digits (0 to 2). base [coded rows, columns] takes the coarsest + 128
 * and digits [n_digits, coded rows, columns], the coarsest first, takes digit + 1; contexts, of the same shape, the sign
 * of the coarser symbol: 0 zero, 1 positive, 2 negative.
 * wide [ceil(columns / CG_BLOCK_COLUMNS), coded rows] takes 1 where a base symbol of that block of a row fits no byte:
 * then nothing of that block holds, else 0. */
#define CG_BLOCK_COLUMNS 1024
#define CG_MAX_DIGITS 2
CG_API int32_t cg_quantise(const cg_chunk* chunk, const void* values, uint32_t n_digits, uint8_t* base, uint8_t* digits,
                           uint8_t* contexts, uint8_t* wide, const cg_run* run) CG_NOEXCEPT;

/* The inverse, for coded rows [first, last): value = symbol * step + mean + anchor, symbol = base - 128 refined by
 * 3 symbol + digit - 1 for each digit, coarsest first. base, and every one of the n_digits matrices that digits [host]
 * points to, is [last - first, columns]. Writes these rows of values, and no others. */
CG_API int32_t cg_restore(const cg_chunk* chunk, uint64_t first, uint64_t last, const uint8_t* base,
                          const uint8_t* const* digits, uint32_t n_digits, void* values, const cg_run* run) CG_NOEXCEPT;

/* Decoding straight into place: a section's symbols become values while they are decoded, and are written to where they
 * are used, the layers' own tensors, so that no matrix of symbols or rows is made in between. */

/* Where a column's values lie: that of row r at address + r * stride (bytes). On CUDA device addresses, and multiples of
 * the values' size. */
typedef struct cg_place {
  uint64_t address;
  uint64_t stride;
} cg_place;

#define CG_UINT8 3 /* a further dtype of what is written: the symbols' indices themselves */

typedef struct cg_output {
  const cg_chunk* chunk;     /* [host], what it points to is not; its dtype is that of what is written, or CG_UINT8: then
                              * anchors, means and steps are not read */
  uint64_t first;            /* the section's first token is this coded row of the chunk */
  uint64_t gap_at;           /* its tokens from gap_at on stand `gap` coded rows further */
  uint64_t gap;
  uint64_t row;              /* of the chunk's first row in its target */
  const cg_place* places;    /* [chunk columns] */
  const uint32_t* columns;   /* [section columns]: which column of the chunk each one is, rising; NULL: the same */
  const uint8_t* coarser[2]; /* base + 128, then digits + 1, of all coded rows: in blocks of 256 columns, whose rows lie
                              * one after the other, [ceil(chunk columns / 256), coded rows, 256], aligned to 8 bytes */
  uint32_t n_coarser;        /* 0: the section holds base symbols; 1 or 2: digits, and their contexts follow from these */
} cg_output;

/* cg_decode, to values as cg_restore makes them. section->contexts is NULL; ids_per_column is 1 for n_coarser 0, else 3.
 * A column of `columns` that the chunk has not gives CG_BAD_ARGUMENT: the return value on the CPU, the tile's status on
 * CUDA. Where a tile's status is not CG_OK its values mean nothing. */
CG_API int32_t cg_decode_into(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                              const uint64_t* offsets, const cg_output* output, int32_t* tile_status,
                              const cg_run* run) CG_NOEXCEPT;

/* Decoding a batch of chunks in one launch, base and digits of a tile together. On the CPU all pointers are host memory,
 * tables may have any precision, and offsets or patch_offsets that are not sound give CG_BAD_ARGUMENT. */

#define CG_MAX_BATCH 8                  /* chunks */
#define CG_MAX_BATCH_TOKENS (1u << 20)  /* of a chunk */
#define CG_BATCH_PROB_BITS 11           /* of all tables */
#define CG_VECTOR_COLUMNS 8             /* columns that are written together */

/* The streams of one section: tile i's are data[offsets[i] .. offsets[i + 1]), as cg_decode takes them. All are NULL or 0
 * for a section without tokens. */
typedef struct cg_streams {
  const uint8_t* data;
  uint64_t bytes;
  const uint64_t* offsets; /* [tiles + 1] */
} cg_streams;

/* What the chunks of a batch share. All columns are coded in every section. Coded rows [first, last) of a chunk have
 * n_digits digits, at `steps`; the rows before and after, its ends, have n_end_digits digits at `end_steps`. */
typedef struct cg_batch { /* [host] */
  uint64_t columns;        /* of a chunk */
  uint64_t group_tokens;   /* 0, or 2 and above, as in cg_chunk */
  const uint8_t* base_ids; /* [columns] */
  const uint8_t* digit_ids[2]; /* [columns, 3] each */
  const void* base_tables;
  uint64_t base_tables_bytes;
  const void* digit_tables; /* each of three symbols */
  uint64_t digit_tables_bytes;
  const float* means;     /* [columns] */
  const float* steps;     /* [columns] */
  const float* end_steps; /* [columns] */
  const cg_place* places; /* [ceil(columns / 8)]: of the first of every 8 columns, which lie one after the other; addresses
                           * and strides are multiples of 16 */
  uint32_t tables_per_tile; /* at most so many different base tables in any tile; 0: they are not copied to shared memory */
  uint32_t n_digits;
  uint32_t n_end_digits;
  uint32_t dtype; /* of the values, of enum cg_dtype */
} cg_batch;

/* One chunk. Patches replace decoded indices: [63:32] coded row  [31:24] zero  [23:16] column of the tile  [15:8] 0 for the
 * base, 1 or 2 for a digit  [7:0] index. Those of tile i are patches[patch_offsets[i] .. patch_offsets[i + 1]), in the order
 * of their rows. */
typedef struct cg_job { /* [host] */
  uint64_t tokens;      /* rows of the chunk, anchors included: at most CG_MAX_BATCH_TOKENS */
  uint64_t first, last; /* of the coded rows */
  uint64_t row;         /* of the chunk's first row in its target */
  const float* anchors; /* decoded: [ceil(tokens / group_tokens), columns]; written too. NULL without anchors */
  cg_streams base, digits[2], end_digits[2];
  const uint64_t* patches; /* NULL without patches */
  const uint32_t* patch_offsets; /* [tiles + 1] */
  uint32_t n_patches;
  int32_t* tile_status; /* [tiles] */
} cg_job;

/* Decodes n_jobs chunks, at most CG_MAX_BATCH, to values as cg_restore makes them, and writes their anchors. tile_status is
 * that of the first section of a tile that is not CG_OK, by the order base, digits, end_digits; CG_BAD_TABLES too for tables
 * of other than CG_BATCH_PROB_BITS or for digit tables of other than three symbols, CG_BAD_ARGUMENT for more base tables than
 * tables_per_tile. Returns CG_OK, CG_BAD_ARGUMENT, or CG_FAILED where a block cannot have 6 KB, and 8 KB for every table of
 * tables_per_tile, of shared memory. */
CG_API int32_t cg_decode_chunks(const cg_batch* batch, const cg_job* jobs, uint32_t n_jobs,
                                const cg_run* run) CG_NOEXCEPT;

/* As cg_decode_into, for columns that have no streams, since all their symbols are zero: `count` of them, named by
 * output->columns, for `tokens` tokens. */
CG_API int32_t cg_fill_into(uint64_t tokens, uint64_t count, const cg_output* output, const cg_run* run) CG_NOEXCEPT;

/* The same for single symbols, of which no byte need hold the index: positions = token * chunk columns + column, below
 * tokens * chunk columns (others are left out). dtype CG_UINT8 takes those of 0..255 alone. output->columns is NULL. */
CG_API int32_t cg_patch_into(uint64_t tokens, const uint64_t* positions, const int32_t* indices, uint64_t count,
                             const cg_output* output, const cg_run* run) CG_NOEXCEPT;

/* Writes rows [n_rows, chunk columns], float, to chunk rows first, first + every, first + 2 every, ...; of `output` only
 * chunk (its tokens, columns, dtype), row and places count. */
CG_API int32_t cg_rows_into(const float* rows, uint64_t n_rows, uint64_t first, uint64_t every, const cg_output* output,
                            const cg_run* run) CG_NOEXCEPT;

/* Contexts of `count` digits from the coarser symbols: where `coarser` (NULL: nowhere) is not 0 that, else 1 for a
 * symbol above zero, 2 for one below, 0 for zero. */
CG_API int32_t cg_contexts(const uint8_t* symbols, uint8_t zero, const uint8_t* coarser, uint64_t count,
                           uint8_t* contexts, const cg_run* run) CG_NOEXCEPT;

/* Clamps symbols [tokens, columns] to low..high [columns] into inside; with contexts (of that shape, else NULL) low and
 * high are [3, columns]. changed [ceil(columns / CG_BLOCK_COLUMNS), tokens] takes 1 where this made a difference to a
 * symbol of that block of a row, else 0. */
CG_API int32_t cg_clamp(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns,
                        const uint8_t* low, const uint8_t* high, uint8_t* inside, uint8_t* changed,
                        const cg_run* run) CG_NOEXCEPT;

/* Adds to counts [columns, bins] how often each symbol occurs in each column of symbols [tokens, columns]; a count
 * reaches 2^31 - 1 at most. bins is 256, or CG_DIGIT_BINS: then, with contexts (of that shape, else NULL), the bin is
 * 3 * context + symbol, and bins beyond the last count as the last. */
#define CG_DIGIT_BINS 9
CG_API int32_t cg_count(const uint8_t* symbols, const uint8_t* contexts, uint64_t tokens, uint64_t columns,
                        uint32_t bins, int32_t* counts, const cg_run* run) CG_NOEXCEPT;

/* CPU only. Copies pieces of memory to to[at .. at + bytes) each, by several threads. No piece overlaps `to`, or ends behind
 * to[bytes]. */
typedef struct cg_piece {
  const uint8_t* from;
  uint64_t at;
  uint64_t bytes;
} cg_piece;

CG_API int32_t cg_gather(const cg_piece* pieces, uint64_t count, uint8_t* to, uint64_t bytes,
                         const cg_run* run) CG_NOEXCEPT;

/* Sums of `bytes` of memory, in blocks of `block_words` little-endian words of 64 bits, the last one filled up
 * with zeros: sums [blocks, 2] takes the sum of a block's words, and that of the products of both signed halves of
 * word ^ keys[word's number in its block], both modulo 2^64. keys [block_words]; on CUDA data and keys must be aligned to 16
 * bytes and block_words even, on the CPU data need not be aligned. */
CG_API int32_t cg_block_sums(const uint8_t* data, uint64_t bytes, const uint64_t* keys, uint64_t block_words,
                             uint64_t* sums, const cg_run* run) CG_NOEXCEPT;

/* Coefficients, most of which are zero, and a matrix: rows = start + coefficients x matrix. */
typedef struct cg_sparse {
  const float* coefficients;    /* [tokens, components], coefficient_stride values from token to token */
  uint64_t coefficient_stride;
  uint64_t tokens;
  uint64_t components;
  const float* steps;           /* [tokens]: coefficients are rounded to multiples of steps x factors; 0, or NULL: they are not */
  const float* factors;         /* [tokens]; NULL if steps is */
  const float* matrix;          /* [components, channels], matrix_stride values from component to component */
  uint64_t matrix_stride;
  uint64_t channels;
  const void* start;            /* [tokens, channels]; NULL: zeros */
  float* rows;                  /* [tokens, channels] */
  uint32_t start_dtype;         /* CG_FLOAT32 or CG_BFLOAT16 */
} cg_sparse;

/* [host] */
CG_API int32_t cg_multiply_sparse(const cg_sparse* sparse, const cg_run* run) CG_NOEXCEPT;

/* Rows of a matrix product, and the keys or values of a layer that they become. Addresses are multiples of the values' size. */
typedef struct cg_heads {
  const void* rows;      /* [tokens, heads * dim], row_stride values from token to token */
  uint64_t row_stride;
  uint64_t tokens;
  const float* means;    /* [heads * dim], which are added; NULL: none */
  const float* angles;   /* cosines, then sines [tokens, pairs]: pairs of channels are turned by them; NULL for 0 pairs */
  uint64_t address;      /* of the first value; strides in bytes */
  uint64_t token_stride;
  uint64_t head_stride;
  uint32_t heads;
  uint32_t dim;
  uint32_t pairs;
  uint32_t interleaved;  /* pair i is (2i, 2i + 1); 0: (i, i + pairs) */
  uint32_t from_dtype;   /* of rows: CG_FLOAT32 or CG_BFLOAT16 */
  uint32_t to_dtype;
} cg_heads;

/* heads [count] [host] */
CG_API int32_t cg_write_heads(const cg_heads* heads, uint64_t count, const cg_run* run) CG_NOEXCEPT;

/* Kinds of a number of an operand. */
enum cg_operand {
  CG_ZERO = 0,
  CG_ONE = 1,
  CG_NUMBER = 2,      /* of `numbers` */
  CG_COEFFICIENT = 3, /* times its token's factor, as the others */
  CG_ROUNDING = 4,    /* what rounding the coefficient to bfloat16 leaves of it */
  CG_COARSEST = 5     /* in tokens [first, last) the nearest multiple of `step`, else the coefficient */
};

/* CUDA only. The left operands of matrix products, gathered from decoded coefficients and further numbers. */
typedef struct cg_operands { /* [host] */
  const float* coefficients; /* [tokens, columns], row_stride values from token to token */
  uint64_t row_stride;
  uint64_t tokens;
  uint64_t columns;          /* at most 2^28, as n_numbers */
  const float* factors;      /* [tokens]; NULL: all are 1 */
  const float* numbers;      /* [tokens, n_numbers] */
  uint64_t n_numbers;
  uint64_t first, last;
  const uint32_t* sources;   /* [products, width]: [31:28] of enum cg_operand  [27:0] index; others, and indices outside, are 0 */
  uint64_t products;
  uint64_t width;
  uint64_t operands;         /* address of [products, tokens, width] */
  float step;
  uint32_t dtype;            /* of the operands: CG_FLOAT32 or CG_BFLOAT16 */
} cg_operands;

CG_API int32_t cg_gather_operands(const cg_operands* job, const cg_run* run) CG_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
