/// \file
/// Runs a verified segment: as a compiled program where there is one, by the
/// interpreter otherwise; and asks for a program when it is worth it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lazy_backend/contest.h"
#include "lazy_backend/pattern_tree.h"
#include "lazy_backend/program.h"
#include "lazy_backend/program_check.h"
#include "lazy_backend/segment.h"
#include "lazy_backend/trace_tree.h"

namespace reprise {

/// What is known of segments that end at one node of the trace tree.
struct SegmentEnd {
  std::string name;
  std::string replay_range, interpret_range;  ///< names in a profiler's trace
  std::string reason;  ///< why the last one ended here
  std::string symbols;  ///< `SymbolicTrace::text()`
  bool at_error = false;  ///< the op that came next threw
  bool once = false;      ///< it is in no tree, and nobody comes here again
  bool interpreted_only = false;  ///< there is nothing in it to compile
  uint64_t last_run = 0;  ///< or recorded: by its session's count of segments
  uint64_t recorded = 0;
  uint64_t inferred = 0;  ///< written down without being run
  uint64_t interpreted = 0;
  uint64_t replayed = 0;

  /// The path to the node; filled when it is first run.
  std::vector<StepPtr> steps;
  /// What it shares with other sizes; null where sizes share nothing.
  std::shared_ptr<Pattern> pattern;
  /// The pattern's program that does not serve this size.
  std::weak_ptr<Program> unserved_by;
  std::shared_ptr<Program> program;
  /// The same for more outputs, being compiled.
  std::shared_ptr<Program> wider;
  /// The present program's first run gave the interpreter's values.
  bool checked = false;
  std::unique_ptr<ProgramCheck> check;  ///< begun and not decided
  Contest contest;               ///< of the present program with the interpreter

  /// A program for this size alone, being compiled beside one over symbols.
  std::shared_ptr<Program> own;
  /// The one over symbols while the present one, this size's own, is in contest with it.
  struct General {
    std::shared_ptr<Program> program;
    Contest contest;
    bool checked = false;
  } general;
  std::string about_own;  ///< what came of it, or why there is none

  /// Another program is the present one; a contest with the one over symbols is over.
  void serve(std::shared_ptr<Program> next) {
    check = nullptr;  // it uses the present program
    general = {};
    program = std::move(next);
    checked = false;
    contest = {};
  }
  void drop_programs() {
    serve(nullptr);
    wider = own = nullptr;
    about_own.clear();
    steps.clear();
  }
};

/// The end at `node`, made where there is none.
SegmentEnd& end_of(Node& node);

/// Runs the verified segment that ends at `node`. Afterwards every created
/// storage that is still held has its backing, and written inputs have their new
/// contents. Throws what an op throws.
void launch(Node& node, Segment& segment);

}  // namespace reprise
