// Blocks of columns, each times a small matrix of its own, in one pass over an activation:
//
//   y[m, at(g b + j)] = sum_i x[m, at(g b + i)] * r[g, i, j]
//   dr[g, i, j]       = sum_m x[m, at(g b + i)] * dy[m, at(g b + j)]
//
// A tile of rows and whole blocks is brought into cache as fp32, multiplied by the micro kernels of the
// low-rank branch, and rounded once. The bits of a row depend on that row alone; row sums run in segments
// that depend on sizes alone, and are added in order.
#include "cpu/common/copy.h"
#include "cpu/common/thread.h"
#include "cpu/rotate/task.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

static_assert(kMaxBlock <= kTileCols && kTileCols + kPad <= kTileLd && kTileRows % kCombineRows == 0);

// Columns of a tile: whole blocks.
int64_t tile_cols(int64_t size) {
  return kTileCols / size * size;
}

template <class T>
void gather(const ConstMatrix& in, const int64_t* index, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
            float* tile) {
  for (int64_t m = 0; m < rows; ++m) {
    const T* row = static_cast<const T*>(in.data) + (i0 + m) * in.row;
    for (int64_t c = 0; c < cols; ++c) tile[m * kTileLd + c] = widen_scalar(row[index[c0 + c] * in.col]);
  }
}

// tile[m, c] = in[i0 + m, at(c0 + c)] in fp32.
template <class T>
void bring(const ConstMatrix& in, const int64_t* index, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
           float* tile) {
  if (index != nullptr) {
    gather<T>(in, index, i0, rows, c0, cols, tile);
  } else {
    widen_tile<T>(in, i0, rows, c0, cols, Dropout{}, tile, nullptr, Nothing());
  }
}

// out[i0 + m, at(c0 + c)] = tile[m, c], rounded.
template <class T>
void send(const float* tile, const int64_t* index, int64_t i0, int64_t rows, int64_t c0, int64_t cols,
          const Matrix& out) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = tile + m * kTileLd;
    T* row = static_cast<T*>(out.data) + (i0 + m) * out.row;
    if (index != nullptr) {
      for (int64_t c = 0; c < cols; ++c) put(row + index[c0 + c], from[c]);
      continue;
    }
    int64_t c = 0;
    for (; c + W <= cols; c += W) store(row + c0 + c, load(from + c));
    if (c < cols) store_n(row + c0 + c, load(from + c), static_cast<int>(cols - c));
  }
}

// Rows of one block, where x and y lie as the micro kernel reads and writes them.
void rotate_in_place(const float* x, int64_t ldx, int64_t rows, const float* r, int64_t ld, int64_t size,
                     float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kCombineRows <= rows; m += kCombineRows)
    combine_rows<kCombineRows>(x + m * ldx, ldx, size, r, ld, size, y + m * ldy, ldy);
  for (; m < rows; ++m) combine_rows<1>(x + m * ldx, ldx, size, r, ld, size, y + m * ldy, ldy);
}

template <class T>
void rotate(const BlockRotateTask& a, int64_t i0, int64_t rows, int64_t c0, int64_t cols) {
  const int64_t b = a.size, n = round_up(b, kPad);
  const float* r = a.panels + c0 / b * a.panel_block;
  if (a.x.dtype == DType::f32 && a.x.col == 1 && a.index == nullptr && n == b) {
    const float* x = static_cast<const float*>(a.x.data) + i0 * a.x.row + c0;
    float* y = static_cast<float*>(a.y.data) + i0 * a.y.row + c0;
    for (int64_t c = 0; c < cols; c += b, r += a.panel_block)
      rotate_in_place(x + c, a.x.row, rows, r, a.ld, b, y + c, a.y.row);
    return;
  }
  Tile in, out;
  bring<T>(a.x, a.index, i0, rows, c0, cols, in.data);
  // In order: the padding of one block is where the next will be.
  for (int64_t c = 0; c < cols; c += b, r += a.panel_block) {
    for (int64_t m = 0; m < rows; m += kCombineRows)
      combine(in.data + m * kTileLd + c, kTileLd, min64(kCombineRows, rows - m), b, r, a.ld, n,
              out.data + m * kTileLd + c, kTileLd);
  }
  send<T>(out.data, a.index, i0, rows, c0, cols, a.y);
}

// Rows [i0, i1) of the blocks from column c0 on, into their place of this segment's sums.
template <class T>
void add_products(const BlockRotateGradTask& a, int64_t i0, int64_t i1, int64_t c0, int64_t cols,
                  float* sums) {
  const int64_t b = a.size;
  std::memset(sums, 0, sizeof(float) * cols * a.ld);
  Tile x, dy;
  for (int64_t i = i0; i < i1; i += kTileRows) {
    const int64_t rows = min64(kTileRows, i1 - i);
    bring<T>(a.x, a.index, i, rows, c0, cols, x.data);
    bring<T>(a.dy, a.index, i, rows, c0, cols, dy.data);
    // What a block's last vector takes of the next goes into the padding.
    for (int64_t c = 0; c < cols; c += b)
      outer(dy.data + c, kTileLd, rows, x.data + c, kTileLd, b, a.ld, sums + c * a.ld, a.ld);
  }
}

// Row i of all blocks' gradients, b floats: the sums of all segments, in order.
void add_segments(const BlockRotateGradTask& a, int64_t i) {
  const int64_t b = a.size, stride = a.blocks * b * a.ld;
  for (int64_t c = 0; c < b; c += W) {
    const float* sums = a.scratch + i * a.ld + c;
    vf acc = load(sums);
    for (int64_t s = 1; s < a.segments; ++s) acc += load(sums + s * stride);
    store_n(a.out + i * b + c, acc, static_cast<int>(min64(W, b - c)));
  }
}

template <class T>
void rotate_all(const BlockRotateTask& a) {
  const int64_t K = a.blocks * a.size, step = tile_cols(a.size), panels = (K + step - 1) / step;
  // Smaller blocks keep every thread busy when rows are few.
  const int64_t block = min64(kTileRows, round_up((a.M + a.threads - 1) / a.threads, kCombineRows));
  const int64_t tiles = block > 0 ? (a.M + block - 1) / block : 0;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles * panels; ++t) {
      const int64_t i = t / panels * block, c = t % panels * step;
      rotate<T>(a, i, min64(block, a.M - i), c, min64(step, K - c));
    }
  });
}

template <class T>
void grad_all(const BlockRotateGradTask& a) {
  const int64_t K = a.blocks * a.size, step = tile_cols(a.size), panels = (K + step - 1) / step;
  const int64_t rows = (a.M + a.segments - 1) / a.segments;
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.segments * panels; ++t) {
      const int64_t s = t / panels, c = t % panels * step;
      add_products<T>(a, min64(a.M, s * rows), min64(a.M, (s + 1) * rows), c, min64(step, K - c),
                      a.scratch + (s * K + c) * a.ld);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < K; ++i) add_segments(a, i);
  });
}

}  // namespace

void block_rotate_run(const BlockRotateTask& a) {
  switch (a.x.dtype) {
    case DType::f32:
      return rotate_all<float>(a);
    case DType::bf16:
      return rotate_all<bf16>(a);
    case DType::f16:
      return rotate_all<f16>(a);
  }
}

void block_rotate_grad_run(const BlockRotateGradTask& a) {
  switch (a.x.dtype) {
    case DType::f32:
      return grad_all<float>(a);
    case DType::bf16:
      return grad_all<bf16>(a);
    case DType::f16:
      return grad_all<f16>(a);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
