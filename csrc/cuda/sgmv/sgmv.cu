// The branch of a batch whose rows take different adapters, added to an output: shrink and expand in one
// launch, for fp32, and for every device (sgmv_cluster.cu is what sm_90 and up do with half precision).
//
//   out[t] += s[a] g_d[a] (B[a] (d[a] A[a] (p_d[a] x[t])))
//
// with a the slot of row t and vectors that adapters may have; rows without an adapter are not touched.
//
// Work comes in items, taken by ticket: first all shrink items (some rows of one adapter, 1024 columns of K),
// whose partial sums go through memory, then all expand items (the same rows, 512 columns of out), which wait
// until their rows' partial sums are there. A block that waits holds a later ticket than those it waits for,
// so they run. Each item has one place to write to and one order of its sums, whatever block takes it, and
// neither depends on the other rows: results are the same bits in every launch and every batch.
#include <cmath>

#include "cuda/instructions/convert.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "cuda/sgmv/sgmv.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 4;       // rows of one adapter that an item takes
constexpr int kDepth = 1024;   // columns of x in a shrink item
constexpr int kColumns = 512;  // columns of out in an expand item
constexpr int kDoneCounter =
    2;  // counters: tickets, blocks that are done, then shrink items done by position

struct Item {
  int64_t position;  // of its first row in `order`
  int part;          // which columns
  int rows;
  int64_t slot;
  bool invalid;  // the rows asked for an adapter that does not exist, or that the launch does not know
};

// What is there to do from a position of `order` on: nothing (rows = 0) unless an item begins there.
PEFTKERN_DEVICE Item item_at(const SgmvArgs& args, int64_t position, int part) {
  const int slots = static_cast<int>(args.slots), at = static_cast<int>(position);
  const int slot = find_segment(slots + 2, at, [&](int s) { return args.starts[s]; });
  // Each invalid row is an item.
  Item item{position, part, slot > slots, slot, slot > slots};
  const int64_t start = args.starts[slot];
  if (slot >= slots || (position - start) % kRows != 0) return item;
  const int64_t* table = args.table + slot * cpu::kMultiColumns;
  item.invalid = !known(args, table, args.vectors != nullptr);
  if (table[cpu::kRank] == 0 && !item.invalid) return item;
  const int64_t left = args.starts[slot + 1] - position;
  item.rows = left < kRows ? static_cast<int>(left) : kRows;
  return item;
}

// 16 bytes of a row from `p` on as floats, zeros from the element `left` on; vector says that p is aligned.
template <class Adapter, int Count>
PEFTKERN_DEVICE void load_floats(float (&to)[Count], const Adapter* p, int64_t left, bool vector) {
  union {
    Vec16 all;
    Adapter each[Count];
  };
  if (vector && left >= Count) {
    all = load_once(reinterpret_cast<const Vec16*>(p));
    for (int e = 0; e < Count; ++e) to[e] = to_float(each[e]);
  } else {
    for (int e = 0; e < Count; ++e) to[e] = e < left ? to_float(p[e]) : 0.0f;
  }
}

template <class T, class Adapter>
PEFTKERN_DEVICE void shrink(const SgmvArgs& args, const Item& item, int64_t splits, float* shared) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(Adapter)), kVectors = kDepth / 32 / kEach;
  const int t = static_cast<int>(threadIdx.x), lane = lane_index(), warp = t / 32;
  const int64_t first = int64_t{item.part} * kDepth, left = args.K - first;
  const int64_t* table = args.table + item.slot * cpu::kMultiColumns;
  const float* p_d = vector_of(args, table, cpu::kPd);
  for (int row = 0; row < item.rows; ++row) {
    const T* x = static_cast<const T*>(args.x) + args.order[item.position + row] * args.x_row + first;
    for (int k = t; k < kDepth; k += kThreads) shared[row * kDepth + k] = k < left ? to_float(x[k]) : 0.0f;
    if (p_d == nullptr) continue;
    for (int k = t; k < kDepth && k < left; k += kThreads) shared[row * kDepth + k] *= p_d[first + k];
  }
  sync_threads();

  const int64_t rank = table[cpu::kRank];
  const Adapter* a = matrix<Adapter>(args, table, cpu::kATensor, cpu::kAOffset) + first;
  for (int64_t r = warp; r < rank; r += kWarps) {
    const Adapter* a_row = a + r * table[cpu::kARow];
    const bool vector = reinterpret_cast<uintptr_t>(a_row) % 16 == 0;
    float w[kVectors][kEach];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = (lane + 32 * j) * kEach;
      load_floats<Adapter, kEach>(w[j], a_row + k, left - k, vector);
    }
    float sums[kRows] = {};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= item.rows) break;
        const float* x = shared + row * kDepth + (lane + 32 * j) * kEach;
