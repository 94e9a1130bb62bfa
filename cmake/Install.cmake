# `cmake --install`: the library, its headers, the compiler with its Python package, and
# what other builds find it by: find_package(Reprise) and pkg-config.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Where the parts lie beside libreprise.so is what compile_queue.cpp expects.
set(beside "${CMAKE_INSTALL_LIBDIR}/reprise")
set(config "${CMAKE_INSTALL_LIBDIR}/cmake/Reprise")
set(libraries reprise)
if(REPRISE_COMPILER)
  list(APPEND libraries reprise_compiler)
endif()
set_target_properties(${libraries} PROPERTIES
  INSTALL_RPATH "$ORIGIN;${REPRISE_TORCH_DIR}/lib" INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS ${libraries} LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
set_target_properties(reprise-cache PROPERTIES
  INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};${REPRISE_TORCH_DIR}/lib"
  INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS reprise-cache RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(REPRISE_COMPILER)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/compiler_bridge/python/" DESTINATION "${beside}/python"
          PATTERN "__pycache__" EXCLUDE)
  install(DIRECTORY "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/reprise/toolchain"
          DESTINATION "${beside}" USE_SOURCE_PERMISSIONS)
endif()

set(REPRISE_INSTALL_LIBDIR "${CMAKE_INSTALL_LIBDIR}")
set(REPRISE_INSTALL_INCLUDEDIR "${CMAKE_INSTALL_INCLUDEDIR}")
set(generated "${PROJECT_BINARY_DIR}/generated")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/RepriseConfig.cmake.in"
  "${generated}/RepriseConfig.cmake" INSTALL_DESTINATION "${config}"
  PATH_VARS REPRISE_INSTALL_LIBDIR REPRISE_INSTALL_INCLUDEDIR)
write_basic_package_version_file("${generated}/RepriseConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${generated}/RepriseConfig.cmake" "${generated}/RepriseConfigVersion.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/LibTorch.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/describe_torch.py"
        DESTINATION "${config}")

# Found relative to its own place, as the CMake package is, with libtorch's own options.
set(pkgconfig "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
file(RELATIVE_PATH REPRISE_PC_TO_PREFIX "/${pkgconfig}" "/")
get_target_property(options reprise_libtorch INTERFACE_LINK_OPTIONS)
if(NOT options)  # without CUDA there are none
  set(options "")
endif()
list(TRANSFORM options REPLACE "^LINKER:" "-Wl,")
list(JOIN options " " REPRISE_PC_LIBTORCH)
configure_file("${CMAKE_CURRENT_LIST_DIR}/reprise.pc.in" "${generated}/reprise.pc" @ONLY)
install(FILES "${generated}/reprise.pc" DESTINATION "${pkgconfig}")
