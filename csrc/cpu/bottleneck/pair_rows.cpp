// A bottleneck's rows by products of bf16, from one stream to the other: pairs.h says what. A thread takes a
// few rows through both products and what lies between and after them, in its own cache. A row's bits depend
// on sizes alone.
#include "cpu/base/pairs.h"
#include "cpu/bottleneck/functions.h"
#include "cpu/bottleneck/pairs.h"
#include "cpu/lora/drop_rows.h"
#include "cpu/operand/dense.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

static_assert(kPairTerms == Pairs::kTerms * kBaseChain && kPairStep == kBaseRow && kPairCols == kTileCols,
              "see pairs.h");
constexpr int64_t kTile = kPairTerms / 2 * kPairCols;

// What a thread works in.
struct Room {
  uint32_t *in, *z, *dt;
  float *v, *panel;
  bf16* dropped;
  Room(float* scratch, int64_t R) {
    const int64_t left = kPairRows * kPairStep, ranks = pair_blocks(R + 1, kPairTerms);
    in = reinterpret_cast<uint32_t*>(scratch), z = in + left, dt = z + ranks * left;
    v = reinterpret_cast<float*>(dt + ranks * left), panel = v + kPairRows * ((R + 15) / 16 * 16);
    dropped = reinterpret_cast<bf16*>(panel + kPairRows * kPairPanel);
  }
};

// Elements from rank r on of row i, packed on the left.
PEFTKERN_INLINE bf16* packed(uint32_t* a, int64_t i, int64_t r) {
  return reinterpret_cast<bf16*>(a + (r / kPairTerms * kPairRows + i) * kBaseRow) + r % kPairTerms;
}

// out (rows, cols) (+)= a b over `terms` terms of one tile of b.
void multiply(int64_t rows, int64_t cols, int64_t terms, const uint32_t* a, const uint32_t* b, float* out,
              int64_t ld, bool first) {
  const int64_t tiles = pair_blocks(rows, Pairs::kTileRows), step = pair_blocks(rows, tiles);
  for (int64_t i = 0; i < rows; i += step)
    compute<Pairs>(static_cast<int>(smaller(step, rows - i)), static_cast<int>(cols),
                   static_cast<int>((terms + 1) / 2), a + i * kBaseRow, b, out + i * ld, ld, first);
}

// The rows of `in` from i0 on, as dropout leaves them.
ConstMatrix dropped(const PairRowsTask& a, int64_t i0, int64_t rows, bf16* room) {
  const auto* from = static_cast<const bf16*>(a.in.data) + i0 * a.in.row;
  if (a.drop.threshold == 0) return {from, DType::bf16, a.in.row, 1};
  const int64_t ld = pair_blocks(a.C, kPairCols) * kPairCols;
  drop_rows(a.drop, i0, 0, rows, a.C, from, a.in.row, room, ld);
  return {room, DType::bf16, ld, 1};
}

void first_product(const PairRowsTask& a, const ConstMatrix& in, int64_t rows, const Room& room, float* v) {
  const int64_t tiles = pair_blocks(a.R, kPairCols);
  const auto* from = static_cast<const bf16*>(in.data);
  for (int64_t k = 0; k < a.C; k += kPairTerms) {
    const int64_t terms = smaller(kPairTerms, a.C - k);
    for (int64_t i = 0; i < rows; ++i)
      pack_row(from + i * in.row + k, 1, terms, nullptr, room.in + i * kBaseRow);
    const uint32_t* b = a.first + k / kPairTerms * tiles * kTile;
    for (int64_t c = 0; c < a.R; c += kPairCols, b += kTile)
      multiply(rows, smaller(kPairCols, a.R - c), terms, room.in, b, v + c, a.R, k == 0);
  }
}

// What lies between the products; t and v begin at these rows.
template <Activation F>
void between(const PairRowsTask& a, int64_t rows, float* t, const float* v, float* dt, const Room& room) {
  const bool slopes = v != nullptr && a.backward;
  for (int64_t i = 0; i < rows; ++i, t += a.R) {
    for (int64_t r = 0; r < a.R; r += W) {
      const int n = static_cast<int>(smaller(W, a.R - r));
      vf x = load_n(t + r, n);
      if (!a.backward) {
        x *= splat(a.alpha_v);
        if (a.bias != nullptr) x += load_n(a.bias + r, n);
        store_n(t + r, x, n);
      }
      const Point f = activate<F>(x);
      store_n(packed(room.z, i, r), f.value, n);
      if (!slopes) continue;
      const vf d = splat(a.alpha_v) * load_n(v + i * a.R + r, n) * f.slope;
      store_n(packed(room.dt, i, r), d, n);
      if (dt != nullptr) store_n(dt + i * a.R + r, d, n);
    }
    // The other half of a last pair.
    *packed(room.dt, i, a.R) = *packed(room.z, i, a.R) = bf16{0};
    if (a.ones) *packed(room.z, i, a.R) = bf16{0x3f80};
  }
}

