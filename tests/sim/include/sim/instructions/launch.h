// Host body of cuda/launch.h.
#pragma once

#include "sim/core.h"

namespace sim {
// Remembers what launches of a kernel ask for; sim_launches tells.
void note_launch(const void* kernel, const LaunchShape& shape);
}  // namespace sim

namespace peftkern::cuda {

template <class... Parameters, class... Arguments>
const char* launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  ::sim::LaunchShape shape;
  shape.grid = {how.grid.x, how.grid.y, how.grid.z};
  shape.block = {how.block.x, how.block.y, how.block.z};
  shape.shared = how.shared;
  shape.cluster = how.cluster;
  shape.dependent = how.dependent;
  ::sim::note_launch(reinterpret_cast<const void*>(kernel), shape);
  return ::sim::run(shape, [&] { kernel(arguments...); });
}

}  // namespace peftkern::cuda
