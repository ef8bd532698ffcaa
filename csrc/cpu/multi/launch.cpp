// Launchers of multi_lora_linear: which pieces of work a batch is cut into.
#include "cpu/common/dispatch.h"
#include "cpu/common/kept_scratch.h"
#include "cpu/common/views.h"
#include "cpu/multi/tasks.h"
#include "peftkern/cpu_multi.h"

PEFTKERN_DISPATCH_LOCAL(multi_reduce_run, MultiReduceTask)
PEFTKERN_DISPATCH_LOCAL(multi_expand_run, MultiExpandTask)

namespace peftkern::cpu {
namespace {

// Rows whose sums are a part, at least; a part is a whole number of tiles of rows.
constexpr int64_t kPartRows = 96, kTileRowsMultiple = 24;
// With larger gradients than this, too few parts fit into the scratch to occupy the threads: the activation
// is read twice, by rows for the dots and by columns for the sums.
constexpr int64_t kFusedFloats = int64_t{1} << 20;
// Rows of a unit that makes dots alone: enough to pay for a packed panel.
constexpr int64_t kDotUnitRows = 96, kDotRowsMultiple = 6, kDotRanksMultiple = 4;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

MultiSegment segment_of(const MultiBatch& batch, const MultiGroup& g, Side side) {
  MultiSegment s{};
  s.rows = g.rows, s.count = g.count, s.R = g.R, s.padded = g.padded;
  s.p = g.panel[static_cast<int>(side)];
  s.alpha = side == Side::B ? g.scaling : g.keep_scale;
  if (side == Side::A) s.dropout = {batch.seed, g.threshold, 0, 0};
  s.row_scale = side == Side::B ? g.vector[kD] : nullptr;
  s.col_scale = g.vector[side == Side::B ? kGd : kPd];
  s.base_scale = g.vector[side == Side::B ? kGb : kPb];
  s.bias = side == Side::B ? g.vector[kBeta] : nullptr;
  s.own_bias = g.vector[kBeta] != nullptr;
  return s;
}

int64_t largest_rank(const MultiBatch& batch) {
  int64_t R = 0;
  for (const MultiGroup& g : batch.groups) R = std::max(R, g.R);
  return R;
}

// The units of a reduction, run whenever their partial sums fill the scratch.
class Reduction {
 public:
  Reduction(const MultiBatch& batch, const MultiReduceArgs& args)
      : batch_(batch), args_(args), Cpad_(padded(args.C)) {
    task_.in = args.in, task_.C = args.C, task_.dot = args.dot, task_.v = args.v, task_.ld = args.ld;
    task_.colsum = args.colsum;
    task_.threads = args.threads;
    task_.scratch_floats = largest_rank(batch) * kReduceFloatsPerRank + kFewRows * few_row(args.C);
    task_.scratch_floats = round_up(task_.scratch_floats, 16);
    task_.scratch = scratch_.take(task_.scratch_floats * args.threads);
    segments_.reserve(batch.groups.size());
    for (const MultiGroup& g : batch.groups) segments_.push_back(segment(g));
  }

  void run() {
    std::fill_n(args_.colsum, args_.colsum != nullptr ? args_.C : 0, 0.0f);
    for (const MultiSegment& s : segments_) {
      const bool outer = s.grad.data != nullptr || s.col_grad != nullptr, fused = s.R * Cpad_ <= kFusedFloats;
      if (args_.dot != nullptr && fused && (outer || adds(s))) {
        parts(s, outer);
        continue;
      }
      if (args_.dot != nullptr) dots(s);
      if (outer || adds(s)) columns(s, outer);
    }
    flush();
  }

 private:
  // Whether its rows are part of the column sums.
  bool adds(const MultiSegment& s) const { return args_.colsum != nullptr && !s.own_bias; }

  MultiSegment segment(const MultiGroup& g) const {
    MultiSegment s = segment_of(batch_, g, args_.side);
    const int side = static_cast<int>(args_.side);
    const int64_t floats = s.R * Cpad_;
    s.part_rows = round_up(divide_up(s.count, part_count(s.count, kPartRows, floats)), kTileRowsMultiple);
    if (args_.grads != nullptr && floats > 0) {
      const Matrix whole{(*args_.grads)[g.tensor[side]], batch_.adapters.dtype, s.p.row, s.p.col};
      if (whole.data != nullptr)
        s.grad = {static_cast<char*>(whole.data) + g.offset[side] * element_size(whole.dtype), whole.dtype,
                  whole.row, whole.col};
    }
    if (args_.vector_grads != nullptr && floats > 0)
      s.col_grad = vector_grad(g, args_.side == Side::B ? kGd : kPd, *args_.vector_grads);
    return s;
  }

  // Dots and sums in one pass, part by part.
  void parts(const MultiSegment& s, bool outer) {
    const int64_t count = divide_up(s.count, s.part_rows), floats = s.R * Cpad_;
    const bool several = outer && count > 1;
    reserve(several ? count * floats : 0, count);
    for (int64_t i = 0; i < s.count; i += s.part_rows) {
      const int64_t sums = several ? sums_ + i / s.part_rows * floats : -1;
      units_.push_back(
          {&s, i, std::min(s.count, i + s.part_rows), 0, args_.C, 0, s.R, true, outer, sums, colsum(s, 1)});
    }
    if (!several) return;
    const int64_t step = round_up(divide_up(args_.C, args_.threads), kMultiTileCols);
    for (int64_t c = 0; c < args_.C; c += step) {
      finish_.push_back({&s, 0, count, c, std::min(args_.C, c + step), 0, s.R, false, true, sums_});
    }
    sums_ += count * floats;
  }

