// The blocks of one launch: those to come, those that run, their shared memory and stacks.
#pragma once

#include <vector>

#include "sim/core.h"

namespace sim {

struct Grid {
  // Of its clusters only the last ones run if `last` is not 0.
  Grid(const LaunchShape& shape, unsigned slots, unsigned last);
  ~Grid();
  // Fails if the shape is not one that a GPU takes.
  void check() const;
  // Starts waiting clusters, in random order, while there is room.
  void refill();
  // Ends a block: its shared memory must be intact around the edges, nothing may be in flight.
  void retire(Block* block);

  LaunchShape shape;
  unsigned slots;  // blocks at a time
  void (*entry)() = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Thread*> polling;
  std::vector<BulkOp> bulk;

 private:
  void forget(Block* block);
  void start(unsigned linear, std::shared_ptr<Cluster> cluster, unsigned rank);
  size_t skew_ = 0;
  std::vector<unsigned> waiting_;  // first blocks of clusters
  std::vector<unsigned char*> free_memory_, free_stacks_, used_memory_, used_stacks_;
  std::map<Block*, std::pair<unsigned char*, unsigned char*>> of_block_;
};

}  // namespace sim
