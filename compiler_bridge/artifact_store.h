/// \file
/// Compiled packages on disk, named by what they were compiled from.
///
/// A package is native code, so the folder is the user's alone: made with mode
/// 0700, and refused where another user owns it or others can write to it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "reprise/cache.h"

namespace reprise {

class ArtifactStore {
 public:
  /// The process's store, in `options().cache_dir` or its default. Where no
  /// usable folder can be had, a temporary one of this process's is used and a
  /// warning says so once.
  static ArtifactStore& get();

  /// The name for a trace: of its text, the compiler package's sources, torch's
  /// version, what the processor and the GPU can do, and the store's format.
  std::string key(const std::string& trace) const;

  /// The path of a stored package, or nothing. The package counts as used now.
  std::optional<std::string> find(const std::string& key) const;
  /// Where the package of that name belongs.
  std::string path(const std::string& key) const;
  /// Takes a package that does not load out of the store.
  void drop(const std::string& key) const;
  /// Removes the packages that no process has used for longest until the others take
  /// `options().cache_bytes` at most, and what interrupted compiles have left. The package
  /// named `kept` stays. Safe while other processes use the folder: one whose package goes
  /// before it has been loaded compiles it again.
  void trim(const std::string& kept) const;
  /// The same with another limit, in bytes. Returns how many packages went.
  uint64_t trim_to(uint64_t limit, const std::string& kept) const;
  /// The packages, the one used last first.
  std::vector<CachedProgram> packages() const;
  /// Whether anything was ever stored here.
  bool empty() const;

  const std::string& folder() const { return folder_; }

 private:
  ArtifactStore();
  std::string folder_;
};

}  // namespace reprise
