// A matrix of bf16 as dropout leaves it, for products that read it as it is.
#include "cpu/common/thread.h"
#include "cpu/lora/drop_rows.h"
#include "peftkern/cpu.h"

namespace peftkern::cpu::PEFTKERN_LEVEL {

void drop_copy(const DropCopyArgs& a) {
  const auto* in = static_cast<const bf16*>(a.in.data);
  auto* out = static_cast<bf16*>(a.out.data);
  parallel(a.threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.rows; ++i)
      drop_rows(a.dropout, i, 0, 1, a.cols, in + i * a.in.row, a.in.row, out + i * a.out.row, a.out.row);
  });
}

}  // namespace peftkern::cpu::PEFTKERN_LEVEL
