// Rows of a matrix product to the layers' keys and values: a thread has a pair of channels, or one channel that is not turned.
#include "../core/arguments.h"
#include "launch.h"

using namespace cachegen;

namespace {

constexpr uint32_t kMaxLayers = 40;  // of a launch, whose parameters they are: at most 4 KB

struct Layers {
  cg_heads of[kMaxLayers];
};

// Threads of a token's head.
CACHEGEN_HD uint32_t units_of(const cg_heads& heads) { return heads.dim - heads.pairs; }
CACHEGEN_HD uint64_t threads_of(const cg_heads& heads) { return heads.tokens * heads.heads * units_of(heads); }

CACHEGEN_DEVICE float load(const cg_heads& heads, uint64_t t, uint32_t channel) {
  const uint64_t at = t * heads.row_stride + channel;
  const float x = heads.from_dtype == CG_FLOAT32
                      ? CACHEGEN_LOAD(static_cast<const float*>(heads.rows) + at)
                      : Bfloat16::load(CACHEGEN_LOAD(static_cast<const uint16_t*>(heads.rows) + at));
  return x + (heads.means != nullptr ? CACHEGEN_LOAD(heads.means + channel) : 0.0f);
}

CACHEGEN_DEVICE void store(const cg_heads& heads, uint64_t row, uint32_t channel, float x) {
  switch (heads.to_dtype) {
    case CG_FLOAT32: return store_one<Float32>(row + channel * sizeof(float), x);
    case CG_BFLOAT16: return store_one<Bfloat16>(row + channel * sizeof(uint16_t), x);
    default: return store_one<Float16>(row + channel * sizeof(uint16_t), x);
  }
}

// Index: uint32_t where it suffices, since a device divides 64-bit numbers in some hundred instructions.
template <class Index>
CACHEGEN_DEVICE void write(const cg_heads& heads, Index i) {
  const uint32_t units = units_of(heads), width = heads.heads * units, within = uint32_t(i % width);
  const uint32_t head = within / units, unit = within % units;
  const uint64_t t = i / width, row = heads.address + t * heads.token_stride + head * heads.head_stride;
  if (unit >= heads.pairs) {
    const uint32_t channel = heads.pairs + unit;
    return store(heads, row, channel, load(heads, t, head * heads.dim + channel));
  }
  const uint32_t first = heads.interleaved ? 2 * unit : unit, second = first + (heads.interleaved ? 1 : heads.pairs);
  const uint64_t angle = t * heads.pairs + unit;
  const Turned found = turned(load(heads, t, head * heads.dim + first), load(heads, t, head * heads.dim + second),
                            CACHEGEN_LOAD(heads.cosines + angle), CACHEGEN_LOAD(heads.sines + angle));
  store(heads, row, first, found.first);
  store(heads, row, second, found.second);
}

template <class Index>
int32_t write_all(const Layers& layers, uint64_t n, uint64_t most, const cg_run* run) {
  return for_each(run, n * most, [=] CACHEGEN_LAMBDA(uint64_t i) {
    const Index layer = Index(i) / Index(most), within = Index(i) % Index(most);
    const cg_heads& own = layers.of[layer];
    if (within < threads_of(own)) write(own, within);
  });
}

static_assert(sizeof(Layers) <= 4000, "a kernel has 4 KB of parameters");

}  // namespace

int32_t cg_write_heads(const cg_heads* heads, uint64_t count, const cg_run* run) noexcept {
  if (run == nullptr || (count > 0 && heads == nullptr)) return CG_BAD_ARGUMENT;
  for (uint64_t i = 0; i < count; i++)
    if (!is_heads(heads[i])) return CG_BAD_ARGUMENT;
  for (uint64_t first = 0; first < count; first += kMaxLayers) {
    const uint64_t n = count - first < kMaxLayers ? count - first : kMaxLayers;
    Layers layers = {};
    uint64_t most = 0;
    for (uint64_t i = 0; i < n; i++) {
      layers.of[i] = heads[first + i];
      most = most < threads_of(layers.of[i]) ? threads_of(layers.of[i]) : most;
    }
    const bool narrow = n * most <= UINT32_MAX;
    const int32_t status = (narrow ? write_all<uint32_t> : write_all<uint64_t>)(layers, n, most, run);
    if (status) return status;
  }
  return CG_OK;
}
