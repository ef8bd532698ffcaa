// The loader of a dense W for lora_linear_sm80: kStageDepth of k by Columns of the output at a time, from
// global memory into a stage, and from there into the fragments of mma. W lies by column (rows of memory are
// columns of the output) or by row (they are those of k); the product above does not know which.
#pragma once

#include "cuda/common/stage.h"
#include "cuda/instructions/mma.h"

namespace peftkern::cuda {

// Of W by row: rows of Columns elements.
template <int Columns>
PEFTKERN_DEVICE uint32_t place_by_row(int k, int piece) {
  return static_cast<uint32_t>(k * Columns * 2 + ((piece ^ (k & 7)) << 4));
}

// Columns elements of each of kStageDepth rows.
template <int Columns, int Threads>
PEFTKERN_DEVICE void copy_by_row(uint32_t to, const void* from, int64_t stride, int rows, int elements) {
  constexpr int kPieces = Columns / 8, kPass = Threads / kPieces;
  static_assert(kPass % 8 == 0 && kStageDepth % kPass == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int valid = piece_bytes<2>(elements - 8 * piece);
  const auto* source = static_cast<const unsigned char*>(from) + row * stride * 2 + 16 * piece;
  const uint32_t target = to + place_by_row<Columns>(row, piece);
#pragma unroll
  for (int i = 0; i < kStageDepth / kPass; ++i) {
    const bool there = row + i * kPass < rows && valid > 0;
    copy_async<16>(target + i * kPass * Columns * 2, there ? source : from, there ? valid : 0);
    source += kPass * stride * 2;
  }
}

// What copy_by_row does.
template <class T, int Columns, int Threads>
PEFTKERN_DEVICE void gather_by_row(unsigned char* to, const T* from, int64_t stride, int rows, int elements) {
  constexpr int kPieces = Columns / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kStageDepth * kPieces; i += Threads) {
    const int row = i / kPieces, piece = i % kPieces;
    gather_piece(to + place_by_row<Columns>(row, piece), from + row * stride + 8 * piece,
                 row < rows ? elements - 8 * piece : 0);
  }
}

template <class T, int Columns, int Threads, bool ByRow>
struct DenseTiles {
  // The first element of the tile of k = 0, and the way to the next.
  static PEFTKERN_DEVICE const T* first(const ConstMatrix& w, int column) {
    return static_cast<const T*>(w.data) + column * (ByRow ? 1 : w.row);
  }
  static PEFTKERN_DEVICE int64_t step(const ConstMatrix& w) {
    return ByRow ? kStageDepth * w.row : kStageDepth;
  }

  // Starts to copy the tile at `from`, of which `depth` of k and `columns` exist; all addresses are aligned.
  static PEFTKERN_DEVICE void copy(uint32_t to, const T* from, int64_t stride, int depth, int columns) {
    if constexpr (ByRow) {
      copy_by_row<Columns, Threads>(to, from, stride, depth, columns);
    } else {
      copy_rows<2, Columns, Threads>(to, from, stride, columns, depth);
    }
  }
  // The same for any addresses; the tile is there when the caller goes on.
  static PEFTKERN_DEVICE void gather(unsigned char* to, const T* from, int64_t stride, int depth,
                                     int columns) {
    if constexpr (ByRow) {
      gather_by_row<T, Columns, Threads>(to, from, stride, depth, columns);
    } else {
      gather_rows<T, Columns, Threads>(to, from, stride, columns, depth);
    }
  }

  // Where a lane's row for ldmatrix begins in a tile, for a warp whose first column is `column`.
  static PEFTKERN_DEVICE uint32_t lane_at(int column, int lane) {
    if constexpr (ByRow) {
      return place_by_row<Columns>(lane % 16, column / 8 + lane / 16);
    } else {
      return place(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
  }
  // Fragments of 16 of k, the stage's `half`, and of columns 8 j to 8 j + 15 of the warp.
  static PEFTKERN_DEVICE void fragments(uint32_t (&words)[4], uint32_t tile, uint32_t lane_at, int half,
                                        int j) {
    if constexpr (ByRow) {
      load_matrices<4, true>(words, tile + half * 16 * Columns * 2 + (lane_at ^ (j * 16)));
    } else {
      load_matrices<4>(words, tile + j * 8 * 64 + (lane_at ^ (half * 32)));
    }
  }
};

}  // namespace peftkern::cuda
