#include "compiler_bridge/compile_queue.h"

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <torch/csrc/lazy/core/metrics.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <thread>
#include <utility>

#include "compiler_bridge/artifact_store.h"
#include "compiler_bridge/compiler_abi.h"
#include "compiler_bridge/host_engine.h"
#include "compiler_bridge/package_runner.h"
#include "compiler_bridge/trace_outline.h"
#include "compiler_bridge/trace_writer.h"
#include "lazy_backend/cuda_graph.h"
#include "lazy_backend/device.h"
#include "lazy_backend/json_text.h"
#include "lazy_backend/log.h"
#include "lazy_backend/metrics.h"
#include "lazy_backend/shape_inference.h"
#include "lazy_backend/trace_tree.h"
#include "reprise/options.h"
#include "symint/symbols.h"

namespace reprise {
namespace {

/// Where libreprise.so itself lies: the compiler library and its Python package
/// lie beside it.
std::string own_folder() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0) return ".";
  return std::filesystem::absolute(info.dli_fname).parent_path().string();
}

struct CompilerLibrary {
  decltype(&reprise_compiler_initialize) initialize = nullptr;
  decltype(&reprise_compiler_compile) compile = nullptr;
  decltype(&reprise_compiler_interrupt) interrupt = nullptr;
  decltype(&reprise_compiler_free) free = nullptr;
};
CompilerLibrary library;
std::atomic<bool> library_open{false};

std::string take(char* text) {
  std::string out = text == nullptr ? "" : text;
  library.free(text);
  return out;
}

void lower_priority() {
  // Python, and the compilers that it starts, must not take a core from the
  // program. Linux gives each thread a nice value, which children inherit.
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)),
                options().compile_niceness);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Gives sizes of inputs the names of the user's marks.
void name_sites(SplitTrace& trace, const Program& program) {
  std::unordered_map<uint32_t, const std::vector<Expression>*> known;  // by slot
  for (const StepPtr& step : program.steps) {
    if (step->symbolic == nullptr) continue;
    size_t next = 0;
    for_each_tensor(step->args, [&](const Arg& arg) {
      const auto& expressions = step->symbolic->arguments[next++];
      if (!expressions.empty()) known.try_emplace(arg.slot, &expressions);
    });
  }
  for (SplitTrace::Site& site : trace.sites) {
    if (site.kind != SplitTrace::Site::Kind::kSize || site.input >= program.inputs.size()) continue;
    const ProgramInput& input = program.inputs[site.input];
    const auto found = known.find(input.index);
    if (input.kind != ProgramInput::Kind::kSlot || found == known.end()) continue;
    if (found->second->size() != input.geometry.dims.size() + 1) continue;  // it enters whole
    const Expression& size = (*found->second)[site.dim];
    if (size.kind() == Expression::Kind::kSymbol) {
      site.name = symbol_name(static_cast<uint32_t>(size.value()));
    }
  }
}

}  // namespace

CompileQueue& CompileQueue::get() {
  static auto* queue = new CompileQueue;  // its thread outlives static objects
  return *queue;
}

void CompileQueue::push(std::shared_ptr<Program> program) {
  const std::lock_guard lock(mutex_);
  waiting_.push_back(std::move(program));
  start_thread();
  changed_.notify_all();
}

void CompileQueue::start_warm_up() {
  warm_ = true;
  if (!options().compile || !ArtifactStore::get().empty()) return;
  const std::lock_guard lock(mutex_);
  import_wanted_ = true;
  start_thread();
  changed_.notify_all();
}

void CompileQueue::start_thread() {
  if (process_ != 0) return;
  process_ = ::getpid();
  std::thread([this] { run(); }).detach();
}

void CompileQueue::wait_until_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return waiting_.empty() && packages_.empty() && !busy_; });
}

void CompileQueue::compile_package(const std::string& trace, const std::string& path) {
  PackageJob job{trace, path, "", false};
  std::unique_lock lock(mutex_);
  packages_.push_back(&job);
  start_thread();
  changed_.notify_all();
  changed_.wait(lock, [&] { return job.done; });
  TORCH_CHECK(job.problem.empty(), "reprise: the package could not be compiled: ", job.problem);
}

