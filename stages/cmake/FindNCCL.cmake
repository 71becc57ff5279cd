# NCCL's header, and where its library is: NCCL_ROOT, the folder of the Python package nvidia-nccl-cu13 (or -cu12), or the
# system. The library is loaded when a program asks for it, not linked: there may be none, or another one, where that
# runs. Sets NCCL_FOUND, NCCL_INCLUDE_DIR, NCCL_LIBRARY (maybe empty), NCCL_VERSION.
set(nccl_hints "")
if(NOT NCCL_ROOT AND NOT DEFINED ENV{NCCL_ROOT})
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_FOUND)
    execute_process(COMMAND ${Python3_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('nvidia.nccl'); print(*s.submodule_search_locations, sep=';')"
      OUTPUT_VARIABLE nccl_hints OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${nccl_hints} PATH_SUFFIXES include)
find_file(NCCL_LIBRARY libnccl.so.2 HINTS ${NCCL_ROOT} $ENV{NCCL_ROOT} ${nccl_hints}
          PATHS /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE} /usr/local/lib /usr/lib64 PATH_SUFFIXES lib lib64)
set(NCCL_VERSION "")
if(NCCL_INCLUDE_DIR)
  file(STRINGS ${NCCL_INCLUDE_DIR}/nccl.h nccl_lines REGEX "#define NCCL_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "#define NCCL_[A-Z]+ +" "" nccl_lines "${nccl_lines}")
  string(REPLACE ";" "." NCCL_VERSION "${nccl_lines}")
endif()
include(FindPackageHandleStandardArgs)
set(NCCL_FIND_QUIETLY TRUE)
find_package_handle_standard_args(NCCL REQUIRED_VARS NCCL_INCLUDE_DIR VERSION_VAR NCCL_VERSION)
mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
