// Pieces of work (tiles, blocks of columns) over threads: each takes the next piece, so that uneven ones balance.
//
// The threads are those of the caller's other libraries where it has named their pool (cg_use_team): idle ones of OpenMP
// spin for milliseconds, and would keep new threads from their cores. Else threads live for one call. Starting one takes
// some 20 us, which kSymbolsPerThread makes small.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "../include/cachegen_source.h"

namespace cachegen {

constexpr uint64_t kSymbolsPerThread = 1 << 17;  // some 0.5 ms of work: what a thread is worth starting for

// What cg_use_team has named; NULL where that is nothing, and in a child process, in which no pool survives.
cg_team named_team();

// Calls run() in as many threads as the work is worth.
template <class Run>
void in_threads(uint64_t pieces, uint64_t symbols, uint32_t threads, const Run& run) {
  const uint64_t wanted = std::min({uint64_t(threads), pieces, symbols / kSymbolsPerThread});
  if (const cg_team team = wanted > 1 ? named_team() : nullptr) {  // of one size, since OpenMP ends threads left out
    return team([](void* of) { (*static_cast<const Run*>(of))(); }, const_cast<Run*>(&run), threads, 0);
  }
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

template <class Work>
void for_each(uint64_t pieces, uint64_t symbols, uint32_t threads, const Work& work) {
  std::atomic<uint64_t> next{0};
  in_threads(pieces, symbols, threads, [&] {
    for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i);
  });
}

// work(i, memory) with memory of the thread's own, after open(memory); NULL where there is none.
template <class Memory, class Open, class Work>
void for_each_with(uint64_t pieces, uint64_t symbols, uint32_t threads, const Open& open, const Work& work) {
  std::atomic<uint64_t> next{0};
  in_threads(pieces, symbols, threads, [&] {
    const std::unique_ptr<Memory> memory(new (std::nothrow) Memory);
    if (memory) open(memory.get());
    for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i, memory.get());
  });
}

}  // namespace cachegen
