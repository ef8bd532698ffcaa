// The segmented branch on sm_90 and up: one launch, and no memory but its operands.
//
//   out[t] += s[a] B[a] (A[a] x[t])
//
// or, with vectors that adapters may have (base: out itself, or `src`; bias: the adapter's, else the
// layer's),
//
//   out[t] = g_b[a] base[t] + s[a] g_d[a] (B[a] (d[a] A[a] (p_d[a] x[t]))) + bias
//
// A cluster of 8 blocks takes up to 64 rows of one adapter. Each block shrinks its slice of K, the slices are
// added up and scaled through each other's shared memory (exchange.h), and each expands its slice of N.
// Adapters are read once per cluster, each block's slices of A and B under way at
// the same time: A's straight into the registers of tensor-core operands (pieces.h), B's into L2.
//
// A row's sum runs in an order that K and the rank alone decide: by warp along K, then by warp, then by
// block; then along the rank. So its bits are the same in any batch, alone or among 64.
#include "cuda/instructions/cluster.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/sgmv/exchange.h"
#include "cuda/sgmv/items.h"
#include "cuda/sgmv/output.h"

namespace peftkern::cuda {
namespace {

constexpr int kTile = 16;   // rows of a product, and ranks of a chunk
constexpr int kStep = 32;   // columns of K that a warp multiplies at a time
constexpr int kGroup = 64;  // columns of out that a warp makes at a time
constexpr int kMaxRank = 512, kManyRows = 1024, kMaxRankOfManyRows = 128;

// Floats from a row of sums to the next: a multiple of 16 that keeps rows apart in the banks.
__host__ __device__ constexpr int row_floats(int rank) {
  return kTile * ((rank + kTile - 1) / kTile | 1);
}

// Shared memory of a block whose item has up to `rows` rows.
constexpr int shared_bytes(int rows, int rank) {
  return Exchange<kCluster, kThreads>::front(rows, (rank + kTile - 1) / kTile * (kTile / 4)) +
         4 * rows * (row_floats(rank) + kWarps * kTile);
}
static_assert(shared_bytes(16, kMaxRank) <= kSharedAnywhere &&
              shared_bytes(64, kMaxRankOfManyRows) <= kSharedAnywhere);

// Columns of the table's row of an adapter.
using Row = int64_t[cpu::kMultiColumns];

template <class T, class Adapter, bool Vectors>
struct Branch {
  const SgmvArgs& args;
  const Output<T, Vectors>& output;
  const int32_t* order;  // of this item's rows
  int rows, K, N;
  int rank;
  const Adapter* a;
  const Adapter* b;
  int64_t a_row, b_n, b_r;
  float scaling;
  const float *d = nullptr, *p_d = nullptr;
  const Exchange<kCluster, kThreads> sums_of_all;
  float* parts;  // warps x rows x 16: the warps' sums of a chunk

  PEFTKERN_DEVICE Branch(const Output<T, Vectors>& output, const Item& item, int most_rows, const Row& table)
      : args(output.args),
        output(output),
        order(args.order + item.first),
        rows(item.rows),
        K(static_cast<int>(args.K)),
        N(static_cast<int>(args.N)),
        rank(static_cast<int>(table[cpu::kRank])),
        a(matrix<Adapter>(args, table, cpu::kATensor, cpu::kAOffset)),
        b(matrix<Adapter>(args, table, cpu::kBTensor, cpu::kBOffset)),
        a_row(table[cpu::kARow]),
        b_n(table[cpu::kBN]),
        b_r(table[cpu::kBR]),
        scaling(args.scaling[item.slot]),
        sums_of_all(shared_memory(), rows, (rank + kTile - 1) / kTile * (kTile / 4), row_floats(rank)),
        parts(sums_of_all.v + (rows <= kTile ? kTile : most_rows) * sums_of_all.stride) {
    if constexpr (Vectors) d = vector_of(args, table, cpu::kD), p_d = vector_of(args, table, cpu::kPd);
  }

  PEFTKERN_DEVICE static int g() { return lane_index() / 4; }
  PEFTKERN_DEVICE static int t() { return lane_index() % 4; }
  PEFTKERN_DEVICE static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  PEFTKERN_DEVICE static int block() { return static_cast<int>(cluster_rank()); }