// Rows i0 ... of an operand packed on the left by rows, as part of one packed by ranks.
void pack_across(uint32_t* a, int64_t ranks, int64_t i0, int64_t rows, uint32_t* to) {
  alignas(64) uint32_t pairs[kPairRows / 2 * kPairCols];
  to += i0 / kPairTerms * ranks * kBaseRow + i0 % kPairTerms / 2;
  for (int64_t r = 0; r < ranks; r += kPairCols) {
    const int64_t cols = smaller(kPairCols, ranks - r);
    pack_tile(packed(a, 0, r), 1, 2 * kBaseRow, static_cast<int>(cols), static_cast<int>(rows), pairs);
    for (int64_t q = 0; q < (rows + 1) / 2; q += W)
      for (int64_t half = 0; half < cols; half += W) {
        vf x[W];
        for (int64_t k = 0; k < W; ++k)
          x[k] = load(reinterpret_cast<const float*>(pairs + (q + k) * kPairCols + half));
        transpose(x);
        for (int64_t k = 0; k < smaller(W, cols - half); ++k)
          store(reinterpret_cast<float*>(to + (r + half + k) * kBaseRow + q), x[k]);
      }
  }
}

// n columns of a row of the result.
void add_to_stream(const PairRowsTask& a, const uint8_t* bits, const float* delta, int64_t c0, int64_t n,
                   const bf16* to, bf16* out) {
  const auto part = [](const auto* p, int64_t c, int count) {
    return p != nullptr ? load_n(p + c, count) : zero();
  };
  for (int64_t c = 0; c < n; c += W) {
    const int count = static_cast<int>(smaller(W, n - c));
    vf x = splat(a.alpha) * load(delta + c);
    if (a.scale != nullptr) x *= part(a.scale, c0 + c, count);
    if (a.out_bias != nullptr) x += part(a.out_bias, c0 + c, count);
    if (bits != nullptr) x = select(bits, c, x);
    store_n(out + c, x + part(to, c, count), count);
  }
}

void second_product(const PairRowsTask& a, uint32_t* v, int64_t i0, int64_t rows, const Room& room) {
  const int64_t tiles = pair_blocks(a.D, kPairCols);
  uint8_t bits[keep_bits_room(kPairPanel)];
  for (int64_t c0 = 0; c0 < a.D; c0 += kPairPanel) {
    const int64_t cols = smaller(kPairPanel, a.D - c0);
    for (int64_t c = 0; c < cols; c += kPairCols)
      for (int64_t r = 0; r < a.R; r += kPairTerms) {
        const uint32_t* b = a.second + (r / kPairTerms * tiles + (c0 + c) / kPairCols) * kTile;
        multiply(rows, kPairCols, smaller(kPairTerms, a.R - r), v + r / kPairTerms * kPairRows * kBaseRow, b,
                 room.panel + c, kPairPanel, r == 0);
      }
    for (int64_t i = 0; i < rows; ++i) {
      const bool drops = a.out_drop.threshold != 0;
      if (drops) keep_bits(a.out_drop, i0 + i, c0, cols, bits);
      const auto* to = static_cast<const bf16*>(a.to.data);
      add_to_stream(a, drops ? bits : nullptr, room.panel + i * kPairPanel, c0, cols,
                    to != nullptr ? to + (i0 + i) * a.to.row + c0 : nullptr,
                    static_cast<bf16*>(a.out.data) + (i0 + i) * a.out.row + c0);
    }
  }
}

template <Activation F>
void run_rows(const PairRowsTask& a) {
  parallel(a.threads, [&] {
    const Room room(a.scratch + thread_number() * pair_rows_scratch(a.C, a.R, a.drop.threshold != 0), a.R);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.M; i += kPairRows) {
      const int64_t rows = smaller(kPairRows, a.M - i);
      float *t = a.t + i * a.R, *v = a.first == nullptr ? nullptr : a.backward ? room.v : t;
      if (v != nullptr) first_product(a, dropped(a, i, rows, room.dropped), rows, room, v);
      between<F>(a, rows, t, v, a.dt != nullptr ? a.dt + i * a.R : nullptr, room);
      if (a.across_z != nullptr) pack_across(room.z, a.R + a.ones, i, rows, a.across_z);
      if (a.across_dt != nullptr) pack_across(room.dt, a.R, i, rows, a.across_dt);
      if (a.second != nullptr) second_product(a, a.backward ? room.dt : room.z, i, rows, room);
    }
  });
}

}  // namespace

void pair_pack(const PairPackTask& a) {
  const int64_t tiles = pair_blocks(a.D, kPairCols), blocks = pair_blocks(a.C, kPairTerms);
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < blocks * tiles; ++k) {
      const int64_t term = k / tiles * kPairTerms, c = k % tiles * kPairCols;
      const auto* from = static_cast<const bf16*>(a.b.data) + term * a.b.row + c * a.b.col;
      pack_tile(from, a.b.col, a.b.row, static_cast<int>(smaller(kPairCols, a.D - c)),
                static_cast<int>(smaller(kPairTerms, a.C - term)), a.out + k * kTile);
    }
  });
}

void pair_rows(const PairRowsTask& a) {
  with_activation(a.activation, [&](auto f) { run_rows<decltype(f)::value>(a); });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
