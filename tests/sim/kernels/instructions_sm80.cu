// One kernel per instruction: operands from memory, results to memory, nothing else. The tests know the
// layouts.
#include "cuda/instructions/convert.h"
#include "cuda/instructions/copy_async.h"
#include "cuda/instructions/launch.h"
#include "cuda/instructions/memory.h"
#include "cuda/instructions/mma.h"
#include "cuda/instructions/sync.h"
#include "cuda/instructions/warp.h"
#include "export.h"

namespace peftkern::cuda {
namespace {

// a (32, 4), b (32, 2), d (32, 4): a lane's registers in each row.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = lane_index();
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) rd[i] = d[4 * lane + i];
  mma_16x8x16<T>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = rd[i];
}

// rows (512) 16-bit values, 8 a row; where (32): the row whose address a lane gives; out (32, Count).
template <int Count, bool Transposed>
__global__ void load_matrices_kernel(const uint16_t* values, const int* where, uint32_t* out) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = lane_index();
  for (int i = lane; i < 512; i += 32) shared[i] = values[i];
  sync_warp();
  uint32_t words[Count];
  load_matrices<Count, Transposed>(words, shared_address(shared + 8 * where[lane]));
  for (int i = 0; i < Count; ++i) out[Count * lane + i] = words[i];
}

// out (32, 8): every exchange of the lane's value.
__global__ void warp_kernel(const uint32_t* values, int argument, uint32_t* out) {
  const int lane = lane_index();
  const uint32_t v = values[lane];
  uint32_t* mine = out + 8 * lane;
  mine[0] = shuffle(v, argument + lane);
  mine[1] = shuffle_up(v, static_cast<unsigned>(argument));
  mine[2] = shuffle_down(v, static_cast<unsigned>(argument));
  mine[3] = shuffle_xor(v, argument);
  mine[4] = ballot(v % 3 == 0);
  mine[5] = vote_any(v % 3 == 0);
  mine[6] = vote_all(v % 3 == 0);
  // Two groups of lanes, each with a mask of its own.
  mine[7] = lane < 10 ? ballot(v % 2 == 0, 0x3ffu) : ballot(v % 2 == 1, ~0x3ffu);
}

// Only some of the lanes named arrive.
__global__ void diverged_kernel(uint32_t* out) {
  if (threadIdx.x < 31) out[threadIdx.x] = ballot(true);
}

__global__ void convert_kernel(const float* values, int count, uint16_t* to_bf16, uint16_t* to_f16,
                               float* back_bf16, float* back_f16, uint32_t* packed) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const bf16 b = from_float<bf16>(values[i]);
  const f16 h = from_float<f16>(values[i]);
  to_bf16[i] = b.bits;
  to_f16[i] = h.bits;
  back_bf16[i] = to_float(b);
  back_f16[i] = to_float(h);
  packed[2 * i] = pack<bf16>(values[i], 1.0f);
  packed[2 * i + 1] = pack<f16>(1.0f, values[i]);
}

// A block copies its part of `in` to `out` through shared memory, Bytes at a time; the last piece may be
// short.
template <int Bytes>
__global__ void copy_kernel(const unsigned char* in, int bytes, unsigned char* out) {
  unsigned char* shared = shared_memory();
  const int t = static_cast<int>(threadIdx.x), at = (static_cast<int>(blockIdx.x * blockDim.x) + t) * Bytes;
  const int left = bytes - at, valid = left < 0 ? 0 : left < Bytes ? left : Bytes;
  copy_async<Bytes>(shared_address(shared + t * Bytes), valid > 0 ? in + at : in, valid);
  copy_commit();
  copy_wait<0>();
  sync_threads();
  const int other = static_cast<int>(blockDim.x) - 1 - t;  // written by another thread
  for (int i = 0; i < Bytes; ++i) {
    out[(static_cast<int>(blockIdx.x * blockDim.x) + other) * Bytes + i] = shared[other * Bytes + i];
  }
}

