include(${CMAKE_CURRENT_LIST_DIR}/../architectures.cmake)  # as the stage
