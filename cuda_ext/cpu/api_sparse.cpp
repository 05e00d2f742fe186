// Multiplies coefficients, most of which are zero, by a matrix.
#include "backend.h"
#include "threads.h"

using namespace cachegen;

namespace {

constexpr uint64_t kTokens = 256;  // that a thread multiplies at a time
constexpr uint64_t kSlack = 16;    // what is listed behind the last coefficient

bool is_sparse(const cg_sparse& sparse) {
  if (sparse.tokens > CG_MAX_TOKENS || sparse.components > CG_MAX_COLUMNS || sparse.channels > CG_MAX_COLUMNS) return false;
  if (sparse.tokens == 0 || sparse.channels == 0) return true;
  if (sparse.coefficient_stride < sparse.components || sparse.matrix_stride < sparse.channels) return false;
  if (sparse.start_dtype != CG_FLOAT32 && sparse.start_dtype != CG_BFLOAT16) return false;
  if (sparse.components > 0 && (sparse.coefficients == nullptr || sparse.matrix == nullptr)) return false;
  return sparse.rows != nullptr && (sparse.steps == nullptr) == (sparse.factors == nullptr);
}

struct Memory {
  std::unique_ptr<float[]> values;
  std::unique_ptr<uint32_t[]> rows;
  std::unique_ptr<uint64_t[]> ends;

  // Memory that is not touched takes none.
  void open(uint64_t components) {
    values.reset(new (std::nothrow) float[kTokens * components + kSlack]);
    rows.reset(new (std::nothrow) uint32_t[kTokens * components + kSlack]);
    ends.reset(new (std::nothrow) uint64_t[kTokens + 1]);
  }
  bool is_open() const { return values && rows && ends; }
};

}  // namespace

int32_t cg_multiply_sparse(const cg_sparse* sparse, const cg_run* run) noexcept {
  const Backend* backend = backend_for(run);
  if (backend == nullptr || sparse == nullptr || !is_sparse(*sparse)) return CG_BAD_ARGUMENT;
  const uint64_t pieces = (sparse->tokens + kTokens - 1) / kTokens;
  std::atomic<bool> failed{false};
  for_each_with<Memory>(
      pieces, sparse->tokens * sparse->channels, run->threads, [&](Memory* memory) { memory->open(sparse->components); },
      [&](uint64_t i, Memory* memory) {
        if (memory == nullptr || !memory->is_open()) return void(failed = true);
        const SparseRows found = {memory->values.get(), memory->rows.get(), memory->ends.get()};
        backend->sparse(*sparse, i * kTokens, std::min(kTokens, sparse->tokens - i * kTokens), found);
      });
  return failed ? CG_FAILED : CG_OK;
}
