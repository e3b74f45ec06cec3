#include "server/config.h"

#include <cstdlib>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

absl::StatusOr<Config> Resolve(std::vector<std::string> args) {
  const absl::StatusOr<CommandLine> line = ParseCommandLine(args);
  if (!line.ok()) return line.status();
  return ResolveConfig(line->settings);
}

// With a model, so that everything else can be looked at.
Config MustResolve(std::vector<std::string> args) {
  args.insert(args.begin(), "--model=/models/tiny");
  absl::StatusOr<Config> config = Resolve(args);
  EXPECT_TRUE(config.ok()) << config.status();
  return *std::move(config);
}

std::string WriteFile(const std::string& text) {
  const std::string path = testing::TempDir() + "/config_test.textproto";
  std::ofstream(path) << text;
  return path;
}

TEST(ConfigTest, Defaults) {
  const Config config = MustResolve({});
  EXPECT_EQ(config.model.path, "/models/tiny");
  EXPECT_EQ(config.model.served_name, "tiny");
  EXPECT_EQ(config.listen.grpc_address, "127.0.0.1:50051");
  EXPECT_EQ(config.listen.http_address, "127.0.0.1:9090");
  EXPECT_EQ(config.listen.drain_timeout, absl::Seconds(25));
  EXPECT_EQ(config.device.device, Device::kAuto);
  EXPECT_EQ(config.device.threads, 0);
  EXPECT_TRUE(config.device.cpu_bf16);
  EXPECT_EQ(config.pool.kv_dtype, kernels::DType::kBF16);
  EXPECT_EQ(config.pool.bytes, std::nullopt);
  EXPECT_EQ(config.pool.selector,
            (kernels::SelectorSpec{.kind = kernels::SelectorKind::kSketch, .planes = 3}));
  EXPECT_EQ(config.limits.max_context, std::nullopt);
  EXPECT_EQ(config.limits.max_sequences, 64);
  EXPECT_EQ(config.limits.max_step_tokens, 512);
  EXPECT_EQ(config.limits.max_waiting, 256);
  EXPECT_EQ(config.attention.default_policy, engine::AttentionPolicy());
  EXPECT_TRUE(config.attention.auto_mode);
  EXPECT_EQ(config.attention.sparse_from, std::nullopt);
  EXPECT_EQ(config.log.level, "info");
  EXPECT_FALSE(config.log.prompts);
}

TEST(ConfigTest, AGpuIsNamedByItsNumber) {
  const Config config = MustResolve({"--device=cuda:3", "--deterministic=true"});
  EXPECT_EQ(config.device.device, Device::kCuda);
  EXPECT_EQ(config.device.cuda_index, 3);
  EXPECT_TRUE(config.device.deterministic);
  EXPECT_EQ(MustResolve({"--device=cpu"}).device.device, Device::kCpu);
  EXPECT_FALSE(MustResolve({}).device.deterministic);
}

TEST(ConfigTest, EveryFieldIsAFlagAndIsExplained) {
  const std::string help = HelpText();
  const auto* descriptor = resa::v1::ServerConfig::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    std::string flag = descriptor->field(i)->name();
    std::replace(flag.begin(), flag.end(), '_', '-');
    EXPECT_THAT(help, HasSubstr("--" + flag));
    EXPECT_FALSE(descriptor->field(i)->options().GetExtension(resa::v1::flag).text().empty())
        << flag;
  }
}

