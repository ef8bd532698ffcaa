// What enters a base product: each row times its adapter's p_b, rows without one as they are.
#include "cuda/instructions/launch.h"
#include "cuda/sgmv/output.h"

namespace peftkern::cuda {
namespace {

constexpr int kThreads = 128, kColumns = 8 * kThreads;  // a block takes so many columns of a row

template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const SgmvArgs args, int chunks) {
  const int position = static_cast<int>(blockIdx.x) / chunks, chunk = static_cast<int>(blockIdx.x) % chunks;
  const int slots = static_cast<int>(args.slots);
  const int slot = find_segment(slots + 2, position, [&](int s) { return args.starts[s]; });
  const int64_t* table = args.table + int64_t{slot} * cpu::kMultiColumns;
  // sgmv_add makes rows of NaN of those that are not known.
  const float* scale = slot < slots && known(args, table, true) ? vector_of(args, table, cpu::kPb) : nullptr;

  const int64_t row = args.order[position];
  const int n = chunk * kColumns + 8 * static_cast<int>(threadIdx.x), left = static_cast<int>(args.K) - n;
  const T* from = static_cast<const T*>(args.x) + row * args.x_row + n;
  T* to = static_cast<T*>(args.out) + row * args.out_row + n;
  Run<T> run;
  run.load(from, left);
  float factor[8];
  load_vector(factor, scale, n, left, 1.0f);
  run.store(to, from, left, [&](int e, float was) { return was * factor[e]; });
}

}  // namespace

const char* scale_rows(const SgmvArgs& args) {
  if (args.M == 0 || args.K == 0) return nullptr;
  const int64_t chunks = (args.K + kColumns - 1) / kColumns, blocks = args.M * chunks;
  if (args.K > 0x7fffffff - kColumns || blocks > 0x7fffffff) return "cudaErrorInvalidConfiguration";
  const Launch how{{static_cast<unsigned>(blocks)}, {kThreads}, 0, args.stream};
  switch (args.dtype) {
    case DType::bf16:
      return launch(how, scale_rows_kernel<bf16>, args, static_cast<int>(chunks));
    case DType::f16:
      return launch(how, scale_rows_kernel<f16>, args, static_cast<int>(chunks));
    default:
      return "cudaErrorInvalidValue";
  }
}

}  // namespace peftkern::cuda