void CompileQueue::process(PackageJob& job) try {
  if (!open_compiler(&job.problem)) return;
  if (const auto report = build(job.trace, job.path, &job.problem)) {
    REPRISE_LOG(1, "compiled ", job.path, " ", *report);
  }
} catch (const std::exception& failure) {
  job.problem = failure.what();
}

void CompileQueue::run() {
  lower_priority();
  for (;;) {
    std::shared_ptr<Program> program;
    PackageJob* package = nullptr;
    {
      std::unique_lock lock(mutex_);
      busy_ = false;
      changed_.notify_all();
      changed_.wait(lock, [&] {
        return !ending_ && (!waiting_.empty() || !packages_.empty() || import_wanted_);
      });
      busy_ = true;
      import_wanted_ = false;
      if (!packages_.empty()) {
        package = packages_.front();
        packages_.pop_front();
      } else if (!waiting_.empty()) {
        program = std::move(waiting_.front());
        waiting_.pop_front();
      }
    }
    if (package != nullptr) {
      process(*package);
      const std::lock_guard lock(mutex_);
      package->done = true;  // its caller goes on, and it is gone
      continue;
    }
    if (program == nullptr) {
      std::string problem;
      open_compiler(&problem);
      continue;
    }
    try {
      process(*program);
    } catch (const std::exception& error) {
      finish(*program, error.what());
    }
  }
}

void CompileQueue::stop_for_exit() {
  std::unique_lock lock(mutex_);
  if (process_ != ::getpid()) return;
  ending_ = true;
  const std::deque<std::shared_ptr<Program>> dropped = std::exchange(waiting_, {});
  lock.unlock();
  if (library_open.load(std::memory_order_acquire)) library.interrupt(/*timeout_ms=*/2000);
  lock.lock();
  // What loads a package needs static objects of libtorch.
  changed_.wait_for(lock, std::chrono::seconds(2), [&] { return !busy_ || in_compiler_; });
}

bool CompileQueue::open_compiler(std::string* problem) {
  if (compiler_ == Compiler::kOpen) return true;
  if (compiler_ == Compiler::kUnusable) {
    *problem = compiler_problem_;
    return false;
  }
#ifdef REPRISE_WITHOUT_COMPILER
  compiler_ = Compiler::kUnusable;
  compiler_problem_ = *problem =
      "this Reprise was built without a compiler; programs come from the artifact store";
  REPRISE_LOG(1, *problem);
  return false;
#endif
  RECORD_FUNCTION("reprise::import_compiler", std::vector<c10::IValue>());
  const auto start = std::chrono::steady_clock::now();
  compiler_ = Compiler::kUnusable;
  const auto give_up = [&](const std::string& why) {
    compiler_problem_ = *problem = why;
    TORCH_WARN("reprise: nothing can be compiled, and programs stay interpreted: ", why);
    return false;
  };
  const std::string folder = own_folder();
  const std::string file = folder + "/libreprise_compiler.so";
  void* handle = ::dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (handle == nullptr) {
    return give_up(c10::str(::dlerror(), "; install Python >= 3.10 with its shared library, or "
                            "set REPRISE_COMPILE=0"));
  }
  const auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(handle, name));
    return function != nullptr;
  };
  if (!load(library.initialize, "reprise_compiler_initialize") ||
      !load(library.compile, "reprise_compiler_compile") ||
      !load(library.interrupt, "reprise_compiler_interrupt") ||
      !load(library.free, "reprise_compiler_free")) {
    return give_up(c10::str(file, " is of another version of Reprise; install both from one build"));
  }
  // A process that ends during a compile must end at once. The main thread's
  // session sees to it (Session::detach); this is for programs in which only
  // other threads have one.
  library_open.store(true, std::memory_order_release);
  std::atexit([] { library.interrupt(300); });

  const std::string python = options().python.empty() ? REPRISE_PYTHON_EXECUTABLE
                                                      : options().python;
  std::string package = folder + "/reprise/python";
  if (!std::filesystem::exists(package)) package = REPRISE_PYTHON_PACKAGE_DIR;
  const std::string settings =
      c10::str("{\"python\":", json_text(python), ",\"package_dir\":", json_text(package),
               ",\"cache_dir\":", json_text(ArtifactStore::get().folder() + "/inductor"),
               ",\"toolchain_dir\":", json_text(folder + "/reprise/toolchain"),
               ",\"compile_seconds\":", json_text(std::to_string(options().compile_seconds)), "}");
  // Python's torch is about to put its own meta kernels in place of libtorch's.
  keep_meta_kernels();
  char* error = nullptr;
  const auto initialize = [&] {
    const KeepEngine keep;
    return library.initialize(settings.c_str(), &error);
  };
  if (in_compiler(initialize) != 0) {
    return give_up(c10::str("the Python '", python, "' cannot compile: ", take(error),
                            "; name another with REPRISE_PYTHON"));
  }
  compiler_ = Compiler::kOpen;
  torch::lazy::Metric metric("reprise.ImportSeconds");
  metric.AddSample(seconds_since(start));
  REPRISE_LOG(1, "imported the compiler in ", seconds_since(start), " s");
  return true;
}

