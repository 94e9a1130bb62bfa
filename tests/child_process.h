/// \file
/// Runs a program and waits for it: for what can only be seen from outside.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace reprise::test {

struct Ended {
  int status = -1;   ///< its exit status; -1: it did not exit
  int signal = 0;    ///< what killed it, or 0
  double seconds = 0;
  std::string output;  ///< standard output and error

  /// How often `text` comes in the output.
  size_t count(const std::string& text) const;
};

/// `environment` is set on top of this process's. A child that runs for longer
/// than a minute and a half is killed.
Ended run_child(const std::vector<std::string>& command,
                const std::vector<std::pair<std::string, std::string>>& environment = {});

/// Runs a script with the Python that REPRISE_TEST_PYTHON names, which must be set.
Ended run_python(const std::string& script);

/// The program of tests/plain_program.cpp, which names nothing of Reprise.
std::string plain_program();

/// A new folder below the test's own, with mode 0700.
std::string make_folder(const std::string& name);

}  // namespace reprise::test