  // Sums over this block's slice of K for rows row0 to row0 + 16 Tiles - 1 of the item, sent to who adds up
  // the slices. Scaled: by p_d, which A's columns are multiplied by, in fp32.
  template <int Tiles, bool Vector, bool Scaled>
  PEFTKERN_DEVICE void shrink(int row0) const {
    using How = Kind<T, std::conditional_t<Scaled, float, Adapter>>;
    // Under way per block with one tile of rows: 8 loads of 16 bytes of A by each of 128 lanes, 16 KiB.
    constexpr int kDepth = Tiles == 1 && Vector ? (sizeof(Adapter) == 4 || Scaled ? 2 : 4) : 1;
    constexpr int kAhead = Tiles == 1 ? kDepth : 2;  // tiles of x under way
    const int steps = (K + kStep - 1) / kStep, each = (steps + kCluster - 1) / kCluster;
    const int begin = block() * each, end = begin + each < steps ? begin + each : steps;
    int x_row[Tiles][2];  // which, -1 for none
#pragma unroll
    for (int m = 0; m < 2 * Tiles; ++m) {
      const int row = row0 + 8 * m + g();
      x_row[m / 2][m % 2] = row < rows ? order[row] : -1;
    }
    for (int r0 = 0; r0 < rank; r0 += kTile) {
      const Adapter* a_row0 = a + (r0 + g()) * a_row + 8 * t();
      float sums[Tiles][2][4] = {};
      for (int step = begin + warp(); step < end; step += kWarps * kDepth) {
        Eight<Adapter> a_piece[kDepth][2];
        Eight<T> x_piece[kAhead][2];
        Eight<float> scale_piece[kDepth];
        const int k = step * kStep;
        const auto load_x = [&](int i) {
          const int d = i / Tiles, left = left_from(step + d * kWarps, end);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = x_row[i % Tiles][h];
            const T* from = static_cast<const T*>(args.x) + row * args.x_row + 8 * t() + k;
            x_piece[i % kAhead][h] = load_eight<Vector>(from + d * kWarps * kStep, row < 0 ? 0 : left);
          }
        };
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const int left = left_from(step + d * kWarps, end);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Adapter* from = a_row0 + 8 * h * a_row + k;
            const bool inside = r0 + g() + 8 * h < rank;
            a_piece[d][h] = load_eight<Vector>(from + d * kWarps * kStep, inside ? left : 0);
          }
          if constexpr (Scaled)
            scale_piece[d] = load_eight<Vector>(p_d + 8 * t() + k + d * kWarps * kStep, left);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load_x(i);
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          uint32_t of_a[2][How::kTermsA][4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if constexpr (Scaled) {
              to_terms(times(a_piece[d][h], scale_piece[d]), of_a[h]);
            } else {
              to_terms(a_piece[d][h], of_a[h]);
            }
          }
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            const int i = d * Tiles + m;
            multiply<How>(x_piece[i % kAhead], of_a, sums[m]);
            if (i + kAhead < kDepth * Tiles) load_x(i + kAhead);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < Tiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (warp() * Tiles + m) * kTile + g() + i / 2 * 8;
#pragma unroll
          for (int h = 0; h < 2; ++h) parts[row * kTile + 8 * h + 2 * t() + i % 2] = sums[m][h][i];
        }
      }
      if (row0 == 0 && r0 == 0) cluster_wait();  // until all blocks have started
      sync_threads();
      const int count = (rows - row0 < Tiles * kTile ? rows - row0 : Tiles * kTile) * (kTile / 4);
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const auto* part = reinterpret_cast<const Float4*>(parts) + i;
        Float4 sum = part[0];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum.value[e] += part[w * Tiles * kTile * (kTile / 4)].value[e];
        }
        sums_of_all.send(row0 + i / (kTile / 4), r0 / 4 + i % (kTile / 4), sum);
      }
      sync_threads();
    }
  }

  // Columns that are left for this lane in a step of a slice of K.
  PEFTKERN_DEVICE int left_from(int step, int end) const {
    return step < end ? K - step * kStep - 8 * t() : 0;
  }

  // 32 columns of K of 16 rows and 16 ranks: terms i of x and j of A, the smallest products first.
  template <class How>
  PEFTKERN_DEVICE static void multiply(const Eight<T> (&x)[2], const uint32_t (&of_a)[2][How::kTermsA][4],
                                       float (&sums)[2][4]) {
    uint32_t of_x[2][How::kTermsX][4];
    to_terms(x[0], of_x[0]);
    to_terms(x[1], of_x[1]);
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
#pragma unroll
      for (int order = How::kTermsA - 1; order >= 0; --order) {
#pragma unroll
        for (int i = 0; i < How::kTermsX; ++i) {
          const int j = order - i;
          if (j < 0) continue;
          const uint32_t rows[4] = {of_x[0][i][s], of_x[1][i][s], of_x[0][i][s + 1], of_x[1][i][s + 1]};
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t ranks[2] = {of_a[h][j][s], of_a[h][j][s + 1]};
            mma_16x8x16<typename How::Shrink>(sums[h], rows, ranks);
          }
        }
      }
    }
  }

  // This lane's part of 16 ranks from r0 on and 64 columns of out from n0 on.
  PEFTKERN_DEVICE Square<Adapter> load_b(int n0, int r0) const {
    const int n = n0 + 8 * g(), r = r0 + 4 * t();
    return load_square(b + n * b_n + r * b_r, b_n, b_r, N - n, rank - r);
  }

  // out += v B^T for columns n0 to n0 + 63; `square` holds the first 16 ranks.
  PEFTKERN_DEVICE void expand(int n0, Square<Adapter>& square) const {
    using How = Kind<T, Adapter>;
    for (int row0 = 0; row0 < rows; row0 += kTile) {
      float sums[8][4] = {};
      for (int r0 = 0; r0 < rank; r0 += kTile) {
        if (r0 > 0 || (row0 > 0 && rank > kTile)) square = load_b(n0, r0);
        const float* from = sums_of_all.v + (row0 + g()) * sums_of_all.stride + r0 + 4 * t();
        uint32_t of_v[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Float4 some = *reinterpret_cast<const Float4*>(from + 8 * h * sums_of_all.stride);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t terms[2];
            split<2>(some.value[2 * i], some.value[2 * i + 1], terms);
            of_v[0][2 * i + h] = terms[0], of_v[1][2 * i + h] = terms[1];
          }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          uint32_t of_b[How::kTermsB][2];
          square.column(j, of_b);
          if constexpr (How::kTermsB == 2) mma_16x8x16<bf16>(sums[j], of_v[0], of_b[1]);
          mma_16x8x16<bf16>(sums[j], of_v[1], of_b[0]);
          mma_16x8x16<bf16>(sums[j], of_v[0], of_b[0]);
        }
      }
      grid_wait();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + g() + 8 * h, n = n0 + 16 * t(), left = row < rows ? N - n : 0;
        const int64_t of_out = row < rows ? order[row] : 0;
        Run<T> base[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) base[i].load(output.from(of_out) + n + 8 * i, left - 8 * i);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float branch[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) branch[j] = sums[j][2 * h + i];
          output.store(of_out, n + 8 * i, left - 8 * i, base[i], branch);
        }
      }
    }
  }

  template <bool Scaled>
  PEFTKERN_DEVICE void shrink_all() const {
    constexpr bool kWide = sizeof(Adapter) == 4 || Scaled;
    const auto addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(args.x) |
                           (Scaled ? reinterpret_cast<uintptr_t>(p_d) : 0);
    const int64_t strides = a_row * static_cast<int64_t>(sizeof(Adapter)) | args.x_row * 2 | args.K * 2;
    if (addresses % 16 != 0 || strides % 16 != 0) {
      for (int row0 = 0; row0 < rows; row0 += kTile) shrink<1, false, Scaled>(row0);
    } else if (rows <= kTile) {
      shrink<1, true, Scaled>(0);
    } else if constexpr (kWide) {
      for (int row0 = 0; row0 < rows; row0 += 2 * kTile) shrink<2, true, Scaled>(row0);
    } else {
      shrink<4, true, Scaled>(0);
    }
  }

  // Not Vectors: `shrink_all<true>` is not made at all.
  PEFTKERN_DEVICE void run() const {
    const int groups = (N + kGroup - 1) / kGroup, each = (groups + kCluster - 1) / kCluster;
    const int begin = block() * each, end = begin + each < groups ? begin + each : groups;
    if (begin < end) {
      const int first = begin * kGroup, last = end * kGroup < N ? end * kGroup : N;
      prefetch_b(first, last);
      if constexpr (Vectors) output.prefetch(warp(), first, last);
    }
    if (Vectors && p_d != nullptr) {
      shrink_all<Vectors>();
    } else {
      shrink_all<false>();
    }

    int group = begin + warp();
    Square<Adapter> square;
    if (group < end) square = load_b(group * kGroup, 0);
    sums_of_all.collect([&](int r) { return d != nullptr && r < rank ? scaling * d[r] : scaling; });
    while (group < end) {
      expand(group * kGroup, square);
      group += kWarps;
      if (group < end) square = load_b(group * kGroup, 0);
    }
    grid_wait();
    // Not before: where the launch before is a dependent one too, those before it may still use u's memory.
    if (args.u != nullptr) store_u();
  }

  // Beyond the rank the sums are zero.
  PEFTKERN_DEVICE void store_u() const {
    sums_of_all.each_owned([&](int row, int quad, const Float4& sum) {
      float* u = args.u + order[row] * args.max_rank;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (4 * quad + e < args.max_rank) u[4 * quad + e] = sum.value[e];
      }
    });
  }

  // This block's part of B, columns first to last - 1 of out, on its way to L2 if it lies in whole units
  // there.
  PEFTKERN_DEVICE void prefetch_b(int first, int last) const {
    constexpr int kUnit = 16 / static_cast<int>(sizeof(Adapter));
    const bool by_rank = b_n == 1;
    if (lane_index() != 0 || !(by_rank || (b_r == 1 && b_n == rank))) return;
    // The columns of a rank, or a quarter of all.
    const int pieces = by_rank ? rank : kWarps;
    const int64_t all = by_rank ? last - first : int64_t{last - first} * rank / kWarps,
                  count = all / kUnit * kUnit;
    const int64_t next = by_rank ? b_r : count;
    const Adapter* p = b + first * b_n + warp() * next;
    if (count == 0 || reinterpret_cast<uintptr_t>(p) % 16 != 0 || next % kUnit != 0) return;
#pragma unroll 1
    for (int i = warp(); i < pieces; i += kWarps, p += kWarps * next) {
      prefetch_bulk(p, static_cast<uint32_t>(count * sizeof(Adapter)));
    }
  }
};

