#include "tests/child_process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>

namespace reprise::test {

size_t Ended::count(const std::string& text) const {
  size_t found = 0;
  for (size_t at = output.find(text); at != std::string::npos; at = output.find(text, at + 1)) {
    ++found;
  }
  return found;
}

Ended run_child(const std::vector<std::string>& command,
                const std::vector<std::pair<std::string, std::string>>& environment) {
  // Everything is made before the fork: the child of a process with threads may
  // not allocate.
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    const auto overridden = [&](const auto& each) { return text.starts_with(each.first + "="); };
    if (std::none_of(environment.begin(), environment.end(), overridden)) {
      variables.push_back(text);
    }
  }
  for (const auto& [name, value] : environment) variables.push_back(name + "=" + value);
  std::vector<char*> arguments, settings;
  for (const auto& text : command) arguments.push_back(const_cast<char*>(text.c_str()));
  for (const auto& text : variables) settings.push_back(const_cast<char*>(text.c_str()));
  arguments.push_back(nullptr);
  settings.push_back(nullptr);

  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {};
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(ends[1], STDERR_FILENO);
    ::execvpe(arguments[0], arguments.data(), settings.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  Ended ended;
  constexpr double kLongest = 90;
  bool exited = false;
  int status = 0;
  // The pipe may stay open in a grandchild: the child's end is what counts.
  while (!exited) {
    pollfd ready{ends[0], POLLIN, 0};
    ::poll(&ready, 1, 20);
    char text[4096];
    if ((ready.revents & POLLIN) != 0) {
      const auto got = ::read(ends[0], text, sizeof text);
      if (got > 0) ended.output.append(text, static_cast<size_t>(got));
    }
    exited = ::waitpid(child, &status, WNOHANG) == child;
    if (!exited && seconds() > kLongest) ::kill(child, SIGKILL);
  }
  ended.seconds = seconds();
  ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  char text[4096];
  for (ssize_t got; (got = ::read(ends[0], text, sizeof text)) > 0;) {
    ended.output.append(text, static_cast<size_t>(got));
  }
  ::close(ends[0]);
  if (WIFEXITED(status)) ended.status = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) ended.signal = WTERMSIG(status);
  return ended;
}

Ended run_python(const std::string& script) {
  return run_child({std::getenv("REPRISE_TEST_PYTHON"), "-c", script});
}

std::string plain_program() {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "plain_program")
      .string();
}

std::string make_folder(const std::string& name) {
  const auto folder =
      std::filesystem::path(testing::TempDir()) / ("reprise-" + std::to_string(::getpid())) / name;
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  ::chmod(folder.c_str(), 0700);
  return folder.string();
}

}  // namespace reprise::test
