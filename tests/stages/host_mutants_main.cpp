// The tests of plans, the combine, caches and the contract, or of the race detector, on code with one fault. MLA_MUTANT
// says which fault.
#include <gtest/gtest.h>

#include <cstdlib>

namespace mla {
int mutant = 0;
}

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* chosen = std::getenv("MLA_MUTANT");
  mla::mutant = chosen == nullptr ? 0 : std::atoi(chosen);
  return RUN_ALL_TESTS();
}