#pragma unroll
        for (int e = 0; e < kEach; ++e) sums[row] += w[j][e] * x[e];
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= item.rows) break;
      float sum = sums[row];
      for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
      float* partial = args.partial + ((item.position + row) * splits + item.part) * args.max_rank;
      if (lane == 0) store_published(partial + r, sum);
    }
  }
  sync_threads();
  if (t == 0) {
    fence_device();
    atomic_add(args.counters + kDoneCounter + item.position, 1);
  }
}

template <class T, class Adapter>
PEFTKERN_DEVICE void expand(const SgmvArgs& args, const Item& item, int64_t splits, float* shared) {
  const int t = static_cast<int>(threadIdx.x);
  const int64_t* table = args.table + item.slot * cpu::kMultiColumns;
  const int64_t rank = table[cpu::kRank], b_n = table[cpu::kBN], b_r = table[cpu::kBR];
  const Adapter* b = matrix<Adapter>(args, table, cpu::kBTensor, cpu::kBOffset);
  if (t == 0) wait_at_least(args.counters + kDoneCounter + item.position, static_cast<uint32_t>(splits));
  sync_threads();
  const float scaling = args.scaling[item.slot];
  const float *d = vector_of(args, table, cpu::kD), *g_d = vector_of(args, table, cpu::kGd);
  for (int64_t i = t; i < item.rows * rank; i += kThreads) {
    const int64_t row = i / rank, r = i % rank;
    const float* partial = args.partial + (item.position + row) * splits * args.max_rank + r;
    float sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += load_published(partial + s * args.max_rank);
    shared[row * args.max_rank + r] = d == nullptr ? scaling * sum : scaling * d[r] * sum;
  }
  sync_threads();

  // Neighbouring threads read what is adjacent in memory: columns of B^T, or whole rows of B.
  const int64_t first = int64_t{item.part} * kColumns + (b_n == 1 ? 2 * t : t),
                second = first + (b_n == 1 ? 1 : kThreads);
  constexpr int kEach = 16 / static_cast<int>(sizeof(Adapter));
  float sums[2][kRows] = {};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int64_t n = c == 0 ? first : second;
    if (n >= args.N) continue;
    const Adapter* b_row = b + n * b_n;
    const bool vector = reinterpret_cast<uintptr_t>(b_row) % 16 == 0;
    for (int64_t r = 0; r < rank; r += kEach) {
      float w[kEach];
      if (b_r == 1) {
        load_floats<Adapter, kEach>(w, b_row + r, rank - r, vector);
      } else {
        for (int e = 0; e < kEach; ++e) w[e] = r + e < rank ? to_float(b_row[(r + e) * b_r]) : 0.0f;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= item.rows) break;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (r + e < rank) sums[c][row] += w[e] * shared[row * args.max_rank + r + e];
        }
      }
    }
    if (g_d == nullptr) continue;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sums[c][row] *= g_d[n];
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row >= item.rows) break;
    T* out = static_cast<T*>(args.out) + args.order[item.position + row] * args.out_row;
    if (first < args.N) out[first] = from_float<T>(to_float(out[first]) + sums[0][row]);
    if (second < args.N) out[second] = from_float<T>(to_float(out[second]) + sums[1][row]);
  }
}

template <class T>
PEFTKERN_DEVICE void fill_nan(const SgmvArgs& args, const Item& item) {
  for (int row = 0; row < item.rows; ++row) {
    T* out = static_cast<T*>(args.out) + args.order[item.position + row] * args.out_row;
    for (int c = static_cast<int>(threadIdx.x); c < kColumns; c += kThreads) {
      const int64_t n = int64_t{item.part} * kColumns + c;
      if (n < args.N) out[n] = from_float<T>(NAN);
    }
  }
}

