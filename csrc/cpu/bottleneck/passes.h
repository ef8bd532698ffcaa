// What the ways to compute a bottleneck's passes have in common.
#pragma once

#include "cpu/bottleneck/bottleneck.h"
#include "cpu/bottleneck/task.h"
#include "cpu/lora/steps.h"

namespace peftkern::cpu {

// By products of bf16, where h and the matrices are and there is no gate: pairs.cpp.
void bottleneck_forward_pairs(const BottleneckForward& args);
void bottleneck_backward_pairs(const BottleneckBackward& args);

inline int activation_threads(const Bottleneck& g) {
  return worth_threads(kActivationWork * g.M * g.R, g.threads);
}

// What a backward pass is made of: dt, or what is summed over rows, `ones` with a column for up_bias.
struct Steps {
  bool slope, after, ones;
  explicit Steps(const BottleneckBackward& g)
      : slope(g.dh.data != nullptr || g.ddown.data != nullptr || g.ddown_bias != nullptr),
        after(g.dup.data != nullptr || g.dup_bias != nullptr || g.dout_scale != nullptr),
        ones(g.dup_bias != nullptr ||
             (g.up_bias.data != nullptr && (g.dgate != nullptr || g.dout_scale != nullptr))) {}
};

// What needs H = (g e)^T z: alpha G (R or R + 1, N) is s H^T, its last row with `ones` s S.
void finish_up(const BottleneckBackward& g, const float* c, bool ones, float alpha, float* G);

}  // namespace peftkern::cpu
