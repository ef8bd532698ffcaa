// wgmma, one warp at a time: the four warps of a group need not move together.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "sim/async.h"
#include "sim/core.h"

namespace sim {
namespace {

// A 16-bit matrix in shared memory as its descriptor says, in the layouts with 128-byte swizzle: atoms of 8
// rows of 128 bytes. "rows" is the dimension that is not contiguous in memory.
struct Operand {
  Block* block;
  const unsigned char* view;
  uint32_t start, leading, stride;
  bool columns;  // the outer dimension (M or N) is contiguous, not K

  Operand(Block* block, uint64_t descriptor, bool columns)
      : block(block), view(async_view(block)), columns(columns) {
    start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) fail("wgmma: only descriptors with 128-byte swizzle are modelled");
    if ((descriptor >> 49 & 7) != 0 || (start & 0x380) != 0)
      fail("wgmma: an atom that is not aligned to 1024 bytes");
  }

  uint16_t at(unsigned outer, unsigned k) const {
    uint32_t address = columns ? start + outer / 64 * leading + k / 8 * stride + k % 8 * 128 + outer % 64 * 2
                               : start + outer / 8 * stride + outer % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    const unsigned char* from = shared_pointer(block, address, 2, 2, "wgmma operand");
    std::memcpy(&bits, view + (from - block->shared), 2);
    return bits;
  }
};

struct Product {
  Block* block;
  Warp* warp;
  unsigned warp_in_group;
  WarpgroupOperands lane[32];
  uint32_t a[32][4];
  std::shared_ptr<Accumulators> accumulators;
  bool accumulate;

  void run() const {
    const WarpgroupOperands& first = lane[0];
    const auto n = static_cast<unsigned>(first.n);
    float rows[16][16];
    std::vector<float> columns(16 * n);
    if (first.a == nullptr) {
      const Operand operand(block, first.descriptor_a, first.a_columns);
      for (unsigned m = 0; m < 16; ++m)
        for (unsigned k = 0; k < 16; ++k) rows[m][k] = first.value(operand.at(16 * warp_in_group + m, k));
    } else {
      for (unsigned l = 0; l < 32; ++l)
        for (unsigned e = 0; e < 8; ++e) {
          const uint32_t word = a[l][e / 2];
          const auto bits = static_cast<uint16_t>(e % 2 ? word >> 16 : word);
          rows[l / 4 + e / 2 % 2 * 8][l % 4 * 2 + e % 2 + e / 4 * 8] = first.value(bits);
        }
    }
    const Operand operand(block, first.descriptor_b, first.b_columns);
    for (unsigned j = 0; j < n; ++j)
      for (unsigned k = 0; k < 16; ++k) columns[k * n + j] = first.value(operand.at(j, k));
    float sums[16][256] = {};
    for (unsigned m = 0; m < 16; ++m)
      for (unsigned k = 0; k < 16; ++k)
        for (unsigned j = 0; j < n; ++j) sums[m][j] += rows[m][k] * columns[k * n + j];

    const unsigned each = n / 2;
    for (unsigned l = 0; l < 32; ++l)
      for (unsigned i = 0; i < each; ++i) {
        float& value = accumulators->values[l * each + i];
        const float sum = sums[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2];
        value = accumulate ? value + sum : sum;
      }
    if (--accumulators->in_flight == 0) {
      for (unsigned l = 0; l < 32; ++l)
        std::memcpy(lane[l].d, &accumulators->values[l * each], each * sizeof(float));
      warp->accumulators.erase(first.d);
    }
  }
};

void issue(void* const* operands, uint32_t) {
  auto product = std::make_shared<Product>();
  Warp* warp = self->warp;
  product->warp = warp;
  product->block = self->block;
  product->warp_in_group = warp->lanes[0].index.x / 32 % 4;
  for (int l = 0; l < 32; ++l) {
    product->lane[l] = *static_cast<const WarpgroupOperands*>(operands[l]);
    if (product->lane[l].a != nullptr) std::memcpy(product->a[l], product->lane[l].a, 16);
    if (product->lane[l].descriptor_b != product->lane[0].descriptor_b ||
        product->lane[l].descriptor_a != product->lane[0].descriptor_a) {
      fail("wgmma: the lanes of a warp name different descriptors");
    }
  }
  const WarpgroupOperands& first = product->lane[0];
  if (first.n < 8 || first.n > 256 || first.n % 8 != 0) fail("wgmma with n = %d", first.n);
  const auto each = static_cast<size_t>(first.n) / 2;
  std::shared_ptr<Accumulators>& accumulators = warp->accumulators[first.d];
  if (accumulators == nullptr) {
    if (!warp->fenced) fail("wgmma on registers without wgmma.fence since the last wait");
    accumulators = std::make_shared<Accumulators>();
    for (int l = 0; l < 32; ++l) {
      float* d = product->lane[l].d;
      accumulators->values.insert(accumulators->values.end(), d, d + each);
      std::fill(d, d + each, NAN);
    }
  }
  ++accumulators->in_flight;
  product->accumulators = accumulators;
  product->accumulate = first.accumulate;
  warp->products.push_back({[product] { product->run(); }, warp->product_groups});
}

}  // namespace

void product_issue(WarpgroupOperands operands) {
  meet("wgmma", 0xffffffffu, &operands, issue);
}

void product_fence() {
  meet("wgmma.fence", 0xffffffffu, nullptr, [](void* const*, uint32_t) { self->warp->fenced = true; });
}

void product_commit() {
  meet("wgmma.commit_group", 0xffffffffu, nullptr,
       [](void* const*, uint32_t) { ++self->warp->product_groups; });
}

void product_wait(int left) {
  meet("wgmma.wait_group", 0xffffffffu, &left, [](void* const* operands, uint32_t) {
    Warp* warp = self->warp;
    const int64_t limit = warp->product_groups - *static_cast<const int*>(operands[0]);
    while (!warp->products.empty() && warp->products.front().group < limit) run_product(warp);
    if (warp->accumulators.empty()) warp->fenced = false;
  });
}

void run_product(Warp* warp) {
  const WarpOp op = warp->products.front();
  warp->products.erase(warp->products.begin());
  op.complete();
}

}  // namespace sim
