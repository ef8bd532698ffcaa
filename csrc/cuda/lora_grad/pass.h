// A block's share of the pass over `in`: some rows of a strip of 256 columns, in stages of 32 rows that come
// through a ring in shared memory.
//
// A warp owns 64 columns and 16 ranks: its part of grad, v^T (16 x rows) times in (rows x 64), stays in
// registers, and so does its part of p, the operand of `down`. Where no more than 16 ranks are wanted, two
// warps share them and take alternate tiles of 16 rows. What the four groups of columns have of `down` is
// added, in order, through shared memory.
#pragma once

#include "cuda/instructions/launch.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/warp.h"
#include "cuda/lora_grad/finish.h"
#include "cuda/lora_grad/tile.h"

namespace peftkern::cuda {

// Floats from row to row of a column group's part of `down`: rows fall into different banks.
__host__ PEFTKERN_DEVICE constexpr int grad_down_stride(int ranks) {
  return ranks + 8;
}

// The same for a block's results.
constexpr int kGradExchangeRow = kGradColumns + 8;
static_assert(4 * (2 * 16 * kGradExchangeRow + 2 * kGradColumns) <= kGradStages * kGradStageBytes);

static_assert(kGradStages * kGradStageBytes +
                  4 * (2 * grad_words(32, 3) + 4 * kGradRows * grad_down_stride(32)) <=
              kSharedAnywhere);

inline size_t grad_shared_bytes(const GradPlan& plan, int terms) {
  const int words = 2 * grad_words(plan.ranks, terms);
  const int floats = plan.down ? 4 * kGradRows * grad_down_stride(plan.ranks) : 0;
  return static_cast<size_t>(kGradStages * kGradStageBytes + 4 * (words + floats));
}

// `in` as it enters products with bf16 terms: one term of bf16, two of fp16.
template <class T>
constexpr int kInTerms = 2;
template <>
constexpr int kInTerms<bf16> = 1;

// terms[i] packs the terms of a word of `in`.
template <class T>
PEFTKERN_DEVICE void in_terms(uint32_t word, uint32_t (&terms)[kInTerms<T>]) {
  if constexpr (kInTerms<T> == 1) {
    terms[0] = word;
  } else {
    split_f16(word, terms);
  }
}

// product[n] += v^T in, for the 16 rows of a tile and 64 columns, eight to an n. `tile` is the lane's address
// for load_matrices.
template <class T, int Terms>
PEFTKERN_DEVICE void add_grad(float (&product)[8][4], const uint32_t (&v)[Terms][4], uint32_t tile) {
  constexpr int kLoads = 2 / kInTerms<T>;  // under way together: more terms, fewer registers for each
#pragma unroll
  for (int first = 0; first < 4; first += kLoads) {
    uint32_t in[kInTerms<T>][2 * kLoads][2];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint32_t words[4];
      load_matrices<4, true>(words, tile + (first + i) * 32);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t terms[kInTerms<T>];
        in_terms<T>(words[w], terms);
#pragma unroll
        for (int j = 0; j < kInTerms<T>; ++j) in[j][2 * i + w / 2][w % 2] = terms[j];
      }
    }
#pragma unroll
    for (int order = Terms - 1; order >= 0; --order) {
#pragma unroll
      for (int j = 0; j < kInTerms<T> && j <= order; ++j) {
#pragma unroll
        for (int n = 0; n < 2 * kLoads; ++n) {
          mma_16x8x16<bf16>(product[2 * first + n], v[order - j], in[j][n]);
        }
      }
    }
  }
}

// A warp's part of p, scaled: 64 columns (four steps of a product) of 16 ranks (two tiles), zeros outside.
template <class T, class P, int Terms>
PEFTKERN_DEVICE void load_p(uint32_t (&p)[4][2][Terms][2], const LoraGradArgs& args, int64_t column0,
                            int64_t rank0, int lane) {
  const int64_t first = column0 + lane % 4 * 2, rank = rank0 + lane / 4;
  const P* from = static_cast<const P*>(args.p.data) + rank * args.p.row + first * args.p.col;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const bool inside = rank + 8 * n < args.R;
    float values[8][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * i + e;
        values[i][e] = 0;
        if (inside && first + c < args.C) values[i][e] = to_float(from[c * args.p.col]);
      }
    }
    from += 8 * args.p.row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (Terms > 1 && args.column_scale != nullptr) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (first + 8 * i + e < args.C) values[i][e] *= args.column_scale[first + 8 * i + e];
        }
      }
      uint32_t terms[Terms];
      if constexpr (Terms == 1) {
        terms[0] = pack<T>(values[i][0], values[i][1]);
      } else {
        split<Terms>(values[i][0], values[i][1], terms);
      }
#pragma unroll
      for (int j = 0; j < Terms; ++j) p[i / 2][n][j][i % 2] = terms[j];
    }
  }
}

