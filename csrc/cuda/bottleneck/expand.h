// v B^T for 64 rows and 64 columns of a warp, and what becomes of it: output columns of a bottleneck.
//
// v lies in shared memory as two bf16 terms (split.h), [16 rows][16 ranks][term][lane][4 words], in the order
// in which the lanes of a product hold it where lane t of a quad has ranks 4t to 4t + 3; B comes into
// registers in the same order (pieces.h), once for all 64 rows. Lane g of a product has 8 adjacent columns:
// from 8 (g / 2) on if g is even, and 32 further if it is odd, so that the quad writes whole sectors.
#pragma once

#include "cuda/common/philox.h"
#include "cuda/common/pieces.h"
#include "cuda/common/vector.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/warp.h"
#include "peftkern/cuda.h"

namespace peftkern::cuda {

constexpr int kOutRows = 64, kOutColumns = 64;  // of a warp
constexpr int kOutTiles = kOutRows / 16;
constexpr int kTermWords = 32 * 4;          // of 16 rows, 16 ranks and one term
constexpr int kStepWords = 2 * kTermWords;  // of both terms

// Ranks r and r + 1, r even, of a row, of v in so many steps of 16 ranks.
PEFTKERN_DEVICE void store_ranks(uint32_t* v, int steps, int row, int r, float low, float high) {
  uint32_t terms[2];
  split<2>(low, high, terms);
  const int pair = r % 16 / 2;
  uint32_t* to = v + (row / 16 * steps + r / 16) * kStepWords + (row % 8 * 4 + pair / 2) * 4 + pair % 2 * 2 +
                 row % 16 / 8;
  to[0] = terms[0];
  to[kTermWords] = terms[1];
}

// A lane's part of the products.
template <class T, class Adapter>
class OutTile {
 public:
  // For columns `first` on of the output.
  PEFTKERN_DEVICE OutTile(const BottleneckOutArgs& args, int64_t first)
      : args_(args), first_(static_cast<int>(first)), g_(lane_index() / 4), t_(lane_index() % 4) {}

  // += the terms of v for ranks rank0 on, times those of B.
  PEFTKERN_DEVICE void add(const uint32_t* v, int steps, int64_t rank0) {
    const int n = first_ + g_ / 2 * 8 + g_ % 2 * 32, columns = static_cast<int>(args_.N) - n;
    int ranks = static_cast<int>(args_.R - rank0) - 4 * t_;
    const auto* b =
        static_cast<const Adapter*>(args_.b.data) + n * args_.b.row + (rank0 + 4 * t_) * args_.b.col;
    Square<Adapter> next = load_square(b, args_.b.row, args_.b.col, columns, ranks);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Square<Adapter> square = next;
      b += 16 * args_.b.col;
      ranks -= 16;
      if (step + 1 < steps) next = load_square(b, args_.b.row, args_.b.col, columns, ranks);
      uint32_t of_v[kOutTiles][2][4];
#pragma unroll
      for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
        for (int term = 0; term < 2; ++term) {
          const uint32_t* from = v + (i * steps + step) * kStepWords + term * kTermWords + 4 * lane_index();
          const Vec16 four = *reinterpret_cast<const Vec16*>(from);
#pragma unroll
          for (int w = 0; w < 4; ++w) of_v[i][term][w] = four.word[w];
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t of_b[kTerms][2];
        square.template column<kTerms>(j, of_b);
#pragma unroll
        for (int i = 0; i < kOutTiles; ++i) {
          if constexpr (kTerms == 2) mma_16x8x16<bf16>(sums_[i][j], of_v[i][0], of_b[1]);
          mma_16x8x16<bf16>(sums_[i][j], of_v[i][1], of_b[0]);
          mma_16x8x16<bf16>(sums_[i][j], of_v[i][0], of_b[0]);
        }
      }
    }
  }

  // Rows row0 on of the output, of the sums.
  PEFTKERN_DEVICE void store(int64_t row0) const {
    const uint64_t seed = args_.dropout.seed != nullptr ? static_cast<uint64_t>(*args_.dropout.seed) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = first_ + 8 * t_ + 32 * half, left = static_cast<int>(args_.N) - n;
      // All on their way at once.
      Eight<T> residual[2 * kOutTiles] = {};
#pragma unroll
      for (int i = 0; i < 2 * kOutTiles; ++i) {
        const int64_t m = row0 + 8 * i + g_;
        if (args_.residual.data == nullptr || m >= args_.M) continue;
        const T* from = static_cast<const T*>(args_.residual.data) + m * args_.residual.row + n;
        residual[i] = at_once(from, left) ? load_eight<true>(from, left) : load_eight<false>(from, left);
      }
      float factor[8], bias[8];
      load_vector(factor, args_.column_scale, n, left, 1.0f);
      if (args_.bias.dtype == DType::f32) {
        load_vector(bias, static_cast<const float*>(args_.bias.data), n, left, 0.0f);
      } else {
        load_vector(bias, static_cast<const T*>(args_.bias.data), n, left, 0.0f);
      }
#pragma unroll
      for (int i = 0; i < 2 * kOutTiles; ++i) {
        const int64_t m = row0 + 8 * i + g_;
        if (m >= args_.M || left <= 0) continue;
        const float gate = args_.gate != nullptr ? args_.gate[m] : 1.0f;
        const float scaling = gate * args_.scaling * args_.dropout.keep_scale;
        const uint32_t kept =
            args_.dropout.seed != nullptr ? keep_bits(seed, m, n / 8, args_.dropout.threshold) : 0xffu;
        float sum[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float branch = (sums_[i / 2][j][i % 2 * 2 + half] + bias[j]) * factor[j] * scaling;
          sum[j] = value_of(residual[i], j) + ((kept >> j & 1) != 0 ? branch : 0.0f);
        }
        store_row(static_cast<T*>(args_.out.data) + m * args_.out.row + n, left, sum);
      }
    }
  }

 private:
  static constexpr int kTerms = Kind<T, Adapter>::kTermsB;

  PEFTKERN_DEVICE static bool at_once(const T* p, int left) {
    return left >= 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }

  PEFTKERN_DEVICE static void store_row(T* to, int left, const float (&sum)[8]) {
    if (at_once(to, left)) {
      Vec16 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[i] = pack<T>(sum[2 * i], sum[2 * i + 1]);
      *reinterpret_cast<Vec16*>(to) = words;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < left) to[e] = from_float<T>(sum[e]);
      }
    }
  }

  const BottleneckOutArgs& args_;
  const int first_, g_, t_;
  float sums_[kOutTiles][8][4] = {};
};

}  // namespace peftkern::cuda
