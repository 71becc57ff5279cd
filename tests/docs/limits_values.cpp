// What docs/demos/limits.js is compared with: the same cost model, but not compiled to WebAssembly. On standard input: [{"names":
// "...", "times": [[median, p10, p90, n, sustained], ...], "numbers": [...]}], the calls of docs/demos/wasm/limits_page.h; null is NaN.
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "docs/demos/wasm/limits_page.h"

namespace {

double number(const nlohmann::json& value) {
  return value.is_null() ? NAN : value.get<double>();
}

}  // namespace

int main() {
  auto result = nlohmann::json::array();
  for (const auto& request : nlohmann::json::parse(std::cin)) {
    request["names"].get<std::string>().copy(limits_names(), 1024);
    limits_names()[request["names"].get<std::string>().size()] = 0;
    int stage = 0;
    for (const auto& time : request["times"]) {
      limits_time(stage++, number(time[0]), number(time[1]), number(time[2]), number(time[3]),
                  number(time[4]));
    }
    const auto& n = request["numbers"];
    result.push_back(limits_explain(number(n[0]), number(n[1]), number(n[2]), number(n[3]),
                                    number(n[4]), number(n[5]), number(n[6]), number(n[7]),
                                    number(n[8]), number(n[9]), number(n[10]), number(n[11]),
                                    number(n[12]), number(n[13]), number(n[14]), number(n[15])));
  }
  std::cout << result << "\n";
}