namespace {
/// The program's runner, which captures its launches where the device has graphs.
std::shared_ptr<Runner> as_graph(const Program& program) {
  const c10::Device device = backing_device_of(program.device_index);
  if (device.is_cpu()) return program.runner;
  std::vector<bool> written(program.inputs.size());
  std::set<uint32_t> slots;
  for (const StepPtr& step : program.steps) {
    slots.insert(step->written.begin(), step->written.end());
  }
  for (size_t k = 0; k < written.size(); ++k) {
    const ProgramInput& input = program.inputs[k];
    if (input.kind == ProgramInput::Kind::kSlot) {
      written[k] = slots.count(input.index) > 0;
    } else if (input.kind == ProgramInput::Kind::kRandom) {
      // What was drawn is what the tensor holds, and later steps may write it.
      const Step& step = *program.steps[input.index];
      written[k] = step.randomness == Randomness::kCreates && slots.count(step.results[0].slot) > 0;
    }
  }
  return with_cuda_graph(program.runner, device, std::move(written));
}

/// For reports of compiles that fail.
void dump(const std::string& name, const std::string& trace) {
  const char* folder = std::getenv("REPRISE_DUMP_TRACES");
  if (folder == nullptr) return;
  const std::string file = c10::str(folder, "/", name, ".json");
  if (std::FILE* out = std::fopen(file.c_str(), "w")) {
    std::fwrite(trace.data(), 1, trace.size(), out);
    std::fclose(out);
  }
}
}  // namespace

void CompileQueue::finish(Program& program, std::string problem) {
  if (problem.empty()) {
    program.runner = as_graph(program);
    if (program.scratch_bytes > 0) {
      program.scratch = std::make_shared<Scratch>(program.scratch_bytes);
    }
    program.state.store(Program::State::kReady, std::memory_order_release);
    return;
  }
  metrics().compile_failures.add(1);
  program.problem = std::move(problem);
  if (compiler_ != Compiler::kUnusable) {  // which was said already
    TORCH_WARN("reprise: ", program.name, " (", program.steps.size(),
               " ops) could not be compiled and stays interpreted: ", program.problem);
  }
  program.state.store(Program::State::kFailed, std::memory_order_release);
}

