#include "reprise/options.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <iostream>
#include <mutex>

#include "lazy_backend/log.h"

namespace reprise {
namespace {

template <class Number>
void read(const char* name, Number& option) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*end != '\0') {
    TORCH_WARN("reprise: ", name, "=", text, " is no number and is ignored");
    return;
  }
  option = static_cast<Number>(value);
}
void read(const char* name, std::string& option) {
  if (const char* text = std::getenv(name)) option = text;
}

Options from_environment() {
  Options options;
  read("REPRISE_COMPILE", options.compile);
  read("REPRISE_DEMOTE", options.demote_slow_programs);
  read("REPRISE_CUDA_GRAPHS", options.cuda_graphs);
  read("REPRISE_MOST_CUDA_GRAPHS", options.most_cuda_graphs);
  read("REPRISE_FIND_STEPS", options.find_steps);
  read("REPRISE_DYNAMIC_SHAPES", options.dynamic_shapes);
  read("REPRISE_SIZES_BEFORE_DYNAMIC", options.sizes_before_dynamic);
  read("REPRISE_SIZE_PROGRAMS", options.most_size_programs);
  read("REPRISE_SPECIALIZE", options.specialize_sizes);
  read("REPRISE_COMPILE_AFTER", options.compile_after_ops);
  read("REPRISE_CHECK", options.check_programs);
  read("REPRISE_TRACE_BYTES", options.trace_bytes);
  read("REPRISE_PROGRAMS", options.most_programs);
  read("REPRISE_COMPILE_NICE", options.compile_niceness);
  read("REPRISE_COMPILE_SECONDS", options.compile_seconds);
  read("REPRISE_CACHE_DIR", options.cache_dir);
  read("REPRISE_CACHE_BYTES", options.cache_bytes);
  read("REPRISE_PYTHON", options.python);
  read("REPRISE_LOG", options.log_level);
  read("REPRISE_REPORT", options.report_file);
  return options;
}

}  // namespace

Options& options() {
  static auto* instance = new Options(from_environment());
  return *instance;
}

void write_log_line(const std::string& text) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::cerr << "[reprise] " << text << std::endl;
}

}  // namespace reprise
