// mla_run profile as a process: the counts of the stages are compared with formulas. MLA_RUN names
// the program.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/bench/tools/run_program.h"

namespace mla {
namespace {

using Json = nlohmann::json;

Ran run(const std::string& arguments) {
  return run_program(std::string("'") + std::getenv("MLA_RUN") + "' profile " + arguments);
}

class MlaRunProfile : public testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("MLA_RUN") == nullptr) GTEST_SKIP() << "MLA_RUN does not name the program";
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "kernels cannot be counted beside AddressSanitizer";
#endif
#ifdef __clang__
    GTEST_SKIP() << "clang splits accesses to structs; see docs/counters.md";
#endif
  }

  /// The counts of one kernel.
  static Json kernel(const std::string& stage, const std::string& name,
                     const std::string& more = "") {
    const Ran ran = run("--json --stage " + stage + " --shape h16_q1_b2_k256 " + more);
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    const Json json = Json::parse(ran.text, nullptr, false);
    EXPECT_TRUE(json.is_object()) << ran.text;
    for (const Json& one : json["kernels"]) {
      if (one["name"] == name) return one;
    }
    ADD_FAILURE() << "no kernel " << name << " in " << ran.text;
    return {};
  }
  static void expect_refused(const std::string& arguments, const std::string& message) {
    const Ran ran = run(arguments);
    EXPECT_EQ(ran.exit_code, 2) << ran.text;
    EXPECT_NE(ran.text.find(message), std::string::npos) << ran.text;
  }

  // The shape's dimensions.
  static constexpr uint64_t kSequences = 2, kHeads = 16, kTokens = 256;
  static constexpr uint64_t kRows = kSequences * kHeads, kScores = kRows * kTokens;
  static constexpr uint64_t kRowSectors = 576 * 2 / 32;
};

TEST_F(MlaRunProfile, Stage01) {
  // Per score: 18 loads of q and 18 of k, of 2 sectors each, and one load of the block table. Per
  // warp: one load of the length.
  const Json scores = kernel("01", "scores");
  const uint64_t warps = scores["blocks"].get<uint64_t>() * 8;
  EXPECT_EQ(scores["global"]["loads"]["requests"], 37 * kScores + warps);
  EXPECT_EQ(scores["global"]["loads"]["sectors"], 73 * kScores + warps);
  EXPECT_EQ(scores["global"]["stores"]["requests"], kScores);
  EXPECT_EQ(scores["executed"]["__shfl_xor_sync"], 5 * kScores);
  EXPECT_FALSE(scores.contains("shared"));
  // Per row: 8 warps make three passes that load and two that store; and lse is stored.
  const Json softmax = kernel("01", "softmax");
  EXPECT_EQ(softmax["global"]["loads"]["sectors"], kRows * 8 * (3 * 4 + 1));
  EXPECT_EQ(softmax["global"]["stores"]["requests"], kRows * (2 * 8 + 1));
  EXPECT_EQ(softmax["shared"]["loads"]["conflicts"], 0);
  // Per row and token: 8 warps load P once, V twice, and a page's number once.
  const Json values = kernel("01", "values");
  EXPECT_EQ(values["global"]["loads"]["requests"], kRows * 8 * (4 * kTokens + 1));
  EXPECT_EQ(values["global"]["loads"]["sectors"], kRows * 8 * (6 * kTokens + 1));
  // The least that a block needs: V's 32 sectors per token, P's row, a length, and page numbers.
  // Those of the second sequence lie in two sectors.
  EXPECT_EQ(values["global"]["loads"]["l2_sectors"],
            kRows * (kTokens * 32 + kTokens / 8 + 1 + 1) + kHeads);
}

TEST_F(MlaRunProfile, Stage02) {
  // 4 items of 16 rows and 128 tokens; 18 steps of 32 columns; 4 warps.
  const Json scores = kernel("02", "scores");
  const uint64_t steps = 4 * 18 * 4;
  EXPECT_EQ(scores["shared"]["loads"]["requests"], steps * 8 * (4 + 4));
  EXPECT_EQ(scores["shared"]["loads"]["wavefronts"], steps * 8 * (4 * 2 + 4 * 4));
  EXPECT_EQ(scores["shared"]["stores"]["requests"], steps * 2 * (1 + 4));
  EXPECT_EQ(scores["shared"]["loads"]["conflicts"], 0);
  EXPECT_EQ(scores["executed"]["__syncthreads"], 2 * steps);
  EXPECT_EQ(scores["active_blocks"]["by_shared_memory"], 10);
}

