#include "compiler_exit.h"

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

namespace reprise::compiler {
namespace {

/// Longer than any call from Python into C was seen to take (loading a library
/// in an import, 0.2 s), shorter than a user would notice.
constexpr int kExitTimeoutMs = 400;

enum class Place { kOutside, kPython, kParked };

// All of trivial destruction: they are used while static objects are destroyed.
std::atomic<Place> place{Place::kOutside};
std::atomic<bool> stopping{false};
std::atomic<bool> interpreter_is_ours{false};
std::atomic<pid_t> process{0};
std::atomic<pid_t> thread_id{0};
std::atomic<unsigned long> python_thread_id{0};

/// Runs inside `exit`, see below.
void on_process_exit(int status, void*);

/// How many libraries this process has ever loaded.
unsigned long long libraries_loaded() {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        *static_cast<unsigned long long*>(result) = info->dlpi_adds;
        return 1;
      },
      &count);
  return count;
}

/// Exit handlers run youngest first, so this one is registered again whenever
/// libraries have come in, each with static objects of its own.
void register_exit_handler() {
  static unsigned long long seen = 0;  // of the compiling thread
  const unsigned long long now = libraries_loaded();
  if (std::exchange(seen, now) == now) return;
  on_exit(on_process_exit, nullptr);  // glibc's; it knows the exit status
}

[[noreturn]] void park() {
  register_exit_handler();
  place = Place::kParked;
  for (;;) pause();
}

/// Runs on the compiling thread between two bytecodes.
int park_at_safe_point(void*) {
  PyEval_SaveThread();
  park();
}

void append_children(pid_t of, pid_t thread, std::vector<pid_t>& found) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/task/%d/children", of, thread);
  if (std::FILE* file = std::fopen(path, "r")) {
    for (int child = 0; std::fscanf(file, "%d", &child) == 1;) found.push_back(child);
    std::fclose(file);
  }
}

/// The processes that the compiling thread has started, and theirs. A thread's
/// list holds no other thread's children: the host's own stay alone.
void kill_children_of_compiling_thread() {
  std::vector<pid_t> found;
  append_children(process, thread_id, found);
  for (size_t k = 0; k < found.size(); ++k) append_children(found[k], found[k], found);
  for (pid_t child : found) kill(child, SIGKILL);
}

bool at_rest() { return place != Place::kPython; }

void on_process_exit(int status, void*) {
  // A forked child has no compiling thread.
  if (process != getpid()) return;
  if (exit_guard_interrupt(kExitTimeoutMs)) {
    // The static objects of libtorch_python (torch 2.11.0,
    // ~InternedStringsTable) ask for the GIL, and when pybind11 was not set up
    // yet they keep the thread state that the asking made: see that there is
    // one, for good. It also stops any other Python thread.
    if (interpreter_is_ours) PyGILState_Ensure();
    return;
  }
  // It is in C code that does not come back. To go on would be a race between
  // it and the destructors; so end here, with what the program has to say.
  std::fflush(nullptr);
  _exit(status);
}

int on_audit_event(const char* event, PyObject* args, void*) {
  if (std::strcmp(event, "import") == 0 && args && PyTuple_Check(args) &&
      PyTuple_GET_SIZE(args) > 1 && PyTuple_GET_ITEM(args, 1) != Py_None)
    register_exit_handler();
  return 0;
}

/// For a host's interpreter, called by its `atexit`: Python takes its threads
/// down soon after this, and a C++ thread that then asks for the GIL would be
/// unwound (CPython 3.11, Python/ceval_gil.h, take_gil). So the compile is
/// given up with an exception, and this waits until it has left Python.
PyObject* on_host_python_exit(PyObject*, PyObject*) {
  stopping = true;
  if (!at_rest()) PyThreadState_SetAsyncExc(python_thread_id, PyExc_SystemExit);
  Py_BEGIN_ALLOW_THREADS;
  for (int waited_ms = 0; !at_rest() && waited_ms < 5000; waited_ms += 5) {
    kill_children_of_compiling_thread();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef host_exit_method = {"reprise_stop_compiling", on_host_python_exit, METH_NOARGS,
                                "Ends a compile under way, because Python is ending."};

}  // namespace

void exit_guard_enter() {
  process = getpid();
  thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  place = Place::kPython;
  if (stopping) park();
  register_exit_handler();
}

void exit_guard_leave() {
  if (stopping) park();
  register_exit_handler();
  place = Place::kOutside;
}

void exit_guard_watch_imports() { PySys_AddAuditHook(on_audit_event, nullptr); }

void exit_guard_interpreter_is_ours() { interpreter_is_ours = true; }

void exit_guard_watch_host_python() {
  python_thread_id = PyThread_get_thread_ident();
  PyObject* function = PyCFunction_New(&host_exit_method, nullptr);
  PyObject* atexit = PyImport_ImportModule("atexit");
  PyObject* done = atexit ? PyObject_CallMethod(atexit, "register", "O", function) : nullptr;
  if (!done) PyErr_Clear();
  Py_XDECREF(done);
  Py_XDECREF(atexit);
  Py_XDECREF(function);
}

bool exit_guard_interrupt(int timeout_ms) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
  stopping = true;
  bool asked = false;
  while (!at_rest()) {
    // The interpreter's first thread runs pending calls, and that is ours only
    // if we have started it. Adding one needs no GIL.
    if (!asked && interpreter_is_ours) asked = Py_AddPendingCall(park_at_safe_point, nullptr) == 0;
    kill_children_of_compiling_thread();
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace reprise::compiler
