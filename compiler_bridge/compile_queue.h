/// \file
/// Compiles programs in the background, one at a time, at low priority.
///
/// The queue's thread is the only one that ever runs Python. It takes a package
/// from the artifact store where there is one; otherwise it opens
/// `libreprise_compiler.so` and has the trace compiled.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "compiler_bridge/program_families.h"
#include "lazy_backend/program.h"

namespace reprise {

class CompileQueue {
 public:
  static CompileQueue& get();

  /// Takes a program; its state changes when it is done. From any thread.
  void push(std::shared_ptr<Program> program);

  /// Makes the program ready with one over symbols, as `like` has it for another size.
  /// Returns false, and leaves it as it was but for its inputs and outputs, where none
  /// serves it. From any thread.
  bool share(Program& program, const Program& like);

  /// Something is being recorded: a compile will come. Begins the imports, which
  /// take seconds, unless earlier runs have filled the artifact store.
  void warm_up() {
    if (C10_LIKELY(warm_.load(std::memory_order_relaxed))) return;
    start_warm_up();
  }

  /// Compiles a trace into a package at `path` and waits for it. Throws where that fails.
  /// From any thread but the queue's own.
  void compile_package(const std::string& trace, const std::string& path);

  void wait_until_idle();

  /// The process is ending: brings a running compile to rest, waits for a package that is
  /// being loaded, and begins nothing more.
  void stop_for_exit();

 private:
  struct PackageJob {
    std::string trace, path, problem;
    bool done = false;
  };
  CompileQueue() = default;
  void start_warm_up();
  void start_thread();
  void run();
  void process(Program& program);
  void process(PackageJob& job);
  void process_all_sizes(Program& program);
  /// A program from the store, or null.
  std::shared_ptr<Runner> load(const std::string& key, c10::Device device);
  /// Compiles a trace into the store and loads it; null, with the reason, where that fails.
  /// The program is the one that is asked for, and gets the time that it took.
  std::shared_ptr<Runner> compile(Program& program, const std::string& trace,
                                  const std::string& key, std::string* problem);
  /// The family of a trace, which is now one of its members.
  std::shared_ptr<ProgramFamily> note(const SplitTrace& trace);
  /// Serves the program by one over symbols that is there.
  static bool serve(Program& program, const std::vector<int64_t>& integers,
                    const ProgramFamily& family);
  /// As above, compiled now where that is worth it.
  bool serve_or_compile(Program& program, const SplitTrace& trace, ProgramFamily& family);
  void finish(Program& program, std::string problem);
  bool open_compiler(std::string* problem);
  /// Calls the compiler library.
  template <class Call>
  auto in_compiler(const Call& call) {
    const auto set = [&](bool inside) {
      const std::lock_guard lock(mutex_);
      in_compiler_ = inside;
      changed_.notify_all();
    };
    set(true);
    auto result = call();
    set(false);
    return result;
  }
  /// Has the open compiler make a package; returns its report, or nothing and the problem.
  std::optional<std::string> build(const std::string& trace, const std::string& path,
                                   std::string* problem);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Program>> waiting_;
  std::deque<PackageJob*> packages_;  ///< their callers wait
  bool import_wanted_ = false;
  bool busy_ = false;
  bool ending_ = false;
  bool in_compiler_ = false;  ///< from where the queue's thread does not return at the end
  int process_ = 0;  ///< in which the thread runs, not one that was forked later; 0: no thread yet
  std::atomic<bool> warm_{false};

  /// Of traces that differ in integers alone; each is some traces, and programs while in use.
  static constexpr size_t kMostFamilies = 1024;
  std::mutex families_mutex_;  ///< held for moments, never during a compile
  ProgramFamilies families_{kMostFamilies};

  // The queue's thread only.
  std::unordered_map<std::string, std::weak_ptr<Runner>> loaded_;
  enum class Compiler { kClosed, kOpen, kUnusable } compiler_ = Compiler::kClosed;
  std::string compiler_problem_;
};

}  // namespace reprise
