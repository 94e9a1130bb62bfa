# The data of examples and benches, written once at set-up from what the Python
# environment ships: no download.
set(REPRISE_DATA_DIR "${PROJECT_BINARY_DIR}/data" CACHE PATH "Where the examples' data lies")

function(reprise_export_data script file)
  set(source "${PROJECT_SOURCE_DIR}/tools/${script}")
  if(EXISTS "${REPRISE_DATA_DIR}/${file}" AND
     NOT "${source}" IS_NEWER_THAN "${REPRISE_DATA_DIR}/${file}")
    return()
  endif()
  message(STATUS "Exporting ${file}")
  execute_process(COMMAND "${REPRISE_PYTHON_EXECUTABLE}" "${source}" "${REPRISE_DATA_DIR}"
                  RESULT_VARIABLE failed ERROR_VARIABLE problem)
  if(failed)
    message(WARNING "${script} failed, and the examples that need ${file} will not run:\n${problem}")
  endif()
endfunction()

reprise_export_data(export_digits.py digits-images.idx3-ubyte)
reprise_export_data(export_text.py reference.txt)
