// The base product's blocks, and who fills them.
#include "cpu/base/product.h"

#include "cpu/common/caches.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu {
namespace {

// Elements of an fp32 panel of the output: 4 MB stay in a last-level cache, and a call per panel is not felt.
constexpr int64_t kPanel = int64_t{1} << 20, kPanelCols = 1024;
// Bytes of L2 per row of a panel: what is packed of the row stays there, with what passes through.
// Where the arithmetic is twice as fast, what comes back from further away is felt: two blocks' packed rows.
constexpr int64_t kRowBytes = 1024, kPairRowBytes = 2048;
constexpr int64_t kAlign = 32;  // columns; a multiple of every level's tile, and of what the branch needs
// Bytes of a scaled copy of a for the vendor's product, and of codes.
constexpr int64_t kScaledBytes = int64_t{16} << 20;
// Bytes of a quantised W that are decoded at a time for the vendor's product: they are multiplied in a cache.
constexpr int64_t kDecodedBytes = int64_t{8} << 20;
// Narrower fp32 products are computed transposed by the vendor: MKL sums them in chains up to six times less
// accurate than those of the transpose.
constexpr int64_t kNarrow = 16;

int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}
// Size of the parts if n is cut into as few as `most` allows, all alike.
int64_t even(int64_t n, int64_t most, int64_t multiple) {
  return round_up(ceil_div(n, ceil_div(n, most)), multiple);
}

bool narrow(int64_t D, DType dtype) {
  return D < kNarrow && dtype == DType::f32;
}

// The vendor's product of unscaled operands, of D columns of b.
void multiply(const BaseProduct& g, int64_t M, int64_t D, const ConstMatrix& a, const ConstMatrix& b,
              const Matrix& out, KeptScratch& scratch) {
  if (!narrow(D, out.dtype)) {
    g.vendor(M, D, g.C, a, b, out);
    return;
  }
  const Matrix turned{scratch.take(D * M), DType::f32, M, 1};
  g.vendor(D, M, g.C, transposed(b), transposed(a), turned);
  scale_copy({transposed(as_const(turned)), out, M, D, 0, 1.0f, nullptr, nullptr,
              worth_threads(4 * M * D, g.threads)});
}

// Columns of a quantised b that are decoded at a time.
int64_t decoded_cols(const BaseProduct& g) {
  const int64_t column = g.C * element_size(g.out.dtype);
  return std::min(g.D, even(g.D, std::max(kDecodedBytes / column, kAlign), kAlign));
}

// The same of all of b, which may be quantised: `decoded` has room for decoded_cols of its columns.
void product(const BaseProduct& g, int64_t M, const ConstMatrix& a, const Matrix& out, float* decoded,
             KeptScratch& scratch) {
  if (g.quantised == nullptr) {
    multiply(g, M, g.D, a, g.b, out, scratch);
    return;
  }
  const bool turned = g.b.row == 1;  // b is W^T, whose columns are W's rows
  const int64_t most = decoded_cols(g);
  for (int64_t c0 = 0; c0 < g.D; c0 += most) {
    const int64_t cols = std::min(most, g.D - c0);
    const Matrix w{decoded, g.out.dtype, turned ? g.C : cols, 1};
    decode_part({g.quantised, turned ? c0 : 0, turned ? 0 : c0, turned ? cols : g.C, turned ? g.C : cols, w,
                 worth_threads(4 * g.C * cols, g.threads)});
    multiply(g, M, cols, a, turned ? transposed(as_const(w)) : as_const(w), from(out, 0, c0), scratch);
  }
}

}  // namespace

BaseBlocks base_blocks(BaseKind kind, int64_t M, int64_t D, int64_t C, int threads) {
  if (kind == BaseKind::vendor || kind == BaseKind::given) return {M, D};
  // More threads need more to share out.
  const int64_t elements = kPanel * std::clamp(threads / 2, 1, 4);
  BaseBlocks b{even(M, l2_bytes() / (kind == BaseKind::bf16 ? kPairRowBytes : kRowBytes), 1), 0};
  b.cols = std::min(round_up(D, kAlign), even(D, std::max(kPanelCols, elements / b.rows), kAlign));
  b.panel = b.rows * (b.cols + 16);
  if (kind == BaseKind::identity) return b;
  if (kind == BaseKind::few) {
    b.scratch = M * (C + kAlign);
    return b;
  }
  b.scratch = base_gemm_scratch(b.rows, threads);
  return b;
}

