// Host bodies of cuda/warp.h.
#pragma once

#include "sim/instructions/device.h"

namespace peftkern::cuda {
namespace detail {

template <class T>
struct Exchange {
  T value, result;
  int source;
};

// The result of the lane named, or the own value if it is not among the members.
template <class T>
T exchange(const char* kind, T value, int source, uint32_t members) {
  Exchange<T> mine{value, value, source};
  ::sim::meet(kind, members, &mine, [](void* const* operands, uint32_t all) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((all >> lane & 1) == 0) continue;
      auto* own = static_cast<Exchange<T>*>(operands[lane]);
      if (own->source < 0 || own->source > 31) continue;
      if ((all >> own->source & 1) == 0)
        ::sim::fail("a shuffle reads lane %d, which is no member", own->source);
      own->result = static_cast<Exchange<T>*>(operands[own->source])->value;
    }
  });
  return mine.result;
}

inline uint32_t vote(const char* kind, bool value, uint32_t members) {
  struct Vote {
    bool value;
    uint32_t bits;
  } mine{value, 0};
  ::sim::meet(kind, members, &mine, [](void* const* operands, uint32_t all) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((all >> lane & 1) != 0 && static_cast<Vote*>(operands[lane])->value) bits |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if ((all >> lane & 1) != 0) static_cast<Vote*>(operands[lane])->bits = bits;
    }
  });
  return mine.bits;
}

}  // namespace detail

PEFTKERN_DEVICE int lane_index() {
  return ::sim::self->lane;
}
PEFTKERN_DEVICE void sync_warp(uint32_t members = 0xffffffffu) {
  ::sim::meet("sync_warp", members, nullptr, nullptr);
}

template <class T>
PEFTKERN_DEVICE T shuffle(T value, int source, uint32_t members = 0xffffffffu) {
  return detail::exchange("shuffle", value, source & 31, members);
}
template <class T>
PEFTKERN_DEVICE T shuffle_up(T value, unsigned distance, uint32_t members = 0xffffffffu) {
  return detail::exchange("shuffle_up", value, lane_index() - static_cast<int>(distance), members);
}
template <class T>
PEFTKERN_DEVICE T shuffle_down(T value, unsigned distance, uint32_t members = 0xffffffffu) {
  return detail::exchange("shuffle_down", value, lane_index() + static_cast<int>(distance), members);
}
template <class T>
PEFTKERN_DEVICE T shuffle_xor(T value, int mask, uint32_t members = 0xffffffffu) {
  return detail::exchange("shuffle_xor", value, lane_index() ^ mask, members);
}

PEFTKERN_DEVICE bool vote_any(bool value, uint32_t members = 0xffffffffu) {
  return detail::vote("vote_any", value, members) != 0;
}
PEFTKERN_DEVICE bool vote_all(bool value, uint32_t members = 0xffffffffu) {
  return detail::vote("vote_all", value, members) == members;
}
PEFTKERN_DEVICE int count_ones(uint32_t bits) {
  return __builtin_popcount(bits);
}
PEFTKERN_DEVICE uint32_t ballot(bool value, uint32_t members = 0xffffffffu) {
  return detail::vote("ballot", value, members);
}

}  // namespace peftkern::cuda
