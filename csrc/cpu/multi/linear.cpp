#include "cpu/multi/linear.h"

#include <cstring>
#include <stdexcept>

#include "cpu/bottleneck/task.h"
#include "cpu/lora/steps.h"

namespace peftkern::cpu {
namespace {

constexpr int64_t kA = static_cast<int64_t>(Side::A), kB = static_cast<int64_t>(Side::B);

// Bytes of a scaled copy of rows for the base product.
constexpr int64_t kScaledBytes = int64_t{16} << 20;

// The vector that scales what goes into the base product.
MultiVector in_scale(Side side) {
  return side == Side::B ? kPb : kGb;
}

// The rows of a group in [r0, r1).
struct Rows {
  const int32_t* rows;
  int64_t count;
};
Rows rows_between(const MultiGroup& g, int64_t r0, int64_t r1) {
  const int32_t* begin = std::lower_bound(g.rows, g.rows + g.count, r0);
  return {begin, std::lower_bound(begin, g.rows + g.count, r1) - begin};
}

// One row of scaled(r0 ...) is one of a times its adapter's scale.
void scale_part(const MultiBatch& batch, MultiVector vector, const ConstMatrix& a, int64_t C, int64_t r0,
                int64_t r1, const Matrix& scaled, int threads) {
  for (const MultiGroup& group : batch.groups) {
    const Rows part = rows_between(group, r0, r1);
    for (int64_t i = 0; i < part.count;) {
      // Neighbours go together: the rows of a sequence take one adapter.
      int64_t end = i + 1;
      while (end < part.count && part.rows[end] == part.rows[end - 1] + 1) ++end;
      const int64_t row = part.rows[i], count = end - i;
      scale_copy({from(a, row, 0), from(scaled, row - r0, 0), count, C, 0, 1.0f, nullptr,
                  group.vector[vector], worth_threads(4 * count * C, threads)});
      i = end;
    }
  }
}

// base_product with rows scaled by their adapters' vectors.
template <class Epilogue>
void scaled_product(const MultiBatch& batch, MultiVector vector, BaseProduct g, const Epilogue& epilogue) {
  if (!batch.has(vector)) {
    KeptScratch scratch;
    base_product(g, scratch, epilogue);
    return;
  }
  // What Python has multiplied was not scaled.
  if (g.kind == BaseKind::given) g.kind = BaseKind::panels;
  const BaseProduct whole = g;
  const int64_t size = element_size(g.a.dtype);
  const int64_t rows = std::clamp<int64_t>(kScaledBytes / std::max<int64_t>(g.C * size, 1), 1, g.M);
  for (int64_t r = 0; r < whole.M; r += rows) {
    KeptScratch scratch;
    g.M = std::min(rows, whole.M - r);
    const Matrix scaled{scratch.take((g.M * g.C * size + 3) / 4), g.a.dtype, g.C, 1};
    scale_part(batch, vector, whole.a, g.C, r, r + g.M, scaled, g.threads);
    g.a = as_const(scaled), g.out = from(whole.out, r, 0);
    base_product(g, scratch, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
      epilogue(r0 + r, r1 + r, c0, c1, block);
    });
  }
}

// What a pass makes of the base product of its rows, beside the branch.
struct Onto {
  Side side;
  ConstMatrix a;
  Matrix out;
  const float* v;     // u or du
  const float* bias;  // forward
  Matrix h;           // forward: the product, if wanted
  // Backward: what makes the gradients of p_b.
  ConstMatrix x;
  const std::vector<float*>* vector_grads;
};

void add_dp_b(const MultiBatch& batch, const Onto& to, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
              const ConstMatrix& block, int threads) {
  for (const MultiGroup& group : batch.groups) {
    float* grad = vector_grad(group, kPb, *to.vector_grads);
    const Rows part = grad != nullptr ? rows_between(group, r0, r1) : Rows{};
    if (part.count == 0) continue;
    column_dot({from(block, -r0, 0), from(to.x, 0, c0), part.count, c1 - c0, grad + c0, true,
                worth_threads(part.count * (c1 - c0), threads), part.rows});
  }
}

// out = the base of a, scaled by each row's vectors, plus v times its panel on this side, plus bias.
void onto_base(const MultiBatch& batch, const MultiLinear& g, const Onto& to) {
  const MultiAdapters& adapters = batch.adapters;
  const bool forward = to.side == Side::B, keep = to.h.data != nullptr;
  const int64_t M = batch.M, C = forward ? adapters.K : adapters.N, D = forward ? adapters.N : adapters.K;
  const Matrix& product = keep ? to.h : to.out;
  const auto epilogue = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const ConstMatrix& block) {
    const int64_t rows = r1 - r0, cols = c1 - c0;
    const int64_t work = rows * cols * std::max<int64_t>(adapters.max_rank, 1);
    const Matrix saved = from(product, r0, c0);
    if (keep && block.data != saved.data)
      scale_copy(
          {block, saved, rows, cols, 0, 1.0f, nullptr, nullptr, worth_threads(4 * rows * cols, g.threads)});
    if (to.vector_grads != nullptr && block.data != nullptr)
      add_dp_b(batch, to, r0, r1, c0, c1, block, g.threads);
    multi_expand(batch, {to.side, from(to.out, r0, c0), block, r0, rows, c0, cols, to.v, adapters.max_rank,
                         to.bias, worth_threads(work, g.threads)});
  };
  if (M == 0 || D == 0) return;
  if (!g.base) {
    epilogue(0, M, 0, D, ConstMatrix{});
  } else if (g.kind == BaseKind::given && !batch.has(in_scale(to.side))) {
    epilogue(0, M, 0, D, as_const(product));
  } else {
    const ConstMatrix b = forward ? transposed(g.weight) : g.weight;
    scaled_product(batch, in_scale(to.side),
                   {g.kind, M, D, C, to.a, b, nullptr, product, g.vendor, g.threads, g.quantised}, epilogue);
  }
}

