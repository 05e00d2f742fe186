// NEON, which every 64-bit Arm processor has: 4 lanes a vector.
#include "backend.h"

#if CACHEGEN_NEON
#include <arm_neon.h>

#include "heads.h"
#include "into.h"
#include "planes.h"
#include "source.h"
#include "sparse.h"
#include "vector_encode.h"
#include "vector_tiles.h"

namespace cachegen {
namespace {

// By a mask of lanes, as indices of bytes: `to` spreads the words of a vector's first bytes over these lanes' low halves, `from`
// moves the words of these lanes to the first bytes. 0xff is a zero.
struct WordOrders {
  uint8_t to[16][16] = {}, from[16][8] = {};

  constexpr WordOrders() {
    for (uint32_t mask = 0; mask < 16; mask++) {
      for (uint8_t& byte : to[mask]) byte = 0xff;
      for (uint8_t& byte : from[mask]) byte = 0xff;
      for (uint32_t lane = 0, n = 0; lane < 4; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        for (uint32_t i = 0; i < kWordBytes; i++) {
          to[mask][4 * lane + i] = uint8_t(kWordBytes * n + i);
          from[mask][kWordBytes * n + i] = uint8_t(4 * lane + i);
        }
        n++;
      }
    }
  }
};
alignas(64) constexpr WordOrders kOrders;
constexpr uint8_t kCounts[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

struct Neon {
  using Int = uint32x4_t;
  static constexpr uint32_t kWidth = 4;

  static CACHEGEN_HD Int all(uint32_t x) { return vdupq_n_u32(x); }
  static CACHEGEN_HD Int load(const uint32_t* p) { return vld1q_u32(p); }
  static CACHEGEN_HD void store(uint32_t* p, Int x) { vst1q_u32(p, x); }
  static CACHEGEN_HD Int add(Int a, Int b) { return vaddq_u32(a, b); }
  static CACHEGEN_HD Int subtract(Int a, Int b) { return vsubq_u32(a, b); }
  static CACHEGEN_HD Int multiply(Int a, Int b) { return vmulq_u32(a, b); }
  static CACHEGEN_HD Int smaller(Int a, Int b) { return vminq_u32(a, b); }
  static CACHEGEN_HD Int both(Int a, Int b) { return vandq_u32(a, b); }
  static CACHEGEN_HD Int either(Int a, Int b) { return vorrq_u32(a, b); }
  static CACHEGEN_HD Int left_by(Int x, Int bits) { return vshlq_u32(x, vreinterpretq_s32_u32(bits)); }
  static CACHEGEN_HD Int right_by(Int x, Int bits) { return vshlq_u32(x, vnegq_s32(vreinterpretq_s32_u32(bits))); }
  static CACHEGEN_HD Int left(Int x, uint32_t bits) { return left_by(x, all(bits)); }
  static CACHEGEN_HD Int right(Int x, uint32_t bits) { return right_by(x, all(bits)); }
  static CACHEGEN_HD Int of(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return vsetq_lane_u32(d, vsetq_lane_u32(c, vsetq_lane_u32(b, vdupq_n_u32(a), 1), 2), 3);
  }
  static CACHEGEN_HD Int gather(const uint32_t* p, Int i) {
    return of(p[vgetq_lane_u32(i, 0)], p[vgetq_lane_u32(i, 1)], p[vgetq_lane_u32(i, 2)], p[vgetq_lane_u32(i, 3)]);
  }
  static CACHEGEN_HD Int gather8(const uint32_t* p, Int i) {
    return of(p[2 * uint64_t(vgetq_lane_u32(i, 0))], p[2 * uint64_t(vgetq_lane_u32(i, 1))],
              p[2 * uint64_t(vgetq_lane_u32(i, 2))], p[2 * uint64_t(vgetq_lane_u32(i, 3))]);
  }
  static CACHEGEN_HD Int choose(Int condition, Int yes, Int no) { return vbslq_u32(condition, yes, no); }
  static CACHEGEN_HD Int at_least(Int a, Int b) { return vcgeq_u32(a, b); }
  static CACHEGEN_HD Int add_where(Int condition, Int a, Int b) { return add(a, both(condition, b)); }
  static CACHEGEN_HD Int where_bit(Int x, uint32_t bit, Int yes, Int no) { return choose(vtstq_u32(x, all(1u << bit)), yes, no); }
  static CACHEGEN_HD Int is_zero(Int x) { return vceqzq_u32(x); }
  static CACHEGEN_HD bool any(Int x) { return vmaxvq_u32(x) != 0; }
  static CACHEGEN_HD uint32_t mask(Int condition) { return vaddvq_u32(both(condition, of(1, 2, 4, 8))); }

  // x / y, or one less, for x < 2^31 and x / y < 2^21: see kBelow.
  static CACHEGEN_HD Int quotient(Int x, Int y) {
    const float32x4_t about = vdivq_f32(vcvtq_f32_u32(x), vcvtq_f32_u32(y));
    return vcvtq_u32_f32(vmulq_f32(about, vdupq_n_f32(kBelow)));
  }

  static CACHEGEN_HD Int multiply_high(Int a, Int b) {
    const uint64x2_t low = vmull_u32(vget_low_u32(a), vget_low_u32(b)), high = vmull_high_u32(a, b);
    return vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high));
  }

