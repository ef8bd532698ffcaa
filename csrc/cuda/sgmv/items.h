// Which rows a cluster works on, and what it does with those that have no branch. A batch is cut into
// segments, the rows of each slot, those without an adapter and the invalid ones, and segments into items.
#pragma once

#include <cmath>

#include "cuda/instructions/cluster.h"
#include "cuda/sgmv/output.h"

namespace peftkern::cuda {

constexpr int kCluster = 8, kWarps = 4, kThreads = 32 * kWarps;

struct Parameters {
  SgmvArgs args;
  int shift;         // an item has up to 1 << shift rows: 16 or 64
  bool by_position;  // how items are numbered
  bool all_rows;     // whether rows without an adapter are items too: those of out, or of u, are written
};

struct Item {
  int first;  // position of its first row in `order`
  int rows;   // 0: nothing to do
  int slot;   // args.slots and up: no adapter, or an invalid one
};

// Item `index` is the one that begins at that position of `order`; or, with fewer items than rows, segment s
// has the numbers from (starts[s] >> shift) + s on: as many as it needs, before the next segment's.
PEFTKERN_DEVICE Item find_item(const Parameters& p, int index) {
  const int32_t* starts = p.args.starts;
  const auto number = [&](int s) { return p.by_position ? starts[s] : (starts[s] >> p.shift) + s; };
  const int slots = static_cast<int>(p.args.slots), most = 1 << p.shift;
  const int slot = find_segment(slots + 2, index, number), start = starts[slot];
  const int offset = p.by_position ? index - start : (index - number(slot)) << p.shift;
  const int left = starts[slot + 1] - start - offset;
  const bool begins = left > 0 && (offset & (most - 1)) == 0 && (slot != slots || p.all_rows);
  return {start + offset, !begins ? 0 : left < most ? left : most, slot};
}

// Zeros in u for the item's rows, from a rank on.
PEFTKERN_DEVICE void clear_u(const SgmvArgs& args, const Item& item, int64_t first) {
  if (args.u == nullptr) return;
  for (int row = 0; row < item.rows; ++row) {
    float* u = args.u + args.order[item.first + row] * args.max_rank;
    for (int64_t r = first + cluster_rank() * kThreads + threadIdx.x; r < args.max_rank;
         r += kCluster * kThreads) {
      u[r] = 0;
    }
  }
}

template <class T>
PEFTKERN_DEVICE void fill_nan(const SgmvArgs& args, const Item& item) {
  for (int row = 0; row < item.rows; ++row) {
    T* out = static_cast<T*>(args.out) + args.order[item.first + row] * args.out_row;
    for (int64_t n = cluster_rank() * kThreads + threadIdx.x; n < args.N; n += kCluster * kThreads) {
      out[n] = from_float<T>(NAN);
    }
  }
}

// The item's rows of out where there is no branch.
template <class T, bool Vectors>
PEFTKERN_DEVICE void store_base(const Output<T, Vectors>& output, const Item& item) {
  const int64_t first = cluster_rank() * kThreads + threadIdx.x;
  const float no_branch[8] = {};
  for (int at = 0; at < item.rows; ++at) {
    const int64_t row = output.args.order[item.first + at];
    for (int64_t n = 8 * first; n < output.args.N; n += 8 * kCluster * kThreads) {
      const int column = static_cast<int>(n), left = static_cast<int>(output.args.N - n);
      Run<T> base;
      base.load(output.from(row) + n, left);
      output.store(row, column, left, base, no_branch);
    }
  }
}

}  // namespace peftkern::cuda
