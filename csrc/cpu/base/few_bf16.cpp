// The base product of few rows of bf16 by a quantised W on CPUs with AVX512-BF16: codes become vectors of
// bf16 by look-up, in a table of what those of a group stand for, and are multiplied in pairs of terms.
//
// As with other products of pairs, elements of W are rounded to bf16, and numbers below its normal range
// count as zero. A row's bits depend on the inner dimension alone.
#include <array>

#include "cpu/base/dots.h"
#include "cpu/base/pairs.h"
#include "cpu/operand/in_pairs.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Terms of a chain of a dot product.
constexpr int64_t kChain = 1024;
// Columns whose decoded terms of a chain are in L1 at once, and room between them.
constexpr int64_t kCols = 8, kRoom = kChain + 32;
// Columns of a tile in registers; more rows than kDirect are worth W in memory.
constexpr int kTile = 4, kDirect = 5;

PEFTKERN_INLINE __m512i load_pairs(const bf16* p) {
  return _mm512_loadu_si512(p);
}

template <int ROWS>
PEFTKERN_INLINE void add_sums(const vf (&acc)[ROWS][kTile], int64_t cols, float* out, int64_t ld, bool first) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const v4 sums = sum_lanes(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    float* to = out + i * ld;
    if (cols == kTile) {
      v4* all = reinterpret_cast<v4*>(to);
      *all = first ? sums : *all + sums;
    } else {
      for (int j = 0; j < cols; ++j) to[j] = first ? sums[j] : to[j] + sums[j];
    }
  }
}

// out[i, j] (+)= a_i . w_j over `terms` terms from k on, of `cols` columns from n on.
template <int ROWS, class Form, class Groups>
void dots_of_codes(const Form& form, const Groups& groups, const Quantised& w, int64_t n, int64_t cols,
                   int64_t k, int64_t terms, const bf16* a, int64_t lda, float* out, int64_t ld) {
  const uint8_t* p[kTile];
  int64_t group[kTile], left = 0;
  for (int j = 0; j < kTile; ++j) {  // the last stands in for those that are not there
    const Place<Form> at(w, n + smaller(j, cols - 1), k);
    p[j] = at.codes, group[j] = at.group, left = at.left;
  }
  const int64_t ahead = Form::bytes(kTile * w.row);
  vf acc[ROWS][kTile];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) acc[i][j] = zero();
  for (int64_t t = 0; t < terms; left = w.group) {
    const int64_t end = smaller(t + left, terms);
    decltype(Form::group(form, groups.of(0))) f[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      f[j] = Form::group(form, groups.of(group[j]++));
      ask_for_bytes(p[j] + ahead, Form::bytes(end - t));
    }
    for (; t < end; t += kPair, a += kPair) {
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j, p[j - 1] += Form::kBytes) {
        const __m512i b = Form::in_bf16(p[j], f[j]);
#pragma GCC unroll 5
        for (int i = 0; i < ROWS; ++i) acc[i][j] = dot_pairs(acc[i][j], load_pairs(a + i * lda), b);
      }
    }
  }
  add_sums(acc, cols, out, ld, k == 0);
}

template <int ROWS>
void dots_of_pairs(const bf16* a, int64_t lda, const bf16* w, int64_t terms, int64_t cols, float* out,
                   int64_t ld, bool first) {
  vf acc[ROWS][kTile];
#pragma GCC unroll 5
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) acc[i][j] = zero();
  for (int64_t t = 0; t < terms; t += kPair) {
    __m512i b[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) b[j] = load_pairs(w + j * kRoom + t);
#pragma GCC unroll 5
    for (int i = 0; i < ROWS; ++i) {
      const __m512i x = load_pairs(a + i * lda + t);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) acc[i][j] = dot_pairs(acc[i][j], x, b[j]);
    }
  }
  add_sums(acc, cols, out, ld, first);
}

