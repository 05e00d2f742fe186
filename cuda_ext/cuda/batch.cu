// cg_decode_chunks and cg_probe: a block decodes one tile column of up to CG_MAX_BATCH chunks, a warp each, which share the
// tables that they look up.
#include <string.h>

#include <vector>

#include "../core/arguments.h"
#include "../core/levels.h"
#include "launch.h"

using namespace cachegen;

namespace {

struct Jobs {
  cg_job of[CG_MAX_BATCH];
};

// What a warp makes of its job once the block has staged the tile's tables.
template <class T, uint32_t kDigits, bool kAny>
CACHEGEN_DEVICE void decode_job(int32_t staged, const cg_batch& batch, const cg_job& job, const TileTables& tables,
                                uint64_t tile) {
  const Warp warp;
  int32_t status = staged;
  if (status == CG_OK) {
    ChunkTile<T, kAny> decoder(warp, batch, job, tables, tile);
    status = decoder.template decode<kDigits>();
  }
  warp.once([&] { job.tile_status[tile] = status; });
}

#if defined(__CUDACC__)

// Registers for so many blocks of 8 warps on a multiprocessor: 24 warps at level 1 (16 on sm_120, where some would be
// spilled), 16 above.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr uint32_t kBaseBlocks = 2;
#else
constexpr uint32_t kBaseBlocks = 3;
#endif
template <uint32_t kDigits, bool kAny>
constexpr uint32_t kBlocks = kAny ? 1 : kDigits == 0 ? kBaseBlocks : 2;

template <class T, uint32_t kDigits, bool kAny>
__global__ void __launch_bounds__(CG_MAX_BATCH* kLanes, kBlocks<kDigits, kAny>)
    chunks_kernel(const __grid_constant__ cg_batch batch, const __grid_constant__ Jobs jobs) {
  extern __shared__ uint4 memory[];
  __shared__ uint32_t used[kMaxTables / 32];
  uint32_t* pairs = reinterpret_cast<uint32_t*>(memory);
  const TileTables tables = {pairs + CG_MAX_DIGITS * kPairs, pairs, used};
  const int32_t staged = stage_tile(Crew(), batch, blockIdx.x, tables);
  decode_job<T, kDigits, kAny>(staged, batch, jobs.of[threadIdx.x / kLanes], tables, blockIdx.x);
}

template <class T, uint32_t kDigits, bool kAny>
int32_t launch(const cg_batch& batch, const Jobs& jobs, uint32_t n_jobs, const cg_run* run) {
  const auto kernel = chunks_kernel<T, kDigits, kAny>;
  const int bytes = int(batch_shared_bytes(batch));
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    cudaGetLastError();
    return CG_FAILED;
  }
  kernel<<<uint32_t(tile_count(1, batch.columns)), n_jobs * kLanes, size_t(bytes), stream_of(run)>>>(batch, jobs);
  return launched();
}

__global__ void empty_kernel() {}

#else

template <class T, uint32_t kDigits, bool kAny>
int32_t launch(const cg_batch& batch, const Jobs& jobs, uint32_t n_jobs, const cg_run*) {
  std::vector<uint32_t> memory(batch_shared_bytes(batch) / sizeof(uint32_t));
  uint32_t used[kMaxTables / 32], *pairs = memory.data();
  const TileTables tables = {pairs + CG_MAX_DIGITS * kPairs, pairs, used};
  for (uint64_t tile = 0; tile < tile_count(1, batch.columns); tile++) {
    const int32_t staged = stage_tile(Crew(), batch, tile, tables);
    for (uint32_t i = 0; i < n_jobs; i++) decode_job<T, kDigits, kAny>(staged, batch, jobs.of[i], tables, tile);
  }
  return CG_OK;
}

#endif

template <class T>
int32_t decode_chunks(const cg_batch& batch, const Jobs& jobs, uint32_t n_jobs, bool any, const cg_run* run) {
  if (any) return launch<T, 0, true>(batch, jobs, n_jobs, run);
  switch (batch.n_digits) {
    case 0: return launch<T, 0, false>(batch, jobs, n_jobs, run);
    case 1: return launch<T, 1, false>(batch, jobs, n_jobs, run);
    default: return launch<T, 2, false>(batch, jobs, n_jobs, run);
  }
}

}  // namespace

int32_t cg_probe(char* reason, uint64_t bytes, uint64_t* shared_bytes) noexcept {
  if (reason == nullptr || bytes == 0 || shared_bytes == nullptr) return CG_BAD_ARGUMENT;
  reason[0] = 0;
#if defined(__CUDACC__)
  int device = 0, found = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    empty_kernel<<<1, 1>>>();
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  *shared_bytes = error == cudaSuccess ? uint64_t(found) : 0;
  if (error == cudaSuccess) return CG_OK;
  cudaGetLastError();  // it is reported here, and must not be found by a later call
  strncpy(reason, cudaGetErrorString(error), bytes - 1);
  reason[bytes - 1] = 0;
  return CG_FAILED;
#else
  *shared_bytes = uint64_t(227) << 10;
  return CG_OK;
#endif
}

int32_t cg_decode_chunks(const cg_batch* batch, const cg_job* jobs, uint32_t n_jobs, const cg_run* run) noexcept {
  if (run == nullptr || !is_batch(batch) || (n_jobs > 0 && jobs == nullptr) || n_jobs > CG_MAX_BATCH) return CG_BAD_ARGUMENT;
  Jobs copied = {};
  bool any = batch->columns % kTileColumns != 0 || batch->tables_per_tile == 0;
  for (uint32_t i = 0; i < n_jobs; i++) {
    if (!is_job(*batch, jobs[i])) return CG_BAD_ARGUMENT;
    copied.of[i] = jobs[i];
    any |= jobs[i].first > 0 || jobs[i].last < coded_rows(chunk_of(*batch, jobs[i]));
  }
  if (batch->columns == 0 || n_jobs == 0) return CG_OK;
  switch (batch->dtype) {
    case CG_FLOAT32: return decode_chunks<Float32>(*batch, copied, n_jobs, any, run);
    case CG_BFLOAT16: return decode_chunks<Bfloat16>(*batch, copied, n_jobs, any, run);
    default: return decode_chunks<Float16>(*batch, copied, n_jobs, any, run);
  }
}
