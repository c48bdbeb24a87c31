# SPDX-License-Identifier: Apache-2.0
#
# Injected with -DCMAKE_PROJECT_INCLUDE when an interface package is built on the ROS wheels.
#
# The exported targets of the wheels refer to the Python of their build container, and CMake refuses an imported
# target whose include directory does not exist. After the project has found all its packages, those directories are
# replaced with this environment's own; the installed files are not changed.
cmake_minimum_required(VERSION 3.21)

foreach(required KFLOC_PYTHON_INCLUDE KFLOC_NUMPY_INCLUDE)
  if(NOT IS_DIRECTORY "${${required}}")
    message(FATAL_ERROR "${required} must name an existing directory, but is '${${required}}'.")
  endif()
endforeach()

function(kfloc_repair_imported_targets)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(includes ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT includes)
      continue()
    endif()
    set(repaired "")
    foreach(include IN LISTS includes)
      if(include MATCHES "^/opt/python/.*/numpy/.*include$" AND NOT IS_DIRECTORY "${include}")
        list(APPEND repaired "${KFLOC_NUMPY_INCLUDE}")
      elseif(include MATCHES "^/opt/python/" AND NOT IS_DIRECTORY "${include}")
        list(APPEND repaired "${KFLOC_PYTHON_INCLUDE}")
      else()
        list(APPEND repaired "${include}")
      endif()
    endforeach()
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${repaired}")
  endforeach()
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL kfloc_repair_imported_targets)
