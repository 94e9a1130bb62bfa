#include "compiler_bridge/artifact_store.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <torch/csrc/lazy/core/hash.h>
#include <torch/version.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#else
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "compiler_id.h"
#include "lazy_backend/device.h"
#include "lazy_backend/gpu.h"
#include "reprise/options.h"

namespace reprise {
namespace fs = std::filesystem;
namespace {

constexpr const char* kFormat = "1";

std::string default_folder() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0') {
    return std::string(cache) + "/reprise";
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') {
    return std::string(home) + "/.cache/reprise";
  }
  return "";
}

/// Why the folder cannot be used; empty where it can.
std::string make_usable(const std::string& folder) {
  if (folder.empty()) return "no home folder is set";
  std::error_code error;
  fs::create_directories(fs::path(folder).parent_path(), error);
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
    return c10::str("it cannot be made (", std::strerror(errno), ")");
  }
  struct stat info {};
  if (::stat(folder.c_str(), &info) != 0) return std::strerror(errno);
  if (!S_ISDIR(info.st_mode)) return "it is no folder";
  if (info.st_uid != ::geteuid()) return "another user owns it";
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0) return "others may write to it";
  if (::access(folder.c_str(), W_OK) != 0) return "it cannot be written to";
  return "";
}

/// What the compiler names a file or folder before it is whole (build_package.py).
constexpr const char* kUnfinished = ".partial-";
/// One that is older was left by a process that ended.
constexpr std::chrono::hours kLongestCompile{24};

/// The instructions that this processor has: programs are compiled for all of them
/// (`-march=native`), and a folder may serve several machines. Not what its kernel, microcode
/// and hypervisor add, which change under a store.
std::string processor_features() {
#if defined(__x86_64__)
  struct Leaf {  // of CPUID, and what to take of each register
    unsigned leaf, subleaf;
    std::array<unsigned, 4> mask;
  };
  constexpr unsigned kAll = ~0u;
  constexpr Leaf kLeaves[] = {
      {0x1, 0, {0, 0, ~(1u << 27 | 1u << 31), kAll}},  // OSXSAVE; a hypervisor
      {0x7, 0, {0, kAll, kAll, 0x03d5413c}},           // the rest are mitigations
      {0x7, 1, {kAll, kAll, kAll, kAll}},
      {0xd, 1, {kAll, 0, 0, 0}},
      {0x1e, 1, {kAll, 0, 0, 0}},
      {0x24, 0, {0, kAll, 0, 0}},
      {0x80000001, 0, {0, 0, kAll, kAll}},
  };
  std::string features;
  for (const Leaf& each : kLeaves) {
    std::array<unsigned, 4> found{};
    __get_cpuid_count(each.leaf, each.subleaf, &found[0], &found[1], &found[2], &found[3]);
    for (size_t k = 0; k < found.size(); ++k) features += c10::str(found[k] & each.mask[k], ".");
  }
  return features;
#else
  return c10::str(::getauxval(AT_HWCAP), ".", ::getauxval(AT_HWCAP2));
#endif
}

/// With its guards, which it needs: they go last.
void remove_package(const std::string& file) {
  ::unlink(file.c_str());
  ::unlink((file + ".guards").c_str());
}

}  // namespace

ArtifactStore& ArtifactStore::get() {
  static auto* store = new ArtifactStore;
  return *store;
}

ArtifactStore::ArtifactStore() {
  const std::string wanted =
      options().cache_dir.empty() ? default_folder() : options().cache_dir;
  const std::string problem = make_usable(wanted);
  if (problem.empty()) {
    folder_ = fs::absolute(wanted).string();
    return;
  }
  char temporary[] = "/tmp/reprise-XXXXXX";
  if (::mkdtemp(temporary) != nullptr) folder_ = temporary;
  TORCH_WARN("reprise: the cache folder '", wanted, "' is not used: ", problem,
             ". Compiled programs of this process will not be kept; set REPRISE_CACHE_DIR to a "
             "folder that is yours alone");
}

