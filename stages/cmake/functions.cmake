# How libraries and programs are built here, and how a stage's one source becomes an object for the GPU model and one
# for GPUs.
include(GNUInstallDirs)

add_library(flashmla_warnings INTERFACE)
target_compile_options(flashmla_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow $<$<BOOL:${MLA_WERROR}>:-Werror>>
  # GCC 12 and 13 see overlaps in std::string's operator+ that are not there (GCC bug 105329).
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra $<$<BOOL:${MLA_WERROR}>:-Werror=all-warnings>>)

# Language, warnings and linking, the same for every target of the project.
function(flashmla_target target)
  set_target_properties(${target} PROPERTIES
    CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_RUNTIME_LIBRARY Static
    POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:flashmla_warnings>)
endfunction()

# Adds library flashmla_NAME, for others flashmla::NAME: flashmla_add_library(NAME STATIC|OBJECT [source...])
function(flashmla_add_library name kind)
  add_library(flashmla_${name} ${kind} ${ARGN})
  add_library(flashmla::${name} ALIAS flashmla_${name})
  set_target_properties(flashmla_${name} PROPERTIES EXPORT_NAME ${name})
  flashmla_target(flashmla_${name})
endfunction()

# Adds a program: flashmla_add_program(NAME source...)
function(flashmla_add_program name)
  add_executable(${name} ${ARGN})
  flashmla_target(${name})
endfunction()

