/// \file
/// What can be set. Each option also has an environment variable, read once when
/// the library is loaded.
#pragma once

#include <cstdint>
#include <string>

#include "reprise/export_macros.h"

namespace reprise {

struct Options {
  /// Compile segments that repeat. Off: they are verified and interpreted.
  /// `REPRISE_COMPILE=0|1`.
  bool compile = true;

  /// Compare the first run of each program with the interpreter's on the same inputs,
  /// and refuse one whose values differ by more than rounding explains.
  /// `REPRISE_CHECK=0|1`.
  bool check_programs = true;

  /// Take programs that measured slower than the interpreter out of service.
  /// `REPRISE_DEMOTE=0|1`.
  bool demote_slow_programs = true;

  /// Let traces that differ in sizes alone share a program over symbols.
  /// `REPRISE_DYNAMIC_SHAPES=0|1`.
  bool dynamic_shapes = true;

  /// Of sizes that were not marked, so many are met before a program over symbols is asked
  /// for; at least 2. From fewer, more expressions are guessed wrong, and compiled anew.
  /// `REPRISE_SIZES_BEFORE_DYNAMIC`.
  int64_t sizes_before_dynamic = 3;

  /// So many sizes of one segment at most get programs of their own where none over symbols
  /// serves them; others are interpreted, as `explain()` says. `REPRISE_SIZE_PROGRAMS`.
  int64_t most_size_programs = 32;

  /// Give a size that runs often a program of its own beside the one over symbols, and keep
  /// the faster one. Measured like a demotion, and off where `demote_slow_programs` is.
  /// `REPRISE_SPECIALIZE=0|1`.
  bool specialize_sizes = true;

  /// On a GPU, replay programs as CUDA graphs where they can be captured.
  /// `REPRISE_CUDA_GRAPHS=0|1`.
  bool cuda_graphs = true;

  /// How many CUDA graphs there are at most. Each keeps the memory of its results.
  /// `REPRISE_MOST_CUDA_GRAPHS`.
  int64_t most_cuda_graphs = 256;

  /// Find the steps of programs that call no `mark_step`.
  /// `REPRISE_FIND_STEPS=0|1`.
  bool find_steps = true;

  /// A segment is worth a compile when its verified ops so far, all its
  /// repetitions taken together, are at least this many. `REPRISE_COMPILE_AFTER`.
  int64_t compile_after_ops = 64;

  /// What a thread's traces take at most, in bytes, without programs: beyond, segments
  /// that have not run for longest are forgotten. `REPRISE_TRACE_BYTES`.
  int64_t trace_bytes = int64_t{128} << 20;

  /// How many programs a thread's traces hold at most. `REPRISE_PROGRAMS`.
  int64_t most_programs = 256;

  /// The nice value of the compiling thread and of the compilers that it starts,
  /// 0 to 19. At 10 they get a tenth of a core that the program keeps busy.
  /// `REPRISE_COMPILE_NICE`.
  int compile_niceness = 10;

  /// A compile that takes longer, in seconds, is given up, and its segment stays
  /// interpreted. 0: none is. `REPRISE_COMPILE_SECONDS`.
  int64_t compile_seconds = 600;

  /// Where compiled packages are kept. Empty: `$XDG_CACHE_HOME/reprise` or
  /// `~/.cache/reprise`. `REPRISE_CACHE_DIR`.
  std::string cache_dir;

  /// What the compiled packages on disk take at most, in bytes; 0: no limit. Beyond, those
  /// that have not been used for longest are removed. `REPRISE_CACHE_BYTES`.
  uint64_t cache_bytes = uint64_t{4} << 30;

  /// The interpreter whose torch compiles. Empty: the one Reprise was built
  /// with. `REPRISE_PYTHON`.
  std::string python;

  /// 0: warnings only; 1: segments, compiles and failures as they happen, on
  /// standard error; 2: also what becomes an input. `REPRISE_LOG`.
  int log_level = 0;

  /// A file to which `statistics()` and `explain()` are written as JSON when the
  /// main thread ends, for programs that know nothing of Reprise.
  /// `REPRISE_REPORT`.
  std::string report_file;
};

/// The process's options. Set them before the first lazy tensor is made: they
/// are read without a lock.
REPRISE_API Options& options();

}  // namespace reprise
