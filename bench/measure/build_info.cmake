# Run at every build: writes build_info.cpp where something in it changed. Needs source, output, cuda_compiler and
# host_compiler.
set(commit "unknown")
find_program(git git)
if(git)
  execute_process(COMMAND ${git} -C ${source} describe --always --dirty
                  OUTPUT_VARIABLE described RESULT_VARIABLE result OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(result EQUAL 0)
    set(commit ${described})
  endif()
endif()
configure_file(${source}/build_info.cpp.in ${output} @ONLY)
