# In every public header, each type and each function outside a class has a comment. Members whose name says all need
# none, and kernels speak in plain comments, so Doxygen's own warning about the undocumented is of use for these alone.
#   cmake -DDOXYGEN=doxygen -DDOXYFILE=Doxyfile -P undocumented.cmake
file(READ ${DOXYFILE} doxyfile)
string(APPEND doxyfile "WARN_IF_UNDOCUMENTED = YES\nWARN_AS_ERROR = NO\nGENERATE_HTML = NO\nGENERATE_XML = NO\n")
file(WRITE ${DOXYFILE}.undocumented "${doxyfile}")
execute_process(COMMAND ${DOXYGEN} ${DOXYFILE}.undocumented OUTPUT_QUIET ERROR_VARIABLE warnings)
string(REGEX MATCHALL
  "[^\n]*\\.h:[0-9]+: [^\n]*(Compound [^\n]* is not documented|\\((function|typedef|enumeration)\\) of (namespace|file) [^\n]* is not documented)[^\n]*"
  missing "${warnings}")
list(REMOVE_DUPLICATES missing)
if(missing)
  list(JOIN missing "\n  " missing)
  message(FATAL_ERROR "A comment is missing:\n  ${missing}")
endif()
