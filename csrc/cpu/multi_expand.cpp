// The low-rank update of multi_lora_linear (see peftkern/multi.h): expand_block on the rows of each segment.
#include "cpu/expand_block.h"
#include "cpu/multi_panel.h"
#include "cpu/thread.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

static_assert(kTileLd + kExpandRows <= kExpandFloatsPerRank, "scratch is too small");

template <class TO, class TS>
void expand_unit(const MultiExpandTask& a, const MultiUnit& u, float* scratch) {
  const MultiSegment& s = *u.segment;
  float* panel = scratch;
  float* v = panel + s.R * kTileLd;
  for (int64_t i = u.i0; s.R > 0 && i < u.i1; ++i) {
    std::memcpy(v + (i - u.i0) * s.R, a.v + s.rows[i] * a.ld, sizeof(float) * s.R);
  }
  for (int64_t c = u.c0; c < u.c1; c += kTileCols) {
    const int64_t cols = min64(kTileCols, u.c1 - c);
    const PanelTile p = s.R > 0 ? panel_tile(s, 0, s.R, a.col0 + c, cols, panel) : PanelTile{};
    LoraExpandArgs e{};
    e.out = a.out;
    e.out.data = static_cast<TO*>(a.out.data) + c;
    e.src = a.src;
    if (a.src.data != nullptr) e.src.data = static_cast<const TS*>(a.src.data) + c;
    e.rows = s.rows + u.i0;
    e.R = s.R;
    e.v = v, e.ldv = s.R, e.p = p.data, e.ldp = p.ld;
    e.alpha = s.alpha;
    e.dropout = s.dropout;
    e.dropout.row0 = a.row0, e.dropout.col0 = a.col0 + c;
    e.bias = a.bias != nullptr ? a.bias + c : nullptr;
    expand_block<TO, TS>(e, 0, u.i1 - u.i0, 0, cols);
  }
}

template <class TO, class TS>
void expand(const MultiExpandTask& a) {
#pragma omp parallel num_threads(a.threads)
  {
    float* scratch = a.scratch + thread_number() * a.scratch_floats;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < a.count; ++t) expand_unit<TO, TS>(a, a.units[t], scratch);
  }
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
