// Values that pass between the lanes of a warp. `members` must name the lanes that call, all with the same
// mask.
#pragma once

#include "cuda/instructions/device.h"

#ifdef PEFTKERN_SIM
#include "sim/instructions/warp.h"
#else

namespace peftkern::cuda {

PEFTKERN_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x % 32);
}
PEFTKERN_DEVICE void sync_warp(uint32_t members = kAllLanes) {
  __syncwarp(members);
}

// The value of lane `source`, or of the lane that is `distance` above or below or differs in the bits of
// `mask`; a lane's own where there is none.
template <class T>
PEFTKERN_DEVICE T shuffle(T value, int source, uint32_t members = kAllLanes) {
  return __shfl_sync(members, value, source);
}
template <class T>
PEFTKERN_DEVICE T shuffle_up(T value, unsigned distance, uint32_t members = kAllLanes) {
  return __shfl_up_sync(members, value, distance);
}
template <class T>
PEFTKERN_DEVICE T shuffle_down(T value, unsigned distance, uint32_t members = kAllLanes) {
  return __shfl_down_sync(members, value, distance);
}
template <class T>
PEFTKERN_DEVICE T shuffle_xor(T value, int mask, uint32_t members = kAllLanes) {
  return __shfl_xor_sync(members, value, mask);
}

PEFTKERN_DEVICE bool vote_any(bool value, uint32_t members = kAllLanes) {
  return __any_sync(members, value);
}
PEFTKERN_DEVICE bool vote_all(bool value, uint32_t members = kAllLanes) {
  return __all_sync(members, value);
}
PEFTKERN_DEVICE int count_ones(uint32_t bits) {
  return __popc(bits);
}
// One bit per lane.
PEFTKERN_DEVICE uint32_t ballot(bool value, uint32_t members = kAllLanes) {
  return __ballot_sync(members, value);
}

}  // namespace peftkern::cuda
#endif
