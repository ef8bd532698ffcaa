// Runs a grid: which fiber goes on, what completes when, who waits for whom.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "fiber.h"
#include "grid.h"
#include "sim/core.h"
#include "sim/memory_model.h"

namespace sim {

thread_local Thread* self = nullptr;

namespace {

Config config;
uint64_t state = 1;
unsigned change_every = 64;
double lowest = 0;
std::string error;
Grid* grid = nullptr;
sigjmp_buf out;
void* scheduler_context = nullptr;
const std::function<void()>* body = nullptr;

void fiber_main() {
  (*body)();
  Thread* thread = self;
  // Whoever comes after this launch relies on the one before it.
  if (grid->shape.dependent && !thread->waited) fail("exits a dependent launch without grid_wait");
  if (!thread->copies.empty()) fail("exits with %zu asynchronous copies in flight", thread->copies.size());
  drain(thread->stores);
  cluster_exit(thread);
  thread->done = true;
  thread->warp->runnable &= ~(1u << thread->lane);
  --thread->block->alive;
  void* nowhere;
  switch_fiber(&nowhere, scheduler_context);
}

void leave() {
  Thread* thread = self;
  switch_fiber(&thread->context, scheduler_context);
  self = thread;
}

void on_fault(int, siginfo_t* info, void*) {
  const char* const wrong = judge(info->si_addr);
  if (wrong == nullptr) return;
  char text[200];
  if (self != nullptr) {
    snprintf(text, sizeof text, "block %u,%u thread %u: access to address %p, %s", self->block->index.x,
             self->block->index.y, self->index.x, info->si_addr, wrong);
  } else {
    snprintf(text, sizeof text, "an asynchronous operation touches address %p, %s", info->si_addr, wrong);
  }
  error = text;
  siglongjmp(out, 1);
}

// Faults end the launch instead of the process. The handler has a stack of its own: the fiber's may be full.
class FaultGuard {
 public:
  FaultGuard() {
    stack_t stack{};
    stack.ss_sp = memory_;
    stack.ss_size = sizeof memory_;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultGuard() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static inline char memory_[65536];
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

void switch_to(Thread* thread) {
  if (grid->shape.dependent && !thread->waited) hide_memory();
  self = thread;
  switch_fiber(&scheduler_context, thread->context);
  self = nullptr;
}

Thread* choose() {
  Warp* best = nullptr;
  if (config.schedule == kUniform) {
    unsigned seen = 0;
    for (auto& block : grid->resident) {
      for (auto& warp : block->warps) {
        if (warp->runnable != 0 && random_bits() % ++seen == 0) best = warp.get();
      }
    }
  } else {
    // Changed now and then, so that nobody waits for ever behind a warp that yields.
    const bool change = chance(change_every);
    for (auto& block : grid->resident) {
      for (auto& warp : block->warps) {
        if (warp->runnable == 0) continue;
        if (change) warp->priority = static_cast<double>(random_bits());
        if (best == nullptr || warp->priority > best->priority) best = warp.get();
      }
    }
  }
  if (best == nullptr) return nullptr;
  uint32_t lanes = best->runnable;
  for (int skip = static_cast<int>(random_bits() % __builtin_popcount(lanes)); skip > 0; --skip)
    lanes &= lanes - 1;
  return &best->lanes[__builtin_ctz(lanes)];
}

// Wakes threads whose condition has come true.
bool poll_all() {
  bool any = false;
  for (size_t i = 0; i < grid->polling.size();) {
    Thread* thread = grid->polling[i];
    if (thread->poll()) {
      thread->poll = nullptr;
      wake(thread);
      grid->polling[i] = grid->polling.back();
      grid->polling.pop_back();
      any = true;
    } else {
      ++i;
    }
  }
  return any;
}

// Completes one asynchronous operation, if there is any.
bool complete_one() {
  std::vector<std::function<void()>> ways;
  if (!grid->bulk.empty()) {
    ways.push_back([] {
      const size_t i = random_bits() % grid->bulk.size();
      BulkOp op = std::move(grid->bulk[i]);
      grid->bulk.erase(grid->bulk.begin() + static_cast<long>(i));
      op.complete();
    });
  }
  Thread* copier = nullptr;
  Thread* storer = nullptr;
  Warp* product = nullptr;
  unsigned copiers = 0, storers = 0, products = 0;
  for (auto& block : grid->resident) {
    for (auto& warp : block->warps) {
      if (!warp->products.empty() && random_bits() % ++products == 0) product = warp.get();
      for (Thread& lane : warp->lanes) {
        if (!lane.copies.empty() && random_bits() % ++copiers == 0) copier = &lane;
        if (!lane.stores.empty() && random_bits() % ++storers == 0) storer = &lane;
      }
    }
  }
  if (copier != nullptr) ways.push_back([&] { run_copy(copier, random_bits() % copier->copies.size()); });
  if (storer != nullptr) ways.push_back([&] { drain(storer->stores); });
  if (product != nullptr) ways.push_back([&] { run_product(product); });
  if (ways.empty()) return false;
  ways[random_bits() % ways.size()]();
  return true;
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, int> counts;
  for (auto& block : grid->resident) {
    for (auto& warp : block->warps) {
      for (Thread& lane : warp->lanes) {
        if (lane.warp != nullptr && !lane.done) {
          char key[200];
          snprintf(key, sizeof key, "block %u,%u warp %u: %s", block->index.x, block->index.y,
                   lane.index.x / 32, lane.waits);
          ++counts[key];
        }
      }
    }
  }
  error = "deadlock:";
  for (auto& [key, count] : counts) error += " [" + key + ", " + std::to_string(count) + " lanes]";
  siglongjmp(out, 1);
}

void loop() {
  while (true) {
    grid->refill();
    if (grid->resident.empty()) break;
    if (config.completion == kRandom && chance(8)) complete_one();
    if (!grid->polling.empty() && chance(4)) poll_all();
    Thread* next = choose();
    if (next == nullptr) {
      if (poll_all() || complete_one()) continue;
      report_deadlock();
    }
    switch_to(next);
    if (next->done && next->block->alive == 0) grid->retire(next->block);
  }
}

}  // namespace

void configure(const Config& c) {
  config = c;
}
void grid_wait() {
  step_aside(8);
  self->waited = true;
}

const char* last_error() {
  return error.c_str();
}

uint64_t random_bits() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (state * 0x2545F4914F6CDD1Dull) >> 16;
}

void fail(const char* format, ...) {
  char text[400];
  int used = 0;
  if (self != nullptr) {
    used = snprintf(text, sizeof text, "block %u,%u thread %u: ", self->block->index.x, self->block->index.y,
                    self->index.x);
  }
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + used, sizeof text - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  error = text;
  siglongjmp(out, 1);
}

void maybe_yield(unsigned one_in) {
  if (chance(one_in)) leave();
}

void step_aside(unsigned one_in) {
  if (!chance(one_in)) return;
  self->warp->priority = --lowest;  // behind those that stepped aside before
  leave();
}

void block(const char* what) {
  self->waits = what;
  self->warp->runnable &= ~(1u << self->lane);
  leave();
}

void wake(Thread* thread) {
  thread->waits = nullptr;
  thread->warp->runnable |= 1u << thread->lane;
}

void spin(const char* what, std::function<bool()> condition) {
  maybe_yield();
  while (!condition()) {
    self->poll = condition;
    grid->polling.push_back(self);
    block(what);
  }
}

void add_bulk(BulkOp op) {
  grid->bulk.push_back(std::move(op));
}

void complete_arrivals(Thread* thread) {
  for (size_t i = 0; i < grid->bulk.size();) {
    if (grid->bulk[i].arrives == thread) {
      grid->bulk[i].complete();
      grid->bulk.erase(grid->bulk.begin() + static_cast<long>(i));
    } else {
      ++i;
    }
  }
}

const char* run(const LaunchShape& shape, const std::function<void()>& kernel) {
  state = (config.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; ++i) random_bits();
  change_every = 16u << random_bits() % 3 * 3;
  lowest = 0;
  error.clear();
  FaultGuard guard;
  Grid current(shape, config.resident != 0 ? config.resident : 1 + static_cast<unsigned>(random_bits() % 4),
               config.last);
  grid = &current;
  current.entry = fiber_main;
  body = &kernel;
  open_memory(shape.dependent);
  if (sigsetjmp(out, 1) == 0) {
    current.check();
    loop();
    if (!current.bulk.empty()) fail("the grid ends with %zu bulk copies in flight", current.bulk.size());
  }
  self = nullptr;
  grid = nullptr;
  close_memory();
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace sim
