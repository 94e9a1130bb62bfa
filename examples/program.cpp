#include "program.h"

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <reprise/device.h>
#include <torch/utils.h>

#include <algorithm>
#include <charconv>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace examples {

/// The most bytes that libtorch's allocators had given out at once, as they report
/// them to a profiler.
class PeakMemory : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t, size_t allocated, size_t, c10::Device device) override {
    auto& peak = device.is_cpu() ? cpu : accelerator;
    peak = std::max(peak, allocated);
  }
  bool memoryProfilingEnabled() const override { return true; }

  size_t cpu = 0;
  size_t accelerator = 0;
};

namespace {

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

/// A number that reads back as the same double; JSON has none for inf and nan.
std::string json(double value) {
  return std::isfinite(value) ? format("%.17g", value) : "null";
}

std::string json(const std::vector<double>& values) {
  std::string text = "[";
  for (const double value : values) {
    text += (text.size() > 1 ? ", " : "") + json(value);
  }
  return text + "]";
}

template <typename Number>
Number parse_number(const std::string& name, const std::string& text) {
  Number value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end) {
    throw std::invalid_argument("--" + name + ": expected a number, got '" + text + "'");
  }
  return value;
}

double median(std::vector<double> values) {
  if (values.empty()) {
    return 0.0;
  }
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// The most memory this process has had resident, in bytes; 0 where it is not known.
/// getrusage's ru_maxrss would not do: it starts at what the parent had.
int64_t peak_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) {
      return 1024 * std::strtoll(line.c_str() + 6, nullptr, 10);
    }
  }
  return 0;
}

}  // namespace

Program::Program(std::string name, std::string summary, int64_t steps)
    : name_(std::move(name)),
      summary_(std::move(summary)),
      data_folder_(EXAMPLES_DATA_DIR),
      steps_(steps) {
  option("device", device_, "Where to compute: cpu, cuda, cuda:1, lazy.");
  option("steps", steps_, "Steps to run.");
  option("seed", seed_, "Seed of all random numbers.");
  option("threads", threads_, "Threads that one operation may use.");
  option("log-every", log_every_, "Steps between two progress lines.");
  option("data", data_folder_, "Folder of the data files.");
  option("mark-steps", mark_steps_, "Call reprise::mark_step() after each step.");
  option("report", report_path_, "File to write a report to, as JSON.");
}

void Program::option(std::string name, int64_t& value, std::string help) {
  options_.push_back({std::move(name), &value, std::move(help), {}});
}

void Program::option(std::string name, double& value, std::string help) {
  options_.push_back({std::move(name), &value, std::move(help), {}});
}

void Program::option(std::string name, bool& value, std::string help) {
  options_.push_back({std::move(name), &value, std::move(help), {"true", "false"}});
}

void Program::option(std::string name, std::string& value, std::string help) {
  options_.push_back({std::move(name), &value, std::move(help), {}});
}

void Program::choice(
    std::string name, std::string& value, std::vector<std::string> choices, std::string help) {
  options_.push_back({std::move(name), &value, std::move(help), std::move(choices)});
}

void Program::parse(int argc, const char* const* argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h") {
      std::fputs(help().c_str(), stdout);
      std::exit(EXIT_SUCCESS);
    }
    if (!argument.starts_with("--")) {
      throw std::invalid_argument("unexpected argument '" + argument + "'; see --help");
    }
    const auto equals = argument.find('=');
    const auto& option = find(argument.substr(2, equals == std::string::npos ? equals : equals - 2));
    if (equals != std::string::npos) {
      assign(option, argument.substr(equals + 1));
    } else if (std::holds_alternative<bool*>(option.target)) {
      assign(option, "true");
    } else if (i + 1 < argc) {
      assign(option, argv[++i]);
    } else {
      throw std::invalid_argument(argument + ": expected a value");
    }
  }
  if (steps_ < 1 || log_every_ < 1 || threads_ < 1) {
    throw std::invalid_argument("--steps, --log-every and --threads: expected at least 1");
  }
  if (!report_path_.empty()) {
    peak_memory_ = std::make_shared<PeakMemory>();
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, peak_memory_);
  }
  at::set_num_threads(static_cast<int>(threads_));
  torch::manual_seed(static_cast<uint64_t>(seed_));
}

const Program::Option& Program::find(const std::string& name) const {
  const auto found = std::find_if(
      options_.begin(), options_.end(), [&](const Option& option) { return option.name == name; });
  if (found == options_.end()) {
    throw std::invalid_argument("unknown option --" + name + "; see --help");
  }
  return *found;
}