// Vectors: adapters may have them, a bias is added here, or the base product lies elsewhere.
template <class T, class Adapter, bool Vectors>
__global__ void __launch_bounds__(kThreads, sizeof(Adapter) == 4 || Vectors ? 3 : 4)
    sgmv_cluster_kernel(const __grid_constant__ Parameters p) {
  if constexpr (kHasClusters) {
    const SgmvArgs& args = p.args;
    const Item item = find_item(p, static_cast<int>(blockIdx.x) / kCluster);
    // Its row of the table at once: what waits for one of these loads has waited for all.
    Row row = {};
    Output<T, Vectors> output(args);
    bool valid = true;
    if (item.rows > 0 && item.slot < args.slots) {
      constexpr int kColumns = Vectors ? int{cpu::kMultiColumns} : cpu::kBR + 1;
#pragma unroll
      for (int i = cpu::kRank; i < kColumns; ++i) row[i] = args.table[item.slot * cpu::kMultiColumns + i];
      valid = known(args, row, Vectors);
      if (valid) output.find(row);
    }
    if (row[cpu::kRank] > 0 && valid) {
      Branch<T, Adapter, Vectors>(output, item, 1 << p.shift, row).run();
      clear_u(args, item, (row[cpu::kRank] + kTile - 1) / kTile * kTile);
    } else {
      // Also where nothing is to be done: whoever comes after this launch relies on the one before it.
      grid_wait();
      clear_u(args, item, 0);
      if (!valid || (item.rows > 0 && item.slot > args.slots)) {
        fill_nan<T>(args, item);
      } else if (output.acts_alone()) {
        store_base(output, item);
      }
    }
  }
}

