/// @file
/// What an explanation is made from, gathered: stages, records, a measurement that was just made.
#pragma once

#include <string>
#include <vector>

#include "bench/explain/explain.h"
#include "bench/measure/measure.h"
#include "bench/measure/recorded.h"

namespace mla::bench {

/// The limits of the device that results were recorded on.
/// @return kUnsupported if the file does not say them, or names a compute capability without a known
///         size of shared memory
Status recorded_limits(const Recorded& recorded, DeviceLimits* limits);

/// The name of the recorded shape that is exactly this problem, page ids and scale apart; empty if
/// there is none.
std::string recorded_shape(const Recorded& recorded, const Problem& problem,
                           const std::vector<int32_t>& seqlens_k);

/// Facts for a device of which there are records: limits, ceilings and times are the recorded
/// ones. While they are gathered the GPU model takes the device's limits.
/// @param recorded  null: there are none, and `why_not` says why. The device is then the model's,
///                  and no times are known.
/// @param stage     slug of the one that is asked about; empty: all of them. "auto" joins the stages, and the
///                  explanation says what it chose.
ExplainInput explain_recorded(const Problem& problem, const std::vector<int32_t>& seqlens_k,
                              const Recorded* recorded, const std::string& why_not,
                              const std::string& stage = "");

/// The same for this machine. A GPU gets recorded ceilings and times only if they are of its kind:
/// same name, same multiprocessors. For the model: explain_recorded().
ExplainInput explain_on(Machine& machine, const Problem& problem,
                        const std::vector<int32_t>& seqlens_k, const std::string& stage = "");

/// Takes the times of `result` and these ceilings in place of others.
void set_measured(const ShapeResult& result, const Ceilings& ceilings, ExplainInput* input);

/// Explains a shape that was just measured: with these times and ceilings on a GPU; on the model,
/// whose times say nothing about one, by explain_recorded().
std::string explain(const Bench& bench, const ShapeResult& result);

}  // namespace mla::bench