# Headers of other projects, which take longer to read than most sources, compiled once for all targets with the same flags:
# flashmla_add_headers(NAME HEADER... [LIBRARIES target...] [OPTIONS option...]), then flashmla_use_headers(TARGET NAME), which
# links the libraries, too. Not with a compiler cache, which does not know such headers and takes less; and GCC alone, so that
# clang still finds an #include that is missing.
set(flashmla_precompiles OFF)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(flashmla_precompiles ON)
endif()
function(flashmla_add_headers name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LIBRARIES;OPTIONS")
  if(flashmla_precompiles)
    file(CONFIGURE OUTPUT ${name}.cpp CONTENT "// Owns headers that others share.\n")
    flashmla_add_library(${name} OBJECT ${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp)
    set_target_properties(flashmla_${name} PROPERTIES EXCLUDE_FROM_ALL ON FLASHMLA_LIBRARIES "${arg_LIBRARIES}")
    target_compile_options(flashmla_${name} PRIVATE ${arg_OPTIONS})
    target_link_libraries(flashmla_${name} PRIVATE ${arg_LIBRARIES})
    target_precompile_headers(flashmla_${name} PRIVATE ${arg_UNPARSED_ARGUMENTS})
    if("-fPIE" IN_LIST arg_OPTIONS)
      set_target_properties(flashmla_${name} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    endif()
  endif()
endfunction()
function(flashmla_use_headers target name)
  if(TARGET flashmla_${name})
    get_target_property(libraries flashmla_${name} FLASHMLA_LIBRARIES)
    target_link_libraries(${target} PRIVATE ${libraries})
    target_precompile_headers(${target} REUSE_FROM flashmla_${name})
  endif()
endfunction()

# Architectures. A stage with needs of its own sets `architectures` in its architectures.cmake.
# As CMake has them, and 80=80,86: machine code for the cards 8.0 and 8.6 from one pass over the source, which sees 8.0;
# 80=80,ptx keeps the PTX, too.
set(default_architectures 80-real 90)
# Of kernels that only check and measure, and use nothing that came after 8.0.
set(checking_architectures 80=80,90,ptx)
function(mla_set_architectures target architectures)
  set(others "")
  foreach(architecture IN LISTS architectures)
    if(architecture MATCHES "^([0-9]+)=(.*)$")
      set(seen compute_${CMAKE_MATCH_1})
      string(REGEX REPLACE "([0-9]+)" "sm_\\1" codes "${CMAKE_MATCH_2}")
      string(REPLACE ptx ${seen} codes "${codes}")
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--generate-code=arch=${seen},code=[${codes}]>)
    else()
      list(APPEND others ${architecture})
    endif()
  endforeach()
  if(NOT others)
    set(others OFF)
  endif()
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${others}")
endfunction()

# The flags of kernels on the model: uninitialised variables get a pattern, not luck; kernels read 16-bit data as uint4.
# `#pragma unroll` is for nvcc: that clang cannot always follow it is no fault.
set(model_kernel_flags ${MLA_KERNEL_FLAGS} -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi
    -ftrivial-auto-var-init=pattern $<$<CXX_COMPILER_ID:Clang>:-Wno-pass-failed>)

# Kernels that are compiled with these are seen by the model's race detector (reference/gpu_model/race_detector.h). The
# program is linked without them. AddressSanitizer bears no other beside it.
set(race_detector_flags "")
if(NOT MLA_SANITIZER STREQUAL address)
  set(race_detector_flags -fsanitize=thread -g1  # lines and inlined calls: with variables, too, it takes a third longer
      "$<IF:$<CXX_COMPILER_ID:Clang>,SHELL:-mllvm -tsan-distinguish-volatile,--param=tsan-distinguish-volatile=1>")
  if(CMAKE_CXX_COMPILER_ID STREQUAL Clang AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 15)
    list(APPEND race_detector_flags "SHELL:-include ${PROJECT_SOURCE_DIR}/reference/gpu_model/clang14_copies.h")
  endif()
endif()
# Kernels that are compiled with these are counted (reference/gpu_model/counters.h): every access as the source has it,
# a float4 as one, as nvcc does it. Optimised, so that what is the same is loaded once.
set(counted_kernel_flags ${race_detector_flags} -O2 -fno-tree-vectorize -fno-tree-slp-vectorize
    $<$<CXX_COMPILER_ID:GNU>:-fno-tree-sra -fno-ipa-sra -fno-store-merging -fno-tree-loop-distribute-patterns>)
if(MLA_SANITIZER STREQUAL races)
  list(APPEND model_kernel_flags ${race_detector_flags})
endif()

# A .cu file for the model: a source that includes it, so that one file can be in a target in either language. (Or the
# .cpp of a stage on the CPU, which an exercise may likewise take from a copy of the project.)
function(mla_model_source target cu_file)
  file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${cu_file})
  string(REGEX REPLACE "\\.(cu|cpp)$" "_on_model.cpp" wrapper ${name})
  string(REPLACE "../" "" wrapper ${CMAKE_CURRENT_BINARY_DIR}/${wrapper})
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${cu_file}\"\n" @ONLY)
  target_sources(${target} PRIVATE ${wrapper})
endfunction()

# Kernels for GPUs: spills to local memory are errors, like every warning, and like ptxas' remarks that it serialised
# wgmma, which is why the compiler runs under nvcc_guard.sh. With anything after that, spills are let through. By itself
# nvcc does not compress code that has line numbers; compressed, it takes a seventh of the space.
function(mla_gpu_options target architectures)
  set(launcher sh ${PROJECT_SOURCE_DIR}/stages/cmake/nvcc_guard.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  mla_set_architectures(${target} "${architectures}")
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Xfatbin=-compress-all
    $<$<NOT:$<BOOL:${ARGN}>>:-Xptxas=-warn-spills,-warn-lmem-usage,-Werror>>)
endfunction()

# Sets `result` to whether the stage in `folder` runs on the CPU: then it has no kernel, and nothing of it is compiled for
# GPUs, counted or made to race.
function(mla_is_on_cpu result folder)
  set(${result} OFF PARENT_SCOPE)
  if(EXISTS ${folder}/stage.cpp)
    set(${result} ON PARENT_SCOPE)
  endif()
endfunction()

# Sets `result` to the name of the stage, or step to a stage, in `folder`.
function(mla_slug result folder)
  get_filename_component(slug ${folder} NAME)
  if(folder MATCHES "/([0-9][0-9])_[^/]*/steps/")
    set(slug step_${CMAKE_MATCH_1}_${slug})
  endif()
  set(${result} ${slug} PARENT_SCOPE)
