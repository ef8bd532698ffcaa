#include "cpu/operand/decode.h"

#include "cpu/operand/codes.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

using Code = Quantised::Code;
using Order = Quantised::Order;
using Number = Quantised::Number;

// A run of codes that share their scale.
struct Run {
  float scale, zero;
  PEFTKERN_INLINE vf apply(const Run& r, vf x) { return (x - splat(r.zero)) * splat(r.scale); }
  float apply(float x) const { return (x - zero) * scale; }
};

// Codes at positions p, p + 1, ..., two neighbours a byte.
template <bool UPPER>
void pairs(const uint8_t* codes, int64_t p, int64_t count, const float* values, const Run& run, float* to) {
  const auto one = [&](int64_t at) {
    const int shift = (at % 2 == 0) == UPPER ? 4 : 0;
    return run.apply(values[codes[at / 2] >> shift & 15]);
  };
  const Values16 table(values);
  int64_t i = 0;
  if (p % 2 != 0 && count > 0) to[i++] = one(p);
  for (; i + W <= count; i += W)
    store(to + i, Run::apply(run, Values16::look_up(table, spread<UPPER>(codes + (p + i) / 2))));
  for (; i < count; ++i) to[i] = one(p + i);
}

// One of the two codes of each byte.
void singles(const uint8_t* bytes, int shift, int64_t count, const float* values, const Run& run, float* to) {
  const Values16 table(values);
  int64_t i = 0;
  for (; i + W <= count; i += W)
    store(to + i, Run::apply(run, Values16::look_up(table, widen_bytes(bytes + i) >> shift)));
  for (; i < count; ++i) to[i] = run.apply(values[bytes[i] >> shift & 15]);
}

template <Code CODE>
void wholes(const uint8_t* bytes, int64_t count, const Run& run, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, Run::apply(run, values8<CODE>(bytes + i)));
  for (; i < count; ++i) to[i] = run.apply(value8(CODE, bytes[i]));
}

float number(Number type, const void* data, int64_t i) {
  switch (type) {
    case Number::bf16:
      return widen_scalar(static_cast<const bf16*>(data)[i]);
    case Number::f16:
      return widen_scalar(static_cast<const f16*>(data)[i]);
    case Number::e8m0: {
      // 2^(e - 127); all bits set is NaN, and 2^-127 is below the normal numbers.
      const uint32_t e = static_cast<const uint8_t*>(data)[i];
      const uint32_t bits = e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : e << 23;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    default:
      return static_cast<const float*>(data)[i];
  }
}

Run run_of(const Quantised& w, int64_t g) {
  if (w.number == Number::nested) {
    const float inner = w.book[static_cast<const uint8_t*>(w.scales)[g]];
    return {inner * w.outer[g / w.outer_group] + *w.offset, 0.0f};
  }
  if (w.block_bytes != 0) {
    f16 scale;
    std::memcpy(&scale, static_cast<const uint8_t*>(w.scales) + g * w.block_bytes, sizeof scale);
    return {widen_scalar(scale), 0.0f};
  }
  return {number(w.number, w.scales, g), w.zeros != nullptr ? number(w.number, w.zeros, g) : 0.0f};
}

// Codes of a run, at position p on, of group g.
void decode_run(const Quantised& w, int64_t p, int64_t g, int64_t count, const Run& run, float* to) {
  const float* values = values_of(w.code);
  switch (w.order) {
    case Order::upper_first:
      return pairs<true>(w.codes, p, count, values, run, to);
    case Order::lower_first:
      return pairs<false>(w.codes, p, count, values, run, to);
    case Order::halves_upper: {
      // The second half begins where a group does, so a run lies in one of the two.
      const int64_t half = w.N * w.row / 2;
      const bool first = p < half;
      return singles(w.codes + (first ? p : p - half), first ? 4 : 0, count, values, run, to);
    }
    case Order::blocks_lower: {
      const uint8_t* block = w.codes + g * w.block_bytes;
      const int64_t at = p - g * w.group, low = at < 16 ? smaller(16 - at, count) : 0;
      if (low > 0) singles(block + at, 0, low, values, run, to);
      if (low < count) singles(block + at + low - 16, 4, count - low, values, run, to + low);
      return;
    }
    default:
      break;
  }
  const uint8_t* bytes = w.block_bytes != 0 ? w.codes + g * w.block_bytes + (p - g * w.group) : w.codes + p;
  if (w.code == Code::int8) return wholes<Code::int8>(bytes, count, run, to);
  if (w.code == Code::e4m3) return wholes<Code::e4m3>(bytes, count, run, to);
  wholes<Code::e5m2>(bytes, count, run, to);
}

}  // namespace

void decode(const Quantised& w, int64_t n, int64_t k, int64_t count, float* to) {
  int64_t p = n * w.row + k;
  const int64_t along = w.flat ? p : k;
  // Nearly all groups are a power of two long.
  const bool power = (w.group & (w.group - 1)) == 0;
  int64_t g = power ? along >> __builtin_ctzll(static_cast<uint64_t>(w.group)) : along / w.group;
  int64_t left = (g + 1) * w.group - along;
  if (!w.flat) g += (w.rows == 1 ? n : n / w.rows) * w.groups;
  for (; count > 0; ++g, left = w.group) {
    const int64_t some = smaller(left, count);
    decode_run(w, p, g, some, run_of(w, g), to);
    p += some, to += some, count -= some;
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
