/// \file
/// The artifact store: the compiled programs that are kept on disk.
///
/// A program needs none of this; `reprise-cache` shows it on the command line. All functions
/// may be called from any thread, and while other processes use the folder.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "reprise/export_macros.h"

namespace reprise {

struct CachedProgram {
  std::string path;       ///< of the package; its name is the key of what was compiled
  uint64_t bytes = 0;
  std::chrono::system_clock::time_point last_used;
  /// Where a program over symbols holds, a condition a line; empty for one of fixed sizes.
  std::string guards;
};

/// Where this process keeps its programs: `options().cache_dir` or its default.
REPRISE_API std::string cache_folder();

/// What is there, the one used last first.
REPRISE_API std::vector<CachedProgram> cached_programs();

/// Removes what has not been used for longest until the rest takes `most_bytes` at most, and
/// what interrupted compiles have left. Returns how many programs went.
REPRISE_API uint64_t prune_cache(uint64_t most_bytes);

/// Removes one, by its path. A process that has loaded it goes on with it.
REPRISE_API void remove_cached_program(const std::string& path);

}  // namespace reprise