// sums[n] = in p^T, for 16 rows, 64 columns and 16 ranks. Two chains of products each, by step.
template <class T, int Terms>
PEFTKERN_DEVICE void make_down(float (&sums)[2][4], const uint32_t (&p)[4][2][Terms][2], uint32_t tile) {
  float chains[2][2][4] = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[2][4];
    load_matrices<4>(words[0], tile + pair * 64);
    load_matrices<4>(words[1], tile + pair * 64 + 32);
    if constexpr (Terms == 1) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_16x8x16<T>(chains[odd][n], words[odd], p[2 * pair + odd][n][0]);
      }
    } else {
      uint32_t in[kInTerms<T>][2][4];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t both[kInTerms<T>];
          in_terms<T>(words[odd][w], both);
#pragma unroll
          for (int j = 0; j < kInTerms<T>; ++j) in[j][odd][w] = both[j];
        }
      }
#pragma unroll
      for (int order = Terms - 1; order >= 0; --order) {
#pragma unroll
        for (int j = 0; j < kInTerms<T> && j <= order; ++j) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              mma_16x8x16<bf16>(chains[odd][n], in[j][odd], p[2 * pair + odd][n][order - j]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[n][e] = chains[0][n][e] + chains[1][n][e];
  }
}

// Where a thread adds what the column groups have of `down`: one rank of two or four rows of every stage.
class GradDown {
 public:
  PEFTKERN_DEVICE GradDown(const LoraGradArgs& args, const GradPlan& plan, const GradBlock& block)
      : shift_(plan.ranks == 16 ? 4 : 5) {
    const int64_t rank = block.rank0 + r();
    rows_ = rank < args.R ? static_cast<int>(block.row1 - block.row0) : 0;
    if (plan.down_at < 0) {
      to_ = args.down + block.row0 * args.R + rank;
      factor_ = args.down_scale != nullptr && rank < args.R ? args.down_alpha * args.down_scale[rank]
                                                            : args.down_alpha;
    } else {
      to_ = args.partial + plan.down_at + (block.strip * args.M + block.row0) * args.R + rank;
      factor_ = 1;
    }
  }

  PEFTKERN_DEVICE void store(const float* parts, int64_t R) {
    const int stride = grad_down_stride(1 << shift_);
    for (int row = static_cast<int>(threadIdx.x) >> shift_; row < kGradRows; row += kGradThreads >> shift_) {
      float sum = 0;
#pragma unroll
      for (int group = 0; group < 4; ++group) sum += parts[(group * kGradRows + row) * stride + r()];
      if (row < rows_) to_[row * R] = sum * factor_;
    }
    to_ += kGradRows * R;
    rows_ -= kGradRows;
  }

 private:
  PEFTKERN_DEVICE int r() const { return static_cast<int>(threadIdx.x) & ((1 << shift_) - 1); }

  int shift_, rows_;  // rows that are left, of the next stage
  float* to_;
  float factor_;
};

