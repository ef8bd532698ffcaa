// A block of the low-rank update, one thread's work:
//
//   out[i, c] = round( base_scale[c] * src[i, c] + drop'(alpha * sum_r v[i, r] * p[r, c]) * delta_scale[c]
//                      + bias[c] )
//
// Every element is computed on its own, so blocks never change bits.
#pragma once

#include "cpu/common/tile.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// The vectors of a block's columns; null: 1, and no bias.
struct BlockVectors {
  const float *base, *delta, *bias;
};
PEFTKERN_INLINE BlockVectors from(const BlockVectors& v, int64_t c) {
  const auto at = [c](const float* p) { return p != nullptr ? p + c : nullptr; };
  return {at(v.base), at(v.delta), at(v.bias)};
}

// One row of n columns, a multiple of W, without scales: what most layers are. Nothing is asked per vector.
template <bool DROP, bool BIAS, class TO, class TS>
static void finish_plain(const float* delta, float alpha, const uint8_t* bits, const TS* src,
                         const float* bias, int64_t n, TO* out) {
  for (int64_t c = 0; c < n; c += W) {
    const vf x = load(delta + c), y = fma(splat(alpha), DROP ? select(bits, c, x) : x, load(src + c));
    store(out + c, BIAS ? y + load(bias + c) : y);
  }
}

// One row of n columns: delta (padded, scratch), everything else as in the equation.
template <class TO, class TS>
static void finish_row(const float* delta, float alpha, const uint8_t* bits, const TS* src,
                       const BlockVectors& v, int64_t n, TO* out) {
  const auto element = [&](int64_t c, vf s, vf base_scale, vf delta_scale, vf b) {
    const vf base = v.base != nullptr ? s * base_scale : s;
    const vf factor = v.delta != nullptr ? splat(alpha) * delta_scale : splat(alpha);
    const vf y = fma(factor, select_if(bits, c, load(delta + c)), base);
    return v.bias != nullptr ? y + b : y;
  };
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    const auto at = [c](const auto* p) { return p != nullptr ? load(p + c) : zero(); };
    store(out + c, element(c, at(src), at(v.base), at(v.delta), at(v.bias)));
  }
  if (c < n) {
    const int k = static_cast<int>(n - c);
    const auto at = [c, k](const auto* p) { return p != nullptr ? load_n(p + c, k) : zero(); };
    store_n(out + c, element(c, at(src), at(v.base), at(v.delta), at(v.bias)), k);
  }
}

template <class TO, class TS>
static void finish(const float* delta, float alpha, const uint8_t* bits, const TS* src, const BlockVectors& v,
                   int64_t n, TO* out) {
  if (src == nullptr || v.base != nullptr || v.delta != nullptr || n % W != 0)
    return finish_row<TO, TS>(delta, alpha, bits, src, v, n, out);
  const auto run = [&](auto plain) { plain(delta, alpha, bits, src, v.bias, n, out); };
  if (bits != nullptr) {
    v.bias != nullptr ? run(finish_plain<true, true, TO, TS>) : run(finish_plain<true, false, TO, TS>);
  } else {
    v.bias != nullptr ? run(finish_plain<false, true, TO, TS>) : run(finish_plain<false, false, TO, TS>);
  }
}

// Without a branch there is no delta to add: not even a zero, which would turn -0 into 0.
template <class TO, class TS>
static void finish_row_base(const TS* src, const BlockVectors& v, int64_t n, TO* out) {
  const auto element = [&](vf y, vf base_scale, vf b) {
    if (v.base != nullptr) y *= base_scale;
    return v.bias != nullptr ? y + b : y;
  };
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    const auto at = [c](const auto* p) { return p != nullptr ? load(p + c) : zero(); };
    store(out + c, element(at(src), at(v.base), at(v.bias)));
  }
  if (c < n) {
    const int k = static_cast<int>(n - c);
    const auto at = [c, k](const auto* p) { return p != nullptr ? load_n(p + c, k) : zero(); };
    store_n(out + c, element(at(src), at(v.base), at(v.bias)), k);
  }
}

// p: a.p, or the same in half precision.
template <class TO, class TS, class TP>
static void expand_block(const LoraExpandArgs& a, const TP* p, int64_t i0, int64_t i1, int64_t c0,
                         int64_t cols) {
  // Few enough columns for delta to be read back before it has left the store queue's reach.
  constexpr int64_t kStep = kCombineVectors * W, kBitsRow = round_up(keep_bits_room(kTileCols), 64);
  alignas(64) float delta[kCombineRows * kStep];
  alignas(64) uint8_t bits[kCombineRows * kBitsRow];
  const bool drop = a.dropout.threshold != 0;
  const auto row_of = [&a](int64_t i) { return a.rows != nullptr ? a.rows[i] - a.dropout.row0 : i; };
  for (int64_t i = i0; i < i1;) {
    // combine takes 1, 2 or kCombineRows rows: three and more at the end are computed along with rows before
    // them.
    const int64_t left = min64(kCombineRows, i1 - i);
    const int64_t take = left > 2 && i + left < kCombineRows ? 2 : left;
    const int64_t back = take > 2 ? kCombineRows - take : 0;
    for (int64_t m = 0; drop && m < take; ++m) {
      keep_bits(a.dropout, row_of(i + m), c0, cols, bits + m * kBitsRow);
    }
    for (int64_t c = 0; c < cols; c += kStep) {
      const int64_t n = min64(kStep, cols - c), column = c0 + c;
      if (a.R > 0 && a.delta == nullptr) {
        combine(a.v + (i - back) * a.ldv, a.ldv, take + back, a.R, p + column, a.ldp, round_up(n, W), delta,
                kStep);
      }
      const BlockVectors vectors = from({a.base_scale, a.delta_scale, a.bias}, column);
      for (int64_t m = 0; m < take; ++m) {
        TO* out = static_cast<TO*>(a.out.data) + row_of(i + m) * a.out.row + column;
        const TS* src = static_cast<const TS*>(a.src.data);
        if (src != nullptr) {
          src += column;
          const int64_t next = min64(i + m + kCombineRows, i1 - 1);
          prefetch(src + row_of(next) * a.src.row, n * static_cast<int64_t>(sizeof(TS)));
          src += row_of(i + m) * a.src.row;
        }
        if (a.R == 0) {
          finish_row_base<TO, TS>(src, vectors, n, out);
        } else {
          const float* made =
              a.delta != nullptr ? a.delta + (i + m) * a.ldd + column : delta + (back + m) * kStep;
          finish<TO, TS>(made, a.alpha, drop ? bits + m * kBitsRow + c / 8 : nullptr, src, vectors, n, out);
        }
      }
    }
    i += take;
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
