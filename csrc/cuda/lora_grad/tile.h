// Stages of `in` and of v in shared memory, for the pass that makes the adapters' gradients.
#pragma once

#include "cuda/common/philox.h"
#include "cuda/common/split.h"
#include "cuda/instructions/copy_async.h"
#include "cuda/lora_grad/plan.h"

namespace peftkern::cuda {

constexpr int kGradStageBytes = kGradRows * kGradRowBytes;

// Where a block works.
struct GradBlock {
  int64_t strip, range, column0, row0, row1, rank0;
  int stages;
};

PEFTKERN_DEVICE GradBlock grad_block(const LoraGradArgs& args, const GradPlan& plan) {
  GradBlock b;
  int64_t rest = blockIdx.x;  // chunks are neighbours: all but the first find `in` in L2
  b.rank0 = rest % plan.chunks * plan.ranks;
  rest /= plan.chunks;
  b.strip = rest % plan.strips;
  b.range = rest / plan.strips;
  b.column0 = b.strip * kGradColumns;
  b.row0 = b.range * plan.range_rows;
  b.row1 = b.row0 + plan.range_rows < args.M ? b.row0 + plan.range_rows : args.M;
  b.stages = static_cast<int>((b.row1 - b.row0 + kGradRows - 1) / kGradRows);
  return b;
}

// A thread's four pieces of a stage: 8 columns of rows w, w + 8, w + 16 and w + 24, w its warp. What lies
// outside becomes zero.
class GradTile {
 public:
  PEFTKERN_DEVICE GradTile(const LoraGradArgs& args, const GradBlock& block) {
    const int t = static_cast<int>(threadIdx.x);
    const int64_t column = block.column0 + t % 32 * 8, left = args.C - column, row = block.row0 + t / 32;
    columns_ = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    rows_ = columns_ > 0 ? static_cast<int>(block.row1 - row) : 0;
    source_ = static_cast<const uint16_t*>(args.in.data) + row * args.in.row + column;
    vector_ = reinterpret_cast<uintptr_t>(args.in.data) % 16 == 0 && args.in.row % 8 == 0;
  }

  // Starts copies of the next stage, into the slot of the one kGradStages before.
  PEFTKERN_DEVICE void load(const LoraGradArgs& args, unsigned char* ring, int stage) {
    unsigned char* to = ring + place(stage);
    const int64_t step = 8 * args.in.row;
    if (!vector_) {
      load_by_element(to, step);
    } else if (rows_ > kGradRows - 8 && columns_ == 8) {
#pragma unroll
      for (int j = 0; j < kGradRows / 8; ++j) {
        copy_async<16>(shared_address(to + 8 * j * kGradRowBytes), source_ + j * step);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kGradRows / 8; ++j) {
        // An address past the last row is never read.
        copy_async<16>(shared_address(to + 8 * j * kGradRowBytes), source_ + j * step,
                       8 * j < rows_ ? 2 * columns_ : 0);
      }
    }
    source_ += kGradRows / 8 * step;
    rows_ -= kGradRows;
  }

  // Zeros for what is dropped. Before others read the stage: these are the pieces this thread has loaded.
  PEFTKERN_DEVICE void drop(const LoraGradArgs& args, const GradBlock& block, unsigned char* ring, int stage,
                            uint64_t seed) const {
    const int t = static_cast<int>(threadIdx.x);
    const int64_t row = block.row0 + stage * kGradRows + t / 32, group = block.column0 / 8 + t % 32;
    unsigned char* pieces = ring + place(stage);
#pragma unroll 2
    for (int j = 0; j < kGradRows / 8; ++j) {
      auto* at = reinterpret_cast<Vec16*>(pieces + 8 * j * kGradRowBytes);
      Vec16 piece = *at;
      drop_halves(piece.word, seed, row + 8 * j, group, args.dropout.threshold);
      *at = piece;
    }
  }

 private:
  PEFTKERN_DEVICE static int place(int stage) {
    const int t = static_cast<int>(threadIdx.x);
    return stage % kGradStages * kGradStageBytes + t / 32 * kGradRowBytes + t % 32 * 16;
  }

