#include "bench/explain/explain.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "bench/measure/table.h"

namespace mla::bench {
namespace {

constexpr double kPartBytes = kHeadDimV * 4.0 + 4;  // of a row's partial result and lse
// Less is no finding: runs of one kernel on two cards differ by as much.
constexpr double kNoticeable = 1.05;
constexpr size_t kWidth = 100;  // of a line

// Words ------------------------------------------------------------------------------------------

std::string us(double seconds) {
  return microseconds(1e6 * seconds) + " µs";
}

std::string count(int64_t n, const std::string& what) {
  return fmt::format("{} {}{}", n, what, n == 1 ? "" : "s");
}

std::string bytes_text(double bytes) {
  const std::pair<double, const char*> units[] = {
      {1e12, " TB"}, {1e9, " GB"}, {1e6, " MB"}, {1e3, " KB"}};
  for (const auto& [unit, name] : units) {
    if (bytes >= unit) return number(bytes / unit) + name;
  }
  return number(bytes, 1) + " B";
}

std::string times(double value) {
  return number(value, value < 10 ? 2 : 3) + "×";
}

/// Breaks a text between words, so that it fits between `indent` and the line's width. The first
/// line comes behind `first`, which is as wide as the indent.
std::string wrap(const std::string& first, const std::string& text) {
  const size_t indent = width(first);
  std::string result, line = first;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    const bool fresh = width(line) <= indent;
    if (!fresh && width(line) + 1 + width(word) > kWidth) {
      result += line + "\n";
      line = std::string(indent, ' ') + word;
    } else {
      line += (fresh ? "" : " ") + word;
    }
    begin = end + 1;
  }
  return result + line + "\n";
}

// What rules look at -----------------------------------------------------------------------------

double total_of(const std::vector<int32_t>& seqlens_k) {
  return std::accumulate(seqlens_k.begin(), seqlens_k.end(), 0.0);
}

double flop_of(const StageFacts& stage) {
  return stage.prediction.fp32_flop + stage.prediction.matrix_flop;
}

double rows_of(const Problem& problem) {
  return static_cast<double>(problem.seqlen_q) * problem.num_heads_q;
}

/// The input and what follows from it.
struct Case {
  const ExplainInput& input;
  const Problem& problem;
  double tokens = 0;
  int64_t grains = 0;
  int32_t longest = 0;
  Work work;
  Floor floor;
  MemoryUse memory;
  const StageFacts* stage = nullptr;  ///< The subject.
  OwnLimit limit;                     ///< Its own
  std::optional<Balance> plan;        ///< Its plan, if it makes one
  std::optional<Balance> free_plan;   ///< In batch-invariant mode: without the fixed cuts

  explicit Case(const ExplainInput& from) : input(from), problem(from.problem) {
    tokens = total_of(input.seqlens_k);
    for (const int32_t length : input.seqlens_k) {
      grains += grains_for(length);
      longest = std::max(longest, length);
    }
    work = work_of(problem, static_cast<int64_t>(tokens));
    floor = floor_of(work, input.ceilings, Mode::kCold);
    memory = memory_of(problem, input.seqlens_k);
    stage = subject_of(input);
    if (stage == nullptr) return;
    limit = limit_of(*stage);
    if (!stage->plan) return;
    plan = balance(problem);
    if (problem.fixed_split_tokens == 0) return;
    Problem unbound = problem;
    unbound.fixed_split_tokens = 0;
    free_plan = balance(unbound);
  }