  // 8 bytes a lane, as two vectors of their halves.
  static CACHEGEN_HD void load_halves(const uint8_t* p, Int& low, Int& high) {
    const Int a = vreinterpretq_u32_u8(vld1q_u8(p)), b = vreinterpretq_u32_u8(vld1q_u8(p + 16));
    low = vuzp1q_u32(a, b);
    high = vuzp2q_u32(a, b);
  }
  // The same, the last lane first.
  static CACHEGEN_HD void load_halves_back(const uint8_t* p, Int& low, Int& high) {
    Int ahead, behind;
    load_halves(p, ahead, behind);
    low = vextq_u32(vrev64q_u32(ahead), vrev64q_u32(ahead), 2);
    high = vextq_u32(vrev64q_u32(behind), vrev64q_u32(behind), 2);
  }
  static CACHEGEN_HD void store_halves(uint8_t* p, Int low, Int high) {
    vst1q_u8(p, vreinterpretq_u8_u32(vzip1q_u32(low, high)));
    vst1q_u8(p + 16, vreinterpretq_u8_u32(vzip2q_u32(low, high)));
  }

  // States below kMinState take the next words, in lane order.
  static CACHEGEN_HD Int refill(Int x, const uint8_t*& at) {
    const Int low = vcltq_u32(x, all(kMinState));
    const uint32_t lanes = mask(low);
    const uint8x16_t words = vcombine_u8(vld1_u8(at), vdup_n_u8(0));
    at += kWordBytes * kCounts[lanes];
    return choose(low, either(left(x, kWordBits), vreinterpretq_u32_u8(vqtbl1q_u8(words, vld1q_u8(kOrders.to[lanes])))), x);
  }

  // States from `limit` on give a word, in the order of the vector, to `at`.
  static CACHEGEN_HD Int give(Int x, Int limit, uint8_t*& at) {
    const Int full = vcgeq_u32(x, limit);
    const uint32_t lanes = mask(full);
    vst1_u8(at, vqtbl1_u8(vreinterpretq_u8_u32(x), vld1_u8(kOrders.from[lanes])));
    at += kWordBytes * kCounts[lanes];
    return choose(full, right(x, kWordBits), x);
  }
};

}  // namespace

const Backend kNeon = {decode_tiles<Neon, 1>, 1,    open_chain<Neon>, encode_rows<Neon>, store_stream, passes,       contexts,
                      clamp,                 count_digits, into, rows_into, run_contexts, levels_into,
                      levels_contexts,       source_passes, plane_passes, heads_into, multiply_sparse};

}  // namespace cachegen
#endif
