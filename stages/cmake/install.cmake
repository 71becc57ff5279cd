# find_package(flashmla) for others, whole or by COMPONENTS. Each component has a file of targets of its own, and
# flashmlaConfig.cmake.in says what it needs. flashmla::gpu needs the CUDA Toolkit alone.
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/flashmla)
set(built_components "")
macro(install_component component)
  install(TARGETS ${ARGN} EXPORT flashmla_${component})
  install(EXPORT flashmla_${component} NAMESPACE flashmla:: DESTINATION ${package_folder}
          FILE flashmla_${component}.cmake)
  list(APPEND built_components ${component})
endmacro()
if(MLA_HAVE_CUDA)
  install_component(gpu flashmla_gpu)
endif()
install_component(model flashmla_stages flashmla_common flashmla_gpu_model)
install_component(reference flashmla_reference)
install_component(layers flashmla_layers)
if(MLA_TESTS OR MLA_BENCH)
  install_component(testing flashmla_testing)
endif()

install(CODE "set(source \"${PROJECT_SOURCE_DIR}\")\nset(headers \"${CMAKE_INSTALL_INCLUDEDIR}/flashmla\")")
install(SCRIPT ${CMAKE_CURRENT_LIST_DIR}/install_headers.cmake)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/flashmlaConfig.cmake.in flashmlaConfig.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(flashmlaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flashmlaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/flashmlaConfigVersion.cmake
        DESTINATION ${package_folder})
