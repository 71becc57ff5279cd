// mla_run whose kernels have the fault of this number in mutants.txt, for recordings: MLA_MUTANT=86 mutant_run trace ...
#include <cstdlib>

namespace mla {

namespace {
const char* const number = std::getenv("MLA_MUTANT");
}

extern int mutant;
int mutant = number != nullptr ? std::atoi(number) : 0;

}  // namespace mla
