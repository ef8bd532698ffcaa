// Calls that were looked at before: what decides how a call is run, and what was decided. A call that is not
// found here is looked at by Python, which checks it, chooses, and leaves its choice here.
#pragma once

#include <Python.h>

#include <array>
#include <type_traits>
#include <unordered_map>

#include "cpu/base/product.h"
#include "cpu/common/dispatch.h"

namespace peftkern {

// Everything that a choice may depend on. `settings` is an object of Python's, compared by identity.
struct PlanKey {
  enum Pass {
    kLoraForward,
    kLoraBackward,
    kMultiForward,
    kMultiBackward,
    kSgmvAdd,
    kBottleneckForward,
    kBottleneckBackward
  };
  enum Fact { kPass, kThreads, kDType, kAdapterDType, kPresent, kStrides, kM, kN, kK, kR, kFacts };
  PyObject* settings = nullptr;
  std::array<int64_t, kFacts> facts{};

  bool operator==(const PlanKey& other) const { return settings == other.settings && facts == other.facts; }
};

struct Plan {
  cpu::BaseKind kind;
  bool pairs;        // whether a branch is computed by products of bf16
  cpu::Level level;  // the instruction set it was chosen for
};

class Plans {
 public:
  // Null if this call was not looked at, or at another instruction set level.
  const Plan* find(const PlanKey& key) const {
    const auto found = plans_.find(key);
    return found != plans_.end() && found->second.level == cpu::level() ? &found->second : nullptr;
  }
  void keep(const PlanKey& key, cpu::BaseKind kind, bool pairs = false) {
    if (plans_.size() >= kMost) clear();
    if (plans_.insert_or_assign(key, Plan{kind, pairs, cpu::level()}).second) Py_INCREF(key.settings);
  }
  void clear() {
    std::unordered_map<PlanKey, Plan, Hash> old;
    old.swap(plans_);
    for (const auto& each : old) Py_DECREF(each.first.settings);
  }

 private:
  static constexpr size_t kMost = 4096;
  struct Hash {
    size_t operator()(const PlanKey& key) const {
      uint64_t h = reinterpret_cast<uintptr_t>(key.settings);
      for (const int64_t fact : key.facts)
        h = (h ^ static_cast<uint64_t>(fact)) * 0x9E3779B97F4A7C15u, h ^= h >> 32;
      return h;
    }
  };
  std::unordered_map<PlanKey, Plan, Hash> plans_;
};

// Of all passes.
inline Plans plans;

// Whether calls of this kind know a branch by products of bf16.
template <class Call, class = void>
constexpr bool has_branch = false;
template <class Call>
constexpr bool has_branch<Call, std::void_t<decltype(&Call::takes_pairs)>> = true;

// An entry's _learn: what the entry takes, the word for who computes the base product of calls like it, and,
// where a call has that choice, whether the branch is computed by products of bf16 (left out: no).
template <class Call>
PyObject* learn(PyObject*, PyObject* const* a, Py_ssize_t count) {
  Call call;
  cpu::BaseKind kind = cpu::BaseKind::vendor;
  if (count <= Call::kCount || count > Call::kCount + 1 + has_branch<Call> || !call.read(a, count))
    Py_RETURN_FALSE;
  if (!call.read_way(a[Call::kCount], kind)) return nullptr;
  const bool pairs = count > Call::kCount + 1 && a[Call::kCount + 1] == Py_True;
  if constexpr (has_branch<Call>) {
    if (pairs && !call.takes_pairs()) {
      PyErr_SetString(PyExc_ValueError, "this branch cannot be computed by products of bf16");
      return nullptr;
    }
  }
  plans.keep(call.key, kind, pairs);
  Py_RETURN_TRUE;
}

}  // namespace peftkern