void CompileQueue::process(Program& program) {
  RECORD_FUNCTION("reprise::compile", std::vector<c10::IValue>());
  if (!program.other_sizes.empty()) return process_all_sizes(program);
  const std::string trace = write_trace(program);
  const std::string key = ArtifactStore::get().key(trace);
  dump(program.name, trace);

  std::optional<SplitTrace> split;
  std::shared_ptr<ProgramFamily> family;
  if (options().dynamic_shapes && !program.alone) family = note(split.emplace(trace));
  if (auto runner = load(key, backing_device_of(program.device_index))) {
    program.runner = std::move(runner);
    program.from_store = true;
    return finish(program, "");
  }
  if (family != nullptr && serve_or_compile(program, *split, *family)) return finish(program, "");

  std::string problem;
  program.runner = compile(program, trace, key, &problem);
  finish(program, program.runner == nullptr ? problem : "");
}

void CompileQueue::process_all_sizes(Program& program) {
  for (std::vector<StepPtr>& steps : program.other_sizes) {
    Program other;
    other.steps = std::move(steps);
    other.live = program.live;
    other.device_index = program.device_index;
    other.environment = program.environment;
    note(SplitTrace(write_trace(other)));
  }
  program.other_sizes.clear();
  auto outline = std::make_shared<TraceOutline>();
  const std::string trace = write_trace(program, outline.get());
  dump(program.name, trace);
  SplitTrace split(trace);
  name_sites(split, program);
  const std::shared_ptr<ProgramFamily> family = note(split);
  {
    const std::lock_guard lock(families_mutex_);
    family->name_sites(split.sites);
  }
  std::vector<int64_t> integers;
  outline->complete = outline->complete && outline->apply(program, integers) &&
                      integers == split.integers;
  if (!outline->complete) REPRISE_LOG(2, program.name, ": other sizes' traces must be written out");
  program.outline = std::move(outline);
  program.family = family;
  if (serve_or_compile(program, split, *family)) return finish(program, "");
  // Each size can still have a program of its own.
  program.problem = program.reason;
  program.state.store(Program::State::kFailed, std::memory_order_release);
}

std::shared_ptr<ProgramFamily> CompileQueue::note(const SplitTrace& split) {
  const std::lock_guard lock(families_mutex_);
  auto family = families_.of(split);
  family->note(split.integers);
  return family;
}

bool CompileQueue::serve(Program& program, const std::vector<int64_t>& integers,
                         const ProgramFamily& family) {
  auto serving = family.serving(integers);
  if (!serving) return false;
  program.runner = std::move(serving->runner);
  program.shared = std::move(serving->shared);
  program.symbols = std::move(serving->symbols);
  for (const int64_t number : serving->numbers) {
    ProgramInput input;
    input.kind = ProgramInput::Kind::kNumber;
    input.geometry.rank = 1;
    input.geometry.dtype = c10::kByte;
    input.geometry.dims = {number, 0};
    program.inputs.push_back(std::move(input));
  }
  return true;
}

bool CompileQueue::share(Program& program, const Program& like) try {
  std::vector<int64_t> integers;
  std::shared_ptr<const ProgramFamily> family;
  if (like.outline != nullptr && like.outline->complete &&
      like.outline->apply(program, integers)) {
    family = like.family;
  } else {
    program.inputs.clear();
    program.outputs.clear();
    SplitTrace split(write_trace(program));
    integers = std::move(split.integers);
    const std::lock_guard lock(families_mutex_);
    family = families_.find(split);
  }
  {
    const std::lock_guard lock(families_mutex_);
    if (family == nullptr || !serve(program, integers, *family)) {
      REPRISE_LOG(1, program.name, ": not served by the program of other sizes: ",
                  family == nullptr ? "it differs from them in more than integers"
                                    : family->differences(integers));
      return false;
    }
  }
  metrics().programs_shared.add(1);
  program.runner = as_graph(program);
  program.state.store(Program::State::kReady, std::memory_order_release);
  return true;
} catch (const std::exception& error) {
  REPRISE_LOG(1, program.name, ": ", error.what());
  return false;
}

