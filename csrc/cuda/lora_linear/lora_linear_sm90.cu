// out = g_b * x w^T + low-rank term + bias in one launch, for Hopper: bf16 and fp16, forward and input
// gradient.
//
// A persistent block per multiprocessor, in pairs. One warp loads tiles of x and w by TMA into a ring of
// stages, w by multicast for both blocks of a pair. Three warps, the adapter's, put the operands of the
// low-rank term into the same ring as stages of their own, so that its products run on in the base's
// accumulators; with lora_A given they make v as well, under the first tiles' products. Two warpgroups
// multiply, 64 rows each, and store.
#include "cuda/instructions/launch.h"
#include "cuda/instructions/tma.h"
#include "cuda/lora_linear/sm90_product.h"
#include "cuda/lora_linear/sm90_row_blocks.h"

namespace peftkern::cuda {
namespace hopper {
namespace {

// Hands free stages to the adapter. (Whoever fills a stage must have seen it free each time it was; a parity
// tells the last time from the one before the last only. So one thread watches all stages.)
template <int Columns, bool MakesV>
PEFTKERN_DEVICE void grant(const Layout<Columns, MakesV>& shared,
                           Ring<Layout<Columns, MakesV>::kStages>& ring, int stages) {
  for (int i = 0; i < stages; ++i) {
    mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
    mbarrier_arrive(shared.granted(ring.slot));
    ring.advance();
  }
}

// Stages of x and w, by one thread.
template <int Columns, bool MakesV, bool ByRow>
PEFTKERN_DEVICE void load(const LoraLinearArgs& args, const Layout<Columns, MakesV>& shared,
                          const TensorMap* x, const TensorMap* w) {
  const Walk<Columns, MakesV> walk(args);
  Ring<Layout<Columns, MakesV>::kStages> ring;
  tensor_map_prefetch(x);
  tensor_map_prefetch(w);
  for (int index = walk.first; index < walk.tiles; index += walk.step) {
    const Tile tile = walk.at(index);
    if (walk.rank_first) grant(shared, ring, walk.rank_steps);
    for (int step = 0; step < walk.steps; ++step) {
      const int k = step * kDepth;
      const uint32_t full = shared.full(ring.slot);
      mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
      mbarrier_arrive_expect(full, shared.kStage);
      tile_load(shared.left(ring.slot), x, full, tile.row, k);
      DenseTiles<Columns, ByRow>::load(shared.right(ring.slot), w, full, tile.column, k, walk.rank);
      ring.advance();
    }
    if (!walk.rank_first) grant(shared, ring, walk.rank_steps);
  }
}

// Stages of the low-rank term, by three warps; with MakesV, v before.
template <class T, int Columns, bool MakesV>
PEFTKERN_DEVICE void adapt(const LoraLinearArgs& args, const Layout<Columns, MakesV>& shared) {
  const int t = static_cast<int>(threadIdx.x) - 32;
  const Walk<Columns, MakesV> walk(args);
  if (walk.rank_steps == 0) return;
  Ring<Layout<Columns, MakesV>::kStages> ring;
  unsigned char* const extra = shared.memory + shared.kExtraAt;
  const uint64_t seed = args.dropout.seed != nullptr ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  const RowBlocks<T> row_blocks{args, extra, reinterpret_cast<int*>(shared.memory + shared.kTicketAt), t};
  uint32_t mask_parity = 1, granted = 0;  // of the next wait; for each slot
  for (int index = walk.first; index < walk.tiles; index += walk.step) {
    const Tile tile = walk.at(index);
    if constexpr (MakesV) row_blocks.wait_for(tile, index == walk.first);
    if (!MakesV && walk.rank_first) {
      mbarrier_wait(shared.mask_read(), mask_parity);
      mask_parity ^= 1;
      make_mask<Columns>(args, extra, tile, seed, t);
    } else {
      ring.skip(walk.steps);
    }
    for (int step = 0; step < walk.rank_steps; ++step) {
      make_rank_stage<T>(args, shared, ring.slot, granted >> ring.slot & 1, tile, step * kRankDepth,
                         known_here(t));
      granted ^= 1u << ring.slot;
      ring.skip(1);
    }
    if (walk.rank_first) ring.skip(walk.steps);
  }
  if constexpr (MakesV) row_blocks.leave();
}

template <class T, int Columns, bool MakesV, bool ByRow>
__global__ void __launch_bounds__(kThreads, 1)
    lora_linear_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                       const __grid_constant__ LoraLinearArgs args) {
  using Shared = Layout<Columns, MakesV>;
  const Shared shared(shared_memory());
  const int warp = shuffle(static_cast<int>(threadIdx.x) / 32, 0);  // the same in all lanes
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < Shared::kStages; ++s) {
      mbarrier_init(shared.full(s), 1);
      mbarrier_init(shared.empty(s), 8 * kCluster<Columns>);  // the multiplying warps
      mbarrier_init(shared.granted(s), 1);
    }
    mbarrier_init(shared.mask_read(), 8);
    mbarrier_init_fence();
  }
  if constexpr (kCluster<Columns> > 1) {
    cluster_sync();
  } else {
    sync_threads();
  }
  // Registers: a warpgroup of three may have more than the 168 that all start with, if others have less.
  // Products of 256 columns need 154 at the start, so there is no room for a fourth warpgroup.
  if (warp < 4) {
    if constexpr (Columns == 256) {
      registers_decrease<152>();
    } else {
      registers_increase<216>();
    }
    if (warp == 0) {
      if (threadIdx.x == 0) load<Columns, MakesV, ByRow>(args, shared, &x, &w);
    } else {
      adapt<T>(args, shared);
    }
  } else {
    if constexpr (Columns == 256) {
      registers_increase<176>();
    } else {
      registers_decrease<144>();
    }
    multiply<T, Columns, MakesV, ByRow>(args, shared, warp / 4 - 1);
  }
  if constexpr (kCluster<Columns> > 1) {
    sync_warp();
    cluster_sync();  // the other block may still arrive at this one's barriers
  }
}

