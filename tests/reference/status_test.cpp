#include "reference/status.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <set>

namespace mla {
namespace {

Status first_failure(const Status& first, const Status& second) {
  MLA_RETURN_IF_ERROR(first);
  MLA_RETURN_IF_ERROR(second);
  return {};
}

TEST(Status, DefaultIsOk) {
  const Status status;
  EXPECT_OK(status);
  EXPECT_EQ(status.code(), StatusCode::kOk);
  EXPECT_EQ(status.to_string(), "ok");
}

TEST(Status, TextIsCodeThenMessage) {
  const Status status(StatusCode::kInvalidArgument,
                      "num_heads_q = 5 is not a multiple of num_heads_kv = 2");
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.to_string(),
            "invalid argument: num_heads_q = 5 is not a multiple of num_heads_kv = 2");
}

TEST(Status, EveryCodeHasItsOwnName) {
  std::set<std::string> names;
  const int codes = static_cast<int>(StatusCode::kRankFailed) + 1;
  for (int code = 0; code < codes; ++code) {
    const std::string name = to_string(static_cast<StatusCode>(code));
    EXPECT_NE(name, "unknown") << code;
    names.insert(name);
  }
  EXPECT_EQ(names.size(), size_t(codes));
}

TEST(Status, MacroReturnsTheFirstFailure) {
  const Status bad(StatusCode::kOutOfRange, "first");
  const Status worse(StatusCode::kCudaError, "second");
  EXPECT_OK(first_failure({}, {}));
  EXPECT_EQ(first_failure(bad, worse).message(), "first");
  EXPECT_EQ(first_failure({}, worse).message(), "second");
}

}  // namespace
}  // namespace mla