void Program::assign(const Option& option, const std::string& text) {
  const auto& choices = option.choices;
  if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
    std::string message = "--" + option.name + ": expected";
    for (const auto& choice : choices) {
      message += (&choice == &choices.front() ? " " : " or ") + choice;
    }
    throw std::invalid_argument(message + ", got '" + text + "'");
  }
  if (const auto* integer = std::get_if<int64_t*>(&option.target)) {
    **integer = parse_number<int64_t>(option.name, text);
  } else if (const auto* real = std::get_if<double*>(&option.target)) {
    **real = parse_number<double>(option.name, text);
  } else if (const auto* flag = std::get_if<bool*>(&option.target)) {
    **flag = text == "true";
  } else {
    *std::get<std::string*>(option.target) = text;
  }
}

std::string Program::help() const {
  std::ostringstream text;
  text << "usage: " << name_ << " [--option value]...\n" << summary_ << "\n\noptions:\n";
  for (const auto& option : options_) {
    text << "  --" << option.name << "  (";
    if (!option.choices.empty()) {
      for (const auto& choice : option.choices) {
        text << choice << (&choice == &option.choices.back() ? "; " : ", ");
      }
    }
    text << "default ";
    if (const auto* flag = std::get_if<bool*>(&option.target)) {
      text << (**flag ? "true" : "false");
    } else if (const auto* string = std::get_if<std::string*>(&option.target)) {
      text << ((*string)->empty() ? "none" : **string);
    } else {
      std::visit([&](const auto* value) { text << *value; }, option.target);
    }
    text << ")\n      " << option.help << '\n';
  }
  return text.str();
}

bool Program::next_step() {
  if (mark_steps_ && step_ > 0) {
    reprise::mark_step();
  }
  const auto now = Clock::now();
  if (step_ > 0) {
    step_seconds_.push_back(std::chrono::duration<double>(now - step_began_).count());
  }
  if (step_ == steps_) {
    return false;
  }
  ++step_;
  step_began_ = now;
  return true;
}

bool Program::log_due() const {
  return step_ % log_every_ == 0 || step_ == steps_;
}

void Program::log(std::initializer_list<std::pair<const char*, double>> numbers) {
  std::printf("step %6" PRId64, step_);
  logged_["step"].push_back(static_cast<double>(step_));
  for (const auto& [name, value] : numbers) {
    std::printf("  %s %.9g", name, value);
    logged_[name].push_back(value);
  }
  std::printf("\n");
  std::fflush(stdout);
}

void Program::result(const std::string& name, double value) {
  std::printf("%s %.9g\n", name.c_str(), value);
  results_.emplace_back(name, value);
}

void Program::finish() {
  const double seconds = std::accumulate(step_seconds_.begin(), step_seconds_.end(), 0.0);
  std::printf(
      "%" PRId64 " steps in %.2f s on %s: %.1f steps/s, median step %.3f ms\n", step_, seconds,
      device_.c_str(), static_cast<double>(step_) / seconds, 1e3 * median(step_seconds_));
  if (report_path_.empty()) {
    return;
  }
  std::ofstream file(report_path_);
  file << report();
  if (!file.flush()) {
    throw std::runtime_error("cannot write the report to " + report_path_);
  }
}

std::string Program::report() const {
  const double seconds = std::accumulate(step_seconds_.begin(), step_seconds_.end(), 0.0);
  std::ostringstream text;
  text << "{\n  \"program\": \"" << name_ << "\",\n  \"device\": \"" << device_
       << "\",\n  \"threads\": " << threads_ << ",\n  \"seed\": " << seed_
       << ",\n  \"steps\": " << step_ << ",\n  \"seconds\": " << json(seconds)
       << ",\n  \"median_step_seconds\": " << json(median(step_seconds_))
       << ",\n  \"peak_resident_bytes\": " << peak_resident_bytes()
       << ",\n  \"peak_cpu_tensor_bytes\": " << peak_memory_->cpu
       << ",\n  \"peak_accelerator_tensor_bytes\": " << peak_memory_->accelerator << ",\n  \"results\": {";
  for (const auto& [name, value] : results_) {
    text << (name == results_.front().first ? "" : ", ") << '"' << name << "\": " << json(value);
  }
  text << "},\n  \"log\": {";
  for (auto column = logged_.begin(); column != logged_.end(); ++column) {
    text << (column == logged_.begin() ? "" : ", ") << '"' << column->first
         << "\": " << json(column->second);
  }
  text << "},\n  \"step_seconds\": " << json(step_seconds_) << "\n}\n";
  return text.str();
}

int guarded(const std::function<void()>& body) {
  try {
    body();
    return EXIT_SUCCESS;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return EXIT_FAILURE;
}

}  // namespace examples
