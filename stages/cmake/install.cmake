# find_package(flashmla) for others: flashmla::stages, ::common, ::gpu_model, ::layers, ::reference and, with tests or
# bench, ::testing. Headers go to include/flashmla, and name each other as "flashmla/reference/..." there, so that no
# consumer's own "reference/" or "stages/" is shadowed.
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/flashmla)
set(installed_targets flashmla_reference flashmla_layers flashmla_gpu_model flashmla_common flashmla_stages)
if(MLA_TESTS OR MLA_BENCH)
  list(APPEND installed_targets flashmla_testing)
endif()
install(TARGETS ${installed_targets} EXPORT flashmla)
install(EXPORT flashmla NAMESPACE flashmla:: DESTINATION ${package_folder} FILE flashmlaTargets.cmake)
install(CODE "set(source \"${PROJECT_SOURCE_DIR}\")\nset(headers \"${CMAKE_INSTALL_INCLUDEDIR}/flashmla\")")
install(SCRIPT ${CMAKE_CURRENT_LIST_DIR}/install_headers.cmake)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/flashmlaConfig.cmake.in flashmlaConfig.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(flashmlaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flashmlaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/flashmlaConfigVersion.cmake
        DESTINATION ${package_folder})
