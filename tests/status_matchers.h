/// @file
/// EXPECT_OK and ASSERT_OK: for a Status, or anything else with ok(), which a failing test prints.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace mla {

/// For EXPECT_OK: prints the expression, and what its value says of itself.
template <typename T>
testing::AssertionResult is_ok(const char* expression, const T& value) {
  if (value.ok()) return testing::AssertionSuccess();
  std::string text;
  if constexpr (requires { value.to_string(); }) {
    text = value.to_string();
  } else {
    text = value.describe();
  }
  return testing::AssertionFailure() << expression << "\n  " << text;
}

}  // namespace mla

#define EXPECT_OK(expression) EXPECT_PRED_FORMAT1(::mla::is_ok, expression)
#define ASSERT_OK(expression) ASSERT_PRED_FORMAT1(::mla::is_ok, expression)
