// Tiles of an adapter's panel as fp32: in place where it lies so, else packed into scratch.
#pragma once

#include "cpu/common/copy.h"
#include "cpu/multi/tasks.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

static_assert(kTileCols == kMultiTileCols, "units start at multiples of a tile");

// T: float, or the dtype in which the panel is stored.
template <class T>
struct PanelTile {
  const T* data;
  int64_t ld;
};

// Whether columns [.., + cols) can be read where they lie, up to a multiple of kPad columns.
PEFTKERN_INLINE bool in_place(const MultiSegment& s, int64_t cols) {
  return s.p.col == 1 && (s.padded || cols % kPad == 0);
}

template <class T>
PEFTKERN_INLINE PanelTile<T> stored_tile(const MultiSegment& s, int64_t r0, int64_t c) {
  return {static_cast<const T*>(s.p.data) + r0 * s.p.row + c, s.p.row};
}

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
static PanelTile<float> panel_tile(const MultiSegment& s, int64_t r0, int64_t r1, int64_t c, int64_t cols,
                                   float* room) {
  switch (s.p.dtype) {
    case DType::f32:
      if (in_place(s, cols)) return stored_tile<float>(s, r0, c);
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

// Calls f with the same; if used `once`, in half precision as it is stored: then packing would not pay.
template <class F>
PEFTKERN_INLINE void with_panel_tile(const MultiSegment& s, bool once, int64_t r0, int64_t r1, int64_t c,
                                     int64_t cols, float* room, const F& f) {
  if (s.p.dtype != DType::f32 && once && in_place(s, cols)) {
    if (s.p.dtype == DType::bf16) return f(stored_tile<bf16>(s, r0, c));
    return f(stored_tile<f16>(s, r0, c));
  }
  f(panel_tile(s, r0, r1, c, cols, room));
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
