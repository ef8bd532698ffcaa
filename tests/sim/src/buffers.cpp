// Memory that tests hand to kernels, and what of it a launch may touch at which time.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "sim/core.h"
#include "sim/memory_model.h"

namespace sim {
namespace {

constexpr uintptr_t kPage = 4096;

// Of what a launch is allowed: a fault goes one step further, if the thread may.
enum Access { kHidden, kReadable, kWritable };

struct Span {
  uintptr_t begin, end;
};

struct Buffer {
  void* mapping;
  size_t length;
  std::vector<Span> rows, pages;  // what the test sees; the whole pages around, merged
  Access access = kWritable;
  bool written = false;  // by this launch
  bool before = false;   // by the launch before
};

std::map<void*, Buffer> buffers;  // by the address that the test sees
bool running = false, is_dependent = false, revealed = false;

void allow(Buffer& buffer, Access access) {
  if (buffer.access == access) return;
  buffer.access = access;
  const int flags = access == kHidden ? PROT_NONE : access == kReadable ? PROT_READ : PROT_READ | PROT_WRITE;
  for (const Span& s : buffer.pages) mprotect(reinterpret_cast<void*>(s.begin), s.end - s.begin, flags);
}

Buffer* find(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (auto& entry : buffers) {
    for (const Span& s : entry.second.pages) {
      if (at >= s.begin && at < s.end) return &entry.second;
    }
  }
  return nullptr;
}

bool must_wait() {
  return running && is_dependent && self != nullptr && !self->waited;
}

void* map_rows(size_t first, size_t rows, size_t bytes, size_t stride, size_t alignment, bool at_end) {
  const size_t span = rows == 0 ? 0 : (rows - 1) * stride + bytes, before = first * stride;
  const size_t length = (before + span + kPage - 1) / kPage * kPage + 2 * kPage;
  void* mapping = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  const uintptr_t low = reinterpret_cast<uintptr_t>(mapping) + kPage, high = low + length - 2 * kPage;
  const uintptr_t slack = at_end ? (high - low - before - span) / alignment * alignment : 0, p = low + slack;
  Buffer buffer{mapping, length, {}, {}};
  for (size_t i = first; i < first + rows; ++i) {
    const Span row{p + i * stride, p + i * stride + bytes};
    const Span pages{row.begin / kPage * kPage, (row.end + kPage - 1) / kPage * kPage};
    buffer.rows.push_back(row);
    if (!buffer.pages.empty() && pages.begin <= buffer.pages.back().end) {
      buffer.pages.back().end = std::max(pages.end, buffer.pages.back().end);
    } else {
      buffer.pages.push_back(pages);
    }
  }
  for (const Span& s : buffer.pages) {
    mprotect(reinterpret_cast<void*>(s.begin), s.end - s.begin, PROT_READ | PROT_WRITE);
    std::memset(reinterpret_cast<void*>(s.begin), kPoison, s.end - s.begin);
  }
  buffers[reinterpret_cast<void*>(p)] = buffer;
  return reinterpret_cast<void*>(p);
}

}  // namespace

void* allocate(size_t bytes, size_t alignment, bool at_end) {
  return map_rows(0, 1, bytes, bytes, alignment, at_end);
}

void* allocate_rows(size_t first, size_t rows, size_t bytes, size_t stride, size_t alignment) {
  return map_rows(first, rows, bytes, stride, alignment, true);
}

bool release(void* p) {
  const Buffer buffer = buffers.at(p);
  buffers.erase(p);
  bool intact = true;
  auto row = buffer.rows.begin();
  for (const Span& s : buffer.pages) {
    for (uintptr_t at = s.begin; at < s.end; ++at) {
      while (row != buffer.rows.end() && row->end <= at) ++row;
      if (row != buffer.rows.end() && row->begin <= at) {
        at = std::min(row->end, s.end) - 1;
      } else {
        intact = intact && *reinterpret_cast<const unsigned char*>(at) == kPoison;
      }
    }
  }
  munmap(buffer.mapping, buffer.length);
  return intact;
}

void written_before(void* p) {
  buffers.at(p).before = true;
}

void open_memory(bool dependent) {
  running = revealed = true;
  is_dependent = dependent;
  hide_memory();
}

void close_memory() {
  for (auto& entry : buffers) {
    Buffer& buffer = entry.second;
    allow(buffer, kWritable);
    // A dependent launch may run beside the one before it, so what comes next has both beside it.
    buffer.before = buffer.written || (is_dependent && buffer.before);
    buffer.written = false;
  }
  running = false;
}

void hide_memory() {
  if (!revealed) return;
  revealed = false;
  for (auto& entry : buffers) {
    allow(entry.second, is_dependent && entry.second.before ? kHidden : kReadable);
  }
}

const char* judge(const void* address) {
  Buffer* const buffer = running ? find(address) : nullptr;
  if (buffer == nullptr || buffer->access == kWritable) return "outside every buffer";
  if (must_wait())
    return buffer->access == kHidden ? "which the launch before writes, before grid_wait"
                                     : "a write before grid_wait";
  revealed = true;
  buffer->written = buffer->written || buffer->access == kReadable;
  allow(*buffer, buffer->access == kHidden ? kReadable : kWritable);
  return nullptr;
}

void check_read(const void* p, const char* what) {
  const Buffer* const buffer = must_wait() ? find(p) : nullptr;
  if (buffer != nullptr && buffer->before)
    fail("%s of what the launch before writes, before grid_wait", what);
}

void check_store(const char* what) {
  if (must_wait()) fail("%s before grid_wait", what);
}

}  // namespace sim
