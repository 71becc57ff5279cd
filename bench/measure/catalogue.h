/// @file
/// What `mla_bench --list --json` prints: suites, shapes, protocol and tolerances, for the scripts in
/// bench/report, so that they have neither a grammar of shapes nor numbers of their own.
#pragma once

#include <string>
#include <vector>

#include "bench/measure/shapes.h"

namespace mla {
struct Stage;
}

namespace mla::bench {

/// The JSON text, for these shapes: catalogue.cpp says what its fields mean.
std::string catalogue(const std::vector<const Stage*>& stages, const std::vector<Shape>& shapes);

}  // namespace mla::bench
