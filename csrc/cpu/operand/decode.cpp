#include "cpu/operand/decode.h"

#include "cpu/common/thread.h"
#include "cpu/operand/codes.h"
#include "cpu/operand/groups.h"
#include "cpu/operand/tile.h"
#include "peftkern/cpu.h"

// Of a lambda: called for each group, and mostly of a few vectors.
#define PEFTKERN_INLINED __attribute__((always_inline))

namespace peftkern::cpu::PEFTKERN_LEVEL {
namespace {

using Code = Quantised::Code;
using Order = Quantised::Order;

// Codes at positions p, p + 1, ..., two neighbours a byte.
template <bool UPPER, class F>
PEFTKERN_INLINE void pairs(const uint8_t* codes, int64_t p, int64_t count, const float* values,
                           const Values16& table, const F& f, float* to) {
  const auto one = [&](int64_t at) {
    const int shift = (at & 1) == (UPPER ? 0 : 1) ? 4 : 0;
    return f.apply(values[codes[at >> 1] >> shift & 15]);
  };
  int64_t i = 0;
  if ((p & 1) != 0 && count > 0) to[i++] = one(p);
  const uint8_t* bytes = codes + ((p + i) >> 1);
  const auto vector = [&](int64_t at) PEFTKERN_INLINED {
    store(to + i + at, apply(f, Values16::look_up(table, spread<UPPER>(bytes + (at >> 1)))));
  };
  for (; i + 4 * W <= count; i += 4 * W, bytes += 2 * W) vector(0), vector(W), vector(2 * W), vector(3 * W);
  for (; i + W <= count; i += W, bytes += W / 2) vector(0);
  for (; i < count; ++i) to[i] = one(p + i);
}

// One of the two codes of each byte.
template <class F>
PEFTKERN_INLINE void singles(const uint8_t* bytes, int shift, int64_t count, const float* values,
                             const Values16& table, const F& f, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W)
    store(to + i, apply(f, Values16::look_up(table, widen_bytes(bytes + i) >> shift)));
  for (; i < count; ++i) to[i] = f.apply(values[bytes[i] >> shift & 15]);
}

template <Code CODE, class F>
PEFTKERN_INLINE void wholes(const uint8_t* bytes, int64_t count, const F& f, float* to) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + W <= count; i += W) store(to + i, apply(f, values8<CODE>(bytes + i)));
  for (; i < count; ++i) to[i] = f.apply(value8(CODE, bytes[i]));
}

// Codes from position p on, of group g, `left` more of which there are.
struct Span {
  int64_t p, g, left, count;
};
Span span_of(const Quantised& w, int64_t n, int64_t k, int64_t count) {
  const int64_t p = n * w.row + k, along = w.flat ? p : k;
  // Nearly all groups are a power of two long.
  const bool power = (w.group & (w.group - 1)) == 0;
  int64_t g = power ? along >> __builtin_ctzll(static_cast<uint64_t>(w.group)) : along / w.group;
  const int64_t left = (g + 1) * w.group - along;
  if (!w.flat) g += (w.rows == 1 ? n : n / w.rows) * w.groups;
  return {p, g, left, count};
}

// Group by group: codes(p, g, count, scale, to).
template <class Groups, class Codes>
PEFTKERN_INLINE void by_groups(const Groups& groups, int64_t size, Span s, float* to, const Codes& codes) {
  for (; s.count > 0; ++s.g, s.left = size) {
    const int64_t some = smaller(s.left, s.count);
    codes(s.p, s.g, some, groups.of(s.g), to);
    s.p += some, to += some, s.count -= some;
  }
}
template <class Codes>
PEFTKERN_INLINE void by_groups(const Quantised& w, const Span& s, float* to, const Codes& codes) {
  if (Floats::fit(w)) return by_groups(Floats(w), w.group, s, to, codes);
  if (w.number == Quantised::Number::nested) return by_groups(Nested(w), w.group, s, to, codes);
  if (w.block_bytes != 0) return by_groups(InBlocks(w), w.group, s, to, codes);
  by_groups(Numbers(w), w.group, s, to, codes);
}

