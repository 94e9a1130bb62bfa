/// \file
/// The C interface of `libreprise_compiler.so`, the one library of Reprise that
/// contains Python. `libreprise.so` opens it with `dlopen` when there is
/// something to compile; nothing else links it.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/// Starts the interpreter on the calling thread and imports the compiler.
/// Takes seconds. All further calls but `reprise_compiler_interrupt` must come
/// from that same thread.
///
/// `options_json` is an object: `python` (path of the interpreter whose
/// packages are used), `package_dir` (folder that holds `reprise_compiler/`),
/// `cache_dir` (scratch folder for Inductor's own files), `toolchain_dir` (what
/// `reprise_compiler.prebuild` has made, only read; may be missing), and
/// `compile_seconds` (a number as text: a compile that takes longer is given up;
/// "0" or missing: none is).
///
/// Returns 0, or non-zero with `*error` set to a message that the caller frees
/// with `reprise_compiler_free`.
int reprise_compiler_initialize(const char* options_json, char** error);

/// Compiles a trace (docs/trace_format.md) into an AOTInductor package at
/// `output_path`, an absolute path ending in `.pt2`, written whole or not at
/// all. `*report_json` gets an object with the seconds spent in each phase.
/// Returns 0, or non-zero with `*error` set.
int reprise_compiler_compile(const char* trace_json, const char* output_path,
                             char** report_json, char** error);

/// Asks a running initialize or compile to come to rest because the process
/// is ending: child processes are killed and the compiling thread parks at the
/// next safe point instead of running Python while static objects are being
/// destroyed. Callable from any thread; returns within `timeout_ms`.
void reprise_compiler_interrupt(int timeout_ms);

void reprise_compiler_free(char* text);

#ifdef __cplusplus
}
#endif
