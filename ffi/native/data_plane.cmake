# The data plane (platform, reader, neuron cache, stream, and what measures them), and the guesser, which is as pure, as a
# static library without llama.cpp. Included by the library's own build and by the project of its tests; HYPURA_SANITIZE
# is empty, "address,undefined", "thread" or a list for -fsanitize=.
find_package(Threads REQUIRED)
if(APPLE)
    set(HYPURA_PLATFORM_SOURCE ${CMAKE_CURRENT_LIST_DIR}/platform_darwin.cpp)
else()
    set(HYPURA_PLATFORM_SOURCE ${CMAKE_CURRENT_LIST_DIR}/platform_linux.cpp)
endif()
add_library(hypura_data STATIC
    ${CMAKE_CURRENT_LIST_DIR}/reader.cpp
    ${CMAKE_CURRENT_LIST_DIR}/neuron_cache.cpp
    ${CMAKE_CURRENT_LIST_DIR}/stream.cpp
    ${CMAKE_CURRENT_LIST_DIR}/trace.cpp
    ${CMAKE_CURRENT_LIST_DIR}/replay.cpp
    ${CMAKE_CURRENT_LIST_DIR}/guesser.cpp
    ${CMAKE_CURRENT_LIST_DIR}/measure.cpp
    ${HYPURA_PLATFORM_SOURCE})
target_include_directories(hypura_data PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_compile_features(hypura_data PUBLIC cxx_std_17)
target_compile_options(hypura_data PRIVATE -Wall -Wextra -Werror)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_compile_options(hypura_data PRIVATE -Wthread-safety)
endif()
set_target_properties(hypura_data PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_link_libraries(hypura_data PUBLIC Threads::Threads)
if(HYPURA_SANITIZE)
    target_compile_options(hypura_data PUBLIC -fsanitize=${HYPURA_SANITIZE} -fno-sanitize-recover=all
                                              -fno-omit-frame-pointer -g)
    target_link_options(hypura_data PUBLIC -fsanitize=${HYPURA_SANITIZE})
endif()
