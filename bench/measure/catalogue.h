/// @file
/// What `mla_bench --list --json` prints: suites, shapes, protocol and tolerances, for the scripts in
/// bench/report, so that they have neither a grammar of shapes nor numbers of their own.
#pragma once

#include <string>
#include <vector>

#include "bench/measure/shapes.h"
#include "stages/common/machine/machine.h"

namespace mla::bench {

/// The JSON text, for the stages on such a machine and for these shapes: catalogue.cpp says what its
/// fields mean.
std::string catalogue(MachineKind machine, const std::vector<Shape>& shapes);

}  // namespace mla::bench
