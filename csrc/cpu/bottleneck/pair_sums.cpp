// Sums over rows of a bottleneck by products of bf16: pairs.h says what. Rows are added up in chains of
// kPairTerms, in their order, whoever computes a column.
#include "cpu/base/pairs.h"
#include "cpu/bottleneck/pairs.h"
#include "cpu/lora/drop_rows.h"
#include "cpu/operand/dense.h"

#if defined(__AVX512BF16__)

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// Columns that a thread takes at a time.
constexpr int64_t kSumCols = 2 * kPairCols;

// One tile of columns, over one block of rows.
void add_block(const PairSumsTask& a, int64_t i0, int64_t terms, int64_t c, int64_t cols) {
  alignas(64) uint32_t packed[kPairTerms / 2 * kPairCols];
  alignas(64) bf16 kept[kPairTerms * kPairCols];
  const auto* from = static_cast<const bf16*>(a.in.data) + i0 * a.in.row + c;
  const bool drops = a.drop.threshold != 0;
  if (drops) drop_rows(a.drop, i0, c, terms, cols, from, a.in.row, kept, kPairCols);
  pack_tile(drops ? kept : from, 1, drops ? kPairCols : a.in.row, static_cast<int>(cols),
            static_cast<int>(terms), packed);
  const int64_t tiles = pair_blocks(a.ranks, Pairs::kTileRows), step = pair_blocks(a.ranks, tiles);
  const uint32_t* v = a.v + i0 / kPairTerms * a.ranks * kBaseRow;
  const int64_t ahead = pair_blocks(kPairTerms, tiles);
  for (int64_t r = 0, next = 0; r < a.ranks; r += step, next += ahead) {
    // What comes below is asked for between computations: too few bytes of a row for the hardware to see it
    // coming.
    for (int64_t i = next; i < next + ahead && i0 + kPairTerms + i < a.M; ++i)
      __builtin_prefetch(from + (kPairTerms + i) * a.in.row, 0, 2);
    compute<Pairs>(static_cast<int>(smaller(step, a.ranks - r)), static_cast<int>(cols),
                   static_cast<int>((terms + 1) / 2), v + r * kBaseRow, packed, a.out + r * a.C + c, a.C,
                   i0 == 0);
  }
}

}  // namespace

void pair_sums(const PairSumsTask& a) {
  parallel(a.threads, [&] {
#pragma omp for schedule(dynamic)
    for (int64_t c0 = 0; c0 < a.C; c0 += kSumCols)
      for (int64_t i = 0; i < a.M; i += kPairTerms)
        for (int64_t c = c0; c < smaller(a.C, c0 + kSumCols); c += kPairCols)
          add_block(a, i, smaller(kPairTerms, a.M - i), c, smaller(kPairCols, a.C - c));
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL

#endif
