#include "backend.h"

namespace cachegen {
namespace {

#if CACHEGEN_X86
bool has_avx2() {
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
  return found;
}
bool has_avx512() {
  static const bool found =
      (__builtin_cpu_init(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
  return found;
}
#endif

}  // namespace

const Backend* backend_of(uint32_t isa) {
  switch (isa) {
#if CACHEGEN_X86
    case CG_BEST:
      return has_avx512() ? &kAvx512 : has_avx2() ? &kAvx2 : &kScalar;
    case CG_AVX2: return has_avx2() ? &kAvx2 : nullptr;
    case CG_AVX512: return has_avx512() ? &kAvx512 : nullptr;
#endif
#if CACHEGEN_NEON
    case CG_BEST:
    case CG_NEON: return &kNeon;
#elif !CACHEGEN_X86
    case CG_BEST:
#endif
    case CG_SCALAR: return &kScalar;
    default: return nullptr;
  }
}

const Backend* backend_for(const cg_run* run) {
  return run == nullptr || run->queue != nullptr ? nullptr : backend_of(run->isa);
}

}  // namespace cachegen