  PEFTKERN_DEVICE void load_by_element(unsigned char* to, int64_t step) const {
#pragma unroll 1
    for (int j = 0; j < kGradRows / 8; ++j) {
      const uint16_t* from = source_ + j * step;
      Vec16 piece;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = 8 * j < rows_ && 2 * w < columns_ ? from[2 * w] : 0;
        const uint32_t high = 8 * j < rows_ && 2 * w + 1 < columns_ ? from[2 * w + 1] : 0;
        piece.word[w] = low | high << 16;
      }
      *reinterpret_cast<Vec16*>(to + 8 * j * kGradRowBytes) = piece;
    }
  }

  const uint16_t* source_;  // of the next stage to load
  int rows_;                // that are left, from the next stage's first on
  int columns_;             // that exist
  bool vector_;
};

// Words of v's terms in a stage.
__host__ PEFTKERN_DEVICE constexpr int grad_words(int ranks, int terms) {
  return kGradRows / 2 * ranks * terms;
}

// v's terms as the left operand of a product over rows, in the order in which lanes hold it: [16 rows][16
// ranks][term][lane][4 words], a word being two rows of a rank. A thread has one rank and one or two pairs of
// rows of every stage.
template <int Terms>
class GradVector {
 public:
  PEFTKERN_DEVICE GradVector(const LoraGradArgs& args, const GradPlan& plan, const GradBlock& block,
                             uint32_t* fragments)
      : ranks_(plan.ranks), R_(args.R), fragments_(fragments) {
    const int t = static_cast<int>(threadIdx.x), pair = t / ranks_, r = t % ranks_ % 16;
    const int64_t row = block.row0 + 2 * pair, rank = block.rank0 + t % ranks_;
    rows_ = rank < R_ ? static_cast<int>(block.row1 - row) : 0;
    source_ = args.v + row * R_ + rank;
    scale_ = args.v_scale != nullptr && rank < R_ ? args.v_scale[rank] : 1.0f;
    const int tile = pair / 8 * (ranks_ / 16) + t % ranks_ / 16;
    at_ = tile * Terms * 128 + (r % 8 * 4 + pair % 4) * 4 + r / 8 + pair % 8 / 4 * 2;
  }

  PEFTKERN_DEVICE void fetch(int stage) {
    const float* from = source_ + static_cast<int64_t>(stage) * kGradRows * R_;
    const int left = rows_ - stage * kGradRows;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      values_[0][e] = e < left ? from[e * R_] : 0.0f;
      values_[1][e] = ranks_ == 32 && 16 + e < left ? from[(16 + e) * R_] : 0.0f;
    }
  }

  // Stores what was fetched last.
  PEFTKERN_DEVICE void store(int stage) const {
    uint32_t* to = fragments_ + stage % 2 * grad_words(ranks_, Terms) + at_;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && ranks_ == 16) break;
      uint32_t terms[Terms];
      split<Terms>(values_[j][0] * scale_, values_[j][1] * scale_, terms);
#pragma unroll
      for (int i = 0; i < Terms; ++i) to[(2 * j * Terms + i) * 128] = terms[i];
    }
  }

  // A lane's words of 16 rows and 16 ranks.
  PEFTKERN_DEVICE void load(uint32_t (&words)[Terms][4], int stage, int row_tile, int rank_tile,
                            int lane) const {
    const int tile = row_tile * (ranks_ / 16) + rank_tile;
    const uint32_t* from = fragments_ + stage % 2 * grad_words(ranks_, Terms) + tile * Terms * 128 + lane * 4;
#pragma unroll
    for (int i = 0; i < Terms; ++i) {
      const Vec16 four = *reinterpret_cast<const Vec16*>(from + i * 128);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[i][w] = four.word[w];
    }
  }

 private:
  int ranks_, rows_, at_;
  int64_t R_;
  const float* source_;
  uint32_t* fragments_;
  float scale_, values_[2][2];
};

}  // namespace peftkern::cuda
