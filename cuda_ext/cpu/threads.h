// Pieces of work (tiles, blocks of columns) over threads: each takes the next piece, so that uneven ones balance.
//
// Note: threads live for one call. A pool would not survive fork(), which data loaders use; starting a thread takes
// some 20 us, which kSymbolsPerThread makes small.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace cachegen {

constexpr uint64_t kSymbolsPerThread = 1 << 17;  // some 0.5 ms of work: what a thread is worth starting for

template <class Work>
void for_each(uint64_t pieces, uint64_t symbols, uint32_t threads, const Work& work) {
  std::atomic<uint64_t> next{0};
  const auto run = [&] {
    for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i);
  };
  const uint64_t wanted = std::min({uint64_t(threads), pieces, symbols / kSymbolsPerThread});
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(wanted);
    while (helpers.size() + 1 < wanted) helpers.emplace_back(run);
  } catch (const std::exception&) {
    // No memory or no thread to be had: those that run do the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cachegen
