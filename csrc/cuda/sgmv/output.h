// What becomes of the columns of a row, 8 adjacent ones at a time:
//
//   out = g_b base + g_d branch + bias      base: out itself, or `src`; bias: the adapter's, else the layer's
//
// In a launch without vectors, which adds no bias either, that is one addition.
#pragma once

#include "cuda/common/pieces.h"
#include "cuda/common/split.h"
#include "cuda/instructions/memory.h"
#include "cuda/sgmv/sgmv.h"

namespace peftkern::cuda {

// Up to 8 adjacent values of a row of halves.
template <class T>
struct Run {
  Vec16 words;

  PEFTKERN_DEVICE static bool at_once(const T* p, int left) {
    return left >= 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }

  PEFTKERN_DEVICE void load(const T* p, int left) {
    if (at_once(p, left)) words = *reinterpret_cast<const Vec16*>(p);
  }

  // to[e] = make(e, from[e]), where `from` is what was loaded, and may be `to`.
  template <class Make>
  PEFTKERN_DEVICE void store(T* to, const T* from, int left, const Make& make) {
    if (at_once(from, left) && at_once(to, left)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = low_half<T>(words.word[i]), high = high_half<T>(words.word[i]);
        words.word[i] = pack<T>(make(2 * i, low), make(2 * i + 1, high));
      }
      *reinterpret_cast<Vec16*>(to) = words;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < left) to[e] = from_float<T>(make(e, to_float(from[e])));
      }
    }
  }
};

template <class T, bool Vectors>
struct Output {
  const SgmvArgs& args;
  const float *g_b = nullptr, *g_d = nullptr, *beta = nullptr;

  PEFTKERN_DEVICE explicit Output(const SgmvArgs& args) : args(args) {}

  // Those of the adapter in a row of the table.
  PEFTKERN_DEVICE void find(const int64_t* row) {
    if constexpr (Vectors) {
      g_b = vector_of(args, row, cpu::kGb), g_d = vector_of(args, row, cpu::kGd);
      beta = vector_of(args, row, cpu::kBeta);
    }
  }

  // Columns first to last - 1 of the vectors on their way to L2, by a warp each; first is a multiple of 4.
  PEFTKERN_DEVICE void prefetch(int warp, int first, int last) const {
    const float* v = warp == 0 ? g_b : warp == 1 ? g_d : warp == 2 ? beta : nullptr;
    const int count = (last - first) / 4;  // of 16 bytes
    if (v == nullptr || count == 0 || reinterpret_cast<uintptr_t>(v) % 16 != 0 || lane_index() != 0) return;
    prefetch_bulk(v + first, static_cast<uint32_t>(16 * count));
  }

  // Whether rows change that have no branch.
  PEFTKERN_DEVICE bool acts_alone() const {
    return Vectors && (args.bias != nullptr || args.src != nullptr || g_b != nullptr || beta != nullptr);
  }

  PEFTKERN_DEVICE T* to(int64_t row) const { return static_cast<T*>(args.out) + row * args.out_row; }
  PEFTKERN_DEVICE const T* from(int64_t row) const {
    return Vectors && args.src != nullptr ? static_cast<const T*>(args.src) + row * args.src_row : to(row);
  }

  // Columns n to n + 7 of a row, as many as are left; `base` has loaded them.
  PEFTKERN_DEVICE void store(int64_t row, int n, int left, Run<T>& base, const float (&branch)[8]) const {
    if constexpr (!Vectors) {
      base.store(to(row) + n, from(row) + n, left, [&](int e, float was) { return was + branch[e]; });
    } else {
      // With neutral elements for what is absent: the bits of a launch without vectors.
      float of_base[8], of_branch[8], bias[8];
      load_vector(of_base, g_b, n, left, 1.0f);
      load_vector(of_branch, g_d, n, left, 1.0f);
      if (beta != nullptr || args.bias_dtype == DType::f32) {
        load_vector(bias, beta != nullptr ? beta : static_cast<const float*>(args.bias), n, left, -0.0f);
      } else {
        load_vector(bias, static_cast<const T*>(args.bias), n, left, -0.0f);
      }
      base.store(to(row) + n, from(row) + n, left,
                 [&](int e, float was) { return of_base[e] * was + of_branch[e] * branch[e] + bias[e]; });
    }
  }
};

}  // namespace peftkern::cuda