int reduce_threads(const MultiBatch& batch, const MultiLinear& g, int64_t C) {
  return worth_threads(batch.M * C * std::max<int64_t>(batch.adapters.max_rank, 1), g.threads);
}

// Whether a gradient on this side is wanted of an adapter that has rows.
bool wanted(const MultiBatch& batch, const MultiLinearBackward& g, int64_t side) {
  const MultiVector vector = side == kA ? kPd : kGd;
  return std::any_of(batch.groups.begin(), batch.groups.end(), [&](const MultiGroup& each) {
    return each.R > 0 &&
           (g.grads[each.tensor[side]] != nullptr || vector_grad(each, vector, g.vector_grads) != nullptr);
  });
}
bool wanted(const MultiBatch& batch, const MultiLinearBackward& g, MultiVector vector) {
  return std::any_of(batch.groups.begin(), batch.groups.end(), [&](const MultiGroup& each) {
    return vector_grad(each, vector, g.vector_grads) != nullptr;
  });
}

// Zero where no row's adapter lies, and in all gradients of vectors. A tensor that is one whole matrix of an
// adapter with rows is written anyway.
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
  for (size_t i = 0; i < g.vector_grads.size(); ++i)
    fill_zeros(g.vector_grads[i], adapters.vectors[i].elements);
}

// Gradients that are sums over the rows of dy alone.
void sums_of_dy(const MultiBatch& batch, const MultiLinearBackward& g) {
  const int64_t N = batch.adapters.N;
  for (const MultiGroup& each : batch.groups) {
    const int threads = worth_threads(each.count * N, g.threads);
    if (N == 0) return;
    if (float* grad = vector_grad(each, kGb, g.vector_grads))
      column_dot({g.dy, g.h, each.count, N, grad, false, threads, each.rows});
    if (float* grad = vector_grad(each, kBeta, g.vector_grads))
      column_dot({g.dy, ConstMatrix{}, each.count, N, grad, false, threads, each.rows});
  }
}

// Whether z of an adapter is not u.
bool curved(const MultiGroup& group) {
  return group.R > 0 && (group.activation != 0 || group.vector[kRankBias] != nullptr);
}

// z = f(u + b), which is u itself where no adapter has f or b; else `into`, which may be u, or scratch if it
// is null.
const float* activated(const MultiBatch& batch, const float* u, float* into, int threads,
                       KeptScratch& scratch) {
  if (std::none_of(batch.groups.begin(), batch.groups.end(), curved)) return u;
  const int64_t ld = batch.adapters.max_rank;
  float* z = into != nullptr ? into : scratch.take(batch.M * ld);
  if (z != u) std::copy_n(u, batch.M * ld, z);
  for (const MultiGroup& each : batch.groups) {
    if (!curved(each)) continue;
    activate_run({static_cast<Activation>(each.activation), each.count, each.R, u, each.vector[kRankBias],
                  nullptr, nullptr, z, false, worth_threads(kActivationWork * each.count * each.R, threads),
                  each.rows, ld});
  }
  return z;
}