template <class T, class Adapter>
__global__ void __launch_bounds__(kThreads, 2) sgmv_kernel(const SgmvArgs args) {
  auto* broadcast = reinterpret_cast<uint32_t*>(shared_memory());
  auto* shared = reinterpret_cast<float*>(broadcast + 4);
  const int64_t splits = (args.K + kDepth - 1) / kDepth, chunks = (args.N + kColumns - 1) / kColumns;
  // Counters and partial sums may be in use up to here, as `out` is.
  grid_wait();
  if (threadIdx.x == 0) *broadcast = atomic_add(&args.counters[0], 1);
  sync_threads();
  const int64_t ticket = *broadcast, shrinks = args.M * splits;
  if (ticket < shrinks) {
    const Item item = item_at(args, ticket / splits, static_cast<int>(ticket % splits));
    if (item.rows > 0 && !item.invalid) shrink<T, Adapter>(args, item, splits, shared);
  } else {
    const int64_t rest = ticket - shrinks;
    const Item item = item_at(args, rest / chunks, static_cast<int>(rest % chunks));
    if (item.invalid) {
      fill_nan<T>(args, item);
    } else if (item.rows > 0) {
      expand<T, Adapter>(args, item, splits, shared);
    }
  }

  // Whoever is last makes the counters ready for the next launch: nobody waits any more.
  sync_threads();
  if (threadIdx.x == 0) *broadcast = atomic_count(&args.counters[1], gridDim.x);
  sync_threads();
  if (*broadcast != gridDim.x - 1) return;
  if (threadIdx.x == 0) args.counters[0] = 0;
  for (int64_t i = threadIdx.x; i < args.M; i += kThreads) args.counters[kDoneCounter + i] = 0;
}

// Of a block: the ticket, then rows of x or of their sums.
int64_t shared_bytes(int64_t max_rank) {
  return 16 + 4 * kRows * (max_rank > kDepth ? max_rank : kDepth);
}

template <class T>
const char* start(const SgmvArgs& args, const Launch& how) {
  if (args.adapter_dtype == DType::f32) return launch(how, sgmv_kernel<T, float>, args);
  return launch(how, sgmv_kernel<T, T>, args);
}

}  // namespace

int64_t sgmv_partials(int64_t M, int64_t K, int64_t max_rank, DType dtype, int arch) {
  if (sgmv_in_clusters(max_rank, dtype, arch)) return 0;
  return M * ((K + kDepth - 1) / kDepth) * max_rank;
}
int64_t sgmv_counters(int64_t M, int64_t max_rank, DType dtype, int arch) {
  if (sgmv_in_clusters(max_rank, dtype, arch)) return 0;
  return kDoneCounter + M;
}

bool sgmv_takes(int64_t max_rank, DType dtype, int arch) {
  return sgmv_in_clusters(max_rank, dtype, arch) || shared_bytes(max_rank) <= most_shared(arch);
}

const char* sgmv_add(const SgmvArgs& args) {
  const int64_t splits = (args.K + kDepth - 1) / kDepth, chunks = (args.N + kColumns - 1) / kColumns;
  const int64_t blocks = args.M * (splits + chunks);
  if (args.M == 0 || (args.N == 0 && args.u == nullptr)) return nullptr;
  if (sgmv_in_clusters(args.max_rank, args.dtype, args.arch)) return sgmv_cluster_add(args);
  if (args.u != nullptr || args.src != nullptr || args.bias != nullptr) return "cudaErrorInvalidValue";
  if (blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const auto shared = static_cast<size_t>(shared_bytes(args.max_rank));
  Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, shared, args.stream};
  how.dependent = args.dependent;
  switch (args.dtype) {
    case DType::f32:
      return start<float>(args, how);
    case DType::bf16:
      return start<bf16>(args, how);
    case DType::f16:
      return start<f16>(args, how);
  }
  return "cudaErrorInvalidValue";
}

}  // namespace peftkern::cuda
