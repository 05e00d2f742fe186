// Copies pieces of memory side by side with several threads: what brings coded bytes together, and into pinned memory.
#include <string.h>

#include <vector>

#include "backend.h"
#include "threads.h"

#if CACHEGEN_X86
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace cachegen;

namespace {

constexpr uint64_t kShare = 1 << 18;  // bytes that a thread copies at a time
constexpr uint64_t kBytesPerSymbol = 4;  // of a copy, in the time of decoding a symbol

// The host rarely reads these bytes soon, so they pass the caches by and leave the caller's data there.
void copy(uint8_t* to, const uint8_t* from, uint64_t bytes) {
#if CACHEGEN_X86
  constexpr uint64_t kVector = sizeof(__m128i), kLine = 4 * kVector;
  const uint64_t head = std::min(bytes, (kVector - uintptr_t(to) % kVector) % kVector);
  memcpy(to, from, head);
  uint64_t i = head;
  for (; i + kLine <= bytes; i += kLine)
    for (uint64_t k = i; k < i + kLine; k += kVector)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
  _mm_sfence();
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// The first write to each page of new memory interrupts the program, so pages should be large.
void use_large_pages(uint8_t* to, uint64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t first = (uintptr_t(to) + kPage - 1) / kPage * kPage, last = (uintptr_t(to) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

int32_t cg_gather(const cg_piece* pieces, uint64_t count, uint8_t* to, uint64_t bytes, const cg_run* run) noexcept {
  if (backend_for(run) == nullptr || (count > 0 && pieces == nullptr)) return CG_BAD_ARGUMENT;
  uint64_t total = 0, shares = 0;
  for (uint64_t i = 0; i < count; i++) {
    const cg_piece& piece = pieces[i];
    if (piece.bytes == 0) continue;
    if (to == nullptr || piece.from == nullptr || piece.at > bytes || piece.bytes > bytes - piece.at) return CG_BAD_ARGUMENT;
    total += piece.bytes;
    shares += (piece.bytes - 1) / kShare + 1;
  }
  use_large_pages(to, bytes);
  std::vector<cg_piece> cut;
  try {
    cut.reserve(shares);
  } catch (const std::exception&) {
    return CG_FAILED;
  }
  for (uint64_t i = 0; i < count; i++)
    for (uint64_t done = 0; done < pieces[i].bytes; done += kShare)
      cut.push_back({pieces[i].from + done, pieces[i].at + done, std::min(kShare, pieces[i].bytes - done)});
  for_each(cut.size(), total / kBytesPerSymbol, run->threads,
           [&](uint64_t i) { copy(to + cut[i].at, cut[i].from, cut[i].bytes); });
  return CG_OK;
}
