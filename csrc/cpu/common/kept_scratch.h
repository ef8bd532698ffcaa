// Scratch that a thread keeps from call to call: fresh pages would cost more than the arithmetic of a small
// layer. Not for files that are compiled per level.
#pragma once

#include <utility>
#include <vector>

#include "cpu/common/scratch.h"

namespace peftkern::cpu {

// What a thread keeps at most, in floats: 64 MB. A call that needs more gives the rest back when it ends.
constexpr int64_t kMaxKeptFloats = int64_t{1} << 24;

// Room for one call, taken piece by piece; all of it is free again when the object ends. One at a time in a
// thread.
class KeptScratch {
 public:
  KeptScratch() : kept_(mine()) {}
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  ~KeptScratch() {
    if (taken_ <= kept_.floats || more_.empty()) return;
    const int64_t keep = std::min(taken_, kMaxKeptFloats);
    if (keep <= kept_.floats) return;
    more_.clear();
    kept_.room.reset();
    kept_.floats = 0;
    // The next call of this size finds one piece; without memory for it, that call looks again.
    if (float* p = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(keep) * sizeof(float)))) {
      kept_.room.reset(p);
      kept_.floats = keep;
    }
  }

  // Uninitialised, aligned to a cache line.
  float* take(int64_t floats) {
    floats = (std::max<int64_t>(floats, 1) + 15) / 16 * 16;
    taken_ += floats;
    if (used_ + floats <= kept_.floats) {
      float* p = kept_.room.get() + used_;
      used_ += floats;
      return p;
    }
    more_.push_back(allocate(floats));
    return more_.back().get();
  }

 private:
  struct Kept {
    std::unique_ptr<float, Free> room;
    int64_t floats = 0;
  };
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }

  Kept& kept_;
  int64_t used_ = 0, taken_ = 0;
  std::vector<std::unique_ptr<float, Free>> more_;
};

}  // namespace peftkern::cpu