std::string ArtifactStore::key(const std::string& trace) const {
  static const std::string processor = processor_features();
  const std::string about =
      c10::str(kFormat, "|", REPRISE_COMPILER_ID, "|", TORCH_VERSION, "|", at::get_cpu_capability(),
               "|", processor, "|", gpu_model(backing_device_of(0)), "|");
  const auto low = torch::lazy::MHash(about, trace);
  const auto high = torch::lazy::MHash(trace, about, trace.size());
  return torch::lazy::HashToString(low) + torch::lazy::HashToString(high);
}

std::string ArtifactStore::path(const std::string& key) const {
  return folder_ + "/" + key + ".pt2";
}

std::optional<std::string> ArtifactStore::find(const std::string& key) const {
  const std::string file = path(key);
  struct stat info {};
  if (::stat(file.c_str(), &info) != 0 || info.st_uid != ::geteuid()) return std::nullopt;
  ::utimensat(AT_FDCWD, file.c_str(), nullptr, 0);
  return file;
}

void ArtifactStore::drop(const std::string& key) const { remove_package(path(key)); }

std::vector<CachedProgram> ArtifactStore::packages() const {
  std::vector<CachedProgram> packages;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    if (entry.path().extension() != ".pt2") continue;
    // Another process may remove any of them meanwhile.
    struct stat info {};
    if (::stat(entry.path().c_str(), &info) != 0) continue;
    // Whole: several may be used within a second.
    const auto last_used = std::chrono::seconds(info.st_mtim.tv_sec) +
                           std::chrono::nanoseconds(info.st_mtim.tv_nsec);
    using std::chrono::system_clock;
    packages.push_back(
        {entry.path().string(), static_cast<uint64_t>(info.st_size),
         system_clock::time_point(std::chrono::duration_cast<system_clock::duration>(last_used)),
         ""});
  }
  std::sort(packages.begin(), packages.end(), [](const CachedProgram& a, const CachedProgram& b) {
    return a.last_used > b.last_used;
  });
  return packages;
}

void ArtifactStore::trim(const std::string& kept) const {
  const auto limit = static_cast<uint64_t>(options().cache_bytes);
  trim_to(limit == 0 ? std::numeric_limits<uint64_t>::max() : limit, path(kept));
}

uint64_t ArtifactStore::trim_to(uint64_t limit, const std::string& kept) const {
  const auto now = fs::file_time_type::clock::now();
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    std::error_code gone;
    if (!entry.path().filename().string().starts_with(kUnfinished)) continue;
    const fs::file_time_type written = entry.last_write_time(gone);
    if (!gone && now - written > kLongestCompile) fs::remove_all(entry.path(), gone);
  }
  std::vector<CachedProgram> all = packages();
  uint64_t total = 0, removed = 0;
  for (const CachedProgram& package : all) total += package.bytes;
  for (; total > limit && !all.empty(); all.pop_back()) {
    if (all.back().path == kept) continue;
    remove_package(all.back().path);
    total -= all.back().bytes;
    ++removed;
  }
  return removed;
}

bool ArtifactStore::empty() const {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    if (entry.path().extension() == ".pt2") return false;
  }
  return true;
}

std::string cache_folder() { return ArtifactStore::get().folder(); }

std::vector<CachedProgram> cached_programs() {
  std::vector<CachedProgram> programs = ArtifactStore::get().packages();
  for (CachedProgram& program : programs) {
    std::ifstream guards(program.path + ".guards");
    program.guards.assign(std::istreambuf_iterator<char>(guards), {});
  }
  return programs;
}

uint64_t prune_cache(uint64_t most_bytes) { return ArtifactStore::get().trim_to(most_bytes, ""); }

void remove_cached_program(const std::string& path) { remove_package(path); }

}  // namespace reprise
