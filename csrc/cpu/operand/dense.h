// The loader of a dense W: element (column c, term k) at w + c * out + k * in, in the activation's type T.
//
// A kind of base is a class like this one, and the products in cpu/base know no more of W than it tells them:
// tiles for many rows, and for few rows, which read W once, pairs of vectors in registers.
#pragma once

#include "cpu/operand/pack_tile.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

typedef uint32_t vu_any __attribute__((vector_size(4 * W), aligned(2), may_alias));

template <class T>
struct Dense {
  using Activation = T;
  const T* w;
  int64_t out, in;

  explicit Dense(const BaseArgs& g) : w(static_cast<const T*>(g.w)), out(g.w_out), in(g.w_in) {}

  // The tile of `cols` columns from `col` on and `depth` terms from `k` on; its other columns are zero.
  // Element: float, to[k][c]; or uint32_t, pairs of terms.
  template <class Element>
  void pack(int64_t col, int64_t k, int cols, int depth, Element* to) const {
    pack_tile(w + col * out + k * in, out, in, cols, depth, to);
  }
  // Asks for part `part` of `parts` of such a tile. It lies in pieces too short for the hardware to see them
  // coming.
  __attribute__((always_inline)) void ask(int64_t col, int64_t k, int cols, int depth, int64_t part,
                                          int64_t parts) const {
    const bool across = out == 1;
    if (!across && in != 1) return;
    const int64_t pieces = across ? depth : cols, step = across ? in : out;
    const T* from = w + col * out + k * in;
    for (int64_t i = pieces * part / parts; i < pieces * (part + 1) / parts; ++i)
      ask_for_bytes(from + i * step, bytes(across ? cols : depth));
  }

  // A place in W, where adjacent elements follow along one of the two dimensions.
  using Cursor = const T*;
  Cursor at(int64_t col, int64_t k) const { return w + col * out + k * in; }
  // Elements of a cache line, or of a pair if that is longer.
  static constexpr int kLine = kLineOrPair<T>;
  static constexpr int64_t bytes(int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); }
  static constexpr int64_t elements(int64_t bytes) { return bytes / static_cast<int64_t>(sizeof(T)); }
  // Starts to load N elements into a level of cache (3: L1, 2: L2).
  template <int N, int LEVEL>
  PEFTKERN_INLINE void ask(Cursor p) {
    ask_for<N, LEVEL>(p);
  }
  // What is read at p from here on is read anew, not kept in registers.
  PEFTKERN_INLINE void forget(Cursor& p) { asm("" : "+r"(p)); }

  // kPair elements at once, as two vectors of fp32. Widening bf16 in its own order costs a shuffle per
  // vector; taking its even and its odd elements apart costs a shift and a mask. What meets such a pair has
  // to be in the same order.
  PEFTKERN_INLINE vf first(Cursor p) {
    if constexpr (!kEvenOdd) return load(p);
    const vu u = *reinterpret_cast<const vu_any*>(p) << 16;
    return reinterpret_cast<const vf&>(u);
  }
  PEFTKERN_INLINE vf second(Cursor p) {
    if constexpr (!kEvenOdd) return load(p + W);
    const vu u = *reinterpret_cast<const vu_any*>(p) & 0xffff0000u;
    return reinterpret_cast<const vf&>(u);
  }
  // kPair floats from their own order to that of a pair, in place.
  PEFTKERN_INLINE void to_pair(float* p) {
    if (!kEvenOdd) return;
    vi even{}, odd{};
    for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const vf x = load(p), y = load(p + W);
    store(p, __builtin_shuffle(x, y, even));
    store(p + W, __builtin_shuffle(x, y, odd));
  }
  // The inverse of to_pair.
  PEFTKERN_INLINE void from_pair(vf& x, vf& y) {
    if (!kEvenOdd) return;
    vi low{}, high{};
    for (int i = 0; i < W; ++i) {
      low[i] = (i & 1) * W + i / 2;
      high[i] = low[i] + W / 2;
    }
    const vf a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
    x = a, y = b;
  }
  // n < kPair elements in room for a pair, the rest zero.
  struct Part {
    T of[kPair];
    void take(Cursor p, int64_t n) {
      const int low = static_cast<int>(smaller(n, W)), high = static_cast<int>(n) - low;
      copy_n(p, low, of);
      copy_n(p + low, high, of + W);
    }
    Cursor at() const { return of; }
  };

 private:
  static constexpr bool kEvenOdd = std::is_same<T, bf16>::value;
};

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
