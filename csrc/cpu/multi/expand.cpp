// The low-rank update of multi_lora_linear (see peftkern/cpu_multi.h): expand_block on the rows of each
// segment.
#include "cpu/common/thread.h"
#include "cpu/lora/expand_block.h"
#include "cpu/multi/few.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

static_assert(kTileLd + kExpandRows <= kExpandFloatsPerRank, "scratch is too small");

// The branch of some columns at a time.
template <class TO, class TS, class TP>
void few_rows(const MultiExpandTask& a, const MultiUnit& u, const float* v) {
  const MultiSegment& s = *u.segment;
  alignas(64) float sums[kStreamFloats], chain[kStreamFloats];
  alignas(64) uint8_t bits[keep_bits_room(kStreamFloats)];
  const int64_t rows = u.i1 - u.i0, ld = stream_cols(rows);
  for (int64_t c = u.c0; c < u.c1; c += ld) {
    const int64_t cols = min64(ld, u.c1 - c);
    stream_sums<TP>(v, rows, s, a.col0 + c, cols, sums, chain);
    for (int64_t i = u.i0; i < u.i1; ++i) {
      const int64_t row = s.rows[i] - a.row0;
      const TS* src = static_cast<const TS*>(a.src.data);
      if (s.dropout.threshold != 0) keep_bits(s.dropout, row + a.row0, a.col0 + c, cols, bits);
      finish_row<TO, TS>(sums + (i - u.i0) * ld, s.alpha, s.dropout.threshold != 0 ? bits : nullptr,
                         src != nullptr ? src + row * a.src.row + c : nullptr,
                         from({s.base_scale, s.col_scale, s.bias}, a.col0 + c), cols,
                         static_cast<TO*>(a.out.data) + row * a.out.row + c);
    }
  }
}

template <class TO, class TS>
void expand_unit(const MultiExpandTask& a, const MultiUnit& u, float* scratch) {
  const MultiSegment& s = *u.segment;
  float* panel = scratch;
  float* v = panel + s.R * kTileLd;
  for (int64_t i = u.i0; s.R > 0 && i < u.i1; ++i) {
    float* to = v + (i - u.i0) * s.R;
    std::memcpy(to, a.v + s.rows[i] * a.ld, sizeof(float) * s.R);
    for (int64_t r = 0; s.row_scale != nullptr && r < s.R; ++r) to[r] *= s.row_scale[r];
  }
  if (s.R > 0 && u.i1 - u.i0 <= kFewRows && streams(s)) {
    switch (s.p.dtype) {
      case DType::f32:
        return few_rows<TO, TS, float>(a, u, v);
      case DType::bf16:
        return few_rows<TO, TS, bf16>(a, u, v);
      case DType::f16:
        return few_rows<TO, TS, f16>(a, u, v);
    }
  }
  for (int64_t c = u.c0; c < u.c1; c += kTileCols) {
    const int64_t cols = min64(kTileCols, u.c1 - c);
    LoraExpandArgs e{};
    e.out = a.out;
    e.out.data = static_cast<TO*>(a.out.data) + c;
    e.src = a.src;
    if (a.src.data != nullptr) e.src.data = static_cast<const TS*>(a.src.data) + c;
    e.rows = s.rows + u.i0;
    e.R = s.R;
    e.v = v, e.ldv = s.R;
    e.alpha = s.alpha;
    e.dropout = s.dropout;
    e.dropout.row0 = a.row0, e.dropout.col0 = a.col0 + c;
    const BlockVectors vectors = from({s.base_scale, s.col_scale, s.bias}, a.col0 + c);
    e.base_scale = vectors.base, e.delta_scale = vectors.delta, e.bias = vectors.bias;
    const int64_t rows = u.i1 - u.i0;
    if (s.R == 0) {
      expand_block<TO, TS, float>(e, nullptr, 0, rows, 0, cols);
      continue;
    }
    const PanelTile<float> p = panel_tile(s, 0, s.R, a.col0 + c, cols, panel);
    e.ldp = p.ld;
    expand_block<TO, TS>(e, p.data, 0, rows, 0, cols);
  }
}

template <class TO, class TS>
void expand(const MultiExpandTask& a) {
  parallel(a.threads, [&] {
    float* scratch = a.scratch + thread_number() * a.scratch_floats;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < a.count; ++t) expand_unit<TO, TS>(a, a.units[t], scratch);
  });
}

}  // namespace

void multi_expand_run(const MultiExpandTask& a) {
  const bool wide = a.src.dtype == DType::f32;
  switch (a.out.dtype) {
    case DType::f32:
      return expand<float, float>(a);
    case DType::bf16:
      return wide ? expand<bf16, float>(a) : expand<bf16, bf16>(a);
    case DType::f16:
      return wide ? expand<f16, float>(a) : expand<f16, f16>(a);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
