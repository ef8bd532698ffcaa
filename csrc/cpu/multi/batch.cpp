// The route of a batch, and what its table says about the adapters that have rows.
#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "cpu/bottleneck/bottleneck.h"
#include "cpu/common/scratch.h"
#include "cpu/common/views.h"
#include "peftkern/cpu_multi.h"

namespace peftkern::cpu {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Whether the elements (r, c) of a panel (R, C) that begins at `offset` lie in memory.
bool inside(const MultiMemory& memory, int64_t offset, int64_t R, int64_t row, int64_t C, int64_t col) {
  if (offset < 0 || row < 0 || col < 0) return false;
  int64_t down, right, last;
  const bool huge = __builtin_mul_overflow(R - 1, row, &down) || __builtin_mul_overflow(C - 1, col, &right) ||
                    __builtin_add_overflow(down, right, &last) || __builtin_add_overflow(last, offset, &last);
  return !huge && last < memory.elements;
}

// The vectors that a table row names.
void find_vectors(const MultiAdapters& a, const int64_t* row, MultiGroup& g) {
  const int64_t sizes[] = {g.R, a.K, a.K, a.N, a.N, a.N, g.R};
  static_assert(std::size(sizes) == kMultiVectors);
  for (int v = 0; v < kMultiVectors; ++v) {
    const int64_t tensor = row[kVectors + 2 * v], offset = row[kVectors + 2 * v + 1];
    if (tensor < 0) continue;
    require(tensor < static_cast<int64_t>(a.vectors.size()) && offset >= 0 &&
                offset <= a.vectors[tensor].elements - sizes[v],
            "table: a vector lies outside of vectors");
    g.vector[v] = static_cast<const float*>(a.vectors[tensor].data) + offset;
    g.vector_tensor[v] = static_cast<int>(tensor), g.vector_offset[v] = offset;
  }
}

void check_rows(const int32_t* rows, int64_t count, int64_t M) {
  bool ok = rows[0] >= 0 && rows[count - 1] < M;
  for (int64_t i = 1; i < count; ++i) ok &= rows[i - 1] < rows[i];
  require(ok, "order must list the rows of each slot in ascending order");
}

}  // namespace

MultiBatch::MultiBatch(const MultiAdapters& a, const int32_t* order, const int32_t* starts, int64_t rows,
                       const double* dropout_p, uint64_t dropout_seed)
    : adapters(a), M(rows), seed(dropout_seed) {
  require(starts[0] == 0 && starts[a.slots + 1] == M,
          "starts must cover all rows; each needs a valid adapter");
  // Slots without rows are passed over: a decoder's batch has few rows, a bank may have a hundred thousand
  // slots.
  const int32_t *next = starts, *last = starts + a.slots + 2;
  for (int64_t begin = 0, end; begin < M; begin = end) {
    next = std::upper_bound(next, last, begin);
    require(next != starts && next != last && next[-1] == begin && *next <= M, "starts must not descend");
    const int64_t slot = next - starts - 1;
    end = *next;
    MultiGroup g{};
    g.rows = order + begin, g.count = end - begin;
    g.scaling = g.keep_scale = 1.0f;
    check_rows(g.rows, g.count, M);
    if (slot < a.slots) {
      const int64_t* t = a.table + slot * kMultiColumns;
      g.R = t[kRank], g.padded = t[kPadded] != 0;
      require(g.R >= 0 && g.R <= a.max_rank, "table: a rank is not in [0, max_rank]");
      const int64_t strides[2][2] = {{t[kARow], 1}, {t[kBR], t[kBN]}}, columns[2] = {a.K, a.N};
      for (int side = 0; side < 2 && g.R > 0; ++side) {
        const auto [row, col] = strides[side];
        const int64_t tensor = t[side == 0 ? kATensor : kBTensor],
                      offset = t[side == 0 ? kAOffset : kBOffset];
        const int64_t C = g.padded ? padded(columns[side]) : columns[side];
        require(tensor >= 0 && tensor < static_cast<int64_t>(a.weights.size()) &&
                    (C == 0 || inside(a.weights[tensor], offset, g.R, row, C, col)),
                "table: an adapter lies outside of weights");
        g.tensor[side] = static_cast<int>(tensor), g.offset[side] = offset;
        const auto* data = static_cast<const char*>(a.weights[tensor].data);
        if (C > 0) g.panel[side] = {data + offset * element_size(a.dtype), a.dtype, row, col};
      }
      find_vectors(a, t, g);
      require(t[kActivation] >= 0 && t[kActivation] < kActivations, "table: there is no such activation");
      g.activation = static_cast<int>(t[kActivation]);
      g.scaling = a.scaling[slot];
      if (dropout_p != nullptr) {
        const double p = dropout_p[slot];
        require(p >= 0.0 && p < 1.0, "dropout_p must be in [0, 1)");
        g.threshold = static_cast<uint32_t>(p * 4294967296.0);
        g.keep_scale = static_cast<float>(1.0 / (1.0 - p));
      }
    }
    groups.push_back(g);
  }
}

bool MultiBatch::has(MultiVector vector) const {
  return std::any_of(groups.begin(), groups.end(),
                     [vector](const MultiGroup& g) { return g.vector[vector] != nullptr; });
}

float* vector_grad(const MultiGroup& group, MultiVector vector, const std::vector<float*>& grads) {
  if (grads.empty() || group.vector[vector] == nullptr) return nullptr;
  float* tensor = grads[group.vector_tensor[vector]];
  return tensor != nullptr ? tensor + group.vector_offset[vector] : nullptr;
}

int64_t multi_route(const void* ids, bool wide, int64_t M, const int64_t* table, int64_t slots, int64_t mask,
                    int32_t* order, int32_t* starts) {
  int64_t invalid = -1;
  std::vector<int32_t> place(static_cast<size_t>(M));
  std::fill_n(starts, slots + 2, 0);
  for (int64_t i = 0; i < M; ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
    const int64_t slot = id & mask;
    int64_t at = id == -1 ? slots : slots + 1;
    if (id >= 0 && slot >= 0 && slot < slots && table[slot * kMultiColumns + kId] == id) at = slot;
    if (at > slots && invalid < 0) invalid = i;
    place[i] = static_cast<int32_t>(at);
    ++starts[at];
  }
  // From the ends of the slots' rows, the last row first, to their beginnings.
  for (int64_t s = 0, end = 0; s < slots + 2; ++s) starts[s] = static_cast<int32_t>(end += starts[s]);
  for (int64_t i = M - 1; i >= 0; --i) order[--starts[place[i]]] = static_cast<int32_t>(i);
  starts[slots + 2] = static_cast<int32_t>(M);
  return invalid;
}

}  // namespace peftkern::cpu
