#include "child_process.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

extern char** environ;

namespace bench {

namespace {

constexpr int kInFd = 3;  // in the child
constexpr int kOutFd = 4;

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

template <class Move, class Data>
bool transfer(Move move, int fd, Data* data, size_t size) {
  ssize_t moved;
  do {
    moved = move(fd, data, size);
  } while (moved < 0 && errno == EINTR);
  return moved == static_cast<ssize_t>(size);  // messages are shorter than PIPE_BUF
}

std::vector<char*> pointers_to(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) {
    pointers.push_back(text.data());
  }
  return pointers;
}

}  // namespace

bool Channel::write(const void* data, size_t size) const {
  return transfer(::write, out_, data, size);
}

bool Channel::read(void* data, size_t size) const { return transfer(::read, in_, data, size); }

ChildProcess::ChildProcess(std::vector<std::string> arguments,
                           std::vector<std::string> environment) {
  const Pipe to_child = make_pipe();
  const Pipe from_child = make_pipe();
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_adddup2(&files, to_child.read, kInFd);
  posix_spawn_file_actions_adddup2(&files, from_child.write, kOutFd);
  std::string program = "/proc/self/exe";
  arguments.insert(arguments.begin(), program);
  auto argv = pointers_to(arguments);
  argv.push_back(nullptr);
  auto variables = pointers_to(environment);  // getenv finds the first one of a name
  for (char** each = environ; *each != nullptr; ++each) {
    variables.push_back(*each);
  }
  variables.push_back(nullptr);
  const int failed =
      ::posix_spawn(&child_, program.c_str(), &files, nullptr, argv.data(), variables.data());
  posix_spawn_file_actions_destroy(&files);
  ::close(to_child.read);
  ::close(from_child.write);
  out_ = to_child.write;
  in_ = from_child.read;
  if (failed != 0) {
    ::close(out_);
    ::close(in_);
    throw std::system_error(failed, std::generic_category(), "posix_spawn");
  }
}

ChildProcess::~ChildProcess() {
  ::close(out_);
  ::close(in_);
  ::waitpid(child_, nullptr, 0);
}

Channel channel_to_parent() { return {kInFd, kOutFd}; }

}  // namespace bench
