// How work is spread over a device: for_each, a thread an item; for_each_warp, a warp an item; for_each_tile, a warp a tile.
//
// Notes:
// 1. Compiled by another compiler than nvcc the same calls loop on the host, a tile after the other, the lanes of its warp in
//    lockstep (core/warp.h). It is not shipped; the tests run it.
// 2. The tables that a block's tiles use are staged in shared memory, if they fit (those of base symbols mostly do):
//    neighbouring columns share most of theirs, and a lookup that 32 lanes make at 32 places is several times faster there.
#pragma once

#include <stdint.h>

#include "../core/warp_tile.h"

#if defined(__CUDACC__)
#define CACHEGEN_LAMBDA __device__
#else
#define CACHEGEN_LAMBDA
#endif

namespace cachegen {

#if defined(__CUDACC__)

constexpr uint32_t kThreads = 256;             // of a block of for_each
constexpr uint32_t kMaxWarps = 6;              // of a block; two have room for their registers
constexpr uint32_t kStagedBytes = 80 << 10;    // two blocks fit on an A100, an H100 and a B200; a T4's block has less
constexpr uint32_t kFixedBytes = 1 << 10;      // of a block of tile_kernel, beside what is staged
constexpr uint32_t kTableBytes = 4u << 11;     // of a table's slots, at the usual prob_bits
constexpr uint32_t kMaxBlocks = 1u << 30;

inline cudaStream_t stream_of(const cg_run* run) { return static_cast<cudaStream_t>(run->queue); }
inline int32_t launched() { return cudaGetLastError() == cudaSuccess ? CG_OK : CG_FAILED; }

template <class F>
__global__ void __launch_bounds__(kThreads) each_kernel(uint64_t count, F f) {
  const uint64_t step = uint64_t(gridDim.x) * kThreads;
  for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) f(i);
}