// counters: sum, maximum, count modulo 5.
__global__ void atomic_kernel(uint32_t* counters, uint32_t* old) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  old[i] = atomic_add(&counters[0], 1);
  atomic_max(&counters[1], i * 7 % 101);
  atomic_count(&counters[2], 5);
}

// Warp 0 makes values, warp 1 uses them; each waits for the other at a barrier of its own.
__global__ void handover_kernel(int rounds, uint32_t* out) {
  auto* slot = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t lane = static_cast<uint32_t>(lane_index());
  for (int i = 0; i < rounds; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) barrier_sync<2>(64);
      slot[lane] = static_cast<uint32_t>(i) * 100 + lane;
      barrier_arrive<1>(64);
    } else {
      barrier_sync<1>(64);
      out[static_cast<uint32_t>(i) * 32 + lane] = slot[31 - lane];
      if (i + 1 < rounds) barrier_arrive<2>(64);
    }
  }
}

template <class T>
__global__ void load_once_kernel(const T* in, T* out) {
  out[threadIdx.x] = load_once(in + threadIdx.x);
}

}  // namespace
}  // namespace peftkern::cuda

using namespace peftkern::cuda;

PEFTKERN_EXPORT const char* sim_mma(int is_f16, const uint32_t* a, const uint32_t* b, float* d) {
  return launch({{1}, {32}}, is_f16 ? mma_kernel<peftkern::f16> : mma_kernel<peftkern::bf16>, a, b, d);
}

PEFTKERN_EXPORT const char* sim_load_matrices(int count, int transposed, const uint16_t* values,
                                              const int* where, uint32_t* out) {
  const auto kernel =
      count == 4   ? (transposed ? load_matrices_kernel<4, true> : load_matrices_kernel<4, false>)
      : count == 2 ? (transposed ? load_matrices_kernel<2, true> : load_matrices_kernel<2, false>)
                   : (transposed ? load_matrices_kernel<1, true> : load_matrices_kernel<1, false>);
  return launch({{1}, {32}, 1024}, kernel, values, where, out);
}

PEFTKERN_EXPORT const char* sim_warp(const uint32_t* values, int argument, uint32_t* out) {
  return launch({{1}, {32}}, warp_kernel, values, argument, out);
}

PEFTKERN_EXPORT const char* sim_diverged(uint32_t* out) {
  return launch({{1}, {32}}, diverged_kernel, out);
}

PEFTKERN_EXPORT const char* sim_convert(const float* values, int count, uint16_t* to_bf16, uint16_t* to_f16,
                                        float* back_bf16, float* back_f16, uint32_t* packed) {
  const auto blocks = static_cast<unsigned>((count + 127) / 128);
  return launch({{blocks}, {128}}, convert_kernel, values, count, to_bf16, to_f16, back_bf16, back_f16,
                packed);
}

PEFTKERN_EXPORT const char* sim_copy(int each, const unsigned char* in, int bytes, unsigned blocks,
                                     unsigned char* out) {
  const auto kernel = each == 16 ? copy_kernel<16> : each == 8 ? copy_kernel<8> : copy_kernel<4>;
  return launch({{blocks}, {64}, static_cast<size_t>(64 * each)}, kernel, in, bytes, out);
}

PEFTKERN_EXPORT const char* sim_atomics(unsigned blocks, unsigned threads, uint32_t* counters,
                                        uint32_t* old) {
  return launch({{blocks}, {threads}}, atomic_kernel, counters, old);
}

PEFTKERN_EXPORT const char* sim_handover(int rounds, uint32_t* out) {
  return launch({{1}, {64}, 128}, handover_kernel, rounds, out);
}

PEFTKERN_EXPORT const char* sim_load_once(int bytes, const unsigned char* in, unsigned char* out) {
  if (bytes == 16) {
    return launch({{1}, {32}}, load_once_kernel<Vec16>, reinterpret_cast<const Vec16*>(in),
                  reinterpret_cast<Vec16*>(out));
  }
  return launch({{1}, {32}}, load_once_kernel<uint32_t>, reinterpret_cast<const uint32_t*>(in),
                reinterpret_cast<uint32_t*>(out));
}
