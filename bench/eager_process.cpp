#include "eager_process.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>
#include <stdexcept>
#include <system_error>

#include "harness.h"
#include "paired_timing.h"
#include "workloads.h"

extern char** environ;

namespace bench {

namespace {

constexpr std::string_view kFlag = "--eager-steps-of";
constexpr int kAskFd = 3;  // in the child
constexpr int kAnswerFd = 4;

struct Pipe {
  int read = -1;
  int write = -1;
};

Pipe make_pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    throw std::system_error(errno, std::generic_category(), "pipe");
  }
  // Above the numbers that they get in the child: dup2 of one onto itself would
  // leave it closed on exec.
  Pipe pipe;
  pipe.read = ::fcntl(ends[0], F_DUPFD_CLOEXEC, 16);
  pipe.write = ::fcntl(ends[1], F_DUPFD_CLOEXEC, 16);
  ::close(ends[0]);
  ::close(ends[1]);
  return pipe;
}

bool transfer(ssize_t (*move)(int, void*, size_t), int fd, void* data, size_t size) {
  ssize_t moved;
  do {
    moved = move(fd, data, size);
  } while (moved < 0 && errno == EINTR);
  return moved == static_cast<ssize_t>(size);  // both messages are shorter than PIPE_BUF
}

bool receive(int fd, void* data, size_t size) {
  return transfer([](int f, void* d, size_t s) { return ::read(f, d, s); }, fd, data, size);
}

bool send(int fd, void* data, size_t size) {
  return transfer([](int f, void* d, size_t s) { return ::write(f, d, s); }, fd, data, size);
}

const Workload& workload_named(std::string_view name) {
  for (const auto& workload : workloads()) {
    if (workload.name() == name) {
      return workload;
    }
  }
  throw std::invalid_argument("no workload " + std::string(name));
}

}  // namespace

EagerProcess::EagerProcess(const std::string& workload, c10::Device device) {
  const Pipe ask = make_pipe();
  const Pipe answer = make_pipe();
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_adddup2(&files, ask.read, kAskFd);
  posix_spawn_file_actions_adddup2(&files, answer.write, kAnswerFd);
  std::string program = "/proc/self/exe", flag(kFlag), name = workload, where = device.str();
  char* const arguments[] = {program.data(), flag.data(), name.data(), where.data(), nullptr};
  const int failed = ::posix_spawn(&child_, program.c_str(), &files, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&files);
  ::close(ask.read);
  ::close(answer.write);
  ask_ = ask.write;
  answer_ = answer.read;
  if (failed != 0) {
    ::close(ask_);
    ::close(answer_);
    throw std::system_error(failed, std::generic_category(), "posix_spawn");
  }
}

EagerProcess::~EagerProcess() {
  ::close(ask_);  // which ends it
  ::close(answer_);
  ::waitpid(child_, nullptr, 0);
}

double EagerProcess::steps(int64_t count) {
  double seconds = 0.0;
  if (!send(ask_, &count, sizeof count) || !receive(answer_, &seconds, sizeof seconds)) {
    throw std::runtime_error("the process of eager steps has ended");
  }
  return seconds;
}

bool served_eager_steps(int argc, char** argv) {
  if (argc != 4 || argv[1] != kFlag) {
    return false;
  }
  set_threads();
  const c10::Device device(argv[3]);
  auto job = workload_named(argv[2]).on(device);
  for (int64_t count; receive(kAskFd, &count, sizeof count);) {
    double seconds = seconds_of(count, [&] {
      const auto output = job.step();
      if (device.is_cuda()) {
        torch::cuda::synchronize(device.index());
      }
    });
    if (!send(kAnswerFd, &seconds, sizeof seconds)) {
      break;
    }
  }
  return true;
}

}  // namespace bench