// f(i) for i below count; F is copied to the device.
template <class F>
int32_t for_each(const cg_run* run, uint64_t count, const F& f) {
  if (count == 0) return CG_OK;
  const uint64_t blocks = (count + kThreads - 1) / kThreads;
  each_kernel<<<uint32_t(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream_of(run)>>>(count, f);
  return launched();
}

template <class F>
__global__ void __launch_bounds__(kThreads) warp_kernel(uint64_t count, F f) {
  const uint64_t step = uint64_t(gridDim.x) * (kThreads / kLanes);
  const Warp warp;
  for (uint64_t i = uint64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes; i < count; i += step) f(warp, i);
}

// f(warp, i) for i below count, a warp an item.
template <class F>
int32_t for_each_warp(const cg_run* run, uint64_t count, const F& f) {
  if (count == 0) return CG_OK;
  const uint64_t blocks = (count + kThreads / kLanes - 1) / (kThreads / kLanes);
  warp_kernel<<<uint32_t(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream_of(run)>>>(count, f);
  return launched();
}

inline int32_t set_zero(const cg_run* run, void* memory, uint64_t bytes) {
  return bytes == 0 || cudaMemsetAsync(memory, 0, bytes, stream_of(run)) == cudaSuccess ? CG_OK : CG_FAILED;
}

// Which tables the block's tiles use, and where their slot entries lie from now on.
__device__ inline Lut stage(const cg_section& section, const Tables& tables, uint64_t tile, uint64_t tiles,
                            uint32_t capacity, uint32_t* used, uint8_t* rank, SlotEntry* staged) {
  if (threadIdx.x < kMaxTables / 32) used[threadIdx.x] = 0;
  __syncthreads();
  if (tile < tiles) {
    const Tile mine = tile_at(tile, section.columns);
    const uint8_t* ids = section.table_ids + mine.first_column * section.ids_per_column;
    for (uint32_t i = threadIdx.x % kLanes; i < mine.width * section.ids_per_column; i += kLanes)
      atomicOr(&used[ids[i] / 32], 1u << ids[i] % 32);
  }
  __syncthreads();
  uint32_t count = 0;
  for (uint32_t i = 0; i < kMaxTables / 32; i++) count += count_bits(used[i]);
  const uint32_t entries = 1u << tables.prob_bits;
  if (uint64_t(count) * entries * sizeof(SlotEntry) > capacity)
    return {tables.slots, nullptr, tables.prob_bits, tables.n_tables};
  uint32_t place = 0;
  for (uint32_t id = 0; id < tables.n_tables; id++) {
    if ((used[id / 32] >> id % 32 & 1) == 0) continue;
    if (threadIdx.x == 0) rank[id] = uint8_t(place);
    const uint4* from = reinterpret_cast<const uint4*>(tables.slots_of(id));
    uint4* to = reinterpret_cast<uint4*>(staged + place * entries);
    for (uint32_t i = threadIdx.x; i < entries / 4; i += blockDim.x) to[i] = from[i];
    place++;
  }
  __syncthreads();
  return {staged, rank, tables.prob_bits, tables.n_tables};
}

template <class F>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    tile_kernel(cg_section section, uint64_t tiles, int32_t* status, uint32_t staged_bytes, F f) {
  extern __shared__ __align__(16) SlotEntry memory[];
  __shared__ uint32_t used[kMaxTables / 32];
  __shared__ uint8_t rank[kMaxTables];
  const uint64_t tile = uint64_t(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  Tables tables;
  const Warp warp;
  if (!open_tables(section.tables, section.tables_bytes, &tables)) {
    if (tile < tiles) warp.once([&] { status[tile] = CG_BAD_TABLES; });
    return;
  }
  const Lut lut = staged_bytes ? stage(section, tables, tile, tiles, staged_bytes, used, rank, memory)
                               : Lut{tables.slots, nullptr, tables.prob_bits, tables.n_tables};
  if (tile >= tiles) return;
  const int32_t found = f(warp, tables, lut, tile);
  warp.once([&] { status[tile] = found; });
}

// status[i] = f(warp, tables, lut, i) for every tile; staged: f looks into lut.
template <class F>
int32_t for_each_tile(const cg_run* run, const cg_section& section, uint64_t tiles, int32_t* status, bool staged,
                      const F& f) {
  int device = 0, processors = 1, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return CG_FAILED;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return CG_FAILED;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return CG_FAILED;
  // Few tiles go to many multiprocessors, all at once; many share what is staged.
  const uint64_t wanted = (tiles + 2 * uint64_t(processors) - 1) / (2 * uint64_t(processors));
  const uint32_t warps = uint32_t(wanted < 1 ? 1 : wanted > kMaxWarps ? kMaxWarps : wanted);
  const uint64_t blocks = (tiles + warps - 1) / warps;
  const uint64_t known = uint64_t(section.tables_per_tile) * warps * kTableBytes;
  const uint32_t room = uint32_t(shared) < kStagedBytes + kFixedBytes ? uint32_t(shared) - kFixedBytes : kStagedBytes;
  const uint32_t bytes = !staged ? 0 : known > 0 && known < room ? uint32_t(known) : room;
  if (staged && cudaFuncSetAttribute(tile_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess)
    return CG_FAILED;
  tile_kernel<<<uint32_t(blocks), warps * kLanes, bytes, stream_of(run)>>>(section, tiles, status, bytes, f);
  return launched();
}

#else

template <class F>
int32_t for_each(const cg_run*, uint64_t count, const F& f) {
  for (uint64_t i = 0; i < count; i++) f(i);
  return CG_OK;
}

template <class F>
int32_t for_each_warp(const cg_run*, uint64_t count, const F& f) {
  for (uint64_t i = 0; i < count; i++) f(Warp(), i);
  return CG_OK;
}

inline int32_t set_zero(const cg_run*, void* memory, uint64_t bytes) {
  if (bytes > 0) memset(memory, 0, bytes);
  return CG_OK;
}

template <class F>
int32_t for_each_tile(const cg_run*, const cg_section& section, uint64_t tiles, int32_t* status, bool, const F& f) {
  for (uint64_t i = 0; i < tiles; i++) {
    Tables tables;
    if (open_tables(section.tables, section.tables_bytes, &tables))
      status[i] = f(Warp(), tables, Lut{tables.slots, nullptr, tables.prob_bits, tables.n_tables}, i);
    else
      status[i] = CG_BAD_TABLES;
  }
  return CG_OK;
}

#endif

}  // namespace cachegen