template <Code CODE>
void decode_wholes(const Quantised& w, const Span& span, float* to) {
  by_groups(w, span, to,
            [&](int64_t p, int64_t g, int64_t count, const auto& f, float* out) PEFTKERN_INLINED {
              const uint8_t* bytes =
                  w.block_bytes != 0 ? w.codes + g * w.block_bytes + (p - g * w.group) : w.codes + p;
              wholes<CODE>(bytes, count, f, out);
            });
}

}  // namespace

void decode(const Quantised& w, int64_t n, int64_t k, int64_t count, float* to) {
  const Span span = span_of(w, n, k, count);
  const float* values = values_of(w.code);
  const Values16 table(values);
  switch (w.order) {
    case Order::upper_first:
      by_groups(w, span, to,
                [&](int64_t p, int64_t, int64_t some, const auto& f, float* out)
                    PEFTKERN_INLINED { pairs<true>(w.codes, p, some, values, table, f, out); });
      return;
    case Order::lower_first:
      by_groups(w, span, to,
                [&](int64_t p, int64_t, int64_t some, const auto& f, float* out)
                    PEFTKERN_INLINED { pairs<false>(w.codes, p, some, values, table, f, out); });
      return;
    case Order::halves_upper:
    case Order::halves_lower:
      by_groups(
          w, span, to, [&](int64_t p, int64_t, int64_t some, const auto& f, float* out) PEFTKERN_INLINED {
            const int shift = w.order == Order::halves_upper ? 4 : 0;
            const int64_t half = w.N * w.row / 2, first = p < half ? smaller(half - p, some) : 0;
            if (first > 0) singles(w.codes + p, shift, first, values, table, f, out);
            if (first < some)
              singles(w.codes + p + first - half, 4 - shift, some - first, values, table, f, out + first);
          });
      return;
    case Order::blocks_lower:
      by_groups(w, span, to,
                [&](int64_t p, int64_t g, int64_t some, const auto& f, float* out) PEFTKERN_INLINED {
                  const uint8_t* block = w.codes + g * w.block_bytes;
                  const int64_t at = p - g * w.group, low = at < 16 ? smaller(16 - at, some) : 0;
                  if (low > 0) singles(block + at, 0, low, values, table, f, out);
                  if (low < some) singles(block + at + low - 16, 4, some - low, values, table, f, out + low);
                });
      return;
    case Order::bytes:
      if (w.code == Code::int8) return decode_wholes<Code::int8>(w, span, to);
      if (w.code == Code::e4m3) return decode_wholes<Code::e4m3>(w, span, to);
      return decode_wholes<Code::e5m2>(w, span, to);
  }
}

namespace {

// Elements that are decoded at a time, where they are rounded.
constexpr int64_t kDecodedRun = 512;

void decode_row(const Quantised& w, int64_t n, int64_t k, int64_t count, float* to) {
  decode(w, n, k, count, to);
}

template <class T>
void decode_row(const Quantised& w, int64_t n, int64_t k, int64_t count, T* to) {
  alignas(64) float run[kDecodedRun];
  for (int64_t c = 0; c < count; c += kDecodedRun) {
    const int64_t some = smaller(kDecodedRun, count - c);
    decode(w, n, k + c, some, run);
    int64_t i = 0;
    for (; i + W <= some; i += W) store(to + c + i, load(run + i));
    if (i < some) store_n(to + c + i, load(run + i), static_cast<int>(some - i));
  }
}

template <class T>
void decode_rows(const DecodePartArgs& g) {
  parallel(g.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.rows; ++i)
      decode_row(*g.weight, g.n + i, g.k, g.cols, static_cast<T*>(g.out.data) + i * g.out.row);
  });
}

}  // namespace

void decode_part(const DecodePartArgs& g) {
  switch (g.out.dtype) {
    case DType::f32:
      return decode_rows<float>(g);
    case DType::bf16:
      return decode_rows<bf16>(g);
    case DType::f16:
      return decode_rows<f16>(g);
  }
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