TEST_F(MlaRunProfile, Stage03) {
  // Q and K are read once. They are what its lines load by uint4.
  const Json decode = kernel("03", "decode");
  uint64_t sectors = 0;
  for (const Json& line : decode["lines"]) {
    if (line["what"] == "load" && line.contains("global") &&
        line["global"]["bytes"] == 16 * line["threads"].get<uint64_t>()) {
      sectors += line["global"]["sectors"].get<uint64_t>();
    }
  }
  EXPECT_EQ(sectors, (kRows + kSequences * kTokens) * kRowSectors);
}

TEST_F(MlaRunProfile, Stage05) {
  // 8 pieces of a tile of 16 rows and 64 tokens.
  const Json decode = kernel("05", "decode");
  EXPECT_EQ(decode["flop"], 8 * 2 * 16 * 64 * (576 + 512));
  EXPECT_EQ(decode["global"]["async_copies"]["sectors"], 8 * (16 + 64) * kRowSectors);
  EXPECT_EQ(decode["executed"]["cp_async_16"], 8 * (16 + 64) * kRowSectors * 2 / 32);
  const Json ldmatrix = decode["shared"]["matrix_loads"];
  EXPECT_EQ(ldmatrix["wavefronts"], 4 * ldmatrix["requests"].get<uint64_t>());
  EXPECT_EQ(ldmatrix["conflicts"], 0);
  EXPECT_EQ(decode["shared"]["async_copies"]["conflicts"], 0);
}

TEST_F(MlaRunProfile, HoppersStages) {
  for (const char* stage : {"06", "07", "08"}) {
    SCOPED_TRACE(stage);
    // Tiles of 64 rows: two sequences, four tiles of tokens each.
    const Json decode = kernel(stage, "decode");
    EXPECT_EQ(decode["flop"], 8 * 2 * 64 * 64 * (576 + 512));
    EXPECT_GT(decode["shared"]["products"]["wavefronts"], 0);
    if (stage[1] >= '7') {
      EXPECT_GE(decode["global"]["bulk_loads"]["sectors"], kSequences * kTokens * kRowSectors);
    }
  }
}

TEST_F(MlaRunProfile, LinesAddUp) {
  for (const char* name : {"scores", "softmax", "values"}) {
    const Json one = kernel("02", name);
    uint64_t sectors = 0, conflicts = 0;
    for (const Json& line : one["lines"]) {
      if (line.contains("global")) sectors += line["global"]["sectors"].get<uint64_t>();
      if (line.contains("shared")) conflicts += line["shared"]["conflicts"].get<uint64_t>();
      EXPECT_TRUE(line["file"].get<std::string>().starts_with("stages/") ||
                  line["file"].get<std::string>().starts_with("reference/"))
          << line;
    }
    uint64_t all_sectors = 0, all_conflicts = 0;
    for (const auto& [kind, counts] : one["global"].items()) {
      all_sectors += counts["sectors"].get<uint64_t>();
    }
    for (const auto& [kind, counts] : one["shared"].items()) {
      all_conflicts += counts["conflicts"].get<uint64_t>();
    }
    EXPECT_EQ(sectors, all_sectors);
    EXPECT_EQ(conflicts, all_conflicts);
  }
}

TEST_F(MlaRunProfile, TheScheduleChangesNothing) {
  const std::string arguments = "--json --stage all --shape h16_q1_b2_k100 --schedule ";
  const Ran first = run(arguments + "0");
  EXPECT_EQ(first.exit_code, 0) << first.text;
  for (const char* schedule : {"3", "8"}) EXPECT_EQ(run(arguments + schedule).text, first.text);
}

TEST_F(MlaRunProfile, TheListingHasCountsBesideTheSource) {
  const Ran ran = run("--stage 02 --shape h16_q1_b1_k64 --listing");
  EXPECT_EQ(ran.exit_code, 0);
  EXPECT_NE(ran.text.find("stages/02_shared_tiled/kernel.cuh\n"), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("const float4 k_rmem = *reinterpret_cast<const float4*>"),
            std::string::npos);
}

TEST_F(MlaRunProfile, RefusesBadInput) {
  expect_refused("--shape h16_q1_b1_k64", "--stage is missing");
  expect_refused("--stage 99 --shape h16_q1_b1_k64", "--stage 99 is not known");
  expect_refused("--stage reference --shape h16_q1_b1_k64", "the reference has no kernels");
  expect_refused("--stage 00 --shape h16_q1_b1_k64", "00_reference runs on the CPU, and has no");
  expect_refused("--stage 02", "--q or --shape is missing");
  expect_refused("--stage 02 --shape h16", "h16");
  expect_refused("--stage 02 --shape h16_q1_b1_k64 --json --listing",
                 "--json and --listing exclude each other");
  expect_refused("--stage 02 --shape h16_q1_b1_k64 --schedule -1", "--schedule");
  expect_refused("--stage 08 --shape h16_q1_b1_k64 --device rtx3090", "08_seesaw");
}

}  // namespace
}  // namespace mla
