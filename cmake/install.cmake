# What `cmake --install` puts where: headers, the two libraries, and how CMake and pkg-config find them. (app/ adds the command.)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sfa)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/sfa DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

# Libraries to name on a linker's line, from a target's link interface: what pkg-config users need after -lsfa.
function(sfa_link_line target out)
  get_target_property(needs ${target} INTERFACE_LINK_LIBRARIES)
  set(line "")
  foreach(need IN LISTS needs)
    string(REGEX REPLACE "^\\$<LINK_ONLY:(.*)>$" "\\1" need "${need}")
    if(need STREQUAL "libsfa")
      continue()
    elseif(need STREQUAL "OpenMP::OpenMP_C")
      list(APPEND line ${OpenMP_C_FLAGS})
    elseif(need MATCHES "^/")
      list(APPEND line ${need})
    elseif(need MATCHES "::(.*)")
      list(APPEND line -l${CMAKE_MATCH_1})
    else()
      list(APPEND line -l${need})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES line)
  list(JOIN line " " line)
  set(${out} "${line}" PARENT_SCOPE)
endfunction()

# One library: its files, its CMake targets, its pkg-config file. A static library hands its own needs on to the linker of its user.
function(sfa_install_library target name description requires)
  install(TARGETS ${target} EXPORT ${name}Targets)
  install(EXPORT ${name}Targets NAMESPACE sfa:: DESTINATION ${package_dir})
  sfa_link_line(${target} needs)
  set(libs_of_user " ${needs}")
  set(libs_private "")
  if(BUILD_SHARED_LIBS)
    set(libs_of_user "")
    set(libs_private "Libs.private: ${needs}\n")
  endif()
  file(RELATIVE_PATH to_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /) # so that an installed tree can be moved
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/${name}.pc @ONLY CONTENT [[
prefix=${pcfiledir}/@to_prefix@.
libdir=${prefix}/@CMAKE_INSTALL_LIBDIR@
includedir=${prefix}/@CMAKE_INSTALL_INCLUDEDIR@

Name: @name@
Description: @description@
Version: @PROJECT_VERSION@
Requires: @requires@
Cflags: -I${includedir}
Libs: -L${libdir} -l@name@@libs_of_user@
@libs_private@]])
  install(FILES ${CMAKE_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()

sfa_install_library(libsfa sfa "Sparse feature attention: top-k codes, exact attention over them, a sparse KV cache" "")
if(TARGET libsfa_engine)
  sfa_install_library(libsfa_engine sfa_engine "Language models with sparse feature attention: files, tokenizers, sessions" "sfa")
endif()
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/sfaConfig.cmake.in ${CMAKE_BINARY_DIR}/sfaConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/sfaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/sfaConfig.cmake ${CMAKE_BINARY_DIR}/sfaConfigVersion.cmake DESTINATION ${package_dir})
