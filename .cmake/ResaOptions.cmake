# Options, compiler flags, and the two functions every folder declares its targets with.

option(RESA_BUILD_TESTS "Build the test suite" ON)
option(RESA_BUILD_FUZZERS "Build the libFuzzer targets (needs clang)" OFF)
set(RESA_SANITIZE "" CACHE STRING "Sanitizers to build with: address,undefined or thread")
option(RESA_ONEDNN "Use a CPU's bf16 instructions through oneDNN (x86-64)" ON)
set(RESA_CUDA "auto" CACHE STRING "Build the CUDA backend: auto (when a toolkit is found), ON or OFF")
set(RESA_CUDA_LIBRARY STATIC CACHE STRING
  "STATIC, or SHARED so that several programs that travel hold the kernels once")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
# CHECKs are our own and stay on in every build; release drops only libraries' asserts.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1 -DNDEBUG")

find_program(RESA_CCACHE ccache)
if(RESA_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER ${RESA_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${RESA_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${RESA_CCACHE})
endif()

if(RESA_SANITIZE)
  add_compile_options(-fsanitize=${RESA_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${RESA_SANITIZE})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # With instrumentation in the way, gcc's flow analysis sees these where there are none.
    add_compile_options(-Wno-maybe-uninitialized -Wno-restrict)
  endif()
  if(RESA_SANITIZE MATCHES "undefined")
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()

set(RESA_WARNINGS -Wall -Wextra -Werror)

# resa_library(name SOURCES a.cc ... DEPS lib ...): a static library that warns on everything.
function(resa_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${RESA_WARNINGS})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS})
endfunction()

# resa_cuda_library(name SOURCES a.cc b.cu ... DEPS lib ...): the same with kernels for a GPU.
function(resa_cuda_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(${name} ${RESA_CUDA_LIBRARY} ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:${RESA_WARNINGS}>
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 -lineinfo --expt-relaxed-constexpr -Werror=all-warnings
      -Xcompiler=-Wall,-Wextra>)
  target_link_libraries(${name} PUBLIC ${ARG_DEPS} CUDA::cudart_static)
  # Definitions for those who choose a backend at run time.
  target_compile_definitions(${name} INTERFACE RESA_HAVE_CUDA=1)
endfunction()

# resa_binary(name SOURCES main.cc ... DEPS lib ...)
function(resa_binary name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE ${RESA_WARNINGS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS})
endfunction()

# What the sanitizer builds build and run: every test labelled unit, sim or e2e.
add_custom_target(resa_sanitized_tests)

# resa_test(name SOURCES x_test.cc ... DEPS lib ... [LABELS unit] [TIMEOUT 60] [ARGS ...]): one
# GoogleTest binary that ctest runs as one test. RESA_SOURCE_DIR in the environment is the
# checkout's root, for tests that read files of the repository.
function(resa_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS;ARGS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 60)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  resa_binary(${name} SOURCES ${ARG_SOURCES} DEPS ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  if(RESA_SANITIZE MATCHES "thread")
    target_sources(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests/support/tsan_absl_mutex.cc)
    target_link_libraries(${name} PRIVATE ${CMAKE_DL_LIBS})
  endif()
  if(ARG_LABELS MATCHES "^(unit|sim|e2e)$")
    add_dependencies(resa_sanitized_tests ${name})
  endif()
  add_test(NAME ${name} COMMAND ${name} ${ARG_ARGS})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}"
    ENVIRONMENT "RESA_SOURCE_DIR=${PROJECT_SOURCE_DIR}")
endfunction()
