// The base product of bf16 operands by tiles: out (fp32) = a B, without an input scale. Blocked as blocks.h
// says; packed elements are pairs of terms, as for gemm_bf16.cpp. Compiled for AMX, and for every level with
// the definition of its instructions, which has the same bits.
//
// An element's sum is a chain over steps of at most 32 terms, each summed as amx.h says. It depends on the
// inner dimension alone.
#include <utility>

#include "cpu/base/amx.h"
#include "cpu/base/blocks.h"
#include "cpu/operand/dense.h"
#include "cpu/operand/quantised.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

// A tile of the output is two registers high and, where kTileCols has room for it, two wide.
constexpr int kRows = 2 * kTileSide;
constexpr bool kWide = kTileCols > kTileSide;
constexpr int kCols = kWide ? kTileSide : kTileCols;
static_assert(kTileCols == (kWide ? 2 : 1) * kCols, "the columns of one or of two registers");
static_assert(kBaseChain % kTileSide == 0, "only the last step of all is shorter");

// Which register holds what: sums, rows of a, pairs of terms of B.
enum : int { kUpLeft, kUpRight, kLowLeft, kLowRight, kUp, kLow, kLeft, kRight };

template <int ROWS>
TileShapes shapes(int pairs) {
  constexpr int up = ROWS < kTileSide ? ROWS : kTileSide, low = ROWS - up;
  TileShapes s;
  s.set(kUpLeft, up, kCols), s.set(kUp, up, pairs), s.set(kLeft, pairs, kCols);
  if (kWide) s.set(kUpRight, up, kCols), s.set(kRight, pairs, kCols);
  if (low > 0) s.set(kLowLeft, low, kCols), s.set(kLow, low, pairs);
  if (low > 0 && kWide) s.set(kLowRight, low, kCols);
  return s;
}

// out += a B, over `depth` pairs, in steps of `pairs`.
template <int ROWS>
void steps(int pairs, int depth, const uint32_t* a, const uint32_t* b, float* out, int64_t ld, bool first) {
  constexpr bool high = ROWS > kTileSide;
  constexpr int64_t a_step = 4 * kBaseRow, b_step = 4 * kTileCols;
  const int64_t step = 4 * ld;
  float* const low = out + kTileSide * ld;
  Tiles t;
  t.configure(shapes<ROWS>(pairs));
  if (first) {
    t.zero<kUpLeft>();
    if constexpr (kWide) t.zero<kUpRight>();
    if constexpr (high) t.zero<kLowLeft>();
    if constexpr (high && kWide) t.zero<kLowRight>();
  } else {
    t.load<kUpLeft>(out, step);
    if constexpr (kWide) t.load<kUpRight>(out + kCols, step);
    if constexpr (high) t.load<kLowLeft>(low, step);
    if constexpr (high && kWide) t.load<kLowRight>(low + kCols, step);
  }
  for (const uint32_t* end = a + depth; a < end; a += pairs, b += pairs * kTileCols) {
    t.load<kLeft>(b, b_step);
    t.load<kUp>(a, a_step);
    t.multiply<kUpLeft, kUp, kLeft>();
    if constexpr (kWide) {
      t.load<kRight>(b + kCols, b_step);
      t.multiply<kUpRight, kUp, kRight>();
    }
    if constexpr (high) {
      t.load<kLow>(a + kTileSide * kBaseRow, a_step);
      t.multiply<kLowLeft, kLow, kLeft>();
    }
    if constexpr (high && kWide) t.multiply<kLowRight, kLow, kRight>();
  }
  t.store<kUpLeft>(out, step);
  if constexpr (kWide) t.store<kUpRight>(out + kCols, step);
  if constexpr (high) t.store<kLowLeft>(low, step);
  if constexpr (high && kWide) t.store<kLowRight>(low + kCols, step);
}

template <int ROWS>
void tile(int depth, const uint32_t* a, const uint32_t* b, float* out, int64_t ld, bool first) {
  const int whole = depth / kTileSide * kTileSide, rest = depth - whole;
  if (whole > 0) steps<ROWS>(kTileSide, whole, a, b, out, ld, first);
  if (rest > 0) steps<ROWS>(rest, rest, a + whole, b + whole * kTileCols, out, ld, first && whole == 0);
}

template <class Rows>
struct TilesOf;
template <int... LAST>
struct TilesOf<std::integer_sequence<int, LAST...>> {
  static constexpr TileFunction<uint32_t> tiles[] = {tile<LAST + 1>...};
};

struct Amx : TilesOf<std::make_integer_sequence<int, kRows>> {
  using Element = uint32_t;
  static constexpr int kTerms = 2, kTileRows = kRows;
  static void complete(const BaseArgs&, int64_t, int, int64_t, int) {}
};

template <class B>
void run(const BaseArgs& g) {
  Blocks<Amx, B> blocks(g);
  parallel(g.threads, [&] {
    blocks.run();
    Tiles::release();
  });
}

}  // namespace

#if defined(__AMX_BF16__)
void base_gemm_amx(const BaseArgs& args) {
#else
void base_gemm_amx_stated(const BaseArgs& args) {
#endif
  args.quantised != nullptr ? run<Decoded<bf16>>(args) : run<Dense<bf16>>(args);
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
