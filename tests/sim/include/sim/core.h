// The simulator's view of a running grid, and what host bodies of instructions may do to it.
//
// Threads are fibers on one OS thread. A fiber runs until an instruction blocks it or yields; which fiber
// goes on is random. Everything asynchronous completes at a random later time, or as late as the program
// allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace sim {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Thread;
struct Warp;
struct Block;

// One cp.async: bytes of dst, of which `valid` come from src and the rest are zero.
struct CopyOp {
  unsigned char* dst;
  const unsigned char* src;
  int bytes, valid;
  int64_t group;
};

// A store that other threads may not see yet.
struct LateStore {
  unsigned char* dst;
  unsigned char value[16];
  int bytes;
  Block* block;  // whose shared memory it goes to, if it does
};

struct Thread {
  Dim index;
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  void* context = nullptr;      // where the fiber goes on
  const char* waits = nullptr;  // what blocks it, for the report
  bool done = false;
  bool waited = false;         // has called grid_wait
  std::function<bool()> poll;  // set while it spins
  std::vector<CopyOp> copies;
  int64_t copy_groups = 0;
  int64_t cluster_phase = -1;  // the last phase of the cluster's barrier at which it arrived
  bool cluster_waits = false;  // has arrived and not waited yet
  std::vector<LateStore> stores;
};

// Lanes of a warp that meet: each leaves its operands, the last one computes for all.
struct Meeting {
  const char* kind;
  uint32_t members, arrived;
  void* operands[32];
};

// An asynchronous tensor-core product of one warp; queues complete in order.
struct WarpOp {
  std::function<void()> complete;
  int64_t group;
};

// Accumulators of a product in flight; the registers hold NaN until it is done.
struct Accumulators {
  std::vector<float> values;
  int in_flight = 0;
};

struct Warp {
  Thread lanes[32];
  uint32_t present = 0, runnable = 0;
  double priority = 0;
  std::vector<Meeting> meetings;
  std::vector<WarpOp> products;
  int64_t product_groups = 0;
  std::map<float*, std::shared_ptr<Accumulators>> accumulators;  // by lane 0's registers
  bool fenced = false;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

// Who knows of a barrier that a thread has initialised: its block, the TMA unit too, the cluster too.
enum class Known { kBlock, kTma, kCluster };

struct TransactionBarrier {
  int count = 0, pending = 0;
  Thread* maker = nullptr;
  Known known = Known::kBlock;
  bool cluster = false;  // threads of other blocks arrive here
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Cluster {
  unsigned size = 1;
  unsigned alive = 0,
           missing = 0;  // threads: not exited; of those, not arrived at the barrier's present phase
  unsigned exited = 0;   // blocks
  int64_t phase = 0;
  std::vector<Block*> blocks;
};

struct Block {
  Dim index, size, grid;
  unsigned cluster_rank = 0;
  std::shared_ptr<Cluster> cluster;
  unsigned char* shared = nullptr;  // the kernel's dynamic shared memory
  uint32_t shared_base = 0;         // its address in the shared window; low bits as those of the pointer
  size_t shared_bytes = 0;
  int alive = 0;
  bool exited = false;                    // but others of the cluster have not
  std::vector<unsigned char> async_view;  // shared memory as wgmma sees it, if anything has been seen
  std::vector<std::unique_ptr<Warp>> warps;
  NamedBarrier barriers[16];
  std::map<uint32_t, TransactionBarrier> transactions;  // by shared address
  std::vector<LateStore> stores;                        // of threads that have passed a barrier since
};

// What reaches a block's shared memory by itself, not there yet: a copy by the TMA unit, an arrival from
// another block.
struct BulkOp {
  std::function<void()> complete;
  Block* block;
  const char* what;
  Thread* arrives;  // of an arrival
};

enum Schedule { kUniform, kPriority };
enum Completion { kRandom, kLatest };

struct Config {
  uint64_t seed = 0;
  Schedule schedule = kPriority;
  Completion completion = kRandom;
  unsigned resident = 0;  // blocks that run at the same time; 0: random
  unsigned last = 0;      // clusters that run at all, the last ones of the grid; 0: every one
};

struct LaunchShape {
  Dim grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
  bool dependent = false;
};

extern thread_local Thread* self;

// Runs a whole grid. Returns null, or a description of the first error (valid until the next launch).
const char* run(const LaunchShape& shape, const std::function<void()>& kernel);
const char* last_error();
void configure(const Config& config);
void grid_wait();

// --- for host bodies of instructions ---
uint64_t random_bits();
inline bool chance(unsigned one_in) {
  return random_bits() % one_in == 0;
}
// Ends the launch with an error that names block and thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
// Lets others run first, or not.
void maybe_yield(unsigned one_in = 2);
// The same, and where priorities rule, everyone else goes first for a while.
void step_aside(unsigned one_in);
// Blocks until somebody calls wake.
void block(const char* what);
void wake(Thread* thread);
// Blocks until the condition holds; whoever can make it true needs no wake.
void spin(const char* what, std::function<bool()> condition);
// Meets the other lanes in `members`; `compute` runs once, with each member's operands.
void meet(const char* kind, uint32_t members, void* operands,
          void (*compute)(void* const* operands, uint32_t members));
// A thread is about to end.
void cluster_exit(Thread* thread);
// Queues that complete by themselves.
void add_bulk(BulkOp op);
void complete_arrivals(Thread* thread);
void run_copy(Thread* thread, size_t which);
void run_product(Warp* warp);
void drain(std::vector<LateStore>& stores);
// A copy that an instruction started and no thread makes.
void deliver(void* dst, const void* src, size_t bytes);
// The memory at a shared address; fails unless all bytes lie in this block's dynamic shared memory.
unsigned char* shared_pointer(Block* block, uint32_t address, size_t bytes, size_t alignment,
                              const char* what);

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in integers

}  // namespace sim