  OwnLimit limit_of(const StageFacts& one) const {
    return own_limit(one.prediction, work, input.ceilings, Mode::kCold);
  }
  Balance balance(const Problem& of) const {
    return balance_of(of, *stage->plan, input.seqlens_k, input.limits.multiprocessors);
  }
  /// Bytes of the cache that a decode must read.
  double cache_read() const { return tokens * problem.cache_row_bytes() * problem.num_heads_kv; }
  bool is(Floor::Bound bound) const { return floor.bound() == bound; }
};

/// Where times are from; in one word if the ceilings, named before, are from there.
std::string times_origin(const ExplainInput& input) {
  const std::string& origin = input.times_origin;
  return origin == input.ceilings_origin ? origin.substr(0, origin.find(':')) : origin;
}

// Rules ------------------------------------------------------------------------------------------
// Each gives its text, or none where its condition does not hold. `c.stage` is there.

std::string needs_other_device(const Case& c) {
  if (c.stage->device.ok()) return "";
  std::string text = c.stage->device.message() + ".";
  const StageFacts* last = nullptr;
  for (const StageFacts& stage : c.input.stages) {
    if (stage.can_run()) last = &stage;
  }
  if (last != nullptr) text += " The furthest stage that runs here is " + last->slug + ".";
  return text;
}

std::string cannot_read_the_cache(const Case& c) {
  if (c.stage->cache.ok() || !c.stage->device.ok()) return "";
  std::string able;
  for (const StageFacts& stage : c.input.stages) {
    if (stage.can_run()) able += (able.empty() ? "" : ", ") + stage.slug;
  }
  return c.stage->cache.message() + (able.empty()
                                         ? ". No stage that runs here can."
                                         : ". Stages that run here and can: " + able + ".");
}

/// By times, if the subject has one: outside of its spread. Else by own limits, which bound a time
/// from below and are near it only where a launch is not most of it.
std::string faster_stage(const Case& c) {
  if (!c.stage->can_run()) return "";
  const bool timed = c.stage->cold.n > 0;
  const StageFacts* best = nullptr;
  for (const StageFacts& stage : c.input.stages) {
    if (!stage.can_run()) continue;
    if (timed) {
      if (stage.cold.n == 0 || !(stage.cold.p90 < c.stage->cold.p10)) continue;
      if (best == nullptr || stage.cold.median < best->cold.median) best = &stage;
    } else {
      const double seconds = c.limit_of(stage).seconds();
      if (c.is(Floor::Bound::kLaunch) || !(seconds * kNoticeable < c.limit.seconds())) continue;
      if (best == nullptr || seconds < c.limit_of(*best).seconds()) best = &stage;
    }
  }
  if (best == nullptr) return "";
  if (timed) {
    return fmt::format("{} takes {} as long as {}: {} and {} µs, cold, {}.", c.stage->slug,
                       times(c.stage->cold.median / best->cold.median), best->slug,
                       microseconds(c.stage->cold.median), microseconds(best->cold.median),
                       times_origin(c.input));
  }
  return fmt::format(
      "{} should be faster, by its own limit: {}, that of {} is {}. No times of this shape "
      "are known here.",
      best->slug, us(c.limit_of(*best).seconds()), c.stage->slug, us(c.limit.seconds()));
}

std::string does_not_split(const Case& c) {
  if (c.stage->plan || !(c.stage->prediction.busy_fraction * kNoticeable < 1)) return "";
  const StageFacts* first = nullptr;
  for (const StageFacts& stage : c.input.stages) {
    if (stage.plan && stage.can_run() && first == nullptr) first = &stage;
  }
  if (first == nullptr ||
      !(first->prediction.busy_fraction > kNoticeable * c.stage->prediction.busy_fraction)) {
    return "";
  }
  return fmt::format(
      "{} gives a sequence to one block: {} of the multiprocessors have work. From {} on, a "
      "plan splits sequences: {}.",
      c.stage->slug, percent(c.stage->prediction.busy_fraction), first->slug,
      percent(first->prediction.busy_fraction));
}

/// The least batch of sequences of the mean length whose plan gives (nearly) all multiprocessors
/// work; 0 for none below a grain for each worker.
int filling_batch(const Case& c) {
  Problem problem = c.problem;
  const auto length = static_cast<int32_t>(std::lround(c.tokens / c.problem.batch));
  const int most = c.problem.batch + c.plan->shape.workers;
  for (problem.batch = c.problem.batch + 1; problem.batch <= most; ++problem.batch) {
    const std::vector<int32_t> lengths(static_cast<size_t>(problem.batch), length);
    const Balance plan =
        balance_of(problem, *c.stage->plan, lengths, c.input.limits.multiprocessors);
    if (!(plan.busy * kNoticeable < 1)) return problem.batch;
  }
  return 0;
}

std::string too_short_to_fill(const Case& c) {
  if (!c.plan || c.tokens <= 0 || !(c.plan->busy * kNoticeable < 1)) return "";
  if (c.plan->blocks ==
      int64_t{c.plan->shape.row_tiles} * c.plan->shape.workers * c.plan->shape.team)
    return "";
  if (c.free_plan && c.free_plan->busy > kNoticeable * c.plan->busy) return "";  // the cuts' fault
  std::string text = fmt::format(
      "{} of 64 tokens × {} give {} of the kernel, {} of {} multiprocessors: {}",
      count(c.grains, "grain"), count(c.plan->shape.row_tiles, "row tile"),
      count(c.plan->blocks, "block"), percent(c.plan->busy), c.input.limits.multiprocessors,
      c.plan->pieces == 0
          ? "sequences stay whole, which costs less than combining their parts."
          : fmt::format("a worker gets {} at least.", count(c.plan->shape.min_grains, "grain")));
  if (const int batch = filling_batch(c); batch > 0) {
    text += fmt::format(
        " With {} of this mean length all multiprocessors have work; up to there, further "
        "sequences go to idle ones.",
        count(batch, "sequence"));
  }
  return text;
}

std::string memory_bound(const Case& c) {
  if (!c.is(Floor::Bound::kMemory)) return "";
  // cache + s q = launch + s matrix, in s, for s times as many query rows
  const double cache = c.cache_read() / c.input.ceilings.read;
  const double q = c.floor.memory - cache;
  std::string text = fmt::format("Reading the cache takes {}, q and out {}, the products {}. ",
                                 us(cache), us(q), us(c.floor.matrix));
  if (!(c.floor.matrix > q)) {
    return text +
           "Contexts are so short that q and out take longer than the products: no number of "
           "query tokens changes that.";
  }
  const double scale = (cache - c.floor.launch) / (c.floor.matrix - q);
  const auto most = static_cast<int64_t>(scale * c.problem.seqlen_q);
  if (most <= c.problem.seqlen_q) {
    return text + "The ridge is near: with one query token more the matrix rate binds.";
  }
  const double grown = static_cast<double>(most) / c.problem.seqlen_q;
  text += fmt::format(
      "More query rows use what is read anyway. Memory binds up to {} query tokens per sequence "
      "(speculative decoding), or {} the heads. The floor is then {}, for {} the work.",
      most, times(grown), us(cache + q * grown), times(grown));
  const std::string own = c.limit.name();
  if (own != "DRAM") {
    text += fmt::format(
        " This is not so for {}: its own limit is its {} work, which grows by tiles of rows.",
        c.stage->slug, own);
  }
  return text;
}

std::string compute_bound(const Case& c) {
  if (!c.is(Floor::Bound::kMatrix)) return "";
  return fmt::format(
      "The matrix rate sets the floor: {} per sequence. A larger batch adds as much for each "
      "sequence and makes none of them cheaper. More query tokens per step do not, either.",
      us(c.floor.matrix / c.problem.batch));
}

std::string launch_bound(const Case& c) {
  if (!c.is(Floor::Bound::kLaunch)) return "";
  std::string text = fmt::format(
      "An empty launch, {}, takes longer than reading ({}) and products ({}). Latency, which no "
      "ceiling counts, comes on top.",
      us(c.floor.launch), us(c.floor.memory), us(c.floor.matrix));
  const double each = std::max(c.floor.memory, c.floor.matrix) / c.problem.batch;
  const auto most = static_cast<int64_t>(c.floor.launch / each);
  if (most > c.problem.batch) {
    text += fmt::format(
        " Up to {} of this length, the rest takes no longer than the launch: batch them.",
        count(most, "sequence"));
  }
  return text +
         " One plan serves all layers of a step, and plan and decodes may be captured in one CUDA "
         "graph.";
}

std::string sustained_clocks(const Case& c) {
  const double ratio = c.input.ceilings.matrix_cold / c.input.ceilings.matrix_sustained;
  if (!c.is(Floor::Bound::kMatrix) || !(ratio > kNoticeable)) return "";
  // A kernel that waits for a good part of its time lets the tensor cores cool meanwhile.
  const bool waits = c.stage->cold.n > 0 && 1e6 * c.limit.seconds() < 0.7 * c.stage->cold.median;
  if (waits) return "";
  const Floor sustained = floor_of(c.work, c.input.ceilings, Mode::kSustained);
  return fmt::format(
      "In runs back to back the tensor cores draw so much power that clocks sink: {} TFLOP/s, not "
      "{}. The floor is then {}. Compare a step of a model with that one.",
      number(c.input.ceilings.matrix_sustained / 1e12), number(c.input.ceilings.matrix_cold / 1e12),
      us(sustained.seconds()));
}

std::string far_from_its_limit(const Case& c) {
  if (c.stage->cold.n == 0 || c.is(Floor::Bound::kLaunch)) return "";
  if (!(2e6 * c.limit.seconds() < c.stage->cold.median)) return "";
  return fmt::format(
      "Its limits explain less than half of the time: {} of {} µs. In the rest it waits: for "
      "memory, between phases, where pieces begin and end. The chapter says for what. "
      "mla_timeline shows it, for stages 07, 08, 09 and 11.",
      us(c.limit.seconds()), microseconds(c.stage->cold.median));
}

std::string padded_rows(const Case& c) {
  const double padding = flop_of(*c.stage) / std::max(c.work.flop, 1.0);
  if (!(padding > kNoticeable)) return "";
  const int rows = c.problem.rows_per_kv_head();
  const int64_t padded = std::lround(rows * padding);
  std::string text = fmt::format(
      "{} computes {} the FLOP of the answer: {} per KV head {} tiles of {} rows in all.",
      c.stage->slug, times(padding), count(rows, "query row"), rows == 1 ? "takes" : "take",
      padded);
  const double seconds = c.limit.seconds();
  if (seconds == seconds && std::string(c.limit.name()) == "DRAM") {
    text += fmt::format(" Memory hides that here: launch and products take {}, DRAM {}.",
                        us(c.limit.matrix + c.limit.fp32), us(c.limit.dram));
  }
  text += fmt::format(" Up to {} rows, from more query tokens or heads, need no further product.",
                      padded);
  const StageFacts* leaner = nullptr;
  for (const StageFacts& stage : c.input.stages) {
    const bool same_cores =
        (stage.prediction.matrix_flop > 0) == (c.stage->prediction.matrix_flop > 0);
    if (!stage.can_run() || !same_cores) continue;
    if (!(flop_of(stage) * kNoticeable < flop_of(*c.stage))) continue;
    if (leaner == nullptr || flop_of(stage) < flop_of(*leaner)) leaner = &stage;
  }
  if (leaner == nullptr) return text;
  text += fmt::format(" The tiles of {} fit better: {}", leaner->slug,
                      times(flop_of(*leaner) / c.work.flop));
  if (leaner->cold.n > 0 && c.stage->cold.n > 0) {
    text += fmt::format(", at {} µs to {}", microseconds(leaner->cold.median),
                        microseconds(c.stage->cold.median));
  }
  return text + ".";
}

std::string fixed_cuts_ignored(const Case& c) {
  if (c.problem.fixed_split_tokens == 0 || c.plan) return "";
  return c.stage->slug +
         " splits no sequence, so its results never depend on the batch. Fixed cuts change "
         "nothing.";
}

std::string batch_invariant_cost(const Case& c) {
  if (!c.free_plan) return "";
  std::string text = fmt::format(
      "Cuts every {} tokens leave {}, {} each way; free cuts leave {}, {}. ",
      c.problem.fixed_split_tokens, count(c.plan->parts, "part"), bytes_text(c.plan->partial_bytes),
      c.free_plan->parts, bytes_text(c.free_plan->partial_bytes));
  const double more = double(c.plan->largest) / double(std::max<int64_t>(c.free_plan->largest, 1));
  if (more > 1) {
    text += fmt::format("The largest load grows {}×, and the time with it; parts come on top. ",
                        number(more));
  }
  return text + "Leave fixed cuts off where results need not have the same bits in every batch.";
}

/// Where a part's way out and back is as many bytes as the cache it is of.
double even_split_tokens(const Problem& problem) {
  return problem.rows_per_kv_head() * 2 * kPartBytes / problem.cache_row_bytes();
}

std::string fixed_split_too_small(const Case& c) {
  if (!c.free_plan || !(2 * c.plan->partial_bytes > c.cache_read())) return "";
  const auto tokens =
      static_cast<int64_t>(std::ceil(even_split_tokens(c.problem) / kGrainTokens) * kGrainTokens);
  if (c.problem.fixed_split_tokens >= tokens) return "";
  return fmt::format(
      "Parts, written and read, are {}; the cache is {}. With {} per KV head they are as many "
      "bytes at cuts every {} tokens: take {} or more.",
      bytes_text(2 * c.plan->partial_bytes), bytes_text(c.cache_read()),
      count(c.problem.rows_per_kv_head(), "row"), number(even_split_tokens(c.problem), 3), tokens);
}

std::string fixed_split_too_large(const Case& c) {
  if (!c.free_plan || !(c.plan->blocks * kNoticeable < c.free_plan->blocks)) return "";
  const int64_t blocks = std::max<int64_t>(1, c.grains / c.plan->shape.workers);
  if (blocks * kGrainTokens >= c.problem.fixed_split_tokens) return "";
  return fmt::format(
      "{} of the kernel get a piece; free cuts keep {} at work. Cuts every {} tokens would give "
      "each of them one.",
      count(c.plan->blocks, "block"), c.free_plan->blocks, blocks * kGrainTokens);
}

std::string imbalance(const Case& c) {
  // Where multiprocessors are without work, that is the finding.
  if (!c.plan || c.plan->busy * kNoticeable < 1 || !(c.plan->imbalance() > kNoticeable)) return "";
  const std::string loads =
      fmt::format("The largest load is {} grains, the mean {}: {}. All wait for the last worker. ",
                  c.plan->largest, number(c.plan->mean), times(c.plan->imbalance()));
  if (c.free_plan) {
    return loads + fmt::format(
                       "Workers get whole pieces of {} tokens; free cuts come to {}, closer cuts "
                       "to something between.",
                       c.problem.fixed_split_tokens, times(c.free_plan->imbalance()));
  }
  if (c.plan->pieces == 0) {
    return loads + fmt::format(
                       "Sequences stay whole, because then nothing has to be combined. The plan "
                       "allows that "
                       "up to {} and a beginning over the mean.",
                       count(c.plan->shape.combine_grains, "grain"));
  }
  return loads +
         "With free cuts it is at most a grain and a beginning over the mean. Loads are short; "
         "longer sequences or a larger batch even them out.";
}

std::string parts_exceed_cache(const Case& c) {
  if (!c.plan || c.free_plan || !(2 * c.plan->partial_bytes > c.cache_read())) return "";
  return fmt::format(
      "{}, {} written and read, are more bytes than the cache, {}. This is what it costs to have "
      "{} of the multiprocessors at work on so few tokens. A part is fewer bytes than its cache "
      "from {} tokens on; here it has {}.",
      count(c.plan->parts, "part"), bytes_text(2 * c.plan->partial_bytes),
      bytes_text(c.cache_read()), percent(c.plan->busy), number(even_split_tokens(c.problem), 3),
      number(c.tokens / static_cast<double>(std::max<int64_t>(c.plan->pieces, 1)), 3));
}

std::string causal_mask(const Case& c) {
  if (!c.problem.causal || c.problem.seqlen_q == 1 || c.tokens <= 0) return "";
  double visible = 0;
  for (const int32_t length : c.input.seqlens_k) {
    for (int query = 0; query < c.problem.seqlen_q; ++query) {
      visible += static_cast<double>(std::max<int64_t>(0, c.problem.visible_tokens(length, query)));
    }
  }
  const double hidden = 1 - visible / (c.problem.seqlen_q * c.tokens);
  std::string text = fmt::format(
      "The causal mask hides {} of the pairs. Neither FLOP nor limits deduct them. Kernels skip "
      "tokens that no row of a tile sees, and compute all others.",
      percent(hidden));
  if (c.plan) text += " The plan counts whole sequences for every tile.";
  return text;
}

std::string fp16(const Case& c) {
  if (c.problem.dtype != DType::kFloat16) return "";
  return "fp16 and bf16 are the same bytes and the same products here: choose by the model. fp16 "
         "has three bits of mantissa more and ends at 65504: values of a bf16 model may not fit. "
         "Kernels keep P within the few exponents of fp16 (chapter of stage 05).";
}

/// By floors alone, which do not contain what a kernel spends on converting codes.
std::string cache_format(const Case& c) {
  Problem other = c.problem;
  const bool quantised = is_quantised(c.problem.cache_format);
  other.cache_format = quantised                            ? CacheFormat::k16Bit
                       : c.problem.dtype == DType::kFloat16 ? CacheFormat::kFp8Tensor
                                                            : CacheFormat::kFp8Tile128;
  const Floor then =
      floor_of(work_of(other, static_cast<int64_t>(c.tokens)), c.input.ceilings, Mode::kCold);
  const auto row = [](const Problem& problem) {
    return fmt::format("{} has {} bytes per row", to_string(problem.cache_format),
                       problem.cache_row_bytes());
  };
  const double here = c.floor.seconds(), there = then.seconds();
  if (std::isnan(here) || c.tokens <= 0 || c.is(Floor::Bound::kLaunch)) return "";
  const Problem& small = quantised ? c.problem : other;
  const Problem& plain = quantised ? other : c.problem;
  const double less = quantised ? here : there, more = quantised ? there : here;
  if (more > kNoticeable * less) {
    return fmt::format(
        "{}, 16 bits have {}. By their floors, {} and {}, a decode of the smaller cache can take "
        "{} "
        "of the time. No floor counts the work of converting codes.",
        row(small), plain.cache_row_bytes(), us(less), us(more), percent(less / more));
  }
  return fmt::format(
      "{}, 16 bits have {}, but floors hardly differ, {} and {}: products take as long. A "
      "quantised cache saves memory here, not time, and converting codes comes on top.",
      row(small), plain.cache_row_bytes(), us(less), us(more));
}

std::string ragged_lengths(const Case& c) {
  if (!(c.memory.contiguous > 2 * c.memory.cache)) return "";
  return fmt::format(
      "Lengths are so uneven that pages save memory: buffers as long as the longest sequence, {}, "
      "would take {}, {} as much as the pages, {}.",
      count(c.longest, "token"), bytes_text(c.memory.contiguous),
      times(c.memory.contiguous / c.memory.cache), bytes_text(c.memory.cache));
}

std::string below_a_grain(const Case& c) {
  if (c.tokens <= 0 || c.longest >= kGrainTokens) return "";
  return fmt::format(
      "No sequence fills a grain of {} tokens, the least that a block is given: there is nothing "
      "to split. The least that is stored is a page of {} tokens: {} of the cache is padding.",
      kGrainTokens, c.problem.page_size, percent(c.memory.padding / c.memory.cache));
}

std::string large_workspace(const Case& c) {
  const auto workspace = static_cast<double>(c.stage->workspace_bytes);
  if (!(workspace > c.memory.cache)) return "";
  const std::string text =
      fmt::format("{} needs a workspace of {}, more than the cache it reads, {}. ", c.stage->slug,
                  bytes_text(workspace), bytes_text(c.memory.cache));
  if (!c.plan) return text + "It holds scores; from 03_online_softmax on there are none.";
  return text +
         "It has room for as many parts as the shape allows, whatever the lengths. Layers that "
         "run one after the other can share it." +
         (c.free_plan ? " Cuts further apart make it smaller." : "");
}

struct Rule {
  const char* name;
  std::string (*text)(const Case&);
};

constexpr Rule kRules[] = {
    {"needs another device", needs_other_device},
    {"cannot read the cache", cannot_read_the_cache},
    {"faster stage", faster_stage},
    {"does not split", does_not_split},
    {"too short to fill", too_short_to_fill},
    {"launch bound", launch_bound},
    {"memory bound", memory_bound},
    {"compute bound", compute_bound},
    {"sustained clocks", sustained_clocks},
    {"far from its limit", far_from_its_limit},
    {"padded rows", padded_rows},
    {"batch invariant", batch_invariant_cost},
    {"fixed cuts ignored", fixed_cuts_ignored},
    {"cuts too close", fixed_split_too_small},
    {"cuts too far apart", fixed_split_too_large},
    {"imbalance", imbalance},
    {"parts exceed the cache", parts_exceed_cache},
    {"causal mask", causal_mask},
    {"fp16", fp16},
    {"cache format", cache_format},
    {"ragged lengths", ragged_lengths},
    {"below a grain", below_a_grain},
    {"large workspace", large_workspace},
};

// Paragraphs -------------------------------------------------------------------------------------

std::string ceilings_line(const ExplainInput& input) {
  const Ceilings& ceilings = input.ceilings;
  if (std::isnan(ceilings.read) && std::isnan(ceilings.matrix_cold)) {
    return fmt::format(
        "none ({}), so no times and no limits below. On a GPU, mla_bench --explain measures "
        "them.",
        input.ceilings_origin);
  }
  return fmt::format("read {} GB/s, matrix {} TFLOP/s, launch {} ({})",
                     number(ceilings.read / 1e9, 4), number(ceilings.matrix_cold / 1e12),
                     us(ceilings.launch), input.ceilings_origin);
}

std::string work_line(const Case& c) {
  const std::string text =
      fmt::format("{} GFLOP, {} each once: {} FLOP per byte", number(c.work.flop / 1e9),
                  bytes_text(c.work.bytes), number(c.work.intensity()));
  const double ridge = c.input.ceilings.matrix_cold / c.input.ceilings.read;
  if (std::isnan(ridge)) return text;
  return fmt::format("{}, {} the ridge of {}", text, c.work.intensity() < ridge ? "below" : "above",
                     number(ridge));
}

std::string floor_line(const Case& c) {
  const char* const names[] = {"", "memory", "the matrix rate", "the launch"};
  const Floor::Bound bound = c.floor.bound();
  if (bound == Floor::Bound::kNone) return "not known";
  const bool memory = bound == Floor::Bound::kMemory;
  const std::string reading = fmt::format("reading{} {}", memory ? "" : ",", us(c.floor.memory));
  const std::string products = fmt::format("launch and products{} {} + {}", memory ? "," : "",
                                           microseconds(1e6 * c.floor.launch), us(c.floor.matrix));
  return fmt::format("{}, set by {}: {}, {} as long as {}", us(c.floor.seconds()),
                     names[static_cast<int>(bound)], memory ? reading : products,
                     times(c.floor.lead()), memory ? products : reading);
}

std::string limit_text(const OwnLimit& limit) {
  const double seconds = limit.seconds();
  return std::isnan(seconds) ? "—" : microseconds(1e6 * seconds) + " " + limit.name();
}

/// The stage's own limit and its time, one paragraph for each.
std::string stage_lines(const Case& c) {
  const StageFacts& stage = *c.stage;
  if (!stage.can_run()) {
    return wrap("stage     ", stage.slug + (stage.device.ok() ? " cannot read this cache"
                                                              : " cannot run on this device"));
  }
  std::string limit = stage.slug;
  const double seconds = c.limit.seconds();
  if (std::isnan(seconds)) {
    limit += ": own limit not known";
  } else {
    limit += ": own limit " + us(seconds) + ", by its";
    const std::pair<const char*, double> terms[] = {{"launch and fp32", c.limit.fp32},
                                                    {"launch and matrix", c.limit.matrix},
                                                    {"launch and shared memory", c.limit.shared},
                                                    {"DRAM", c.limit.dram}};
    for (const auto& [name, term] : terms) {
      if (term == seconds) limit += " " + std::string(name);
    }
    limit += " work";
    for (const auto& [name, term] : terms) {
      if (term > 0 && term != seconds) limit += ", " + std::string(name) + " " + us(term);
    }
  }
  std::string time = "of this shape not known";
  if (stage.cold.n > 0) {
    time = fmt::format("{} µs cold, {}: floor share {}, own-limit share {}", spread(stage.cold),
                       times_origin(c.input), percent(1e6 * c.floor.seconds() / stage.cold.median),
                       percent(1e6 * seconds / stage.cold.median));
    if (!std::isnan(stage.sustained_us)) {
      time += "; sustained " + microseconds(stage.sustained_us) + " µs";
    }
  }
  return wrap("stage     ", limit) + wrap("time      ", time);
}

std::string stage_table(const Case& c) {
  const bool timed = std::any_of(c.input.stages.begin(), c.input.stages.end(),
                                 [](const StageFacts& stage) { return stage.cold.n > 0; });
  Table table({"stage", "cold µs", "own limit µs", "of floor", "of own limit", "SMs with work",
               "parts", "workspace"});
  std::string unable;
  for (const StageFacts& stage : c.input.stages) {
    if (!stage.cache.ok()) {
      unable += (unable.empty() ? "" : ", ") + stage.slug;
      continue;
    }
    if (!stage.device.ok()) {
      table.add({stage.slug, "—", "—", "—", "—", "—", "—", stage.device.message()});
      continue;
    }
    const OwnLimit limit = c.limit_of(stage);
    double busy = stage.prediction.busy_fraction;
    std::string parts = "—";
    if (stage.plan) {
      const Balance plan =
          balance_of(c.problem, *stage.plan, c.input.seqlens_k, c.input.limits.multiprocessors);
      busy = plan.busy;
      parts = std::to_string(plan.parts);
    }
    table.add({stage.slug, microseconds(stage.cold.median), limit_text(limit),
               percent(1e6 * c.floor.seconds() / stage.cold.median),
               percent(1e6 * limit.seconds() / stage.cold.median), percent(busy), parts,
               stage.workspace_bytes == 0
                   ? "—"
                   : bytes_text(static_cast<double>(stage.workspace_bytes))});
  }
  return "\n" + table.to_string() +
         (timed ? "times: " + times_origin(c.input) : "no times of this shape are known") + "\n" +
         (unable.empty() ? "" : wrap("", "cannot read this cache: " + unable)) + "\n";
}

std::string plan_line(const Case& c) {
  if (!c.plan) return "none: " + c.stage->slug + " splits no sequence";
  const Balance& plan = *c.plan;
  std::string text = fmt::format(
      "{}{} × {}: {} with work, on {} of {}; largest load {} grains",
      c.input.stage.empty() ? c.stage->slug + ": " : "", count(plan.shape.row_tiles, "row tile"),
      count(plan.shape.workers, "worker"), count(plan.blocks, "block"), percent(plan.busy),
      count(c.input.limits.multiprocessors, "multiprocessor"), plan.largest);
  // Of a mean with idle workers in it nothing can be seen.
  if (plan.busy * kNoticeable >= 1)
    text += fmt::format(", {} of the mean", percent(plan.imbalance()));
  if (plan.pieces == 0) return text + "; no sequence is cut";
  return text + fmt::format("; {} of {} cut, into {}: {} written, and read again",
                            plan.cut_sequences, count(c.problem.batch, "sequence"),
                            count(plan.parts, "part"), bytes_text(plan.partial_bytes));
}

std::string memory_line(const Case& c) {
  const MemoryUse& memory = c.memory;
  return fmt::format(
      "cache {} in {}, {} of it padding; as buffers of the longest length {}; as keys and "
      "values of every head {}{}; workspace of {} {}",
      bytes_text(memory.cache), count(memory.pages, "page"),
      percent(memory.cache > 0 ? memory.padding / memory.cache : 0), bytes_text(memory.contiguous),
      bytes_text(memory.expanded),
      memory.cache > 0 ? fmt::format(" ({})", times(memory.expanded / memory.cache)) : "",
      c.stage->slug, bytes_text(static_cast<double>(c.stage->workspace_bytes)));
}

}  // namespace