// Terms: of v. DownTerms: of p; 1, p enters as it is, in T; 0, no `down`.
template <class T, int Terms, int DownTerms>
__global__ void __launch_bounds__(kGradThreads, DownTerms == 0 ? 2 : 1)
    lora_grad_kernel(const LoraGradArgs args, const GradPlan plan) {
  unsigned char* ring = shared_memory();
  auto* fragments = reinterpret_cast<uint32_t*>(ring + kGradStages * kGradStageBytes);
  auto* parts = reinterpret_cast<float*>(fragments + 2 * grad_words(plan.ranks, Terms));
  const int t = static_cast<int>(threadIdx.x), lane = lane_index(), warp = t / 32, columns = warp % 4;
  const bool shared_ranks = plan.ranks == 16;
  const int rank_tile = shared_ranks ? 0 : warp / 4, first_tile = shared_ranks ? warp / 4 : 0,
            last_tile = shared_ranks ? first_tile + 1 : kGradRows / 16;

  const GradBlock block = grad_block(args, plan);
  GradTile tile(args, block);
  GradVector<Terms> vector(args, plan, block, fragments);
  GradDown down(args, plan, block);
  const bool dropping = plan.grad && args.dropout.seed != nullptr;
#pragma unroll
  for (int s = 0; s < kGradStages - 1; ++s) {
    if (s < block.stages) tile.load(args, ring, s);
    copy_commit();
  }
  uint32_t p[4][2][DownTerms == 0 ? 1 : DownTerms][2];
  if constexpr (DownTerms > 0) {
    const int64_t column = block.column0 + 64 * columns, rank = block.rank0 + 16 * rank_tile;
    if (DownTerms > 1 && args.p.dtype == DType::f32) {
      load_p<T, float>(p, args, column, rank, lane);
    } else {
      load_p<T, T>(p, args, column, rank, lane);
    }
  }
  if (plan.grad) {
    vector.fetch(0);
    vector.store(0);
    vector.fetch(1);
  }
  const uint64_t seed = dropping ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  if (dropping) {
    copy_wait<kGradStages - 2>();
    tile.drop(args, block, ring, 0, seed);
  }

  // The lane's row of the four matrices that a tile of 16 rows and 16 columns is loaded as.
  const uint32_t corner = shared_address(ring) +
                          static_cast<uint32_t>(lane % 16 * kGradRowBytes + columns * 128 + lane / 16 * 16);
  float product[8][4] = {}, total[8][4] = {};
  float column_sum[2] = {};
#pragma unroll 1
  for (int s = 0; s < block.stages; ++s) {
    const int slot = s % kGradStages * kGradStageBytes;
    if (dropping) {
      copy_wait<kGradStages - 3>();  // the next stage too, as far as this thread has loaded it
    } else {
      copy_wait<kGradStages - 2>();
    }
    sync_threads();  // this stage is there, and everyone has left the one before
    if (s + kGradStages - 1 < block.stages) tile.load(args, ring, s + kGradStages - 1);
    copy_commit();
    if (s + 1 < block.stages) {
      if (dropping) tile.drop(args, block, ring, s + 1, seed);
      if (plan.grad) {
        vector.store(s + 1);
        vector.fetch(s + 2);
      }
    }
    if (plan.colsum && block.rank0 == 0) {
      // A thread takes two columns and 16 of the rows.
      const unsigned char* at = ring + slot + t / 128 * 16 * kGradRowBytes + t % 128 * 4;
      float low = 0, high = 0;
#pragma unroll
      for (int row = 0; row < 16; ++row) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(at + row * kGradRowBytes);
        low += low_half<T>(word);
        high += high_half<T>(word);
      }
      column_sum[0] += low;
      column_sum[1] += high;
    }
#pragma unroll 1
    for (int row_tile = first_tile; row_tile < last_tile; ++row_tile) {
      const uint32_t at = corner + static_cast<uint32_t>(slot + row_tile * 16 * kGradRowBytes);
      if (plan.grad) {
        uint32_t v[Terms][4];
        vector.load(v, s, row_tile, rank_tile, lane);
        add_grad<T>(product, v, at);
      }
      if constexpr (DownTerms > 0) {
        float sums[2][4];
        make_down<T>(sums, p, at);
        const int stride = grad_down_stride(plan.ranks);
        float* to =
            parts + (columns * kGradRows + 16 * row_tile + lane / 4) * stride + 16 * rank_tile + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) to[e / 2 * 8 * stride + 8 * n + e % 2] = sums[n][e];
        }
      }
    }
    if ((s + 1) % kGradFold == 0 || s + 1 == block.stages) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[n][e] += product[n][e];
          product[n][e] = 0;
        }
      }
    }
    if constexpr (DownTerms > 0) {
      sync_threads();
      down.store(parts, args.R);
    }
  }
  grid_launch_dependents();

  // The ring is free once everyone is here: results meet there. Warps that share ranks have a plane each.
  sync_threads();
  auto* exchange = reinterpret_cast<float*>(ring);
  constexpr int kPlane = 16 * kGradExchangeRow;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = lane / 4 + e / 2 * 8, c = 64 * columns + 8 * n + lane % 4 * 2 + e % 2;
      exchange[warp / 4 * kPlane + r * kGradExchangeRow + c] = total[n][e];
    }
  }
  float* column_sums = exchange + 2 * kPlane;
  column_sums[2 * t] = column_sum[0];
  column_sums[2 * t + 1] = column_sum[1];
  sync_threads();
  if (plan.colsum && block.rank0 == 0 && block.column0 + t < args.C) {
    float* to = plan.colsum_at < 0 ? args.colsum : args.partial + plan.colsum_at + block.range * args.C;
    to[block.column0 + t] = column_sums[t] + column_sums[kGradColumns + t];
  }
  if (!plan.grad) return;
#pragma unroll 1
  for (int i = t; i < plan.ranks * kGradColumns; i += kGradThreads) {
    const int row = plan.by_rank ? i % plan.ranks : i / kGradColumns;
    const int column = plan.by_rank ? i / plan.ranks : i % kGradColumns;
    const int64_t r = block.rank0 + row, c = block.column0 + column;
    if (r >= args.R || c >= args.C) continue;
    float sum = exchange[row * kGradExchangeRow + column];
    if (shared_ranks) sum += exchange[kPlane + row * kGradExchangeRow + column];
    if (plan.grad_at < 0) {
      finish_grad(args, r, c, sum);
    } else {
      const int64_t at = plan.by_rank ? c * args.R + r : r * args.C + c;
      args.partial[plan.grad_at + block.range * args.R * args.C + at] = sum;
    }
  }
}

}  // namespace peftkern::cuda
