/// @file
/// The cost model as docs/demos/limits.js calls it, compiled to WebAssembly, and as its test does, which is not.
/// Numbers in SI units; NaN is a number that is not known.
#pragma once

extern "C" {

/// @return room for three lines of UTF-8, ended by a zero: what the device is called, and where its
///         ceilings and its times are from
char* limits_names();

/// @return the slugs of all stages that have a kernel, in order, as a list in JSON
const char* limits_slugs();

/// The time of a stage in the next explanation, cold, in us, as a Summary; n = 0: none.
void limits_time(int stage, double median, double p10, double p90, double n, double sustained);

/// What is known of a decode of `batch` sequences of `seqlen_k` tokens, one KV head.
/// @param capability  9.0 as 90
/// @param format      a CacheFormat
/// @return JSON, which the next call overwrites: {"error": ...}, or "work", "floor", "stages" with
///         their own limits, and "text", what mla_run explain says
const char* limits_explain(double capability, double multiprocessors, double read, double fp32,
                           double matrix_cold, double matrix_sustained, double shared,
                           double shared_bytes_per_clock, double launch, double num_heads_q,
                           double seqlen_q, double batch, double seqlen_k, double causal,
                           double fp16, double format);
}
