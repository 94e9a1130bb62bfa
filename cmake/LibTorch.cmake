# Imported targets over the libtorch that lies in a torch wheel.
#
# Not find_package(Torch): with PyPI's CUDA build of torch that stops on a
# machine without a CUDA toolkit, and torch 2.15's stops with CMake 3.25 even
# where there is one.
#
#   Reprise::torch        libtorch, CPU and (where the wheel has it) CUDA
#   Reprise::torch_cuda   only where the wheel has CUDA; adds CUDA's headers
#
# Also sets REPRISE_TORCH_VERSION, REPRISE_TORCH_DIR, REPRISE_PYBIND11_INCLUDE.

if(REPRISE_PYTHON_EXECUTABLE)
  execute_process(
    COMMAND "${REPRISE_PYTHON_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/describe_torch.py"
    RESULT_VARIABLE failed OUTPUT_VARIABLE described ERROR_VARIABLE problem
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "${REPRISE_PYTHON_EXECUTABLE} has no usable torch:\n${problem}")
  endif()
else()
  # No Python: a folder with libtorch's include/ and lib/.
  set(header "${REPRISE_TORCH_DIR}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${header}")
    message(FATAL_ERROR "there is no libtorch in REPRISE_TORCH_DIR ('${REPRISE_TORCH_DIR}'): "
                        "name the folder that has its include/ and lib/")
  endif()
  file(READ "${header}" text)
  set(version "")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    string(REGEX MATCH "TORCH_VERSION_${part} ([0-9]+)" found "${text}")
    list(APPEND version "${CMAKE_MATCH_1}")
  endforeach()
  list(JOIN version "." version)
  file(GLOB wheels "${REPRISE_TORCH_DIR}/../nvidia/*/lib")
  list(TRANSFORM wheels REPLACE "/lib$" "")
  set(described "${version}" "${REPRISE_TORCH_DIR}" 1 none none ${wheels})
endif()
list(GET described 0 REPRISE_TORCH_VERSION)
list(GET described 1 REPRISE_TORCH_DIR)
list(GET described 2 torch_cxx11_abi)
list(GET described 3 REPRISE_PYBIND11_INCLUDE)
list(GET described 4 torch_cuda_version)
set(torch_cuda_wheels ${described})
list(REMOVE_AT torch_cuda_wheels 0 1 2 3 4)
if(REPRISE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "Reprise needs torch >= 2.11, and ${REPRISE_TORCH_DIR} has "
                      "${REPRISE_TORCH_VERSION}")
endif()
message(STATUS "torch ${REPRISE_TORCH_VERSION} in ${REPRISE_TORCH_DIR}")

set(torch_lib "${REPRISE_TORCH_DIR}/lib")
foreach(name IN ITEMS c10 torch_cpu torch c10_cuda torch_cuda)
  if(EXISTS "${torch_lib}/lib${name}.so")
    add_library(reprise_imported_${name} SHARED IMPORTED GLOBAL)
    set_target_properties(reprise_imported_${name} PROPERTIES
      IMPORTED_LOCATION "${torch_lib}/lib${name}.so" IMPORTED_NO_SONAME FALSE)
  endif()
endforeach()

add_library(reprise_libtorch INTERFACE)
add_library(Reprise::torch ALIAS reprise_libtorch)
target_include_directories(reprise_libtorch SYSTEM INTERFACE
  "${REPRISE_TORCH_DIR}/include" "${REPRISE_TORCH_DIR}/include/torch/csrc/api/include")
target_compile_definitions(reprise_libtorch INTERFACE
  _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi})
target_link_libraries(reprise_libtorch INTERFACE reprise_imported_torch_cpu reprise_imported_c10)

if(TARGET reprise_imported_torch_cuda)
  # Nothing names a symbol of libtorch_cuda, and it must be loaded all the same
  # for torch::kCUDA to exist.
  target_link_options(reprise_libtorch INTERFACE
    "LINKER:--push-state,--no-as-needed,${torch_lib}/libtorch_cuda.so,--pop-state"
    "LINKER:-rpath-link,${torch_lib}")
  add_library(reprise_libtorch_cuda INTERFACE)
  add_library(Reprise::torch_cuda ALIAS reprise_libtorch_cuda)
  target_link_libraries(reprise_libtorch_cuda INTERFACE
    reprise_libtorch reprise_imported_torch_cuda reprise_imported_c10_cuda)
  # CUDA's headers and runtime lie in the nvidia wheels beside torch.
  find_path(REPRISE_CUDA_INCLUDE cuda_runtime_api.h
    PATHS ${torch_cuda_wheels} $ENV{CUDA_HOME} /usr/local/cuda PATH_SUFFIXES include
    NO_DEFAULT_PATH)
  if(REPRISE_CUDA_INCLUDE)
    target_include_directories(reprise_libtorch_cuda SYSTEM INTERFACE "${REPRISE_CUDA_INCLUDE}")
  endif()
  # The one that libtorch_cuda was built with, by its name: wheels have no other.
  string(REGEX MATCH "^[0-9]+" cuda_major "${torch_cuda_version}")
  find_library(REPRISE_CUDART NAMES libcudart.so.${cuda_major} cudart
    PATHS ${torch_cuda_wheels} $ENV{CUDA_HOME} /usr/local/cuda PATH_SUFFIXES lib lib64
    NO_DEFAULT_PATH)
  if(REPRISE_CUDART)
    target_link_libraries(reprise_libtorch_cuda INTERFACE "${REPRISE_CUDART}")
  endif()
  foreach(wheel IN LISTS torch_cuda_wheels)
    target_link_options(reprise_libtorch INTERFACE "LINKER:-rpath-link,${wheel}/lib")
  endforeach()
endif()
