/// \file
/// Ends a process cleanly while Python compiles on another thread.
///
/// `exit` destroys static objects and unmaps nothing, while other threads keep
/// running. A thread inside Python, torch or a compiler's output would then use
/// objects that are gone. So before that, the compiling thread is brought to
/// rest: its child processes are killed, so that it need not wait for them, and
/// it is caught at Python's next safe point, where it sleeps until the process
/// has ended. It never returns from the call it is in.
#pragma once

namespace reprise::compiler {

/// Brackets everything that the compiling thread does in Python. Once the
/// process is ending, neither returns.
void exit_guard_enter();
void exit_guard_leave();

/// Called once, before the interpreter starts: keeps the guard's exit handler
/// younger than the libraries that imports load, so that it runs before their
/// static objects are destroyed.
void exit_guard_watch_imports();

/// Called once the interpreter runs, when this library has started it.
void exit_guard_interpreter_is_ours();

/// Called with the GIL when the host has started the interpreter: the compile
/// is given up when Python's own exit begins.
void exit_guard_watch_host_python();

/// Brings the compiling thread to rest. True if it is when this returns.
bool exit_guard_interrupt(int timeout_ms);

}  // namespace reprise::compiler
