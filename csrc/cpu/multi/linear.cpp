#include "cpu/multi/linear.h"

#include <cstring>
#include <stdexcept>

#include "cpu/lora/steps.h"

namespace peftkern::cpu {
namespace {

constexpr int64_t kA = static_cast<int64_t>(Side::A), kB = static_cast<int64_t>(Side::B);

// out = the base of a, plus each row's v times its panel on this side, plus bias.
void onto_base(const MultiBatch& batch, const MultiLinear& g, Side side, const ConstMatrix& a,
               const Matrix& out, const float* v, const float* bias, KeptScratch& scratch) {
  const MultiAdapters& adapters = batch.adapters;
  const bool forward = side == Side::B;
  const int64_t M = batch.M, C = forward ? adapters.K : adapters.N, D = forward ? adapters.N : adapters.K;
  const auto epilogue = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
    const int64_t rows = r1 - r0, cols = c1 - c0;
    const int64_t work = rows * cols * std::max<int64_t>(adapters.max_rank, 1);
    multi_expand(batch, {side, from(out, r0, c0), block, r0, rows, c0, cols, v, adapters.max_rank, bias,
                         worth_threads(work, g.threads)});
  };
  if (M == 0 || D == 0) return;
  if (!g.base) {
    epilogue(0, M, 0, D, ConstMatrix{});
  } else if (g.kind == BaseKind::given) {
    epilogue(0, M, 0, D, as_const(out));
  } else {
    const ConstMatrix b = forward ? transposed(g.weight) : g.weight;
    base_product({g.kind, M, D, C, a, b, nullptr, out, g.vendor, g.threads}, scratch, epilogue);
  }
}

int reduce_threads(const MultiBatch& batch, const MultiLinear& g, int64_t C) {
  return worth_threads(batch.M * C * std::max<int64_t>(batch.adapters.max_rank, 1), g.threads);
}

// Whether a gradient on this side is wanted of an adapter that has rows.
bool wanted(const MultiBatch& batch, const MultiLinearBackward& g, int64_t side) {
  return std::any_of(batch.groups.begin(), batch.groups.end(), [&](const MultiGroup& each) {
    return each.R > 0 && g.grads[each.tensor[side]] != nullptr;
  });
}

// Zero where no row's adapter lies. A tensor that is one whole matrix of an adapter with rows is written
// anyway.
void clear(const MultiBatch& batch, const MultiLinearBackward& g) {
  const MultiAdapters& adapters = batch.adapters;
  std::vector<bool> written(g.grads.size());
  for (const MultiGroup& each : batch.groups) {
    for (const int64_t side : {kA, kB}) {
      const int64_t C = side == kA ? adapters.K : adapters.N;
      const ConstMatrix& p = each.panel[side];
      const bool adjacent = (p.col == 1 && p.row == C) || (p.row == 1 && p.col == each.R);
      if (each.R > 0 && adjacent && each.R * C == adapters.weights[each.tensor[side]].elements)
        written[each.tensor[side]] = true;
    }
  }
  for (size_t i = 0; i < g.grads.size(); ++i) {
    if (g.grads[i] != nullptr && !written[i])
      std::memset(g.grads[i], 0,
                  static_cast<size_t>(adapters.weights[i].elements * element_size(adapters.dtype)));
  }
}

}  // namespace

void multi_linear_forward(const MultiBatch& batch, const MultiLinearForward& g) {
  const MultiAdapters& adapters = batch.adapters;
  KeptScratch scratch;
  float* u = g.u != nullptr ? g.u : scratch.take(batch.M * adapters.max_rank);
  MultiReduceArgs shrink{};
  shrink.side = Side::A, shrink.in = g.x, shrink.C = adapters.K;
  shrink.dot = u, shrink.ld = adapters.max_rank, shrink.threads = reduce_threads(batch, g, adapters.K);
  multi_reduce(batch, shrink);
  onto_base(batch, g, Side::B, g.x, g.y, u, as_floats(g.bias, adapters.N, scratch), scratch);
}

void multi_linear_backward(const MultiBatch& batch, const MultiLinearBackward& g) {
  const MultiAdapters& adapters = batch.adapters;
  const bool dA = wanted(batch, g, kA), dB = wanted(batch, g, kB);
  if ((dA && g.x.data == nullptr && batch.M * adapters.K > 0) || (dB && g.u == nullptr))
    throw std::invalid_argument("a gradient is wanted of a matrix, and what it is made of is not there");
  KeptScratch scratch;
  float* du = scratch.take(batch.M * adapters.max_rank);
  clear(batch, g);
  MultiReduceArgs over_dy{}, over_x{};
  over_dy.side = Side::B, over_dy.in = g.dy, over_dy.C = adapters.N, over_dy.dot = du;
  over_dy.v = g.u, over_dy.grads = dB ? &g.grads : nullptr, over_dy.colsum = g.dbias;
  over_dy.ld = adapters.max_rank, over_dy.threads = reduce_threads(batch, g, adapters.N);
  if (dA || dB || g.dbias != nullptr || g.dx.data != nullptr) multi_reduce(batch, over_dy);
  over_x.side = Side::A, over_x.in = g.x, over_x.C = adapters.K;
  over_x.v = du, over_x.grads = &g.grads;
  over_x.ld = adapters.max_rank, over_x.threads = reduce_threads(batch, g, adapters.K);
  if (dA) multi_reduce(batch, over_x);
  if (g.dx.data != nullptr) onto_base(batch, g, Side::A, g.dy, g.dx, du, nullptr, scratch);
}

}  // namespace peftkern::cpu