double Balance::imbalance() const {
  return static_cast<double>(largest) / mean;
}

Balance balance_of(const Problem& problem, const PlanShape& shape,
                   const std::vector<int32_t>& seqlens_k, int multiprocessors) {
  const HostPlan plan = make_plan_on_host(problem, shape, seqlens_k);
  Balance balance;
  balance.shape = shape;
  balance.fixed = plan.header.fixed_grains;
  int64_t sum = 0;
  for (const std::vector<Piece>& pieces : pieces_of(plan)) {
    int64_t load = 0;
    for (const Piece& piece : pieces) {
      load += piece.grain_end - piece.grain_begin + plan.header.fixed_grains;
    }
    sum += load;
    balance.largest = std::max(balance.largest, load);
    balance.blocks += pieces.empty() ? 0 : int64_t{shape.row_tiles} * shape.team;
  }
  balance.mean = static_cast<double>(sum) / shape.workers;
  balance.busy = std::min(1.0, static_cast<double>(balance.blocks) / multiprocessors);
  balance.cut_sequences = plan.header.num_split_sequences;
  balance.pieces = plan.header.num_slots;
  balance.parts = balance.pieces - (balance.pieces - combined_slots(plan, shape)) / 2;
  balance.partial_bytes = static_cast<double>(balance.parts) * rows_of(problem) * kPartBytes;
  return balance;
}

