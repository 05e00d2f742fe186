// Operands of matrix products: a warp has some tokens of a product, and reads each source once for all of them.
#include "../core/arguments.h"
#include "../core/operands.h"
#include "launch.h"

using namespace cachegen;

namespace {

constexpr uint32_t kTokens = 4;  // of a warp

template <class T>
int32_t gather(const cg_operands& job, const cg_run* run) {
  const uint64_t blocks = (job.tokens + kTokens - 1) / kTokens;
  return for_each_warp(run, job.products * blocks, [=] CACHEGEN_LAMBDA(const Warp& warp, uint64_t i) {
    const uint64_t product = i / blocks, first = i % blocks * kTokens;
    const uint64_t left = job.tokens - first;
    const uint32_t* sources = job.sources + product * job.width;
    constexpr uint64_t kBytes = sizeof(typename T::Stored);
    const uint64_t to = job.operands + (product * job.tokens + first) * job.width * kBytes;
    warp.each([&](uint32_t lane) {
      for (uint64_t column = lane; column < job.width; column += kWarpLanes) {
        const uint32_t source = CACHEGEN_LOAD(sources + column);
        CACHEGEN_UNROLL for (uint32_t k = 0; k < kTokens; k++)
          if (k < left) store_one<T>(to + (k * job.width + column) * kBytes, operand_of(job, first + k, source));
      }
    });
  });
}

}  // namespace

int32_t cg_gather_operands(const cg_operands* job, const cg_run* run) noexcept {
  if (run == nullptr || !are_operands(job)) return CG_BAD_ARGUMENT;
  if (job->products == 0 || job->tokens == 0 || job->width == 0) return CG_OK;
  return job->dtype == CG_FLOAT32 ? gather<Float32>(*job, run) : gather<Bfloat16>(*job, run);
}