// du = d * dv * f'(u + b) in place, and the gradients of d and b.
void finish_ranks(const MultiBatch& batch, const MultiLinearBackward& g, const float* z, float* du) {
  const int64_t ld = batch.adapters.max_rank;
  for (const MultiGroup& each : batch.groups) {
    const float* d = each.vector[kD];
    if ((d == nullptr && !curved(each)) || each.R == 0) continue;
    const auto sum = [&](MultiVector vector, const ConstMatrix& with) {
      if (float* grad = vector_grad(each, vector, g.vector_grads))
        column_dot({{du, DType::f32, ld, 1},
                    with,
                    each.count,
                    each.R,
                    grad,
                    false,
                    worth_threads(each.count * each.R, g.threads),
                    each.rows});
    };
    sum(kD, {z, DType::f32, ld, 1});
    for (int64_t i = 0; d != nullptr && i < each.count; ++i)
      for (int64_t r = 0; r < each.R; ++r) du[each.rows[i] * ld + r] *= d[r];
    if (each.activation != 0 && g.u != nullptr)
      slope_run({static_cast<Activation>(each.activation), each.count, each.R, g.u, du, false, nullptr, du,
                 nullptr, worth_threads(kActivationWork * each.count * each.R, g.threads),
                 each.vector[kRankBias], each.rows, ld});
    sum(kRankBias, ConstMatrix{});
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
  const float* z = activated(batch, u, g.u == nullptr ? u : nullptr, g.threads, scratch);
  onto_base(batch, g, {Side::B, g.x, g.y, z, as_floats(g.bias, adapters.N, scratch), g.h, {}, nullptr});
}

void multi_linear_backward(const MultiBatch& batch, const MultiLinearBackward& g) {
  const MultiAdapters& adapters = batch.adapters;
  const bool dA = wanted(batch, g, kA), dB = wanted(batch, g, kB);
  const bool dd = wanted(batch, g, kD), db = wanted(batch, g, kRankBias);
  // All that goes through an activation's slope reads its argument.
  const bool slopes = (dA || db || g.dx.data != nullptr) &&
                      std::any_of(batch.groups.begin(), batch.groups.end(),
                                  [](const MultiGroup& each) { return each.R > 0 && each.activation != 0; });
  const bool dp_b = wanted(batch, g, kPb);
  if (((dA || dp_b) && g.x.data == nullptr && batch.M * adapters.K > 0) ||
      ((dB || dd || slopes) && g.u == nullptr) ||
      (wanted(batch, g, kGb) && g.h.data == nullptr && batch.M * adapters.N > 0) ||
      (dp_b && (!g.base || g.dx.data == nullptr) && batch.M * adapters.K > 0))
    throw std::invalid_argument("a gradient is wanted, and what it is made of is not there");
  KeptScratch scratch;
  float* du = scratch.take(batch.M * adapters.max_rank);
  clear(batch, g);
  MultiReduceArgs over_dy{}, over_x{};
  over_dy.side = Side::B, over_dy.in = g.dy, over_dy.C = adapters.N, over_dy.dot = du;
  const float* z = g.u != nullptr ? activated(batch, g.u, nullptr, g.threads, scratch) : nullptr;
  over_dy.v = z, over_dy.grads = dB ? &g.grads : nullptr, over_dy.colsum = g.dbias;
  over_dy.vector_grads = dB ? &g.vector_grads : nullptr;
  over_dy.ld = adapters.max_rank, over_dy.threads = reduce_threads(batch, g, adapters.N);
  if (dA || dB || dd || db || g.dbias != nullptr || g.dx.data != nullptr) {
    multi_reduce(batch, over_dy);
    finish_ranks(batch, g, z, du);
  }
  sums_of_dy(batch, g);
  over_x.side = Side::A, over_x.in = g.x, over_x.C = adapters.K;
  over_x.v = du, over_x.grads = &g.grads, over_x.vector_grads = &g.vector_grads;
  over_x.ld = adapters.max_rank, over_x.threads = reduce_threads(batch, g, adapters.K);
  if (dA) multi_reduce(batch, over_x);
  if (g.dx.data != nullptr)
    onto_base(batch, g, {Side::A, g.dy, g.dx, du, nullptr, {}, g.x, dp_b ? &g.vector_grads : nullptr});
}

}  // namespace peftkern::cpu
