/// @file
/// A shape's inputs and its fp64 results as .npy files, for other programs to run on.
#pragma once

#include <string>

#include "reference/testing/data_generator.h"
#include "stages/common/machine/machine.h"

namespace mla::bench {

/// Makes the data on `machine` and writes into `folder`
///
/// - q.npy, cache.npy (16-bit patterns, <u2), block_table.npy and seqlens.npy (<i4), as mla_run
///   reads them. Cache rows that no sequence owns are NaN; unused slots of the table hold
///   kGarbagePage;
/// - rows.npy [rows, 2] <i4, (sequence, query), and out.npy [rows, h_q, 512] <f8: what those rows
///   should give. All rows of a small batch, else kCheckedRows of them, the longest sequence's last
///   one among them.
Status save_inputs(Machine& machine, const DecodeCase& spec, const std::string& folder);

}  // namespace mla::bench
