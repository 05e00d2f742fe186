// Writes rows of a matrix product to the layers' keys and values.
#include "../core/arguments.h"
#include "backend.h"
#include "threads.h"

using namespace cachegen;

namespace {

constexpr uint64_t kTokens = 128;  // that a thread writes at a time

}  // namespace

int32_t cg_write_heads(const cg_heads* heads, uint64_t count, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || (count > 0 && heads == nullptr)) return CG_BAD_ARGUMENT;
  uint64_t most = 0, values = 0;
  for (uint64_t i = 0; i < count; i++) {
    if (!is_heads(heads[i])) return CG_BAD_ARGUMENT;
    most = std::max(most, heads[i].tokens);
    values += heads[i].tokens * heads[i].heads * heads[i].dim;
  }
  const uint64_t parts = (most + kTokens - 1) / kTokens;
  for_each(count * parts, values, run->threads, [&](uint64_t i) {
    const cg_heads& one = heads[i / parts];
    const uint64_t first = std::min(i % parts * kTokens, one.tokens);
    backend->heads(one, first, std::min(first + kTokens, one.tokens));
  });
  return CG_OK;
}
