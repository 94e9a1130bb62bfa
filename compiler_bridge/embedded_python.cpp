/// \file
/// libreprise_compiler.so: the Python compiler behind a C interface.
///
/// The interpreter lives on the thread that called `initialize`, the compiling
/// thread. When the host is itself a Python program, its interpreter is used
/// and that thread is a guest in it.
#pragma GCC visibility push(default)  // all that this library exports
#include "compiler_abi.h"
#pragma GCC visibility pop

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <signal.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "compiler_exit.h"

namespace reprise::compiler {
namespace {

/// A failed call into Python, described.
class PythonError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject* object = nullptr) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  Ref& operator=(Ref&&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

std::string to_text(PyObject* object) {
  Ref text(object ? PyObject_Str(object) : nullptr);
  const char* bytes = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  if (!bytes) {
    PyErr_Clear();
    return "(no description)";
  }
  return bytes;
}

/// The pending exception's message with the innermost frames, without its middle where
/// it is long.
std::string take_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  Ref type_ref(type), value_ref(value), trace_ref(trace);
  Ref traceback(PyImport_ImportModule("traceback"));
  Ref lines(traceback ? PyObject_CallMethod(traceback.get(), "format_exception", "OOO", type,
                                            value ? value : Py_None, trace ? trace : Py_None)
                      : nullptr);
  Ref empty(PyUnicode_FromString(""));
  Ref joined(lines && empty ? PyUnicode_Join(empty.get(), lines.get()) : nullptr);
  if (!joined) {
    PyErr_Clear();
    return to_text(type) + ": " + to_text(value);
  }
  std::string text = to_text(joined.get());
  constexpr int kLines = 24;
  size_t begin = text.size();
  for (int k = 0; k <= kLines && begin != std::string::npos && begin > 0; ++k)
    begin = text.rfind('\n', begin - 1);
  if (begin == std::string::npos || begin == 0) return text;
  std::string end = text.substr(begin + 1);
  const std::string message = to_text(value);
  const std::string first = message.substr(0, message.find('\n'));
  return end.find(first) == std::string::npos ? first + "\n...\n" + end : end;
}

Ref checked(PyObject* result) {
  if (!result) throw PythonError(take_error());
  return Ref(result);
}

/// Tells the exit guard that this thread may be in Python.
struct WhilePythonRuns {
  WhilePythonRuns() { exit_guard_enter(); }
  ~WhilePythonRuns() { exit_guard_leave(); }
  WhilePythonRuns(const WhilePythonRuns&) = delete;
  WhilePythonRuns& operator=(const WhilePythonRuns&) = delete;
};

struct WithGil {
  WithGil() : state(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;
  PyGILState_STATE state;
};

/// Gives up the GIL that starting the interpreter has taken.
struct ReleaseInitialGil {
  ReleaseInitialGil() = default;
  ~ReleaseInitialGil() { PyEval_SaveThread(); }
  ReleaseInitialGil(const ReleaseInitialGil&) = delete;
  ReleaseInitialGil& operator=(const ReleaseInitialGil&) = delete;
};

/// Reads one text field of a flat JSON object, before there is a Python to do
/// it. Returns "" when it is missing.
std::string json_field(const std::string& json, const std::string& name) {
  size_t at = json.find('"' + name + '"');
  if (at == std::string::npos) return "";
  at = json.find(':', at + name.size() + 2);
  at = at == std::string::npos ? at : json.find('"', at);
  std::string value;
  for (size_t k = at + 1; at != std::string::npos && k < json.size() && json[k] != '"'; ++k) {
    if (json[k] != '\\') {
      value += json[k];
      continue;
    }
    char escaped = json[++k];
    if (escaped == 'u')
      throw std::invalid_argument("option " + name + ": write \\u escapes as UTF-8");
    value += escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped;
  }
  return value;
}

void check(const PyStatus& status) {
  if (PyStatus_Exception(status))
    throw std::runtime_error(std::string("Python did not start: ") +
                             (status.err_msg ? status.err_msg : "no reason given"));
}

/// Python's extension modules look for libpython's symbols in the global scope,
/// where they are not when this library was opened RTLD_LOCAL.
void make_libpython_global() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&Py_InitializeFromConfig), &info) && info.dli_fname)
    dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

