/// \file
/// Runs a verified segment: as a compiled program where there is one, by the
/// interpreter otherwise; and asks for a program when it is worth it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/trace_tree.h"

namespace reprise {

/// A few durations, of which the median speaks.
class Timings {
 public:
  static constexpr size_t kEnough = 9;
  void add(double seconds) {
    if (count_ < kEnough) seconds_[count_++] = seconds;
  }
  bool enough() const { return count_ == kEnough; }
  size_t count() const { return count_; }
  double median() const;
  void clear() { count_ = 0; }

 private:
  double seconds_[kEnough] = {};
  size_t count_ = 0;
};

/// What is known of segments that end at one node of the trace tree.
struct SegmentEnd {
  std::string name;
  std::string replay_range, interpret_range;  ///< names in a profiler's trace
  std::string reason;  ///< why the last one ended here
  uint64_t recorded = 0;
  uint64_t interpreted = 0;
  uint64_t replayed = 0;

  /// The path to the node; filled when it is first run.
  std::vector<StepPtr> steps;
  std::shared_ptr<Program> program;
  /// The same for more outputs, being compiled.
  std::shared_ptr<Program> wider;
  uint64_t replayed_now = 0;  ///< by the present program
  Timings interpreter_time;
  Timings program_time;

  void drop_programs() {
    program = wider = nullptr;
    replayed_now = 0;
    interpreter_time.clear();
    steps.clear();
    program_time.clear();
  }
};

/// The end at `node`, made where there is none.
SegmentEnd& end_of(Node& node);

/// Runs the verified segment that ends at `node`. Afterwards every created
/// storage that is still held has its backing, and written inputs have their new
/// contents. Throws what an op throws.
void launch(Node& node, Segment& segment);

}  // namespace reprise
