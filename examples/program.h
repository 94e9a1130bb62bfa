/// What the example programs share: the command line, the step loop with its
/// progress lines, and a report for other programs to read.
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace examples {

class PeakMemory;

class Program {
 public:
  /// `summary` is the first line that `--help` prints; `steps` the default number of them.
  Program(std::string name, std::string summary, int64_t steps);

  /// Adds `--name VALUE` (or `--name=VALUE`); `value` holds the default and takes
  /// what the command line says. For a bool, `--name` alone means true.
  void option(std::string name, int64_t& value, std::string help);
  void option(std::string name, double& value, std::string help);
  void option(std::string name, bool& value, std::string help);
  void option(std::string name, std::string& value, std::string help);
  /// Adds an option that takes one of `choices`.
  void choice(
      std::string name, std::string& value, std::vector<std::string> choices, std::string help);

  /// Reads the command line, and sets the random seed and the number of threads.
  /// Prints the help and exits with 0 for `--help`; throws std::invalid_argument for
  /// an unknown option or a value that makes no sense.
  void parse(int argc, const char* const* argv);

  c10::Device device() const { return c10::Device(device_); }
  const std::string& data_folder() const { return data_folder_; }
  int64_t steps() const { return steps_; }

  /// Begins the next step, and ends the one before. False when all steps are done.
  /// Reprise finds the steps by itself; with `--mark-steps` it is told of each end.
  bool next_step();
  /// The current step, counted from 1.
  int64_t step() const { return step_; }
  /// Whether this step's numbers are to be read: every `--log-every` steps, and the last.
  bool log_due() const;
  /// Prints the numbers with nine digits, enough to tell two floats apart.
  void log(std::initializer_list<std::pair<const char*, double>> numbers);

  /// Prints a result, and keeps it for the report.
  void result(const std::string& name, double value);
  /// Prints the time taken and writes the report, if one was asked for.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  using Target = std::variant<int64_t*, double*, bool*, std::string*>;
  struct Option {
    std::string name;
    Target target;
    std::string help;
    std::vector<std::string> choices;
  };

  void assign(const Option& option, const std::string& text);
  const Option& find(const std::string& name) const;
  std::string help() const;
  std::string report() const;

  std::string name_;
  std::string summary_;
  std::vector<Option> options_;

  std::string device_ = "cpu";
  std::string data_folder_;
  std::string report_path_;
  int64_t steps_;
  int64_t seed_ = 0;
  int64_t threads_ = 1;
  int64_t log_every_ = 50;
  bool mark_steps_ = false;
  std::shared_ptr<PeakMemory> peak_memory_;  ///< where a report was asked for

  int64_t step_ = 0;
  Clock::time_point step_began_;
  std::vector<double> step_seconds_;
  std::map<std::string, std::vector<double>> logged_;
  std::vector<std::pair<std::string, double>> results_;
};

/// Calls `body` and returns the exit status; prints an exception as one error message.
int guarded(const std::function<void()>& body);

}  // namespace examples
