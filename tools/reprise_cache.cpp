/// Lists, checks and prunes the compiled programs that Reprise keeps on disk.
#include <reprise/cache.h>
#include <reprise/options.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

constexpr const char* kUsage =
    "usage: reprise-cache [--folder FOLDER] COMMAND\n"
    "  list             every program: size, when it was used last, device, name\n"
    "  show NAME...     what a program is; a name's beginning is enough\n"
    "  verify [--drop]  loads every program whose device is here; --drop: removes those that fail\n"
    "  prune BYTES      removes those not used for longest until the rest takes no more\n"
    "FOLDER is REPRISE_CACHE_DIR, or ~/.cache/reprise, where it is not given.\n";

using Metadata = std::unordered_map<std::string, std::string>;
using torch::inductor::AOTIModelPackageLoader;

std::string name_of(const reprise::CachedProgram& program) {
  return std::filesystem::path(program.path).stem().string();
}

Metadata metadata_of(const reprise::CachedProgram& program) {
  return AOTIModelPackageLoader::load_metadata_from_package(program.path, "model");
}

std::string field(const Metadata& metadata, const std::string& name) {
  const auto found = metadata.find(name);
  return found == metadata.end() ? "" : found->second;
}

/// `cuda sm_90`, `cpu AVX512`.
std::string device_of(const Metadata& metadata) {
  const std::string device = field(metadata, "AOTI_DEVICE_KEY");
  return device == "cpu" ? device + " " + field(metadata, "AOTI_CPU_ISA")
                         : device + " sm_" + field(metadata, "AOTI_COMPUTE_CAPABILITY");
}

std::string time_text(std::chrono::system_clock::time_point point) {
  const std::time_t time = std::chrono::system_clock::to_time_t(point);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M", std::localtime(&time));
  return text;
}

std::string first_line(const std::exception& error) {
  const std::string_view text = error.what();
  return std::string(text.substr(0, text.find('\n')));
}

int list() {
  uint64_t total = 0;
  const auto programs = reprise::cached_programs();
  for (const auto& program : programs) {
    total += program.bytes;
    std::string device;
    try {
      device = device_of(metadata_of(program));
    } catch (const std::exception&) {
      device = "damaged";
    }
    std::printf("%10" PRIu64 "  %s  %-24s %s%s\n", program.bytes, time_text(program.last_used).c_str(),
                device.c_str(), name_of(program).c_str(), program.guards.empty() ? "" : "  over symbols");
  }
  std::printf("%zu programs, %" PRIu64 " bytes in %s\n", programs.size(), total,
              reprise::cache_folder().c_str());
  return 0;
}

int show(const std::vector<std::string>& names) {
  if (names.empty()) throw std::invalid_argument("show wants a name");
  for (const std::string& name : names) {
    bool found = false;
    for (const auto& program : reprise::cached_programs()) {
      if (!name_of(program).starts_with(name)) continue;
      found = true;
      std::printf("%s\n  %" PRIu64 " bytes, used last %s\n", program.path.c_str(), program.bytes,
                  time_text(program.last_used).c_str());
      for (const auto& [key, value] : metadata_of(program)) {
        if (!value.empty()) std::printf("  %s: %s\n", key.c_str(), value.c_str());
      }
      std::printf(program.guards.empty() ? "  of fixed sizes\n" : "  over symbols, where\n");
      for (size_t at = 0; at < program.guards.size();) {
        const size_t end = program.guards.find('\n', at);
        std::printf("    %s\n", program.guards.substr(at, end - at).c_str());
        at = end == std::string::npos ? program.guards.size() : end + 1;
      }
    }
    if (!found) throw std::invalid_argument("no program's name begins with '" + name + "'");
  }
  return 0;
}

int verify(bool drop) {
  size_t good = 0, bad = 0, elsewhere = 0;
  const bool has_gpu = torch::cuda::is_available();
  for (const auto& program : reprise::cached_programs()) {
    try {
      if (!has_gpu && field(metadata_of(program), "AOTI_DEVICE_KEY") == "cuda") {
        ++elsewhere;
        continue;
      }
      const AOTIModelPackageLoader loader(program.path);
      ++good;
    } catch (const std::exception& error) {
      ++bad;
      std::printf("%s: %s\n", program.path.c_str(), first_line(error).c_str());
      if (drop) reprise::remove_cached_program(program.path);
    }
  }
  std::printf("%zu programs load, %zu do not%s\n", good, bad, bad > 0 && drop ? " and are removed" : "");
  if (elsewhere > 0) std::printf("%zu are for a GPU, and there is none here\n", elsewhere);
  return bad > 0 && !drop ? 1 : 0;
}

int prune(const std::vector<std::string>& arguments) {
  if (arguments.size() != 1) throw std::invalid_argument("prune wants a number of bytes");
  size_t read = 0;
  const uint64_t bytes = std::stoull(arguments[0], &read);
  if (read != arguments[0].size()) throw std::invalid_argument(arguments[0] + " is no number of bytes");
  std::printf("%" PRIu64 " programs are removed\n", reprise::prune_cache(bytes));
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto take = [&](const std::string& wanted) {
    if (arguments.empty() || arguments.front() != wanted) return false;
    arguments.erase(arguments.begin());
    return true;
  };
  if (take("--folder")) {
    if (arguments.empty()) throw std::invalid_argument("--folder wants a folder");
    if (!std::filesystem::is_directory(arguments.front())) {
      throw std::invalid_argument(arguments.front() + " is no folder");
    }
    reprise::options().cache_dir = arguments.front();
    arguments.erase(arguments.begin());
  }
  if (take("list") && arguments.empty()) return list();
  if (take("show")) return show(arguments);
  if (take("verify")) {
    const bool drop = take("--drop");
    if (arguments.empty()) return verify(drop);
  }
  if (take("prune")) return prune(arguments);
  std::fputs(kUsage, stderr);
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "reprise-cache: %s\n", first_line(error).c_str());
  return 2;
}
