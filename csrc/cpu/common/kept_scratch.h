// Scratch that a thread keeps from call to call: fresh pages would cost more than the arithmetic of a small
// layer. Not for files that are compiled per level.
#pragma once

#include <vector>

#include "cpu/common/scratch.h"

namespace peftkern::cpu {

// What a thread keeps at most, in floats: 64 MB. A call that needs more gives the rest back when it ends.
constexpr int64_t kMaxKeptFloats = int64_t{1} << 24;

// Room for one call, taken piece by piece; all of it is free again when the object ends. A call within a call
// takes what follows.
class KeptScratch {
 public:
  KeptScratch() : kept_(mine()), start_(kept_.used) {}
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  ~KeptScratch() {
    kept_.used = start_;
    if (start_ > 0 || kept_.most <= kept_.floats) return;
    // What did not fit is one piece from now on; without memory for it, the next call looks again.
    const int64_t floats = std::min(kept_.most, kMaxKeptFloats);
    if (floats <= kept_.floats) return;
    more_.clear();
    kept_.room.reset();
    kept_.room.reset(
        static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(floats) * sizeof(float))));
    kept_.floats = kept_.room != nullptr ? floats : 0;
  }

  // Uninitialised, aligned to a cache line.
  float* take(int64_t floats) {
    floats = (std::max<int64_t>(floats, 1) + 15) / 16 * 16;
    const int64_t from = kept_.used;
    kept_.used += floats;
    kept_.most = std::max(kept_.most, kept_.used);
    if (kept_.used <= kept_.floats) return kept_.room.get() + from;
    more_.push_back(allocate(floats));
    return more_.back().get();
  }

 private:
  struct Kept {
    std::unique_ptr<float, Free> room;
    int64_t floats = 0;          // of room
    int64_t used = 0, most = 0;  // by the calls that run, and by any so far: room or not
  };
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }

  Kept& kept_;
  const int64_t start_;
  std::vector<std::unique_ptr<float, Free>> more_;
};

}  // namespace peftkern::cpu
