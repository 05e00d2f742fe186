// The pool of threads that the caller has named.
#include <atomic>

#include "backend.h"
#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace cachegen {

namespace {

int64_t process() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

std::atomic<cg_team> named{nullptr};
std::atomic<int64_t> owner{0};  // the process that named it

}  // namespace

cg_team named_team() { return owner.load() == process() ? named.load() : nullptr; }

}  // namespace cachegen

int32_t cg_use_team(void* team) noexcept {
  cachegen::named = reinterpret_cast<cg_team>(team);
  cachegen::owner = cachegen::process();
  return CG_OK;
}
