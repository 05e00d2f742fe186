// What a batch of chunks begins with: work of the host.
#include "../core/parts.h"

int32_t cg_read_parts(const cg_parts* parts, cg_job* jobs, uint8_t* to, uint64_t to_bytes, uint64_t address,
                      cg_piece* pieces, cg_staged* staged, const cg_run*) noexcept {
  return cachegen::read_parts(parts, jobs, to, to_bytes, address, pieces, staged);
}
