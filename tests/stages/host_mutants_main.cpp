// The tests of plans, the combine, caches and the contract, or of the race detector, on code with one fault. MLA_MUTANT
// says which fault.
#include <gtest/gtest.h>

#include <cstdlib>

namespace mla {
int mutant = 0;
}

namespace {
// A fault is found by the first check that fails: the rest of a test, which may be long, tells nothing more.
class EndsAtAFailure : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed()) std::_Exit(1);
  }
};
}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* chosen = std::getenv("MLA_MUTANT");
  mla::mutant = chosen == nullptr ? 0 : std::atoi(chosen);
  if (mla::mutant != 0) testing::UnitTest::GetInstance()->listeners().Append(new EndsAtAFailure);
  return RUN_ALL_TESTS();
}