bool CompileQueue::serve_or_compile(Program& program, const SplitTrace& split,
                                    ProgramFamily& family) {
  std::optional<GeneralTrace> general;
  {
    const std::lock_guard lock(families_mutex_);
    if (serve(program, split.integers, family)) {
      metrics().programs_shared.add(1);
      return true;
    }
    std::string problem;
    general = family.generalise(split.integers, problem);
    if (!general) {
      program.reason = problem;
      if (!problem.empty()) REPRISE_LOG(1, program.name, ": no program over symbols: ", problem);
      return false;
    }
    program.reason = family.differences(split.integers);
  }
  REPRISE_LOG(1, program.name, ": ", program.reason, "; a program over ",
              general->symbol_count(), " symbols (",
              general->symbols_text(*general->symbols_of(split.integers)), ") is compiled");
  const std::string key = ArtifactStore::get().key(general->text());
  dump(program.name + "-symbols", general->text());
  std::string problem;
  try {
    auto runner = load(key, backing_device_of(program.device_index));
    program.from_store = runner != nullptr;
    if (runner == nullptr) runner = compile(program, general->text(), key, &problem);
    if (runner != nullptr) {
      auto guards = read_guards(ArtifactStore::get().path(key));
      const std::lock_guard lock(families_mutex_);
      family.add({std::move(*general), std::move(guards), std::move(runner)});
      if (serve(program, split.integers, family)) return true;
      problem = "the compiler took for granted what does not hold for this trace";
    }
  } catch (const std::exception& error) {
    problem = error.what();
    ArtifactStore::get().drop(key);
  }
  program.from_store = false;
  program.reason += ", but no program could be made over symbols: " + problem;
  REPRISE_LOG(1, program.name, ": ", program.reason);
  return false;
}

std::shared_ptr<Runner> CompileQueue::load(const std::string& key, c10::Device device) {
  if (auto runner = loaded_[key].lock()) return runner;
  ArtifactStore& store = ArtifactStore::get();
  const auto stored = store.find(key);
  if (!stored) return nullptr;
  try {
    std::shared_ptr<Runner> runner = load_package_runner(*stored, device);
    metrics().programs_loaded.add(1);
    loaded_[key] = runner;
    return runner;
  } catch (const std::exception& error) {
    TORCH_WARN("reprise: a stored program is damaged and is compiled again: ", error.what());
    store.drop(key);
    return nullptr;
  }
}

std::optional<std::string> CompileQueue::build(const std::string& trace, const std::string& path,
                                               std::string* problem) {
  char *report = nullptr, *error = nullptr;
  const int failed = in_compiler(
      [&] { return library.compile(trace.c_str(), path.c_str(), &report, &error); });
  if (failed == 0) return take(report);
  *problem = take(error);
  return std::nullopt;
}

std::shared_ptr<Runner> CompileQueue::compile(Program& program, const std::string& trace,
                                              const std::string& key, std::string* problem) {
  if (!open_compiler(problem)) return nullptr;
  // The compiler reads these settings too.
  const auto has_other_settings = [&] {
    const std::string now = environment_text(environment_key());
    if (now == program.environment) return false;
    const auto named = [](const std::string& text) { return text.empty() ? "the usual settings" : text; };
    *problem = "it was recorded with " + named(program.environment) + ", and the process has " +
               named(now) + " by now";
    return true;
  };
  if (has_other_settings()) return nullptr;
  const std::string path = ArtifactStore::get().path(key);
  const auto start = std::chrono::steady_clock::now();
  const auto phases = build(trace, path, problem);
  if (!phases) return nullptr;
  if (has_other_settings()) {
    ArtifactStore::get().drop(key);
    return nullptr;
  }
  std::shared_ptr<Runner> runner = load_package_runner(path, backing_device_of(program.device_index));
  loaded_[key] = runner;
  program.compile_seconds = seconds_since(start);
  metrics().programs_compiled.add(1);
  torch::lazy::Metric metric("reprise.CompileSeconds");
  metric.AddSample(program.compile_seconds);
  REPRISE_LOG(1, program.name, ": compiled ", program.steps.size(), " ops in ",
              program.compile_seconds, " s ", *phases);
  ArtifactStore::get().trim(key);
  return runner;
}

}  // namespace reprise