MemoryUse memory_of(const Problem& problem, const std::vector<int32_t>& seqlens_k) {
  MemoryUse memory;
  const double row = double(problem.cache_row_bytes()) * problem.num_heads_kv;
  int32_t longest = 0;
  for (const int32_t length : seqlens_k) {
    memory.pages += pages_for(length, problem.page_size);
    longest = std::max(longest, length);
  }
  const double tokens = total_of(seqlens_k);
  memory.cache = static_cast<double>(memory.pages) * problem.page_size * row;
  memory.padding = memory.cache - tokens * row;
  memory.contiguous = static_cast<double>(seqlens_k.size()) * longest * row;
  constexpr double kExpandedRow = 128 + 64 + 128;  // of K and V, per head of a DeepSeek layer
  memory.expanded = tokens * problem.num_heads_q * kExpandedRow * 2;
  return memory;
}

const StageFacts* subject_of(const ExplainInput& input) {
  const StageFacts* best = nullptr;
  const bool timed =
      std::any_of(input.stages.begin(), input.stages.end(),
                  [](const StageFacts& stage) { return stage.can_run() && stage.cold.n > 0; });
  const Work work = work_of(input.problem, static_cast<int64_t>(total_of(input.seqlens_k)));
  const Floor::Bound bound = floor_of(work, input.ceilings, Mode::kCold).bound();
  const auto limit_of = [&](const StageFacts& stage) {
    return own_limit(stage.prediction, work, input.ceilings, Mode::kCold).seconds();
  };
  // Own limits tell stages apart where the launch is not the most of them.
  const bool ranked = bound == Floor::Bound::kMemory || bound == Floor::Bound::kMatrix;
  for (const StageFacts& stage : input.stages) {
    if (!input.stage.empty()) {
      if (stage.slug == input.stage) return &stage;
      continue;
    }
    if (!stage.can_run() || (timed && stage.cold.n == 0)) continue;
    const bool better =
        best == nullptr || (timed ? stage.cold.median < best->cold.median
                                  : !ranked || !(limit_of(stage) > kNoticeable * limit_of(*best)));
    if (better) best = &stage;
  }
  return best;
}

