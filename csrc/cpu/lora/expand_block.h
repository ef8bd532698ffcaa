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

// Rows of a block.
constexpr int64_t kExpandRows = 48;
static_assert(kExpandRows % kCombineRows == 0);

// A block of rows [i0, i1) and columns [c0, c0 + cols). p: a.p, or the same in half precision.
template <class TO, class TS, class TP>
class ExpandBlock {
 public:
  ExpandBlock(const LoraExpandArgs& a, const TP* p, int64_t i0, int64_t i1, int64_t c0, int64_t cols)
      : a_(a), p_(p), i0_(i0), i1_(i1), c0_(c0), cols_(cols), drop_(a.dropout.threshold != 0) {
    for (int64_t k = 0; k < kStep; ++k) ones_[k] = 1.0f, minus_zeros_[k] = -0.0f;
  }

  void run() {
    if (a_.R == 0) return run_base();
    const bool plain =
        a_.src.data != nullptr && a_.base_scale == nullptr && a_.delta_scale == nullptr && a_.bias == nullptr;
    for (int64_t i = i0_; i < i1_;) {
      // 1, 2 or kCombineRows rows: three and more at the end are computed along with rows before them.
      const int64_t left = min64(kCombineRows, i1_ - i);
      const int64_t take = left > 2 && i + left < kCombineRows ? 2 : left;
      const int64_t back = take > 2 ? kCombineRows - take : 0;
      for (int64_t m = 0; drop_ && m < take; ++m)
        keep_bits(a_.dropout, row_of(i + m), c0_, cols_, bits_ + (back + m) * kBitsRow);
      for (int64_t c = 0; c < cols_; c += kStep) {
        if (take == 1) {
          rows<1>(i, 0, c);
        } else if (take == 2) {
          rows<2>(i, 0, c);
        } else if (plain && back == 0 && c + kStep <= cols_) {
          drop_ ? plain_rows<true>(i, c) : plain_rows<false>(i, c);
        } else {
          rows<kCombineRows>(i - back, static_cast<int>(back), c);
        }
      }
      i += take;
    }
  }

 private:
  // A step's columns, few enough for registers.
  static constexpr int64_t kStep = kCombineVectors * W, kBitsRow = round_up(keep_bits_room(kTileCols), 64);

  int64_t row_of(int64_t i) const { return a_.rows != nullptr ? a_.rows[i] - a_.dropout.row0 : i; }
  // Also asks for the row a call later.
  const TS* src(int64_t i, int64_t c) const {
    const auto* from = static_cast<const TS*>(a_.src.data) + c0_ + c;
    prefetch(from + row_of(min64(i + kCombineRows, i1_ - 1)) * a_.src.row,
             kStep * static_cast<int64_t>(sizeof(TS)));
    return from + row_of(i) * a_.src.row;
  }
  TO* out(int64_t i, int64_t c) const {
    return static_cast<TO*>(a_.out.data) + row_of(i) * a_.out.row + c0_ + c;
  }

  void run_base() const {
    const BlockVectors v = from({a_.base_scale, a_.delta_scale, a_.bias}, c0_);
    for (int64_t i = i0_; i < i1_; ++i)
      finish_row_base<TO, TS>(a_.src.data != nullptr ? src(i, 0) : nullptr, v, cols_, out(i, 0));
  }

  // kCombineRows rows from i on and kStep columns from c on, without scales and bias.
  template <bool DROP>
  void plain_rows(int64_t i, int64_t c) const {
    const TS* from[kCombineRows];
    TO* to[kCombineRows];
    for (int m = 0; m < kCombineRows; ++m) from[m] = src(i + m, c), to[m] = out(i + m, c);
    const vf alpha = splat(a_.alpha);
    combine_block<kCombineRows, kCombineVectors>(
        a_.v + i * a_.ldv, a_.ldv, a_.R, p_ + c0_ + c, a_.ldp, [&](int m, int j, vf delta) {
          if (DROP) delta = select(bits_ + m * kBitsRow, c + j * W, delta);
          store(to[m] + j * W, fma(alpha, delta, load(from[m] + j * W)));
        });
  }

  // ROWS rows from i on, the first `skip` of them another call's, and the step of columns from c on. What is
  // absent is neutral here: 1, or a zero that changes no sign.
  template <int ROWS>
  void rows(int64_t i, int skip, int64_t c) const {
    const int64_t n = min64(kStep, cols_ - c);
    const TS* from[ROWS];
    TO* to[ROWS];
    for (int m = skip; m < ROWS; ++m) {
      from[m] = a_.src.data != nullptr ? src(i + m, c) : nullptr;
      to[m] = out(i + m, c);
    }
    const auto or_else = [&](const float* v, const float* neutral) {
      return v != nullptr ? v + c0_ + c : neutral;
    };
    const float *base = or_else(a_.base_scale, ones_), *factor = or_else(a_.delta_scale, ones_),
                *bias = or_else(a_.bias, minus_zeros_);
    const vf alpha = splat(a_.alpha);
    combine_steps(round_up(n, W), [&](auto count, int64_t k) {
      combine_block<ROWS, decltype(count)::value>(
          a_.v + i * a_.ldv, a_.ldv, a_.R, p_ + c0_ + c + k, a_.ldp, [&](int m, int j, vf delta) {
            if (m < skip) return;
            const int64_t at = k + j * W;
            if (drop_) delta = select(bits_ + m * kBitsRow, c + at, delta);
            const auto finish = [&](const auto& part) {
              const vf s = from[m] != nullptr ? part(from[m]) : zero();
              return fma(alpha * part(factor), delta, s * part(base)) + part(bias);
            };
            if (at + W <= n) {
              store(to[m] + at, finish([at](const auto* q) { return load(q + at); }));
            } else {
              const int left = static_cast<int>(n - at);
              store_n(to[m] + at, finish([at, left](const auto* q) { return load_n(q + at, left); }), left);
            }
          });
    });
  }

  const LoraExpandArgs& a_;
  const TP* p_;
  const int64_t i0_, i1_, c0_, cols_;
  const bool drop_;
  alignas(64) float ones_[kStep], minus_zeros_[kStep];
  alignas(64) uint8_t bits_[kCombineRows * kBitsRow];
};

// The block of rows [i0, i1) and columns [c0, c0 + cols), cols at most kTileCols.
template <class TO, class TS, class TP>
static void expand_block(const LoraExpandArgs& a, const TP* p, int64_t i0, int64_t i1, int64_t c0,
                         int64_t cols) {
  for (int64_t i = i0; i < i1; i += kExpandRows)
    ExpandBlock<TO, TS, TP>(a, p, i, min64(i1, i + kExpandRows), c0, cols).run();
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
