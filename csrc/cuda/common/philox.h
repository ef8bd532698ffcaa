// Dropout bits: Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, SC 2011), one call per 8 columns of a
// row.
#pragma once

#include "cuda/instructions/integers.h"

namespace peftkern::cuda {

// The four words of 8 columns of a row: column e has word e / 2, rotated by 16 bits if e is odd.
struct KeepWords {
  uint32_t word[4];
};
PEFTKERN_DEVICE KeepWords keep_words(uint64_t seed, int64_t row, int64_t group) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  KeepWords words{{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                   static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)}};
  uint32_t (&c)[4] = words.word;
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = multiply_wide(c[0], 0xD2511F53u), p1 = multiply_wide(c[2], 0xCD9E8D57u);
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return words;
}

// Bit e says whether element (row, 8 * group + e) is kept: its 32-bit word is at least the threshold.
PEFTKERN_DEVICE uint32_t keep_bits(uint64_t seed, int64_t row, int64_t group, uint32_t threshold) {
  const KeepWords words = keep_words(seed, row, group);
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t w = words.word[e >> 1], z = e & 1 ? (w << 16) | (w >> 16) : w;
    bits |= static_cast<uint32_t>(z >= threshold) << e;
  }
  return bits;
}

// Zeros for dropped elements of 8 in half precision, two to a word.
PEFTKERN_DEVICE void drop_halves(uint32_t (&halves)[4], uint64_t seed, int64_t row, int64_t group,
                                 uint32_t threshold) {
  const KeepWords words = keep_words(seed, row, group);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = words.word[i], rotated = (w << 16) | (w >> 16);
    halves[i] &= (w >= threshold ? 0xffffu : 0u) | (rotated >= threshold ? 0xffff0000u : 0u);
  }
}

}  // namespace peftkern::cuda
