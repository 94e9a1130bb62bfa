# Warnings, sanitizers and the shared precompiled header.

add_library(reprise_flags INTERFACE)
target_compile_options(reprise_flags INTERFACE -Wall -Wextra -Wno-unknown-pragmas)
if(REPRISE_WARNINGS_AS_ERRORS)
  target_compile_options(reprise_flags INTERFACE -Werror)
endif()
if(REPRISE_SANITIZE)
  target_compile_options(reprise_flags INTERFACE
    -fsanitize=${REPRISE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all
    # False alarms in libtorch's headers under GCC's sanitizers.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  target_link_options(reprise_flags INTERFACE -fsanitize=${REPRISE_SANITIZE})
endif()

# <torch/torch.h> costs some 15 s of each translation unit; it is parsed once
# here. Other targets take it with
#   target_precompile_headers(target REUSE_FROM reprise_pch)
file(WRITE "${PROJECT_BINARY_DIR}/generated/pch.cpp.in" "// Holds the precompiled <torch/torch.h>.\n")
configure_file("${PROJECT_BINARY_DIR}/generated/pch.cpp.in"
               "${PROJECT_BINARY_DIR}/generated/pch.cpp" COPYONLY)
add_library(reprise_pch STATIC "${PROJECT_BINARY_DIR}/generated/pch.cpp")
target_link_libraries(reprise_pch PUBLIC Reprise::torch PRIVATE reprise_flags)
target_precompile_headers(reprise_pch PRIVATE <torch/torch.h>)
