// A bottleneck in half precision by products of bf16, for CPUs where those are faster than what
// bottleneck.cpp makes of fp32. t, dv and all sums are fp32; z and dt are rounded to bf16 where they meet a
// matrix, as every operand of such a product. Forward: one pass over h. Backward: one over dy, and for sums
// over rows one over dy and one over h.
#include "cpu/bottleneck/pairs.h"

#include "cpu/bottleneck/passes.h"

#ifdef PEFTKERN_HAVE_AVX512_BF16

namespace peftkern::cpu {
namespace {

using namespace avx512_bf16;

uint32_t* take(int64_t elements, KeptScratch& scratch) {
  return reinterpret_cast<uint32_t*>(scratch.take(elements));
}

// b (C, D) as the kernels read it.
const uint32_t* as_tiles(const ConstMatrix& b, int64_t C, int64_t D, int threads, KeptScratch& scratch) {
  uint32_t* out = take(pairs_right(C, D), scratch);
  pair_pack({b, C, D, out, worth_threads(4 * C * D, threads)});
  return out;
}

// m (rows, cols) in bf16 with adjacent columns, itself if it has no scale and is.
ConstMatrix adjacent(const ConstMatrix& m, int64_t rows, int64_t cols, const float* col_scale, int threads,
                     KeptScratch& scratch) {
  if (m.data == nullptr || (m.col == 1 && col_scale == nullptr)) return m;
  const Matrix out{scratch.take((rows * cols + 1) / 2), DType::bf16, cols, 1};
  scale_copy({m, out, rows, cols, 0, 1.0f, nullptr, col_scale, worth_threads(4 * rows * cols, threads)});
  return as_const(out);
}

// What rows go through, in either pass.
PairRowsTask rows_task(const Bottleneck& g, bool backward, int64_t C, int64_t D, const Dropout& drop,
                       KeptScratch& scratch) {
  PairRowsTask task{};
  task.backward = backward, task.activation = g.activation;
  task.M = g.M, task.C = C, task.R = g.R, task.D = D, task.drop = drop;
  task.threads = worth_threads(g.M * g.R * (C + D), g.threads);
  task.scratch = scratch.take(task.threads * pair_rows_scratch(C, g.R, drop.threshold != 0));
  return task;
}

}  // namespace

void bottleneck_forward_pairs(const BottleneckForward& g) {
  KeptScratch scratch;
  PairRowsTask task = rows_task(g, false, g.K, g.N, g.drop_in, scratch);
  task.in = adjacent(g.h, g.M, g.K, nullptr, g.threads, scratch), task.alpha_v = g.kept_in;
  task.to =
      g.residual.data != nullptr ? adjacent(g.residual, g.M, g.N, nullptr, g.threads, scratch) : task.in;
  task.first = as_tiles(transposed(g.down), g.K, g.R, g.threads, scratch);
  task.second = as_tiles(transposed(g.up), g.R, g.N, g.threads, scratch);
  task.t = g.t != nullptr ? g.t : scratch.take(g.M * g.R);
  task.bias = as_floats(g.down_bias, g.R, scratch);
  task.scale = as_floats(g.out_scale, g.N, scratch);
  task.out = g.y, task.out_drop = g.drop_out, task.alpha = g.scaling * g.kept_out;
  if (g.up_bias.data != nullptr) {
    float* bias = scratch.take(g.N);
    scale_copy({g.up_bias, {bias, DType::f32, g.N, 1}, 1, g.N, 0, task.alpha, nullptr, task.scale, 1});
    task.out_bias = bias;
  }
  pair_rows(task);
}

void bottleneck_backward_pairs(const BottleneckBackward& g) {
  KeptScratch scratch;
  const Steps steps(g);
  const float* c = as_floats(g.out_scale, g.N, scratch);
  const int64_t ranks = g.R + steps.ones;
  PairRowsTask task = rows_task(g, true, g.N, g.K, g.drop_out, scratch);
  task.in = adjacent(g.dy, g.M, g.N, nullptr, g.threads, scratch);
  // (Backward only reads it.)
  task.t = const_cast<float*>(g.t), task.ones = steps.ones, task.alpha_v = g.scaling * g.kept_out;
  if (steps.slope) {
    // Its columns are those of the scale when it is read across.
    const ConstMatrix up =
        c == nullptr ? g.up : transposed(adjacent(transposed(g.up), g.R, g.N, c, g.threads, scratch));
    task.first = as_tiles(up, g.N, g.R, g.threads, scratch);
  }
  if (steps.after) task.across_z = take(pairs_left(ranks, g.M), scratch);
  if (g.ddown.data != nullptr) task.across_dt = take(pairs_left(g.R, g.M), scratch);
  if (g.ddown_bias != nullptr) task.dt = scratch.take(g.M * g.R);
  if (g.dh.data != nullptr) {
    task.second = as_tiles(g.down, g.R, g.K, g.threads, scratch);
    task.out = g.dh, task.out_drop = g.drop_in, task.alpha = g.kept_in;
    task.to = g.through ? task.in : ConstMatrix{};
  }
  pair_rows(task);
  if (steps.after) {
    float* G = scratch.take(ranks * g.N);
    pair_sums({task.across_z, ranks, g.M, g.N, task.in, g.drop_out, G,
               worth_threads(g.M * g.N * ranks, g.threads)});
    finish_up(g, c, steps.ones, task.alpha_v, G);
  }
  if (g.ddown_bias != nullptr)
    dot_columns({task.dt, DType::f32, g.R, 1}, {}, g.M, g.R, g.ddown_bias, false, g.threads);
  if (g.ddown.data != nullptr) {
    float* sums = scratch.take(g.R * g.K);
    pair_sums({task.across_dt, g.R, g.M, g.K, adjacent(g.h, g.M, g.K, nullptr, g.threads, scratch), g.drop_in,
               sums, worth_threads(g.M * g.K * g.R, g.threads)});
    scale_copy({{sums, DType::f32, g.K, 1},
                g.ddown,
                g.R,
                g.K,
                0,
                g.kept_in,
                nullptr,
                nullptr,
                worth_threads(4 * g.R * g.K, g.threads)});
  }
}

}  // namespace peftkern::cpu

#endif