  void dots(const MultiSegment& s) {
    const int64_t share = divide_up(batch_.M, 4 * args_.threads);
    const int64_t rows = s.R > 0 ? std::min(round_up(share, kDotRowsMultiple), kDotUnitRows) : s.count;
    const int64_t ways = divide_up(2 * args_.threads, divide_up(batch_.M, rows));
    const int64_t ranks = std::max<int64_t>(round_up(divide_up(s.R, ways), kDotRanksMultiple), 1);
    for (int64_t i = 0; i < s.count; i += rows) {
      // Without a rank there is still a row to be zeroed.
      for (int64_t r = 0; r == 0 || r < s.R; r += ranks) {
        units_.push_back({&s, i, std::min(s.count, i + rows), 0, args_.C, r, std::min(s.R, r + ranks), true});
      }
    }
  }

  // Sums alone: every thread takes some of the columns, for all rows.
  void columns(const MultiSegment& s, bool outer) {
    const int64_t tiles = divide_up(args_.C, kMultiTileCols);
    const int64_t all = tiles * static_cast<int64_t>(segments_.size());
    const int64_t step = std::clamp<int64_t>(all / (8 * args_.threads), 1, tiles) * kMultiTileCols;
    const int64_t count = divide_up(s.count, s.part_rows);
    reserve(0, count);
    const int64_t row = colsum(s, count);
    for (int64_t c = 0; c < args_.C; c += step) {
      units_.push_back({&s, 0, s.count, c, std::min(args_.C, c + step), 0, s.R, false, outer, -1, row});
    }
  }

  // Runs what is there if the scratch cannot also take this. When that is depends on sizes alone.
  void reserve(int64_t sums, int64_t colsums) {
    if (args_.colsum != nullptr) sums += colsums * Cpad_;
    if (sums_ + colsums_ * Cpad_ + sums > kMaxScratchFloats) flush();
  }

  // The first of `count` new rows.
  int64_t colsum(const MultiSegment& s, int64_t count) {
    if (!adds(s)) return -1;
    return (colsums_ += count) - count;
  }

  void flush() {
    if (!units_.empty()) {
      KeptScratch scratch;
      task_.sums = scratch.take(sums_ + colsums_ * Cpad_), task_.colsums = task_.sums + sums_;
      task_.colsum_count = colsums_;
      task_.units = units_.data(), task_.count = static_cast<int64_t>(units_.size());
      task_.finish = finish_.data(), task_.finish_count = static_cast<int64_t>(finish_.size());
      multi_reduce_run(task_);
    }
    units_.clear(), finish_.clear();
    sums_ = colsums_ = 0;
  }

  const MultiBatch& batch_;
  const MultiReduceArgs& args_;
  const int64_t Cpad_;
  MultiReduceTask task_{};
  KeptScratch scratch_;
  std::vector<MultiSegment> segments_;
  std::vector<MultiUnit> units_, finish_;
  int64_t sums_ = 0, colsums_ = 0;  // floats and rows in use
};

}  // namespace

void multi_reduce(const MultiBatch& batch, const MultiReduceArgs& args) {
  Reduction(batch, args).run();
}

void multi_expand(const MultiBatch& batch, const MultiExpandArgs& args) {
  const bool in_place = args.src.data == args.out.data;
  std::vector<MultiSegment> segments;
  segments.reserve(batch.groups.size());
  int64_t row_units = 0;
  for (const MultiGroup& g : batch.groups) {
    MultiSegment s = segment_of(batch, g, args.side);
    if (s.bias == nullptr) s.bias = args.bias;
    if (in_place && s.R == 0 && s.base_scale == nullptr && s.bias == nullptr) continue;
    const int32_t* begin = std::lower_bound(g.rows, g.rows + g.count, args.row0);
    const int32_t* end = std::lower_bound(begin, g.rows + g.count, args.row0 + args.rows);
    if (begin == end) continue;
    s.rows = begin, s.count = end - begin;
    segments.push_back(s);
    row_units += divide_up(s.count, kExpandRows);
  }
  if (segments.empty()) return;
  const int64_t tiles = divide_up(args.cols, kMultiTileCols);
  const int64_t ways = std::clamp<int64_t>(divide_up(8 * args.threads, row_units), 1, tiles);
  const int64_t step = divide_up(tiles, ways) * kMultiTileCols;
  std::vector<MultiUnit> units;
  units.reserve(static_cast<size_t>(row_units * divide_up(args.cols, step)));
  for (const MultiSegment& s : segments) {
    for (int64_t i = 0; i < s.count; i += kExpandRows) {
      for (int64_t c = 0; c < args.cols; c += step) {
        units.push_back(
            {&s, i, std::min(s.count, i + kExpandRows), c, std::min(args.cols, c + step), 0, s.R});
      }
    }
  }
  MultiExpandTask task{};
  task.units = units.data(), task.count = static_cast<int64_t>(units.size());
  task.out = args.out, task.src = args.src;
  task.row0 = args.row0, task.col0 = args.col0;
  task.v = args.v, task.ld = args.ld;
  task.scratch_floats = round_up(largest_rank(batch) * kExpandFloatsPerRank, 16);
  task.threads = args.threads;
  KeptScratch scratch;
  task.scratch = scratch.take(task.scratch_floats * args.threads);
  multi_expand_run(task);
}

}  // namespace peftkern::cpu