/// Leaves SIGINT as it was. Python's `_signal` takes it when it is first imported, whatever
/// the configuration says (CPython 3.11, signal_get_set_handlers), and the user's Ctrl-C
/// would interrupt a compile and not the program.
class KeepSigint {
 public:
  KeepSigint() { sigaction(SIGINT, nullptr, &before_); }
  ~KeepSigint() { sigaction(SIGINT, &before_, nullptr); }
  KeepSigint(const KeepSigint&) = delete;
  KeepSigint& operator=(const KeepSigint&) = delete;

 private:
  struct sigaction before_ {};
};

/// Starts the interpreter as the given python would. Isolated: it heeds neither
/// PYTHON* variables nor user folders, and leaves signals and locale alone.
void start_interpreter(const std::string& python) {
  make_libpython_global();
  PyPreConfig before;
  PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1;
  check(Py_PreInitialize(&before));

  PyConfig config;
  PyConfig_InitIsolatedConfig(&config);
  config.install_signal_handlers = 0;
  // sys.executable and with it the packages of that python's environment;
  // otherwise it would be the host program, and whoever starts
  // "another Python" from there starts the host once more.
  PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, python.c_str());
  const KeepSigint keep;
  if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
  PyConfig_Clear(&config);
  check(status);
  checked(PyImport_ImportModule("signal"));
}

void import_compiler(const std::string& options_json, bool interpreter_is_ours) {
  std::string package_dir = json_field(options_json, "package_dir");
  PyObject* path = PySys_GetObject("path");
  Ref entry = checked(PyUnicode_DecodeFSDefault(package_dir.c_str()));
  if (!path || PyList_Insert(path, 0, entry.get()) != 0) throw PythonError(take_error());
  Ref module = checked(PyImport_ImportModule("reprise_compiler"));
  checked(PyObject_CallMethod(module.get(), "initialize", "ssOs",
                              json_field(options_json, "cache_dir").c_str(),
                              json_field(options_json, "toolchain_dir").c_str(),
                              interpreter_is_ours ? Py_True : Py_False,
                              json_field(options_json, "compile_seconds").c_str()));
}

std::string call_compile(const char* trace_json, const char* output_path) {
  Ref module = checked(PyImport_ImportModule("reprise_compiler"));
  Ref report =
      checked(PyObject_CallMethod(module.get(), "compile", "ss", trace_json, output_path));
  Ref json = checked(PyImport_ImportModule("json"));
  Ref text = checked(PyObject_CallMethod(json.get(), "dumps", "O", report.get()));
  return to_text(text.get());
}

/// Runs `body`, and turns what it throws into the interface's error text.
template <typename Body>
int guarded(char** error, Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& failure) {
    if (error) *error = strdup(failure.what());
  } catch (...) {
    if (error) *error = strdup("unknown exception");
  }
  return 1;
}

}  // namespace
}  // namespace reprise::compiler

using namespace reprise::compiler;

int reprise_compiler_initialize(const char* options_json, char** error) {
  return guarded(error, [&] {
    if (Py_IsInitialized()) {
      WhilePythonRuns guard;
      WithGil gil;
      exit_guard_watch_host_python();
      import_compiler(options_json, false);
      return;
    }
    std::string python = json_field(options_json, "python");
    if (python.empty()) throw std::invalid_argument("option `python` is missing");
    WhilePythonRuns guard;
    exit_guard_watch_imports();
    start_interpreter(python);
    exit_guard_interpreter_is_ours();
    ReleaseInitialGil gil;
    import_compiler(options_json, true);
  });
}

int reprise_compiler_compile(const char* trace_json, const char* output_path, char** report_json,
                             char** error) {
  return guarded(error, [&] {
    WhilePythonRuns guard;
    WithGil gil;
    std::string report = call_compile(trace_json, output_path);
    if (report_json) *report_json = strdup(report.c_str());
  });
}

void reprise_compiler_interrupt(int timeout_ms) { exit_guard_interrupt(timeout_ms); }

void reprise_compiler_free(char* text) { std::free(text); }
