/// @file
/// Whether the memory holds a decode: asked before anything is allocated, because a system that promises more
/// memory than it has ends the program that uses it.
#pragma once

#include <string>

#include "reference/testing/data_generator.h"
#include "stages/common/machine/machine.h"

namespace mla::bench {

/// Bytes of host memory that can still be used: of the machine, of the control group, of the
/// process.
double host_memory_there();

/// ok, or "shape h1_q1_b1_k4096 needs 4.72 MB of host memory; 1.00 MB are there".
/// @param whose  "host memory", "GPU memory"
/// @return kOutOfMemory
Status check_memory(const std::string& what, double needed, double there, const char* whose);

/// What a decode takes, in bytes. Doubles: a shape may spell more than 64 bits hold.
struct Footprint {
  double tables = 0;    ///< Block table, lengths, and who owns which page.
  double inputs = 0;    ///< q and the cache.
  double outputs = 0;   ///< out and lse.
  double expected = 0;  ///< out and lse in float64.
};

/// Of a problem whose tensors are known.
Footprint footprint(const Problem& problem);

/// Of a case before its data set is made. Drawn lengths count as their mean.
Footprint footprint(const DecodeCase& spec);

/// Whether the host can hold the tables of a case: all that plans and predictions need.
/// @param what  "shape h128_q1_b64_k4096"
/// @return kOutOfMemory, with bytes needed and bytes there
Status check_tables_fit(const std::string& what, const Footprint& one);

/// Whether host and machine can hold a decode that is checked against float64.
/// @param machine      Null: the CPU reference alone decodes.
/// @param host_copies  Copies of q and the cache that the host has yet to make.
/// @return kOutOfMemory, with bytes needed and bytes there
Status check_fits(const std::string& what, const Footprint& one, const Machine* machine,
                  int host_copies);

}  // namespace mla::bench
