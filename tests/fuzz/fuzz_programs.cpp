/// Runs random programs in eager and on the lazy device and compares them.
#include <getopt.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>

#include "reprise/reprise.h"
#include "tests/fuzz/compare.h"
#include "tests/fuzz/machine.h"

namespace {

using namespace reprise::fuzz;

constexpr const char* kHelp =
    R"(usage: fuzz_programs [--seed S] [--count N] [options]

Runs N random programs of views, writes, reads, branches, autograd, changing sizes and
changing numbers on eager's device and on the lazy device: recorded, verified and interpreted (to the last bit),
and compiled (within what rounding explains). The last line is
`N programs, F differences`; the exit status is 1 where F is not 0.

  --seed S       which programs (0)
  --count N      how many (1000)
  --first K      begin with the K-th of them (0)
  --length L     instructions of a program, on average (20)
  --device D     the backing device: cpu or cuda (Reprise's default)
  --compile N    run every N-th batch of programs compiled as well; 0: none (1)
  --batch B      programs that are compiled together (24)
  --differences F  stop after F of them (10)
  --print        print each program as C++
)";

struct Settings {
  uint64_t seed = 0, first = 0, count = 1000;
  size_t length = 20, batch = 24, compile = 1, differences = 10;
  bool print = false;
};

uint64_t running = 0;  // the program, for who reads what a crash left

void on_crash(int signal) {
  const std::string text = "fuzz_programs: signal " + std::to_string(signal) + " in program " +
                           std::to_string(running) + " (--first " + std::to_string(running) +
                           " --count 1)\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text.data(), text.size());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

/// The backing device is chosen when the library is loaded: starts again where it is
/// another one.
void use_backing(const char* name, char** argv) {
  const char* now = std::getenv("REPRISE_BACKING");
  if (now != nullptr && std::strcmp(now, name) == 0) return;
  ::setenv("REPRISE_BACKING", name, 1);
  ::execv("/proc/self/exe", argv);
  throw std::runtime_error(std::string("cannot start again: ") + std::strerror(errno));
}

Settings parse(int argc, char** argv) {
  Settings settings;
  const option known[] = {{"seed", required_argument, nullptr, 's'},
                          {"count", required_argument, nullptr, 'n'},
                          {"first", required_argument, nullptr, 'f'},
                          {"length", required_argument, nullptr, 'l'},
                          {"device", required_argument, nullptr, 'd'},
                          {"compile", required_argument, nullptr, 'c'},
                          {"batch", required_argument, nullptr, 'b'},
                          {"differences", required_argument, nullptr, 'm'},
                          {"print", no_argument, nullptr, 'p'},
                          {"help", no_argument, nullptr, 'h'},
                          {nullptr, 0, nullptr, 0}};
  const auto number = [](const char* text) -> uint64_t {
    char* end = nullptr;
    const uint64_t value = std::strtoull(text, &end, 10);
    if (*text == '\0' || *end != '\0') {
      throw std::invalid_argument(std::string("not a number: ") + text);
    }
    return value;
  };
  for (int c; (c = getopt_long(argc, argv, "", known, nullptr)) != -1;) {
    switch (c) {
      case 's': settings.seed = number(optarg); break;
      case 'n': settings.count = number(optarg); break;
      case 'f': settings.first = number(optarg); break;
      case 'l': settings.length = number(optarg); break;
      case 'd': use_backing(optarg, argv); break;
      case 'c': settings.compile = number(optarg); break;
      case 'b': settings.batch = std::max<uint64_t>(number(optarg), 1); break;
      case 'm': settings.differences = number(optarg); break;
      case 'p': settings.print = true; break;
      case 'h': std::cout << kHelp; std::exit(0);
      default: std::cerr << kHelp; std::exit(2);
    }
  }
  return settings;
}

class Fuzzer {
 public:
  explicit Fuzzer(Settings settings) : settings_(settings) {}

  int run() {
    std::vector<Program> batch;
    size_t batches = 0;
    for (uint64_t k = settings_.first; k < settings_.first + settings_.count && !full(); ++k) {
      running = k;
      batch.push_back(random_program(settings_.seed << 32 | k, settings_.length));
      if (settings_.print) std::cout << to_cpp(batch.back()) << std::flush;
      if (auto found = difference_when_interpreted(batch.back())) {
        const Program least = shrink(batch.back(), [](const Program& candidate) {
          return difference_when_interpreted(candidate).has_value();
        });
        report(k, "interpreted", least, *difference_when_interpreted(least));
      }
      ++done_;
      const bool last = k + 1 == settings_.first + settings_.count;
      if (batch.size() < settings_.batch && !last) continue;
      if (settings_.compile > 0 && batches++ % settings_.compile == 0) {
        compile(batch, k + 1 - batch.size());
      }
      batch.clear();
      if (::isatty(STDERR_FILENO) != 0) std::cerr << '\r' << done_ << std::flush;
    }
    const reprise::Statistics did = reprise::statistics();
    std::cout << did.ops_recorded << " ops recorded, " << did.ops_verified << " verified, "
              << did.ops_inferred << " inferred, "
              << did.mismatches << " mismatches; " << compiled_ << " programs ran compiled, "
              << not_compiled_ << " could not\n"
              << done_ << " programs, " << differences_ << " differences\n";
    if (differences_ > 0) return 1;
    // Nothing was tested where nothing was verified.
    return did.ops_verified > 0 && (settings_.compile == 0 || compiled_ > 0) ? 0 : 2;
  }

 private:
  bool full() const { return settings_.differences > 0 && differences_ >= settings_.differences; }

  /// Those that change in one batch, the others in another.
  void compile(const std::vector<Program>& batch, uint64_t first) {
    for (const bool change : {false, true}) {
      std::vector<Program> part;
      std::vector<uint64_t> numbers;
      for (size_t k = 0; k < batch.size(); ++k) {
        if (batch[k].changes() != change) continue;
        part.push_back(batch[k]);
        numbers.push_back(first + k);
      }
      if (!part.empty()) compile(part, numbers);
    }
  }

  void compile(const std::vector<Program>& batch, const std::vector<uint64_t>& numbers) {
    const Compiled result = compare_compiled(batch);
    compiled_ += result.replayed;
    not_compiled_ += result.not_compiled.size();
    for (const auto& one : result.not_compiled) {
      std::cout << "program " << numbers[one.program] << " (--seed " << settings_.seed
                << " --first " << numbers[one.program] << " --count 1) did not run compiled: "
                << one.text << std::flush;
    }
    for (const auto& one : result.differences) {
      const Program least = shrink(batch[one.program], [](const Program& candidate) {
        return !compare_compiled({candidate}).differences.empty();
      });
      const auto again = compare_compiled({least}).differences;
      report(numbers[one.program], "compiled", least,
             again.empty() ? "only in its batch: " + one.text : again.front().text);
    }
  }

  void report(uint64_t k, const char* way, const Program& least, const std::string& text) {
    ++differences_;
    std::cout << "program " << k << " (--seed " << settings_.seed << " --first " << k
              << " --count 1) differs, " << way << ": " << text << "\n" << to_cpp(least)
              << std::flush;
  }

  const Settings settings_;
  uint64_t done_ = 0;
  size_t differences_ = 0, compiled_ = 0, not_compiled_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  set_up_process();
  for (const int signal : {SIGSEGV, SIGABRT, SIGFPE, SIGBUS}) std::signal(signal, on_crash);
  try {
    return Fuzzer(parse(argc, argv)).run();
  } catch (const std::exception& error) {
    std::cerr << "fuzz_programs: " << error.what() << '\n';
    return 2;
  }
}
