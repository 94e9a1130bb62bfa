/// Copies of the calling program that do a part of a benchmark in a process of their own.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

namespace bench {

/// Messages to and from another process: plain values, shorter than PIPE_BUF.
class Channel {
 public:
  /// Reads from the one file descriptor and writes to the other; closes neither.
  Channel(int in, int out) : in_(in), out_(out) {}

  /// False when the other process has ended, for both.
  template <class T>
  requires std::is_trivially_copyable_v<T>
  bool send(const T& message) const { return write(&message, sizeof message); }
  template <class T>
  requires std::is_trivially_copyable_v<T>
  bool receive(T& message) const { return read(&message, sizeof message); }

 private:
  bool write(const void* data, size_t size) const;
  bool read(void* data, size_t size) const;

  int in_;
  int out_;
};

class ChildProcess {
 public:
  /// Starts the calling program anew with these arguments, and with `environment`
  /// (`NAME=value`) before what this process has of it. Throws std::system_error where it
  /// cannot.
  explicit ChildProcess(std::vector<std::string> arguments,
                        std::vector<std::string> environment = {});
  /// Ends the messages to it, and waits until it has ended.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  Channel channel() const { return {in_, out_}; }

 private:
  pid_t child_ = -1;
  int in_ = -1;
  int out_ = -1;
};

/// In such a copy: the messages to and from the process that has started it.
Channel channel_to_parent();

}  // namespace bench
