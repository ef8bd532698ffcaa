// Blocks of an activation as fp32 tiles in cache: converted once, dropout applied once, used by every rank.
#pragma once

#include "cpu/common/micro.h"
#include "cpu/common/philox.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

constexpr int64_t kTileRows = 24;
constexpr int64_t kTileCols = 256;
// One cache line more than a power of two, or the rows of a tile would share a few cache sets.
constexpr int64_t kTileLd = kTileCols + 16;

PEFTKERN_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
PEFTKERN_INLINE constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Row i of a task that works on the rows `list` names, or on all (null).
PEFTKERN_INLINE int64_t listed(const int32_t* list, int64_t i) {
  return list != nullptr ? list[i] : i;
}

struct alignas(64) Tile {
  // dot reads whole row blocks: rows past the last are never used, but must be readable.
  float data[(kTileRows + kDotRows) * kTileLd];
};

// x where kept, else exactly 0, for the W columns from c; bits may be null.
PEFTKERN_INLINE vf select_if(const uint8_t* bits, int64_t c, vf x) {
  return bits != nullptr ? select(bits, c, x) : x;
}

// Asks for n bytes that will be read soon. Tiles read rows in short pieces, which defeats the hardware's
// guesses; an address that is never read, or not there at all, does no harm.
PEFTKERN_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 0, 2);
}

// Asks for a block of `in`. A few rows at a time, between computations: the CPU tracks a few dozen requests.
PEFTKERN_INLINE void prefetch(const ConstMatrix& in, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
                              const int32_t* list = nullptr) {
  if (in.col != 1) return;
  const int64_t size = in.dtype == DType::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(in.data) + c0 * size;
  for (int64_t i = i0; i < i0 + rows; ++i) prefetch(p + listed(list, i) * in.row * size, cols * size);
}

// A block of a matrix with adjacent columns that is asked for piece by piece while something else is
// computed: the CPU tracks a few dozen requests at a time, and more would wait. Asked for
// as what is read once: a tile takes it from there, and the rows of one often share sets of a cache.
class Ahead {
 public:
  // All of it with `calls` calls of ask.
  Ahead(const ConstMatrix& in, int64_t i0, int64_t rows, int64_t c0, int64_t cols, int64_t calls) {
    const int64_t size = in.dtype == DType::f32 ? 4 : 2, row = in.row * size;
    bytes_ = cols * size;
    at_ = static_cast<const char*>(in.data) + i0 * row + c0 * size;
    const int64_t pieces = (bytes_ + kPiece - 1) / kPiece;
    down_ = row - (pieces - 1) * kPiece;
    left_ = in.col == 1 ? rows * pieces : 0;
    share_ = (left_ + calls - 1) / calls;
  }
  __attribute__((always_inline)) void ask() {
    if (left_ <= 0) return;
    left_ -= share_;
    for (int64_t k = 0; k < share_; ++k) {
#pragma GCC unroll 4
      for (int64_t b = 0; b < kPiece; b += 64) __builtin_prefetch(at_ + b, 0, 0);
      done_ += kPiece;
      const bool down = done_ >= bytes_;
      at_ += down ? down_ : kPiece;
      done_ = down ? 0 : done_;
    }
  }

 private:
  static constexpr int64_t kPiece = 256;
  const char* at_;
  int64_t bytes_, down_, left_, share_, done_ = 0;
};

template <class T>
static void widen_row(const T* in, int64_t n, const uint8_t* bits, float* out) {
  int64_t c = 0;
  for (; c + W <= n; c += W) store(out + c, select_if(bits, c, load(in + c)));
  if (c < n) store(out + c, select_if(bits, c, load_n(in + c, static_cast<int>(n - c))));
  for (c = round_up(n, W); c < round_up(n, kPad); c += W) store(out + c, zero());
}

template <class T, class Between>
static void widen_tile(const ConstMatrix& in, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
                       const Dropout& drop, float* tile, const int32_t* list, const Between& between) {
  uint8_t bits[keep_bits_room(kTileCols)];
  T gathered[kTileCols];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t from = listed(list, i0 + i);
    between();
    if (drop.threshold != 0) keep_bits(drop, from, c0, cols, bits);
    const T* row = static_cast<const T*>(in.data) + from * in.row + c0 * in.col;
    if (in.col != 1) {
      for (int64_t c = 0; c < cols; ++c) gathered[c] = row[c * in.col];
      row = gathered;
    }
    widen_row(row, cols, drop.threshold != 0 ? bits : nullptr, tile + i * kTileLd);
  }
}

// tile[i, c] = f(in[i0 + i, c0 + c]), dropped elements and the padding up to a multiple of kPad columns
// exactly 0. With a list, row list[i0 + i] takes the place of row i0 + i. `between` is called for every row.
template <class Between = Nothing>
static void widen_tile(const ConstMatrix& in, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
                       const Dropout& drop, float* tile, const int32_t* list = nullptr,
                       const Between& between = Nothing()) {
  switch (in.dtype) {
    case DType::f32:
      return widen_tile<float>(in, i0, rows, c0, cols, drop, tile, list, between);
    case DType::bf16:
      return widen_tile<bf16>(in, i0, rows, c0, cols, drop, tile, list, between);
    case DType::f16:
      return widen_tile<f16>(in, i0, rows, c0, cols, drop, tile, list, between);
  }
}

// sums[c] += the sum over a tile's rows.
static void add_columns(const float* tile, int64_t rows, int64_t n, float* sums) {
  for (int64_t c = 0; c < n; c += W) {
    vf acc = zero();
    for (int64_t i = 0; i < rows; ++i) acc += load(tile + i * kTileLd + c);
    store(sums + c, load(sums + c) + acc);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
