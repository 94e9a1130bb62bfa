/// \file
/// A segment compiled for a set of outputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "lazy_backend/scratch.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// Where a program's input comes from when it is called.
struct ProgramInput {
  enum class Kind : uint8_t {
    kSlot,    ///< the storage in `index`, seen through `geometry`
    kScalar,  ///< dynamic scalar number `index`, as a 0-dim float64 tensor
    kRandom,  ///< the random numbers of step `index`
    kNumber,  ///< an integer that only the size of `geometry` says: it has no elements in memory
    kConstant,  ///< `constant`: what is a dynamic scalar where the program was made for
  };
  Kind kind = Kind::kSlot;
  uint32_t index = 0;
  Geometry geometry;
  at::Tensor constant;
};

/// A created slot that the program returns.
struct ProgramOutput {
  uint32_t slot = 0;
  Geometry geometry;  ///< of the tensor that created it
  size_t nbytes = 0;  ///< of its storage in eager
  /// The program's own output differs from the record in geometry, or shares
  /// its bytes: set on the first run.
  bool copy = false;
};

class ProgramFamily;
struct TraceOutline;

/// What the sizes that share a program over symbols have found out about it. From any
/// thread.
struct SharedProgram {
  /// Where it holds: `(!= s0 64), (== (% s1 8) 0)`. Not changed any more.
  std::string guards;
  /// Sizes at which its first run gave the interpreter's values.
  std::atomic<int> sizes_checked{0};
  std::mutex mutex;
  std::vector<uint64_t> hashes_checked;  ///< of these sizes; under the mutex
  /// It gave other values at some size: it is used at none.
  std::atomic<bool> wrong{false};
  /// Turns that it won against the interpreter, at all sizes, less those it lost.
  std::atomic<int> turns_ahead{0};

  /// At so many sizes it is looked at; then it is taken to be right at others.
  static constexpr int kSizes = 3;
  bool checked() const { return sizes_checked.load() >= kSizes; }
  /// Notes a size by the hash of its inputs' sizes; once each.
  void note_checked(uint64_t size) {
    const std::lock_guard lock(mutex);
    if (std::find(hashes_checked.begin(), hashes_checked.end(), size) != hashes_checked.end()) return;
    hashes_checked.push_back(size);
    sizes_checked.store(static_cast<int>(hashes_checked.size()));
  }
  /// So clearly that no more is timed.
  bool faster() const { return turns_ahead.load() >= 12; }
};

/// What runs a compiled artifact. Calls may come from several threads.
class Runner {
 public:
  virtual ~Runner() = default;
  virtual std::vector<at::Tensor> run(std::vector<at::Tensor>&& inputs) = 0;
  /// How it runs, for `explain()`; empty where there is nothing to say.
  virtual std::string about() const { return ""; }
};

struct Program {
  enum class State : uint8_t { kQueued, kReady, kFailed, kDemoted };

  // Set by who asks for the program, before it is queued.
  std::string name;
  std::vector<StepPtr> steps;
  std::vector<uint32_t> live;  ///< created slots that are outputs, ascending
  c10::DeviceIndex device_index = 0;
  std::string environment;  ///< in which its ops were called (`environment_text`)
  size_t scratch_bytes = 0;  ///< for its first run
  /// Where a program over symbols is wanted, and no other: steps that are alike at other
  /// sizes, whose outputs are in the same slots.
  std::vector<std::vector<StepPtr>> other_sizes;
  /// For this size alone, also where a program over symbols serves it.
  bool alone = false;
  /// Where it is written down for a package: what that returns, in order, in place of the
  /// whole storages in `live`.
  std::vector<std::pair<uint32_t, Geometry>> results;

  // Set by the compile queue, before the state becomes kReady.
  std::vector<ProgramInput> inputs;
  std::vector<ProgramOutput> outputs;
  std::shared_ptr<Runner> runner;
  double compile_seconds = 0;
  bool from_store = false;
  /// Of a program over symbols: `s0 = 48 (s0: input 1 dim 0)`.
  std::string symbols;
  /// By which other sizes find their places in it; null where no others were asked for.
  std::shared_ptr<const TraceOutline> outline;
  std::shared_ptr<const ProgramFamily> family;
  std::shared_ptr<SharedProgram> shared;  ///< null where it is for one size alone
  /// What was compiled anew for: `input 1 dim 0: 48 was 64`.
  std::string reason;
  bool writes_inputs = false;
  /// Memory for its first run, which uses it up. Whoever waits for that run would feel
  /// how long the system takes to give it.
  std::shared_ptr<Scratch> scratch;

  /// What is handed to the runner: made at the first run, without a storage between
  /// runs. Used under the lock of the session whose tree holds the program.
  std::vector<at::Tensor> input_tensors;
  c10::Storage no_storage;
  bool compared_with_record = false;  ///< `outputs[k].copy` is known; likewise

  // Set before the state becomes kFailed or kDemoted.
  std::string problem;

  std::atomic<State> state{State::kQueued};
};

}  // namespace reprise