// Blocks that work at the same time, and how often they do.
template <int Columns>
struct Grid {
  int64_t clusters, turns;

  explicit Grid(const LoraLinearArgs& args) {
    constexpr int kRowsTogether = kCluster<Columns> * kRows;
    const int64_t tiles = (args.M + kRowsTogether - 1) / kRowsTogether * ((args.N + Columns - 1) / Columns);
    const int64_t most = args.multiprocessors / kCluster<Columns>;
    clusters = tiles < most ? tiles : most > 0 ? most : 1;
    turns = (tiles + clusters - 1) / clusters;
  }
};

template <class T, int Columns, bool MakesV, bool ByRow>
const char* start(const LoraLinearArgs& args) {
  const bool is_f16 = args.x.dtype == DType::f16;
  TensorMap x, w;
  const TensorMapShape of_x{
      const_cast<void*>(args.x.data), is_f16, args.M, args.K, args.x.row, kRows, kDepth, true};
  if (const char* error = encode_tensor_map(of_x, &x)) return error;
  const TensorMapShape of_w = DenseTiles<Columns, ByRow>::shape(args.w, args.N, args.K);
  if (const char* error = encode_tensor_map(of_w, &w)) return error;
  const auto blocks = static_cast<unsigned>(Grid<Columns>(args).clusters * kCluster<Columns>);
  Launch how{{blocks}, {kThreads}, Layout<Columns, MakesV>::kBytes, args.stream};
  how.cluster = kCluster<Columns>;
  return launch(how, lora_linear_kernel<T, Columns, MakesV, ByRow>, x, w, args);
}

// Narrow tiles load 2.7 times as many bytes for a product, but leave fewer multiprocessors idle where there
// are few tiles.
bool narrow_tiles(const LoraLinearArgs& args) {
  return 2 * 256 * Grid<256>(args).turns > 3 * 128 * Grid<128>(args).turns;
}

template <class T, int Columns>
const char* choose(const LoraLinearArgs& args) {
  if (args.a.data != nullptr) {
    return start<T, Columns, true, false>(args);
  }
  return args.w_by_row ? start<T, Columns, false, true>(args) : start<T, Columns, false, false>(args);
}

template <class T>
const char* choose(const LoraLinearArgs& args) {
  return narrow_tiles(args) ? choose<T, 128>(args) : choose<T, 256>(args);
}

}  // namespace
}  // namespace hopper

int64_t lora_linear_counters(int64_t M) {
  return 2 + (M + hopper::kRowBlock - 1) / hopper::kRowBlock;
}

bool lora_linear_sm90_takes(const LoraLinearArgs& args) {
  const auto fits = [&](const ConstMatrix& m, int64_t rows, int64_t columns) {
    return m.dtype == args.out.dtype && m.col == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
           m.row % 8 == 0 && m.row >= columns && rows <= hopper::kMaxSize && columns <= hopper::kMaxSize;
  };
  const auto adapter = [&](const ConstMatrix& m) {
    return m.dtype == DType::f32 || m.dtype == args.out.dtype;
  };
  const auto vectors = [](const ConstMatrix& m) {
    const int64_t bytes = m.row * (m.dtype == DType::f32 ? 4 : 2);
    return m.col == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && bytes % 16 == 0;
  };
  const bool makes_v = args.a.data != nullptr;
  const bool drops_term = args.R > 0 && args.dropout.seed != nullptr && !makes_v;
  return args.out.dtype != DType::f32 && args.out.col == 1 && args.M >= 1 && args.N >= 1 && args.K >= 1 &&
         args.scales.p_b == nullptr && args.scales.p_d == nullptr && fits(args.x, args.M, args.K) &&
         (args.w_by_row ? fits(args.w, args.K, args.N) : fits(args.w, args.N, args.K)) &&
         args.R <= hopper::kMaxRank && (args.R == 0 || adapter(args.b)) &&
         !(drops_term && args.scales.g_b != nullptr) &&
         (!makes_v || (args.R >= 1 && args.R <= hopper::kMaxMadeRank && adapter(args.a) && !args.w_by_row &&
                       vectors(args.a)));
}

const char* lora_linear_sm90(const LoraLinearArgs& args) {
  if (!lora_linear_sm90_takes(args)) return "cudaErrorInvalidValue";
  return args.x.dtype == DType::bf16 ? hopper::choose<bf16>(args) : hopper::choose<f16>(args);
}

}  // namespace peftkern::cuda
