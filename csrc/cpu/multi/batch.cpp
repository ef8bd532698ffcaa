// The route of a batch, and what its table says about the adapters that have rows.
#include <algorithm>
#include <stdexcept>

#include "peftkern/cpu_multi.h"

namespace peftkern::cpu {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

void check_rows(const int32_t* rows, int64_t count, int64_t M) {
  bool ok = rows[0] >= 0 && rows[count - 1] < M;
  for (int64_t i = 1; i < count; ++i) ok &= rows[i - 1] < rows[i];
  require(ok, "order must list the rows of each slot in ascending order");
}

}  // namespace

MultiBatch::MultiBatch(std::vector<uintptr_t> addresses, DType type, const int64_t* table, int64_t slots,
                       const int32_t* order, const int32_t* starts, int64_t rows, int64_t rank,
                       const float* scaling, const double* dropout_p, uint64_t dropout_seed)
    : weights(std::move(addresses)), dtype(type), M(rows), max_rank(rank), seed(dropout_seed) {
  require(starts[0] == 0 && starts[slots + 1] == M, "starts must cover all rows; each needs a valid adapter");
  // Slots without rows are passed over: a decoder's batch has few rows, a bank may have a hundred thousand
  // slots.
  const int32_t *next = starts, *last = starts + slots + 2;
  for (int64_t begin = 0, end; begin < M; begin = end) {
    next = std::upper_bound(next, last, begin);
    require(next != starts && next != last && next[-1] == begin && *next <= M, "starts must not descend");
    const int64_t slot = next - starts - 1;
    end = *next;
    MultiGroup g{};
    g.rows = order + begin, g.count = end - begin;
    g.scaling = g.keep_scale = 1.0f;
    check_rows(g.rows, g.count, M);
    if (slot < slots) {
      const int64_t* t = table + slot * kMultiColumns;
      g.R = t[kRank], g.padded = t[kPadded] != 0;
      require(g.R >= 0 && g.R <= max_rank, "table: a rank is not in [0, max_rank]");
      const int64_t strides[2][2] = {{t[kARow], 1}, {t[kBR], t[kBN]}};
      for (int side = 0; side < 2 && g.R > 0; ++side) {
        const int64_t tensor = t[side == 0 ? kATensor : kBTensor],
                      offset = t[side == 0 ? kAOffset : kBOffset];
        require(tensor >= 0 && tensor < static_cast<int64_t>(weights.size()) && offset >= 0,
                "table: an adapter lies outside of weights");
        g.tensor[side] = static_cast<int>(tensor), g.offset[side] = offset;
        g.panel[side] = {reinterpret_cast<const void*>(weights[tensor] + offset * element_size(dtype)), dtype,
                         strides[side][0], strides[side][1]};
      }
      if (scaling != nullptr) g.scaling = scaling[slot];
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
