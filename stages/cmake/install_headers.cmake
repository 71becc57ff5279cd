# Run by `cmake --install`: copies public headers, with the project's includes put below "flashmla/".
file(GLOB_RECURSE names RELATIVE "${source}" "${source}/reference/*.h" "${source}/stages/common/*.h")
foreach(name IN LISTS names)
  file(READ "${source}/${name}" text)
  string(REGEX REPLACE "(#include \")(reference|stages)/" "\\1flashmla/\\2/" text "${text}")
  file(WRITE "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/${headers}/${name}" "${text}")
endforeach()
