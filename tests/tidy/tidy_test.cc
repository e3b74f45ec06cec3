// Holds the arrows of the architecture: the checkout against the rules of tree_rules.h, and each
// rule against a violation planted for it.

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/tidy/source_tree.h"
#include "tests/tidy/tree_rules.h"

namespace resa::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(TidyTest, CheckoutKeepsTheRules) {
  const char* root = std::getenv("RESA_SOURCE_DIR");
  ASSERT_NE(root, nullptr) << "RESA_SOURCE_DIR must name the checkout (ctest sets it)";
  ASSERT_GT(ReadTree(root).files.size(), 50u) << root << " is not the checkout";
  for (const Violation& violation : CheckTree(root)) ADD_FAILURE() << violation.ToString();
}

// A small tree in which every rule holds.
class PlantedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "resa_tidy_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    Write(".gitignore", "/build/\n__pycache__/\n*.pyc\n");
    Write("CMakeLists.txt", "project(resad)\n");
    Write("engine/step.h",
          "#ifndef RESA_ENGINE_STEP_H_\n#define RESA_ENGINE_STEP_H_\n"
          "#include \"kernels/ops.h\"\n#endif\n");
    Write("engine/step.cc", "#include \"engine/step.h\"\n");
    Write("kernels/ops.cc", "#include \"kernels/ops.h\"\n");
    Write("kernels/cpu/gemm.cc", "#include \"kernels/cpu/simd-inl.h\"\n");
    Write("kernels/cpu/simd-inl.h",
          "#if defined(RESA_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)\n");
    Write("server/main.cc", "#include \"kernels/cpu/cpu_ops.h\"\nint main() { getenv(\"A\"); }\n");
    Write("tests/engine/step_test.cc", "#include \"kernels/cpu/cpu_ops.h\"\n");
    Write("tests/engine/CMakeLists.txt", "resa_test(step_test SOURCES step_test.cc)\n");
    Write("tests/tidy/tested_elsewhere.txt",
          "# source test reason\n"
          "kernels/ops.cc tests/engine/step_test.cc checks only\n"
          "kernels/cpu/gemm.cc tests/engine/step_test.cc through the ops\n"
          "server/main.cc tests/engine/step_test.cc wiring\n");
  }
  void TearDown() override { fs::remove_all(root_); }

  void Write(std::string_view path, std::string_view text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  std::vector<std::string> Check() {
    std::vector<std::string> out;
    for (const Violation& violation : CheckTree(root_)) {
      out.push_back(violation.rule + " " + violation.file + ":" + std::to_string(violation.line));
    }
    return out;
  }

  fs::path root_;
};

TEST_F(PlantedTest, CleanTreePasses) { EXPECT_THAT(Check(), IsEmpty()); }

TEST_F(PlantedTest, UnknownEntryAtTheRoot) {
  Write("utils/x.md", "");
  Write("build/CMakeCache.txt", "");  // Ignored.
  EXPECT_THAT(Check(), ElementsAre("root utils:0"));
}

// One file, one forbidden header each.
struct Arrow {
  std::string file;
  std::string include;
};
class ArrowTest : public PlantedTest, public ::testing::WithParamInterface<Arrow> {};

TEST_P(ArrowTest, IsHeld) {
  Write(GetParam().file, "\n#include " + GetParam().include + "\n");
  EXPECT_THAT(Check(), ::testing::Contains("include " + GetParam().file + ":2"));
}

INSTANTIATE_TEST_SUITE_P(
    Forbidden, ArrowTest,
    ::testing::Values(Arrow{"engine/step.cc", "\"kernels/cpu/cpu_ops.h\""},
                      Arrow{"engine/step.cc", "\"kernels/cuda/cuda_ops.h\""},
                      Arrow{"engine/step.cc", "\"kernels/philox.h\""},
                      Arrow{"engine/step.cc", "\"server/config.h\""},
                      Arrow{"engine/step.cc", "<grpcpp/grpcpp.h>"},
                      Arrow{"engine/step.cc", "\"google/protobuf/message.h\""},
                      Arrow{"engine/step.cc", "\"proto/resa/v1/inference.pb.h\""},
                      Arrow{"engine/step.cc", "<spdlog/spdlog.h>"},
                      Arrow{"engine/step.cc", "\"tests/support/tiny_model.h\""},
                      Arrow{"kernels/ops.cc", "\"engine/step.h\""},
                      Arrow{"kernels/ops.cc", "\"server/config.h\""},
                      Arrow{"kernels/ops.cc", "\"spdlog/spdlog.h\""},
                      Arrow{"kernels/ops.cc", "\"kernels/cpu/cpu_ops.h\""},
                      Arrow{"kernels/cpu/gemm.cc", "\"kernels/cuda/cuda_ops.h\""},
                      Arrow{"kernels/cuda/gemm.cu", "\"kernels/cpu/cpu_ops.h\""},
                      Arrow{"server/config.cc", "\"kernels/cpu/cpu_ops.h\""},
                      Arrow{"server/main.cc", "\"tests/support/tiny_model.h\""}));