template <class T, class Adapter>
const char* start(const Parameters& p, const Launch& how) {
  const SgmvArgs& args = p.args;
  const bool vectors = args.vectors != nullptr || args.bias != nullptr || args.src != nullptr;
  return vectors ? launch(how, sgmv_cluster_kernel<T, Adapter, true>, p)
                 : launch(how, sgmv_cluster_kernel<T, Adapter, false>, p);
}

template <class T>
const char* start(const Parameters& p, const Launch& how) {
  return p.args.adapter_dtype == DType::f32 ? start<T, float>(p, how) : start<T, T>(p, how);
}

}  // namespace

bool sgmv_in_clusters(int64_t max_rank, DType dtype, int arch) {
  return arch >= 90 && dtype != DType::f32 && max_rank <= kMaxRank;
}

const char* sgmv_cluster_add(const SgmvArgs& args) {
  // With few rows in all, many blocks count for more than reading an adapter once for 64 of them.
  const bool all_rows = args.u != nullptr || args.bias != nullptr || args.src != nullptr;
  Parameters p{args, args.M < kManyRows || args.max_rank > kMaxRankOfManyRows ? 4 : 6, true, all_rows};
  const int rows = 1 << p.shift;
  const int64_t by_segment = (args.M + rows - 1) / rows + args.slots + 2;
  p.by_position = args.M <= by_segment;
  const int64_t blocks = kCluster * (p.by_position ? args.M : by_segment);
  if (blocks > 0x7fffffff || args.K > 0x7fffffff - kStep || args.N > 0x7fffffff - kGroup)
    return "cudaErrorInvalidConfiguration";
  const auto shared = static_cast<size_t>(shared_bytes(rows, static_cast<int>(args.max_rank)));
  Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, shared, args.stream};
  how.cluster = kCluster;
  how.dependent = args.dependent;
  return args.dtype == DType::bf16 ? start<bf16>(p, how) : start<f16>(p, how);
}

}  // namespace peftkern::cuda
