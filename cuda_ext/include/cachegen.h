/* The C ABI of the native coder: the whole contract. Two libraries have it, one for the CPU and one for CUDA.
 *
 * Twists:
 * 1. A return value speaks of the arguments alone. What is found in the data (bytes, ids, contexts, symbols) is
 *    reported tile by tile in `tile_status`, so that a device can report it without a synchronisation.
 * 2. Memory is the caller's, always: no function keeps a pointer or returns memory of its own.
 * 3. `queue` is a CUDA stream. On the CPU it must be NULL and everything is done on return. On CUDA all pointers that
 *    are not marked [host] are device memory, and results are valid once the queue has been waited for.
 * 4. A stream's length is not known before it is written, backwards: the encoder fills the END of a slot of the
 *    worst-case size, one slot per tile, and cg_pack then puts the streams back to back.
 *
 * What a stream is, is spelt out in hf_cachegen/codec/rans_reference.py: every back-end writes the same bytes.
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
#define CG_ABI_VERSION 1

#define CG_TILE_COLUMNS 256 /* of the widest tile */
/* With these, products of sizes stay within 64 bits. */
#define CG_MAX_TOKENS (1u << 31)
#define CG_MAX_COLUMNS (1u << 31)

/* Return values, and (from CG_TRUNCATED on) values of tile_status. */
enum cg_status {
  CG_OK = 0,
  CG_BAD_ARGUMENT = 1,    /* a size, count or pointer that contradicts the contract */
  CG_BAD_FREQUENCIES = 2, /* a table that does not sum to 2^prob_bits, or a frequency above 4095 */
  CG_BAD_TABLES = 3,      /* memory that cg_tables_build has not written */
  CG_TRUNCATED = 4,       /* the stream ends before its last symbol */
  CG_CORRUPT = 5,         /* a stream that no encoder wrote */
  CG_BAD_TABLE_ID = 6,    /* a table id >= n_tables */
  CG_BAD_CONTEXT = 7,     /* a context >= ids_per_column */
  CG_BAD_SYMBOL = 8       /* to be encoded: a symbol without a frequency in its table */
};

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
} cg_section;

CG_API uint32_t cg_abi_version(void) CG_NOEXCEPT;

/* Bytes that cg_tables_build writes. 0 for n_tables or n_symbols outside 1..256, or prob_bits outside 10..12. */
CG_API uint64_t cg_tables_bytes(uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits) CG_NOEXCEPT;

/* Derives what the coder looks up from frequencies [n_tables, n_symbols] [host]. Each row sums to 2^prob_bits, no
 * frequency is above 4095. memory [host], aligned to 16 bytes, takes cg_tables_bytes(...) bytes: opaque, without
 * pointers, free to be copied to another place or a device of the same byte order.
 * Returns CG_OK, CG_BAD_ARGUMENT or CG_BAD_FREQUENCIES. */
CG_API int32_t cg_tables_build(const uint16_t* frequencies, uint32_t n_tables, uint32_t n_symbols, uint32_t prob_bits,
                               void* memory, uint64_t memory_bytes) CG_NOEXCEPT;

/* Bytes of a tile's slot: the longest stream of so many tokens. 0 for tokens above CG_MAX_TOKENS. */
CG_API uint64_t cg_slot_bytes(uint64_t tokens) CG_NOEXCEPT;

/* Encodes symbols [tokens, columns]. Tile i's stream is the last tile_bytes[i] bytes of slot i; slots holds exactly
 * tiles * cg_slot_bytes(tokens) bytes. tile_bytes and tile_status have an entry per tile; tile_status[i] is CG_OK, or
 * CG_BAD_TABLE_ID, CG_BAD_CONTEXT or CG_BAD_SYMBOL and then tile_bytes[i] is 0. threads: at most so many (0 counts as
 * 1; ignored by CUDA). Returns CG_OK, CG_BAD_ARGUMENT or CG_BAD_TABLES. */
CG_API int32_t cg_encode(const cg_section* section, const uint8_t* symbols, uint8_t* slots, uint64_t slots_bytes,
                         uint64_t* tile_bytes, int32_t* tile_status, uint32_t threads, void* queue) CG_NOEXCEPT;

/* Copies the streams of `tiles` slots back to back. streams_bytes is the sum of tile_bytes. Values that disagree, with
 * each other or with slot_bytes, give CG_BAD_ARGUMENT on the CPU, and are cut off on CUDA. */
CG_API int32_t cg_pack(const uint8_t* slots, uint64_t slot_bytes, const uint64_t* tile_bytes, uint64_t tiles,
                       uint8_t* streams, uint64_t streams_bytes, void* queue) CG_NOEXCEPT;

/* Decodes into symbols [tokens, columns]. Tile i's stream is streams[offsets[i] .. offsets[i + 1]); offsets [host] has
 * tiles + 1 entries, never falls and ends at or before streams_bytes. tile_status[i] is CG_OK, CG_TRUNCATED,
 * CG_CORRUPT, CG_BAD_TABLE_ID or CG_BAD_CONTEXT; where it is not CG_OK the tile's symbols mean nothing and may be
 * unwritten. threads as above. Returns CG_OK, CG_BAD_ARGUMENT or CG_BAD_TABLES. */
CG_API int32_t cg_decode(const cg_section* section, const uint8_t* streams, uint64_t streams_bytes,
                         const uint64_t* offsets, uint8_t* symbols, int32_t* tile_status, uint32_t threads,
                         void* queue) CG_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
