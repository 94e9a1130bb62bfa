# Installs BUILD into a new folder, WORK/prefix, and builds and runs programs against it:
# with find_package, with pkg-config, and one that only gets the library from LD_PRELOAD.
foreach(variable IN ITEMS BUILD WORK CXX)
  if(NOT ${variable})
    message(FATAL_ERROR "${variable} is not given")
  endif()
endforeach()
set(source "${CMAKE_CURRENT_LIST_DIR}")
set(prefix "${WORK}/prefix")
file(REMOVE_RECURSE "${WORK}")
file(MAKE_DIRECTORY "${WORK}")

macro(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endmacro()

run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${prefix}")
# What is found must also be found after a move.
file(RENAME "${prefix}" "${WORK}/moved")
set(prefix "${WORK}/moved")
run("${CMAKE_COMMAND}" -S "${source}" -B "${WORK}/build" "-DCMAKE_PREFIX_PATH=${prefix}"
    "-DCMAKE_CXX_COMPILER=${CXX}")
run("${CMAKE_COMMAND}" --build "${WORK}/build")
set(ENV{REPRISE_CACHE_DIR} "${WORK}/cache")
run("${WORK}/build/consumer")
file(GLOB library "${prefix}/lib*/libreprise.so")
run("${CMAKE_COMMAND}" -E env "LD_PRELOAD=${library}" "${WORK}/build/preloaded")

find_program(PKG_CONFIG pkg-config)
if(NOT PKG_CONFIG)
  message(STATUS "no pkg-config: not tried")
  return()
endif()
get_filename_component(libdir "${library}" DIRECTORY)
execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env "PKG_CONFIG_PATH=${libdir}/pkgconfig"
          "${PKG_CONFIG}" --cflags --libs reprise
  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags NATIVE_COMMAND "${flags}")
run("${CXX}" "${source}/consumer.cpp" -o "${WORK}/by_pkg_config" ${flags})
run("${WORK}/by_pkg_config")
