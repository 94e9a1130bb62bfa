# The target `demo`: trains and serves real models on the lazy device, then times
# the whole zoo and prints the table, which also goes to report/.
set(bin "${PROJECT_BINARY_DIR}/bin")
set(report "${PROJECT_BINARY_DIR}/report")
add_custom_target(demo
  COMMAND "${CMAKE_COMMAND}" -E echo "-- Handwritten digits, on the CPU and on the lazy device"
  COMMAND "${bin}/train_digits" --device cpu --log-every 200
  COMMAND "${bin}/train_digits" --device lazy --log-every 200
  COMMAND "${CMAKE_COMMAND}" -E echo "-- Argon: molecular dynamics with forces from autograd"
  COMMAND "${bin}/simulate_argon" --device lazy
  COMMAND "${CMAKE_COMMAND}" -E echo "-- Options: Monte Carlo against the closed formula"
  COMMAND "${bin}/price_options" --device lazy
  COMMAND "${CMAKE_COMMAND}" -E echo "-- The zoo, with one thread and with two"
  COMMAND "${REPRISE_PYTHON_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/bench/report.py"
          --bin "${bin}" --threads 1 "${report}"
  COMMAND "${REPRISE_PYTHON_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/bench/report.py"
          --bin "${bin}" --threads 2 --artifacts "${report}/artifacts" "${report}/two_threads"
  DEPENDS train_digits train_gpt train_lstm train_gan simulate_argon price_options
          bench_models bench_overhead bench_peer_ltc
  WORKING_DIRECTORY "${PROJECT_BINARY_DIR}"
  USES_TERMINAL VERBATIM)