TEST(ConfigTest, AutoIsASettingOfItsOwn) {
  const auto config = [](const std::vector<std::string>& flags) {
    const auto line = ParseCommandLine(flags);
    EXPECT_TRUE(line.ok()) << line.status();
    return ResolveConfig(line->settings).value();
  };
  EXPECT_FALSE(config({"--model=m", "--attention-mode=sparse"}).attention.auto_mode);
  EXPECT_TRUE(config({"--model=m", "--attention-mode=auto"}).attention.auto_mode);
  // The paper's mode belongs to its preset, unless told otherwise.
  const Config paper = config({"--model=m", "--preset=paper"});
  EXPECT_FALSE(paper.attention.auto_mode);
  EXPECT_EQ(paper.attention.default_policy, engine::PaperPolicy());
  EXPECT_TRUE(config({"--model=m", "--preset=paper", "--attention-mode=auto"}).attention.auto_mode);

  EXPECT_EQ(config({"--model=m", "--sparse-from=7"}).attention.sparse_from, 7);
  EXPECT_EQ(config({"--model=m", "--sparse-from=auto"}).attention.sparse_from, std::nullopt);
  // A flag overrides the file, with "auto" as well.
  const std::string path = WriteFile("model: 'm' sparse_from: 512 attention_mode: 'dense'");
  EXPECT_EQ(config({"--config=" + path}).attention.sparse_from, 512);
  const Config overridden =
      config({"--config=" + path, "--sparse-from=auto", "--attention-mode=auto"});
  EXPECT_EQ(overridden.attention.sparse_from, std::nullopt);
  EXPECT_TRUE(overridden.attention.auto_mode);
  EXPECT_FALSE(ParseCommandLine({"--model=m", "--max-waiting=auto"}).ok());
}

// The same settings from flags and from a file, one of every type and every group.
TEST(ConfigTest, FlagsAndFileMeanTheSame) {
  const std::string path = WriteFile(R"(
      # A comment.
      model: "/m/a.gguf" served_model_name: "served" listen: "[::]:0" http_listen: ""
      port_file: "/tmp/ports" drain_timeout: "5s" device: "cpu" threads: 3 cpu_bf16: "off"
      deterministic: true
      kv_dtype: "f32"
      pool_memory: "64MiB" max_context: 4096 max_sequences: 8 max_step_tokens: 600
      max_waiting: 9 preset: "default" selector: "sketch" block_tokens: 4 planes: 3
      refine_share: [0.5, 0.25] attention_mode: "sparse" keep_ratio: 0.2 min_tokens: 128
      local_tokens: 8 sink_tokens: 0 rectify_interval: 64 sparse_from: 0
      log_level: "debug" log_prompts: true)");
  const auto file = ParseCommandLine({"--config", path});
  ASSERT_TRUE(file.ok()) << file.status();
  const auto flags = ParseCommandLine({"--model=/m/a.gguf",
                                       "--served-model-name=served",
                                       "--listen=[::]:0",
                                       "--http-listen=",
                                       "--port-file=/tmp/ports",
                                       "--drain-timeout=5s",
                                       "--device=cpu",
                                       "--threads=3",
                                       "--cpu-bf16=off",
                                       "--deterministic",
                                       "--kv-dtype=f32",
                                       "--pool-memory=64MiB",
                                       "--max-context=4096",
                                       "--max-sequences=8",
                                       "--max-step-tokens=600",
                                       "--max-waiting=9",
                                       "--preset=default",
                                       "--selector=sketch",
                                       "--block-tokens=4",
                                       "--planes=3",
                                       "--refine-share=0.5,0.25",
                                       "--attention-mode=sparse",
                                       "--keep-ratio=0.2",
                                       "--min-tokens=128",
                                       "--local-tokens=8",
                                       "--sink-tokens=0",
                                       "--rectify-interval=64",
                                       "--sparse-from=0",
                                       "--log-level=debug",
                                       "--log-prompts"});
  ASSERT_TRUE(flags.ok()) << flags.status();
  EXPECT_EQ(file->settings.DebugString(), flags->settings.DebugString());
  // Nothing was forgotten above.
  std::vector<const google::protobuf::FieldDescriptor*> set;
  flags->settings.GetReflection()->ListFields(flags->settings, &set);
  EXPECT_EQ(static_cast<int>(set.size()), resa::v1::ServerConfig::descriptor()->field_count());

  const absl::StatusOr<Config> config = ResolveConfig(flags->settings);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->listen.http_address, "");
  EXPECT_EQ(config->listen.drain_timeout, absl::Seconds(5));
  EXPECT_EQ(config->device.threads, 3);
  EXPECT_FALSE(config->device.cpu_bf16);
  EXPECT_EQ(config->pool.kv_dtype, kernels::DType::kF32);
  EXPECT_EQ(config->pool.bytes, 64 << 20);
  EXPECT_EQ(config->pool.selector.planes, 3);
  EXPECT_EQ(config->pool.selector.block_tokens, 4);
  EXPECT_EQ(config->pool.selector.refine_share[0], 0.5f);
  EXPECT_EQ(config->pool.selector.refine_share[1], 0.25f);
  EXPECT_EQ(config->limits.max_context, 4096);
  EXPECT_EQ(config->attention.default_policy.mode, engine::AttentionMode::kSparse);
  EXPECT_EQ(config->attention.default_policy.rectify_interval, 64);
  EXPECT_EQ(config->attention.sparse_from, 0);
  EXPECT_TRUE(config->log.prompts);
}