template <class Form, class Groups>
void decode_bf16(const Form& form, const Groups& groups, const Quantised& w, int64_t n, int64_t k,
                 int64_t count, bf16* to) {
  Place<Form> at(w, n, k);
  for (; count > 0; at.left = w.group) {
    const int64_t some = smaller(at.left, count);
    const auto f = Form::group(form, groups.of(at.group++));
    for (const bf16* end = to + some; to < end; to += kPair, at.codes += Form::kBytes)
      _mm512_storeu_si512(to, Form::in_bf16(at.codes, f));
    count -= some;
  }
}

template <class Form, class Groups>
void dot_columns(const BaseArgs& g, const Form& form, const Groups& groups, int64_t begin, int64_t cols,
                 const bf16* a, int64_t lda, bf16* room) {
  const Quantised& w = *g.quantised;
  const int64_t n = g.quantised_col + begin;
  for (int64_t k = 0; k < g.inner; k += kChain, a += g.rows * kChain) {
    const int64_t terms = smaller(kChain, g.inner - k);
    float* out = g.out + begin;
    if (g.rows <= kDirect) {
      static constexpr auto kDots = std::array{dots_of_codes<1, Form, Groups>, dots_of_codes<2, Form, Groups>,
                                    dots_of_codes<3, Form, Groups>, dots_of_codes<4, Form, Groups>,
                                    dots_of_codes<5, Form, Groups>};
      for (int64_t j = 0; j < cols; j += kTile)
        kDots[g.rows - 1](form, groups, w, n + j, smaller(kTile, cols - j), k, terms, a, lda, out + j, g.ld);
      continue;
    }
    for (int64_t c = 0; c < cols; ++c) {
      decode_bf16(form, groups, w, n + c, k, terms, room + c * kRoom);
      ask_for_bytes(w.codes + Form::bytes((n+c+kCols) * w.row + k), Form::bytes(terms));
    }
    static constexpr decltype(&dots_of_pairs<1>) kDots[] = {dots_of_pairs<1>, dots_of_pairs<2>,
                                                           dots_of_pairs<3>, dots_of_pairs<4>,
                                                           dots_of_pairs<5>};
    const int64_t tiles = (g.rows + kDirect - 1) / kDirect;
    for (int64_t t = 0, i = 0; t < tiles; ++t) {
      const int64_t next = g.rows * (t + 1) / tiles;
      for (int64_t j = 0; j < cols; j += kTile)
        kDots[next - i - 1](a + i * lda, lda, room + j * kRoom, terms, smaller(kTile, cols - j),
                            out + i * g.ld + j, g.ld, k == 0);
      i = next;
    }
  }
}

}  // namespace

void base_few_bf16(const BaseArgs& g) {
  auto* packed = reinterpret_cast<bf16*>(g.scratch);
  with_pairs(*g.quantised, [&](const auto& form, const auto& groups) {
    using Form = std::decay_t<decltype(form)>;
    vs place{};
    for (int i = 0; i < 32; ++i) place[i] = static_cast<uint16_t>(Form::place(i));
    parallel(g.threads, [&] {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.rows; ++i)
        for (int64_t k = 0; k < g.inner; k += kChain) {
          const int64_t n = smaller(kChain, g.inner - k);
          bf16* to = packed + k * g.rows + i * kChain;
          Pairs::pack_row(static_cast<const bf16*>(g.a) + i * g.a_row + k * g.a_col, g.a_col,
                          static_cast<int>(n), nullptr, reinterpret_cast<uint32_t*>(to));
          for (int64_t c = 0; c < n; c += kPair)
            _mm512_storeu_si512(to + c, _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(place),
                                                                 load_pairs(to + c)));
        }
      alignas(64) bf16 room[kCols * kRoom];
#pragma omp for schedule(guided)
      for (int64_t col = 0; col < g.cols; col += kCols)
        dot_columns(g, form, groups, col, smaller(kCols, g.cols - col), packed, kChain, room);
    });
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
