// A stage of lora_linear_sm80 in shared memory: how copies lay it out, and what becomes of its ranks.
//
// Rows of 64 bytes, four pieces of 16 each: 32 elements of k, or 16 ranks in fp32. Pieces are placed by an
// exclusive or with their row, so that what ldmatrix reads at once lies in different banks.
#pragma once

#include "cuda/common/split.h"
#include "cuda/instructions/copy_async.h"
#include "peftkern/types.h"

namespace peftkern::cuda {

constexpr int kStageDepth = 32;  // elements of k in a stage
constexpr int kStageRanks = 16;  // ranks in a stage

PEFTKERN_DEVICE uint32_t place(int row, int piece) {
  return static_cast<uint32_t>(row * 64 + ((piece ^ (row >> 1 & 3)) << 4));
}
// Of a piece with `elements` elements of Size bytes left in its row, those bytes that exist.
template <int Size>
PEFTKERN_DEVICE int piece_bytes(int elements) {
  constexpr int kFull = 16 / Size;
  return elements < 0 ? 0 : elements < kFull ? elements * Size : 16;
}

// 64 bytes of each of Rows rows, of which `rows` rows and `elements` elements (of Size bytes) exist; the rest
// becomes zero.
template <int Size, int Rows, int Threads>
PEFTKERN_DEVICE void copy_rows(uint32_t to, const void* from, int64_t stride, int rows, int elements) {
  constexpr int kPass = Threads / 4;
  const int row = static_cast<int>(threadIdx.x) / 4, piece = static_cast<int>(threadIdx.x) % 4;
  const int valid = piece_bytes<Size>(elements - 16 / Size * piece);
  const auto* source = static_cast<const unsigned char*>(from) + row * stride * Size + 16 * piece;
  const uint32_t target = to + place(row, piece);
#pragma unroll
  for (int i = 0; i < Rows / kPass; ++i) {
    const bool there = row + i * kPass < rows && valid > 0;
    copy_async<16>(target + i * kPass * 64, there ? source : from, there ? valid : 0);
    source += kPass * stride * Size;
  }
}

// A piece of which `left` elements exist, by single elements: for addresses that are not aligned.
template <class T>
PEFTKERN_DEVICE void gather_piece(unsigned char* to, const T* from, int left) {
  Vec16 v{};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < left) v.word[e / 2] |= static_cast<uint32_t>(from[e].bits) << 16 * (e % 2);
  }
  *reinterpret_cast<Vec16*>(to) = v;
}

// What copy_rows does.
template <class T, int Rows, int Threads>
PEFTKERN_DEVICE void gather_rows(unsigned char* to, const T* from, int64_t stride, int rows, int elements) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Rows * 4; i += Threads) {
    const int row = i / 4, piece = i % 4;
    gather_piece(to + place(row, piece), from + row * stride + 8 * piece,
                 row < rows ? elements - 8 * piece : 0);
  }
}
// Elements of m from (row0, rank0) on, as fp32, in rows of 16 ranks as copy_rows lays them out; `rows` and
// `ranks` of them exist. Neighbouring threads take what is adjacent in memory.
template <class T, int Rows, int Threads>
PEFTKERN_DEVICE void gather_ranks(unsigned char* to, const ConstMatrix& m, int64_t row0, int64_t rank0,
                                  int rows, int ranks) {
  const bool wide = m.dtype == DType::f32;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < Rows * kStageRanks; i += Threads) {
    const int row = m.row == 1 ? i % Rows : i / kStageRanks, r = m.row == 1 ? i / Rows : i % kStageRanks;
    const bool there = row < rows && r < ranks;
    const int64_t at = there ? (row0 + row) * m.row + (rank0 + r) * m.col : 0;
    auto* target = reinterpret_cast<float*>(to + place(row, r / 4)) + r % 4;
    if (wide) {
      copy_async<4>(shared_address(target), static_cast<const float*>(m.data) + at, there ? 4 : 0);
    } else {
      *target = there ? to_float(static_cast<const T*>(m.data)[at]) : 0.0f;
    }
  }
}

// Replaces 8 ranks of a row, as fp32 in two pieces, by their terms: the first ones in the even piece.
template <class Scale>
PEFTKERN_DEVICE void split_in_place(unsigned char* stage, int row, int half, const Scale& scale) {
  auto* even = reinterpret_cast<Vec16*>(stage + place(row, 2 * half));
  auto* odd = reinterpret_cast<Vec16*>(stage + place(row, 2 * half + 1));
  union {
    Vec16 pieces[2];
    float values[8];
  };
  pieces[0] = *even;
  pieces[1] = *odd;
  Vec16 out[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t terms[2];
    split<2>(values[2 * i] * scale(2 * i), values[2 * i + 1] * scale(2 * i + 1), terms);
    out[0].word[i] = terms[0];
    out[1].word[i] = terms[1];
  }
  *even = out[0];
  *odd = out[1];
}

}  // namespace peftkern::cuda
