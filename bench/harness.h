/// What the benchmark programs do alike once their rows are registered.
#pragma once

namespace bench {

/// Sets the threads that an operation may use to `REPRISE_BENCH_THREADS`, 1 by default.
void set_threads();

/// Sets the threads, runs the registered benchmarks and returns the exit status of the program.
int run_registered(int argc, char** argv);

}  // namespace bench
