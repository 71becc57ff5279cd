# How a stage's one source becomes an object for the GPU model and one for GPUs.

# Architectures. A stage with needs of its own sets `architectures` in its architectures.cmake.
set(default_architectures 80-real 90)

# The flags of kernels on the model: uninitialised variables get a pattern, not luck; kernels read 16-bit data as uint4.
set(model_kernel_flags ${MLA_KERNEL_FLAGS} -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi
    $<$<CXX_COMPILER_ID:GNU>:-ftrivial-auto-var-init=pattern>)

# A .cu file for the model: a source that includes it, so that one file can be in a target in either language.
function(mla_model_source target cu_file)
  file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${cu_file})
  string(REPLACE ".cu" "_on_model.cpp" wrapper ${name})
  string(REPLACE "../" "" wrapper ${CMAKE_CURRENT_BINARY_DIR}/${wrapper})
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${cu_file}\"\n" @ONLY)
  target_sources(${target} PRIVATE ${wrapper})
endfunction()

# Kernels for GPUs: spills to local memory are errors, like every warning, and like ptxas' remarks that it serialised
# wgmma, which is why the compiler runs under nvcc_guard.sh. With anything after that, spills are let through.
function(mla_gpu_options target architectures)
  set(launcher sh ${PROJECT_SOURCE_DIR}/stages/nvcc_guard.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${architectures}"
    CUDA_COMPILER_LAUNCHER "${launcher}")
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${target} PRIVATE mla_warnings)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo
    $<$<NOT:$<BOOL:${ARGN}>>:-Xptxas=-warn-spills,-warn-lmem-usage,-Werror>>)
endfunction()

# Adds the stages in `folders`, and the registry that lists them, to `target`. With definitions after that: builds of
# their own, with these, for a program that changes what a stage does beside its result.
function(mla_add_stages target folders)
  set(prefix stage_)
  if(ARGN)
    set(prefix ${target}_)
  endif()
  foreach(folder IN LISTS folders)
    get_filename_component(slug ${folder} NAME)
    add_library(${prefix}${slug}_model OBJECT)
    mla_model_source(${prefix}${slug}_model ${folder}/stage.cu)
    target_compile_definitions(${prefix}${slug}_model PRIVATE MLA_STAGE_ENTRY=stage_${slug} ${ARGN})
    target_compile_options(${prefix}${slug}_model PRIVATE ${model_kernel_flags})
    target_link_libraries(${prefix}${slug}_model PRIVATE reference gpu_model mla_warnings)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${prefix}${slug}_model>)
    string(APPEND model_declarations "namespace mla::model { Stage stage_${slug}(); }\n")
    string(APPEND model_entries "    add(model::stage_${slug}(), \"${slug}\");\n")

    if(MLA_HAVE_CUDA)
      set(architectures ${default_architectures})
      include(${folder}/architectures.cmake OPTIONAL)
      add_library(${prefix}${slug}_gpu OBJECT ${folder}/stage.cu)
      target_compile_definitions(${prefix}${slug}_gpu PRIVATE MLA_STAGE_ENTRY=stage_${slug} ${ARGN})
      mla_gpu_options(${prefix}${slug}_gpu "${architectures}" ${ARGN})
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${prefix}${slug}_gpu>)
      string(APPEND gpu_declarations "namespace mla::gpu { Stage stage_${slug}(); }\n")
      string(APPEND gpu_entries "    add(gpu::stage_${slug}(), \"${slug}\");\n")
    endif()
  endforeach()
  configure_file(${PROJECT_SOURCE_DIR}/stages/common/stage_list.cpp.in
                 ${CMAKE_CURRENT_BINARY_DIR}/${target}_list.cpp @ONLY)
  target_sources(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/${target}_list.cpp)
endfunction()