TEST(ConfigTest, FlagsOverrideTheFile) {
  const std::string path =
      WriteFile("model: 'a' max_waiting: 5 planes: 3 refine_share: [0.5, 0.4] threads: 2");
  const auto config =
      Resolve({"--config", path, "--max-waiting=7", "--refine-share=0.3", "--threads", "1"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->limits.max_waiting, 7);
  EXPECT_EQ(config->device.threads, 1);
  EXPECT_EQ(config->pool.selector.planes, 3);
  EXPECT_EQ(config->pool.selector.refine_share[0], 0.3f);
  EXPECT_EQ(config->pool.selector.refine_share[1], 0.3f);
}

TEST(ConfigTest, PaperPresetIsThePapersSelectorAndBudgets) {
  const Config config = MustResolve({"--preset=paper"});
  EXPECT_EQ(config.pool.selector.kind, kernels::SelectorKind::kMinMax);
  EXPECT_EQ(config.pool.selector.block_tokens, 16);
  EXPECT_EQ(config.pool.selector.planes, 0);
  EXPECT_EQ(config.attention.default_policy, engine::PaperPolicy());
  // Single budgets still override it.
  EXPECT_EQ(MustResolve({"--preset=paper", "--keep-ratio=0.2"}).attention.default_policy.keep_ratio,
            0.2);
}

TEST(ConfigTest, CheckHelpAndVersionAreNotSettings) {
  const auto line = ParseCommandLine({"--check", "--model=x"});
  ASSERT_TRUE(line.ok());
  EXPECT_TRUE(line->check);
  EXPECT_TRUE(ParseCommandLine({"--help"})->help);
  EXPECT_TRUE(ParseCommandLine({"--version"})->version);
}

TEST(ConfigTest, RefusesWhatIsOutOfRangeOrContradictsItselfWithOneLine) {
  struct Case {
    std::vector<std::string> args;
    std::string message;
  };
  const Case cases[] = {
      {{}, "--model: required"},
      {{"--model="}, "--model: required"},
      {{"--model=m", "--served-model-name="}, "--served-model-name: must not be empty"},
      {{"--model=m", "extra"}, "unexpected argument 'extra'"},
      {{"--model=m", "--modell=n"}, "unknown flag --modell; did you mean --model?"},
      {{"--model=m", "--listen=50051"}, "--listen: '50051' is not HOST:PORT"},
      {{"--model=m", "--listen=:1"}, "--listen: ':1' is not HOST:PORT"},
      {{"--model=m", "--listen=h:65536"}, "--listen: 'h:65536' is not HOST:PORT"},
      {{"--model=m", "--http-listen=h:"}, "--http-listen: 'h:' is not HOST:PORT"},
      {{"--model=m", "--listen=h:1", "--http-listen=h:1"}, "--http-listen: h:1 is also --listen"},
      {{"--model=m", "--drain-timeout=soon"}, "--drain-timeout: 'soon' is not a duration"},
      {{"--model=m", "--device=cuda"}, "--device: 'cuda' is none of auto, cpu, cuda:N"},
      {{"--model=m", "--device=cuda:-1"}, "--device: 'cuda:-1' is none of auto, cpu, cuda:N"},
      {{"--model=m", "--device=cuda:N"}, "--device: cuda:N is cuda:0 for the first GPU"},
      {{"--model=m", "--device=tpu"}, "--device: 'tpu' is none of auto, cpu, cuda:N"},
      {{"--model=m", "--threads=0"}, "--threads: 0 is not from 1 to 1024"},
      {{"--model=m", "--cpu-bf16=on"}, "--cpu-bf16: 'on' is none of auto, off"},
      {{"--model=m", "--kv-dtype=f16"}, "--kv-dtype: 'f16' is none of bf16, f32"},
      {{"--model=m", "--pool-memory=much"}, "--pool-memory: 'much' is not a size"},
      {{"--model=m", "--max-context=1"}, "--max-context: 1 is not at least 2"},
      {{"--model=m", "--max-sequences=0"}, "--max-sequences: 0 is not from 1 to 4096"},
      {{"--model=m", "--max-waiting=0"}, "--max-waiting: 0 is not from 1 to 65536"},
      {{"--model=m", "--max-sequences=2000000000", "--max-step-tokens=2147483647"},
       "--max-sequences: 2000000000 is not from 1 to 4096"},
      {{"--model=m", "--max-step-tokens=2147483647"},
       "--max-step-tokens: 2147483647 is not from 1 to 65536"},
      {{"--model=m", "--max-step-tokens=100"}, "--max-step-tokens: 100, must be at least 352: "},
      {{"--model=m", "--max-sequences=300"}, "--max-step-tokens: 512, must be at least 588: "},
      {{"--model=m", "--preset=best"}, "--preset: 'best' is none of default, paper"},
      {{"--model=m", "--selector=oracle"}, "--selector: 'oracle' is none of sketch, minmax"},
      {{"--model=m", "--preset=paper", "--selector=sketch"}, "--selector: --preset paper means"},
      {{"--model=m", "--selector=minmax", "--block-tokens=8"}, "--block-tokens: minmax has"},
      {{"--model=m", "--selector=minmax", "--planes=2"}, "--planes: minmax has none"},
      {{"--model=m", "--selector=minmax", "--refine-share=0.5"}, "--refine-share: minmax has no"},
      {{"--model=m", "--block-tokens=12"}, "--block-tokens: 12 is not 4, 8 or 16"},
      {{"--model=m", "--planes=4"}, "--planes: 4 is not from 1 to 3"},
      {{"--model=m", "--planes=1", "--refine-share=0.5"}, "--refine-share: 1 shares, but 1"},
      {{"--model=m", "--planes=3", "--refine-share=0.2,0.5"}, "--refine-share: 0.5 is not above"},
      {{"--model=m", "--refine-share=0"}, "--refine-share: 0 is not above 0"},
      {{"--model=m", "--refine-share=0.1,"}, "--refine-share: '' is not a number"},
      {{"--model=m", "--attention-mode=fast"}, "--attention-mode: 'fast' is none of"},
      {{"--model=m", "--keep-ratio=0"}, "--keep-ratio: 0 is not above 0 and at most 1"},
      {{"--model=m", "--keep-ratio=1.5"}, "--keep-ratio: 1.5 is not"},
      {{"--model=m", "--min-tokens=0"}, "--min-tokens: 0 is not at least 1"},
      {{"--model=m", "--local-tokens=0"}, "--local-tokens: 0 is not at least 1"},
      {{"--model=m", "--sink-tokens=-1"}, "--sink-tokens: -1 is not at least 0"},
      {{"--model=m", "--rectify-interval=12"}, "--rectify-interval: 12 is not a multiple of 8"},
      {{"--model=m", "--sparse-from=-1"}, "--sparse-from: -1 is not at least 0"},
      {{"--model=m", "--log-level=all"}, "--log-level: 'all' is none of"},
      {{"--config=/nonexistent.textproto"}, "--config: cannot read /nonexistent.textproto"},
  };
  for (const Case& c : cases) {
    const auto config = Resolve(c.args);
    ASSERT_FALSE(config.ok()) << c.message;
    EXPECT_THAT(std::string(config.status().message()), StartsWith(c.message));
    EXPECT_THAT(std::string(config.status().message()), testing::Not(HasSubstr("\n")));
  }
}

TEST(ConfigTest, FileErrorsNameLineAndColumn) {
  struct Case {
    std::string text;
    std::string message;
  };
  const Case cases[] = {
      {"model: 'm'\nthread: 3", ":2:"},
      {"model: 'm'\nthreads: 'three'", ":2:"},
      {"model: 'm'\nmodel: 'n'", ":2:"},
      {"model", ":1:"},
  };
  for (const Case& c : cases) {
    const std::string path = WriteFile(c.text);
    const auto config = Resolve({"--config", path});
    ASSERT_FALSE(config.ok()) << c.text;
    EXPECT_THAT(std::string(config.status().message()), StartsWith(path + c.message)) << c.text;
  }
}

}  // namespace
}  // namespace resa::server
