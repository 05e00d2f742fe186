/* The part of the C ABI that reads the parts of a batch's chunks, as bytes that an encoder wrote: work of the host in both
 * libraries. It belongs to cachegen.h, whose version counts for it, too. */
#ifndef CACHEGEN_PARTS_H_
#define CACHEGEN_PARTS_H_

#include "cachegen.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CG_PARTS_SECTIONS 6 /* of a chunk, at most: its anchors, its base, and two digits twice */

typedef struct cg_segment {
  const uint8_t* data;
  uint64_t bytes;
} cg_segment;

typedef struct cg_parts {
  uint64_t columns;       /* of every section, all coded */
  uint64_t anchor_bytes;  /* of the scales of an anchor; 0: there are no anchors */
  uint64_t chunks;        /* at most CG_MAX_BATCH */
  uint32_t n_digits;      /* refinements that are decoded */
  uint32_t n_end_digits;  /* refinements that the base's part holds, of the rows before `first` and from `last` on */
  const cg_segment* segments; /* [1 + n_digits, chunks]: the part of the base, then those of the refinements */
} cg_parts;

typedef struct cg_staged {
  uint64_t used;   /* bytes of `to` */
  uint64_t scales; /* where in `to` the scales of all anchors begin, one chunk after the other */
  uint64_t pieces;
  int32_t status;  /* of the data: CG_OK, CG_TRUNCATED or CG_CORRUPT. If it is not CG_OK, nothing was written */
  uint32_t wide[8]; /* of each chunk the base's exceptions whose index no byte holds; their patches have the nearest one */
} cg_staged;

/* jobs [chunks] have their tokens, first and last; with anchors as many follow, which have the number of anchors as tokens and
 * last. All take their streams and patches. `to` takes offsets, scales and patches; it lies at `address` when the jobs are run.
 * Streams stay where they are if pieces is NULL. Else pieces [CG_PARTS_SECTIONS * chunks] say where in `to` they belong. For
 * each section 16 + 8 * tiles bytes of `to` suffice beside the parts' own, and for each job 8 + 4 * tiles. */
CG_API int32_t cg_read_parts(const cg_parts* parts, cg_job* jobs, uint8_t* to, uint64_t to_bytes, uint64_t address,
                             cg_piece* pieces, cg_staged* staged, const cg_run* run) CG_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