void vendor_product(const BaseProduct& g, KeptScratch& scratch) {
  const int64_t size = element_size(g.a.dtype);
  float* decoded = nullptr;
  if (g.quantised != nullptr) decoded = scratch.take(ceil_div(decoded_cols(g) * g.C * size, 4));
  // Of a narrow product the vendor sums what is not adjacent in one chain, and less accurately.
  if (g.scale == nullptr && (g.a.col == 1 || !narrow(g.D, g.out.dtype))) {
    product(g, g.M, g.a, g.out, decoded, scratch);
    return;
  }
  const int64_t rows = std::min(g.M, std::max<int64_t>(kScaledBytes / (g.C * size), 1));
  const Matrix packed{scratch.take(ceil_div(rows * g.C * size, 4)), g.a.dtype, g.C, 1};
  for (int64_t r = 0; r < g.M; r += rows) {
    const int64_t part = std::min(rows, g.M - r);
    scale_copy({from(g.a, r, 0), packed, part, g.C, 0, 1.0f, nullptr, g.scale,
                worth_threads(4 * part * g.C, g.threads)});
    product(g, part, as_const(packed), from(g.out, r, 0), decoded, scratch);
  }
}

Rounded rounded_room(const BaseProduct& g, KeptScratch& scratch) {
  Rounded to;
  to.ld = round_up(g.C, kCodeAlign);
  to.rows = even(g.M, std::max<int64_t>(kScaledBytes / to.ld, 1), 1);
  to.codes = reinterpret_cast<int8_t*>(scratch.take(to.rows * to.ld / 4));
  to.row_scale = scratch.take(to.rows);
  to.row_sum = reinterpret_cast<int32_t*>(scratch.take(to.rows));
  const Quantised& w = *g.quantised;
  const auto* scales = static_cast<const float*>(w.scales);
  if (w.number != Quantised::Number::f32) {
    float* floats = scratch.take(w.N);
    const DType dtype = w.number == Quantised::Number::bf16 ? DType::bf16 : DType::f16;
    scale_copy(
        {{w.scales, dtype, w.N, 1}, {floats, DType::f32, w.N, 1}, 1, w.N, 0, 1.0f, nullptr, nullptr, 1});
    scales = floats;
  }
  (g.b.row == 1 ? to.out : to.in) = scales;
  return to;
}

void round_part(const BaseProduct& g, int threads, const Rounded& to) {
  round_rows({from(g.a, to.begin, 0), std::min(to.rows, g.M - to.begin), g.C, g.scale, to.in, to.codes, to.ld,
              to.row_scale, to.row_sum, threads});
}

void fill_panel(const BaseProduct& g, const Rounded& rounded, int threads, int64_t r0, int64_t r1, int64_t c0,
                int64_t c1, float* panel, int64_t ld, float* room) {
  const int64_t rows = r1 - r0, cols = c1 - c0;
  if (g.kind == BaseKind::identity) {
    scale_copy({from(g.a, r0, c0),
                {panel, DType::f32, ld, 1},
                rows,
                cols,
                0,
                1.0f,
                nullptr,
                g.scale != nullptr ? g.scale + c0 : nullptr,
                worth_threads(4 * rows * cols, g.threads)});
    return;
  }
  const ConstMatrix a = from(g.a, r0, 0), b = g.quantised != nullptr ? g.b : from(g.b, 0, c0);
  BaseArgs args{a.data, a.row, a.col, b.data, b.col, b.row,   a.dtype,     g.scale, panel,
                ld,     rows,  cols,  g.C,    room,  threads, g.quantised, c0};
  if (g.kind == BaseKind::few) {
    base_few(args);
  } else if (g.kind == BaseKind::bf16) {
    base_gemm_bf16(args);
  } else if (g.kind == BaseKind::amx) {
    base_gemm_amx(args);
  } else if (g.kind == BaseKind::int8) {
    const int64_t row = r0 - rounded.begin;
    args.a = rounded.codes + row * rounded.ld, args.a_row = rounded.ld, args.a_col = 1, args.scale = nullptr;
    args.row_scale = rounded.row_scale + row, args.row_sum = rounded.row_sum + row;
    args.col_scale = rounded.out != nullptr ? rounded.out + c0 : nullptr;
    base_gemm_int8(args);
  } else {
    base_gemm(args);
  }
}

}  // namespace peftkern::cpu