std::vector<Advice> advise(const ExplainInput& input) {
  const Case c(input);
  std::vector<Advice> advice;
  if (c.stage == nullptr) return advice;
  for (const Rule& rule : kRules) {
    std::string text = rule.text(c);
    if (!text.empty()) advice.push_back({rule.name, std::move(text)});
    if (!c.stage->can_run() && !advice.empty()) break;  // the others are about running
  }
  return advice;
}

std::vector<std::string> advice_rules() {
  std::vector<std::string> names;
  for (const Rule& rule : kRules) names.push_back(rule.name);
  return names;
}

std::string explain(const ExplainInput& input) {
  const Case c(input);
  std::string text = wrap("device    ", input.device) + wrap("ceilings  ", ceilings_line(input)) +
                     wrap("work      ", work_line(c)) + wrap("floor     ", floor_line(c));
  if (c.stage == nullptr) {
    return text +
           (input.stage.empty() ? "no stage can run on" : input.stage + " is not built for") +
           " this device" + (is_quantised(input.problem.cache_format) ? ", on this cache" : "") +
           "\n";
  }
  if (!input.choice.empty()) text += wrap("choice    ", input.choice);
  text += input.stage.empty() ? stage_table(c) : stage_lines(c);
  if (c.stage->cache.ok()) {
    text += wrap("plan      ", plan_line(c)) + wrap("memory    ", memory_line(c));
  }
  const std::vector<Advice> advice = advise(input);
  if (advice.empty()) return text;
  text += "advice" + (input.stage.empty() ? ", for " + c.stage->slug : "") + "\n";
  for (const Advice& one : advice) text += wrap("  - ", one.rule + ": " + one.text);
  return text;
}

}  // namespace mla::bench