TEST_F(PlantedTest, GuardOfAnotherPath) {
  Write("engine/other.h", "#ifndef RESA_ENGINE_STEP_H_\n#define RESA_ENGINE_STEP_H_\n#endif\n");
  Write("engine/once.h", "#pragma once\n");
  Write("kernels/cpu/b-inl.h", "#if defined(RESA_B_INL_H_) == defined(HWY_TARGET_TOGGLE)\n");
  EXPECT_THAT(Check(), ElementsAre("guard engine/once.h:0", "guard engine/other.h:0",
                                   "guard kernels/cpu/b-inl.h:0"));
}

TEST_F(PlantedTest, NotesToSelf) {
  Write("deploy/setup.sh", std::string("echo ok\n# TO") + "DO: finish\n");
  Write("engine/step.cc", std::string("// FIX") + "ME\n");
  EXPECT_THAT(Check(), ElementsAre("text deploy/setup.sh:2", "text engine/step.cc:1"));
}

TEST_F(PlantedTest, LongLinesAndFiles) {
  Write("engine/step.cc", "// " + std::string(98, 'x') + "\n// " + std::string(97, 'x') + "\n");
  Write("kernels/ops.cc", "// \u00e9" + std::string(96, 'x') + "\n");  // 100 code points.
  std::string lines;
  for (int i = 0; i < 801; ++i) lines += "int x;\n";
  Write("server/main.cc", lines);
  EXPECT_THAT(Check(), ElementsAre("text engine/step.cc:1", "text server/main.cc:0"));
}

TEST_F(PlantedTest, ThrowAndEnvironment) {
  Write("engine/step.cc",
        "// We never throw.\n"
        "const char* s = \"throw \\\" getenv\"; /* throw\n"
        "throw */ int big = 1'000;\n"
        "void F() { throw 1; }\n"
        "auto* e = std::getenv(\"HOME\");\n"
        "auto* r = R\"(throw\n"
        "throw)\"; char c = '\"'; int after = 0;\n"
        "void G() { throw 2; }\n");
  EXPECT_THAT(Check(), ElementsAre("code engine/step.cc:4", "code engine/step.cc:5",
                                   "code engine/step.cc:8"));
}

TEST_F(PlantedTest, SourceWithoutTest) {
  Write("engine/lonely.cc", "");
  EXPECT_THAT(Check(), ElementsAre("mirror engine/lonely.cc:0"));
}

TEST_F(PlantedTest, BackendsShareTheirTests) {
  Write("kernels/cpu/norm.cc", "");
  Write("kernels/cuda/norm.cu", "");
  EXPECT_THAT(Check(),
              ElementsAre("mirror kernels/cpu/norm.cc:0", "mirror kernels/cuda/norm.cu:0"));
  Write("tests/kernels/norm_test.cc", "");
  Write("tests/kernels/CMakeLists.txt", "norm_test.cc");
  EXPECT_THAT(Check(), IsEmpty());
}

TEST_F(PlantedTest, StaleOrUnexplainedListLines) {
  Write("tests/tidy/tested_elsewhere.txt",
        "kernels/ops.cc tests/engine/step_test.cc\n"
        "kernels/cpu/gemm.cc tests/engine/gone_test.cc through the ops\n"
        "server/main.cc tests/engine/step_test.cc wiring\n"
        "engine/gone.cc tests/engine/step_test.cc was there\n"
        "engine/step.cc tests/engine/step_test.cc has its own\n");
  const std::string list = "mirror tests/tidy/tested_elsewhere.txt:";
  EXPECT_THAT(Check(), ElementsAre(list + "1", list + "2", list + "4", list + "5"));
}

TEST_F(PlantedTest, TestThatNeverRuns) {
  Write("tests/engine/silent_test.cc", "");
  Write("tests/engine/silent_too_test.cc", "");
  Write("tests/engine/loop_test.cc", "");
  EXPECT_THAT(Check(), ElementsAre("declared tests/engine/loop_test.cc:0",
                                   "declared tests/engine/silent_test.cc:0",
                                   "declared tests/engine/silent_too_test.cc:0"));
  Write("tests/engine/CMakeLists.txt",
        "foreach(name loop step)\n"
        "  resa_test(${name}_test SOURCES ${name}_test.cc)\n"
        "endforeach()\n"
        "# silent_test.cc\n");
  EXPECT_THAT(Check(), ElementsAre("declared tests/engine/silent_test.cc:0",
                                   "declared tests/engine/silent_too_test.cc:0"));
}

}  // namespace
}  // namespace resa::testing
