// Tiles of an adapter's panel as fp32: in place where it lies so, else packed into scratch.
#pragma once

#include "cpu/copy.h"
#include "cpu/multi_tasks.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

static_assert(kTileCols == kMultiTileCols, "units start at multiples of a tile");

struct PanelTile {
  const float* data;
  int64_t ld;
};

template <class T>
static void pack_panel(const MultiSegment& s, int64_t r0, int64_t r1, int64_t c, int64_t cols, float* room) {
  const T* from = static_cast<const T*>(s.p.data) + r0 * s.p.row + c * s.p.col;
  const Copy<float, T> copy{from, room, s.p.row, s.p.col, kTileLd, 1, 1.0f, nullptr, nullptr};
  copy.block(0, r1 - r0, 0, cols);
  for (int64_t r = 0; r < r1 - r0; ++r) {
    for (int64_t k = cols; k < round_up(cols, kPad); ++k) room[r * kTileLd + k] = 0.0f;
  }
}

// Ranks [r0, r1), columns [c, c + cols), zeros up to a multiple of kPad columns. room: kTileLd floats a rank.
static PanelTile panel_tile(const MultiSegment& s, int64_t r0, int64_t r1, int64_t c, int64_t cols,
                            float* room) {
  if (s.p.dtype == DType::f32 && s.p.col == 1 && (s.padded || cols % kPad == 0)) {
    return {static_cast<const float*>(s.p.data) + r0 * s.p.row + c, s.p.row};
  }
  switch (s.p.dtype) {
    case DType::f32:
      pack_panel<float>(s, r0, r1, c, cols, room);
      break;
    case DType::bf16:
      pack_panel<bf16>(s, r0, r1, c, cols, room);
      break;
    case DType::f16:
      pack_panel<f16>(s, r0, r1, c, cols, room);
      break;
  }
  return {room, kTileLd};
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
