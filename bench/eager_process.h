/// Eager steps in a process of their own, as in a program without Reprise.
///
/// What two devices do in one process is not independent: glibc's malloc learns from
/// the first buffers that are freed which sizes to keep, and whether eager's next
/// buffers cost page faults then depends on what ran beside it. (A chain of elementwise
/// operations on 2²⁰ floats takes two to five times as long where they do.)
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

#include "child_process.h"

namespace bench {

/// A copy of the calling program that does steps of a workload when asked.
class EagerProcess {
 public:
  /// Starts it. Throws std::system_error where it cannot.
  EagerProcess(const std::string& workload, c10::Device device);

  /// Does so many steps there; returns their seconds as measured there. Throws
  /// std::runtime_error when the process has ended.
  double steps(int64_t count);

  /// The same of steps of which only the last is waited for: on a GPU they queue.
  double queued_steps(int64_t count);

 private:
  double ask(int64_t steps);

  ChildProcess child_;
};

/// To be called first in `main`. True when this process is such a copy: it has then
/// served its parent until that was done.
bool served_eager_steps(int argc, char** argv);

}  // namespace bench
