# Finds the Python whose torch we build against and whose compiler we embed.
#
# Sets REPRISE_PYTHON_EXECUTABLE: an interpreter that has torch. That is
# REPRISE_PYTHON where given; otherwise a private virtual environment, made here
# from requirements.txt in the folder REPRISE_VENV.

set(REPRISE_PYTHON "" CACHE FILEPATH
    "Interpreter that has torch; empty: make a private virtual environment")
set(REPRISE_VENV "${PROJECT_BINARY_DIR}/venv" CACHE PATH
    "Where the private virtual environment lies")
set(REPRISE_VENV_TORCH "" CACHE STRING
    "The version of torch in it; empty: the one in requirements.txt")

if(REPRISE_PYTHON)
  set(Python3_EXECUTABLE "${REPRISE_PYTHON}")
endif()
find_package(Python3 3.10 QUIET COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Embed)
if(NOT Python3_Interpreter_FOUND)
  message(FATAL_ERROR "Reprise needs Python >= 3.10: install it "
                      "(Debian, Ubuntu: apt-get install python3 python3-dev python3-venv)")
endif()
if(NOT Python3_Development.Embed_FOUND)
  message(FATAL_ERROR
    "Reprise needs the headers and the shared library of ${Python3_EXECUTABLE} "
    "(${Python3_VERSION}): install them (Debian, Ubuntu: apt-get install python3-dev)")
endif()

function(reprise_make_venv)
  set(requirements "${PROJECT_SOURCE_DIR}/requirements.txt")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${requirements}")
  if(REPRISE_VENV_TORCH)
    file(READ "${requirements}" text)
    string(REGEX REPLACE "torch==[^\n]*" "torch==${REPRISE_VENV_TORCH}" text "${text}")
    set(requirements "${PROJECT_BINARY_DIR}/requirements.txt")
    file(WRITE "${requirements}" "${text}")
  endif()
  file(SHA256 "${requirements}" wanted)
  set(stamp "${REPRISE_VENV}/requirements.sha256")
  set(installed "")
  if(EXISTS "${stamp}")
    file(READ "${stamp}" installed)
  endif()
  if(installed STREQUAL wanted AND EXISTS "${REPRISE_VENV}/bin/python")
    return()
  endif()

  message(STATUS "Making a virtual environment in ${REPRISE_VENV}")
  execute_process(COMMAND "${Python3_EXECUTABLE}" -m venv "${REPRISE_VENV}"
                  RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    message(FATAL_ERROR
      "${Python3_EXECUTABLE} -m venv failed: install its venv module "
      "(Debian, Ubuntu: apt-get install python3-venv)\n${output}")
  endif()

  message(STATUS "Installing ${requirements} into it (torch is some 2 GB to download)")
  set(python "${REPRISE_VENV}/bin/python")
  # uv is an order of magnitude faster; pip does as well where it cannot be had.
  execute_process(COMMAND "${python}" -m pip install --quiet --disable-pip-version-check uv
                  RESULT_VARIABLE no_uv ERROR_QUIET)
  if(no_uv)
    set(installer "${python}" -m pip install --disable-pip-version-check)
  else()
    set(installer "${python}" -m uv pip install --python "${python}")
  endif()
  execute_process(COMMAND ${installer} -r "${requirements}" RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR
      "could not install ${requirements} into ${REPRISE_VENV} (see above); "
      "name an interpreter that has torch with -DREPRISE_PYTHON=...")
  endif()
  file(WRITE "${stamp}" "${wanted}")
endfunction()

if(REPRISE_PYTHON)
  set(REPRISE_PYTHON_EXECUTABLE "${REPRISE_PYTHON}")
else()
  reprise_make_venv()
  set(REPRISE_PYTHON_EXECUTABLE "${REPRISE_VENV}/bin/python")
endif()
