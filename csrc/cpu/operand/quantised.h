// The loader of a quantised W: tiles of it as fp32, or as pairs of bf16, for products of activations of type
// T.
#pragma once

#include "cpu/operand/decode.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/in_pairs.h"
#include "cpu/operand/pack_tile.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

// Asks for the codes of W[n, k], ..., W[n, k + count - 1].
PEFTKERN_INLINE void ask_for_codes(const Quantised& w, int64_t n, int64_t k, int64_t count) {
  const bool halves = in_halves(w), bytes = halves || w.order == Quantised::Order::bytes;
  const int64_t half = w.N * w.row / 2;
  int64_t at = n * w.row + k;
  if (w.block_bytes != 0) return;
  if (halves && at >= half) at -= half;
  ask_for_bytes(w.codes + (bytes ? at : at / 2), bytes ? count : count / 2 + 1);
}

template <class T>
class Decoded {
 public:
  using Activation = T;
  explicit Decoded(const BaseArgs& g)
      : w_(*g.quantised),
        begin_(g.quantised_col),
        across_(g.w_out == 1),
        pairs_(!across_ && has_pairs(w_)),
        even_odd_(pairs_ && in_neighbours(w_)) {}

  // As Dense has them.
  template <class Element>
  void pack(int64_t col, int64_t k, int cols, int depth, Element* to) const {
    using Stored = std::conditional_t<std::is_same<Element, float>::value, float, bf16>;
    // Rows not a power of two apart: they are read down the columns.
    constexpr int kDepth = kBaseChain * static_cast<int>(sizeof(Element) / sizeof(Stored));
    constexpr int kRow = kDepth + 64 / static_cast<int>(sizeof(Stored));
    alignas(64) Stored rows[kTileCols * kRow > kDepth * kTileCols ? kTileCols * kRow : kDepth * kTileCols];
    if (across_) {
      for (int i = 0; i < depth; ++i) read(k + i, begin_ + col, cols, rows + i * kTileCols);
      pack_tile(rows, 1, kTileCols, cols, depth, to);
    } else {
      for (int c = 0; c < cols; ++c) read(begin_ + col + c, k, depth, rows + c * kRow);
      pack_tile(rows, kRow, 1, cols, depth, to);
    }
  }
  __attribute__((always_inline)) void ask(int64_t col, int64_t k, int cols, int depth, int64_t part,
                                          int64_t parts) const {
    const int64_t pieces = across_ ? depth : cols;
    for (int64_t i = pieces * part / parts; i < pieces * (part + 1) / parts; ++i)
      across_ ? ask_for_codes(w_, k + i, begin_ + col, cols) : ask_for_codes(w_, begin_ + col + i, k, depth);
  }

  const Quantised& weight() const { return w_; }
  int64_t begin() const { return begin_; }
  // Whether columns of a tile follow one another in memory, and not terms.
  bool across() const { return across_; }

  // Rows of a for products of few rows: in the order in which W is read, which is that of a dense fp32 one,
  // or of pairs.
  static constexpr int kLine = kLineOrPair<float>;
  bool pairs() const { return pairs_; }
  void to_pair(float* p) const {
    if (even_odd_) Dense<bf16>::to_pair(p);
  }

 private:
  void read(int64_t n, int64_t k, int count, float* to) const { decode(w_, n, k, count, to); }
  void read(int64_t n, int64_t k, int count, bf16* to) const {
    alignas(64) float wide[2 * kBaseChain];
    decode(w_, n, k, count, wide);
    int i = 0;
    for (; i + W <= count; i += W) store(to + i, load(wide + i));
    if (i < count) store_n(to + i, load_n(wide + i, count - i), count - i);
  }

  const Quantised& w_;
  const int64_t begin_;
  const bool across_, pairs_, even_odd_;
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