endfunction()

# Adds the stages in `folders`, and the registry that lists them, to `target`:
# mla_add_stages(TARGET FOLDERS [MACHINES model|gpu...] [DEFINITIONS name...] [REGISTRY steps])
# For both machines unless MACHINES names one; for GPUs only where there is nvcc. With definitions: builds of their own,
# with these, for a program that changes what a stage does beside its result. Without: a stage is built once.
function(mla_add_stages target folders)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" REGISTRY "MACHINES;DEFINITIONS")
  set(prefix stage_)
  if(arg_DEFINITIONS)
    set(prefix ${target}_)
  endif()
  set(machines ${arg_MACHINES})
  if(NOT machines)
    set(machines model gpu)
  endif()
  if(NOT MLA_HAVE_CUDA)
    list(REMOVE_ITEM machines gpu)
  endif()
  set(registry ${arg_REGISTRY})
  if(NOT registry)
    set(registry registry)
  endif()
  foreach(folder IN LISTS folders)
    mla_slug(slug ${folder})
    mla_is_on_cpu(on_cpu ${folder})
    if("model" IN_LIST machines)
      set(object flashmla_${prefix}${slug}_model)
      if(NOT TARGET ${object})
        flashmla_add_library(${prefix}${slug}_model OBJECT)
        if(on_cpu)
          mla_model_source(${object} ${folder}/stage.cpp)
        else()
          mla_model_source(${object} ${folder}/stage.cu)
          target_compile_options(${object} PRIVATE ${model_kernel_flags})
        endif()
        target_compile_definitions(${object} PRIVATE MLA_STAGE_ENTRY=stage_${slug} ${arg_DEFINITIONS})
        target_link_libraries(${object} PRIVATE flashmla_reference flashmla_gpu_model)
      endif()
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
      string(APPEND model_declarations "namespace mla::model { Stage stage_${slug}(); }\n")
      string(APPEND model_entries "    add(model::stage_${slug}(), \"${slug}\");\n")
    endif()
    if("gpu" IN_LIST machines AND NOT on_cpu)
      set(object flashmla_${prefix}${slug}_gpu)
      if(NOT TARGET ${object})
        set(architectures ${default_architectures})
        include(${folder}/architectures.cmake OPTIONAL)
        if(slug MATCHES "^step_")
          include(${folder}/../architectures.cmake OPTIONAL)
        endif()
        flashmla_add_library(${prefix}${slug}_gpu OBJECT ${folder}/stage.cu)
        target_compile_definitions(${object} PRIVATE MLA_STAGE_ENTRY=stage_${slug} ${arg_DEFINITIONS})
        mla_gpu_options(${object} "${architectures}" ${arg_DEFINITIONS})
      endif()
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
      string(APPEND gpu_declarations "namespace mla::gpu { Stage stage_${slug}(); }\n")
      string(APPEND gpu_entries "    add(gpu::stage_${slug}(), \"${slug}\");\n")
    endif()
  endforeach()
  configure_file(${PROJECT_SOURCE_DIR}/stages/common/${registry}.cpp.in
                 ${CMAKE_CURRENT_BINARY_DIR}/${target}_${registry}.cpp @ONLY)
  target_sources(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/${target}_${registry}.cpp)
endfunction()

# Adds the steps to the stages in `folders` to program `target`: each folder NN_name/steps/N_name is built like a stage,
# but steps() lists it, not stages(). See stages/05_tensor_core/steps/README.md.
function(mla_add_steps target folders)
  set(steps "")
  foreach(folder IN LISTS folders)
    file(GLOB found CONFIGURE_DEPENDS ${folder}/steps/[0-9]_*)
    list(APPEND steps ${found})
  endforeach()
  mla_add_stages(${target} "${steps}" MACHINES ${step_machines} REGISTRY steps)
endfunction()
