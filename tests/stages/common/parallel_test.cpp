// Context parallel decode on the model, with ranks that are threads. It is compared with the reference over ranks,
// shares and exchanges, with needles at every cut. Bits are the same every time. Ranks fail, lag or disagree.
#include "stages/common/parallel/parallel.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/compare.h"
#include "reference/testing/data_generator.h"
#include "stages/common/cache/paging_check.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kPatient{60000};
constexpr int kRanks[] = {1, 2, 3, 4, 8};

// The results of one rank.
struct Ended {
  Status status;
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Ended& other) const {
    return out == other.out && lse.size() == other.lse.size() &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

// A rank's arguments, for a test to spoil.
struct Arguments {
  Problem problem;
  Tensors tensors;
  ParallelSettings settings;
  Workspace workspace;
  Workspace plan = {}, scratch = {};  // parts of the workspace
  // Plans by a call of its own, and decodes two layers by that: a cache of NaN, then the rank's own.
  bool is_planned = false;
  RankObserver* observer = nullptr;
};
using Spoil = std::function<void(int rank, Arguments* arguments)>;

const Stage& stage_of_model(const std::string& slug = "04") {
  return *find_stage(MachineKind::kModel, slug);
}

// A rank's own cache, which has its pages in another order, and a page of NaN.
struct RankCache {
  std::vector<uint8_t> pages;
  std::vector<int32_t> table;
  std::vector<int32_t> lengths;  // the rank's own
  int num_pages = 1;
};
RankCache cache_of(const DataSet& data, const HostTensors& host, const ContextShare& share,
                   const ParallelSettings& settings) {
  const Problem& problem = data.problem;
  const bool quantised = is_quantised(problem.cache_format);
  const auto* from = quantised ? host.quantised_cache.data()
                               : reinterpret_cast<const uint8_t*>(host.kv_cache.data());
  const size_t page_bytes =
      size_t(problem.page_size) * size_t(problem.num_heads_kv) * size_t(problem.cache_row_bytes());
  const int columns = settings.own_lengths ? problem.max_pages_per_seq
                                           : share_columns(problem.max_pages_per_seq, share.ranks,
                                                           share.pages_per_turn);
  // Own lengths: whose a page is has nothing to do with its place in the sequence.
  const auto is_own = [&](int sequence, int page) {
    int turn = page / share.pages_per_turn;
    if (settings.own_lengths) turn = (page * page + sequence) / 2;
    if (settings.first_ranks != nullptr)
      turn += settings.first_ranks[sequence] + 10 * share.ranks;  // above 0
    return turn % share.ranks == share.rank;
  };
  RankCache cache;
  cache.table.assign(size_t(problem.batch) * size_t(columns), kGarbagePage);
  std::vector<int32_t> originals;
  for (int sequence = 0; sequence < problem.batch; ++sequence) {
    int column = 0;
    const int tokens = data.seqlens_k[size_t(sequence)];
    const int64_t pages = pages_for(tokens, problem.page_size);
    int32_t& own = cache.lengths.emplace_back(0);
    for (int page = 0; page < pages; ++page) {
      if (!is_own(sequence, page)) continue;
      own += std::min(problem.page_size, tokens - page * problem.page_size);
      cache.table[size_t(sequence) * size_t(columns) + size_t(column++)] =
          int32_t(originals.size());
      originals.push_back(
          data.block_table[size_t(sequence) * size_t(problem.max_pages_per_seq) + size_t(page)]);
    }
  }
  cache.num_pages = int(originals.size()) + 1;  // the first page belongs to no sequence
  cache.pages.assign(page_bytes * size_t(cache.num_pages), 0xff);
  for (size_t i = 0; i < originals.size(); ++i) {
    std::memcpy(cache.pages.data() + page_bytes * (originals.size() - i),
                from + page_bytes * size_t(originals[i]), page_bytes);
  }
  for (int32_t& page : cache.table) {
    if (page != kGarbagePage) page = int32_t(originals.size()) - page;
  }
  return cache;
}

// One rank: its own memory, from its own thread. The settings' first ranks are in host memory.
Status run_rank(const Stage& stage, const DataSet& data, const HostTensors& host,
                const ParallelSettings& settings, Transport& transport, const Spoil& spoil,
                Ended* ended) {
  Machine& machine = model_machine();
  const int rank = transport.rank(), ranks = transport.ranks();
  const RankCache cache = cache_of(data, host, {rank, ranks, settings.pages_per_turn}, settings);
  Arguments arguments{data.problem, {}, settings, {}};
  arguments.problem.num_pages = cache.num_pages;
  WorkspaceBytes bytes;
  MLA_RETURN_IF_ERROR(parallel_workspace_bytes(stage, arguments.problem, settings, ranks, &bytes));
  const Layout layout = data.layout();
  const size_t slices = settings.exchange == Exchange::kAllGather ? 1 : size_t(ranks);
  DeviceBuffer q, kv, table, lengths, first_ranks, out, lse, workspace;
  if (settings.first_ranks != nullptr) {
    MLA_RETURN_IF_ERROR(
        first_ranks.assign(machine, settings.first_ranks, data.seqlens_k.size() * 4));
    arguments.settings.first_ranks = first_ranks.as<int32_t>();
  }
  MLA_RETURN_IF_ERROR(q.assign(machine, host.q.data(), host.q.size() * 2));
  MLA_RETURN_IF_ERROR(kv.assign(machine, cache.pages.data(), cache.pages.size()));
  MLA_RETURN_IF_ERROR(table.assign(machine, cache.table.data(), cache.table.size() * 4));
  const std::vector<int32_t> seqlens = settings.own_lengths ? cache.lengths : data.seqlens_k;
  MLA_RETURN_IF_ERROR(lengths.assign(machine, seqlens.data(), seqlens.size() * 4));
  MLA_RETURN_IF_ERROR(out.allocate(machine, size_t(layout.out) * 2 / slices));
  MLA_RETURN_IF_ERROR(lse.allocate(machine, size_t(layout.lse) * 4 / slices));
  MLA_RETURN_IF_ERROR(workspace.allocate(machine, bytes.total()));
  Tensors& tensors = arguments.tensors;
  tensors.q = q.data();
  tensors.kv_cache = kv.data();
  tensors.block_table = table.as<int32_t>();
  tensors.seqlens_k = lengths.as<int32_t>();
  tensors.out = out.data();
  tensors.lse = lse.as<float>();
  if (data.spec.strided) {
    tensors.q_strides = layout.strides.q_strides;
    tensors.out_strides = layout.strides.out_strides;
    tensors.lse_strides = layout.strides.lse_strides;
  }
  arguments.workspace = workspace;
  arguments.plan = bytes.plan_in(workspace);
  arguments.scratch = bytes.scratch_in(workspace);
  if (spoil) spoil(rank, &arguments);
  transport.observe(arguments.observer);
  if (arguments.is_planned) {
    MLA_RETURN_IF_ERROR(plan_parallel(stage, arguments.problem, tensors, arguments.settings,
                                      transport, arguments.plan));
    DeviceBuffer other;
    MLA_RETURN_IF_ERROR(other.allocate(machine, kv.bytes()));
    MLA_RETURN_IF_ERROR(machine.fill(other.data(), 0xff, other.bytes()));
    for (const void* layer : {other.data(), kv.data()}) {
      Tensors of_layer = tensors;
      of_layer.kv_cache = layer;
      MLA_RETURN_IF_ERROR(decode_parallel_planned(stage, arguments.problem, of_layer,
                                                  arguments.settings, transport, arguments.plan,
                                                  arguments.scratch));
    }
  } else {
    MLA_RETURN_IF_ERROR(decode_parallel(stage, arguments.problem, tensors, arguments.settings,
                                        transport, arguments.workspace));
  }
  ended->out.resize(out.bytes() / 2);
  ended->lse.resize(lse.bytes() / 4);
  MLA_RETURN_IF_ERROR(machine.copy_to_host(ended->out.data(), out.data(), out.bytes()));
  return machine.copy_to_host(ended->lse.data(), lse.data(), lse.bytes());
}

std::vector<Ended> run_ranks(const Stage& stage, const DataSet& data, const HostTensors& host,
                             const ParallelSettings& settings, int ranks,
                             const Spoil& spoil = nullptr, milliseconds limit = kPatient) {
  std::vector<std::unique_ptr<Transport>> transports;
  EXPECT_OK(make_thread_transports(ranks, limit, &transports));
  std::vector<Ended> ended(transports.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < transports.size(); ++i) {
    threads.emplace_back([&, i] {
      ended[i].status = run_rank(stage, data, host, settings, *transports[i], spoil, &ended[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ended;
}

// Puts outputs together that have some heads each; outputs of all heads stay as they are.
Ended whole(const DataSet& data, const ParallelSettings& settings,
            const std::vector<Ended>& ended) {
  if (settings.exchange == Exchange::kAllGather) return ended[0];
  const Problem& problem = data.problem;
  const size_t heads = size_t(problem.num_heads_q) / ended.size(),
               all = size_t(problem.num_heads_q);
  const size_t queries = size_t(problem.seqlen_q);
  Ended result;
  result.out.resize(size_t(problem.out_elements()));
  result.lse.resize(size_t(problem.lse_elements()));
  for (size_t rank = 0; rank < ended.size(); ++rank) {
    for (size_t token = 0; token < size_t(problem.batch) * queries; ++token) {
      for (size_t head = 0; head < heads; ++head) {
        std::memcpy(&result.out[(token * all + rank * heads + head) * kHeadDimV],
                    &ended[rank].out[(token * heads + head) * kHeadDimV], kHeadDimV * 2);
        const size_t sequence = token / queries, query = token % queries;
        result.lse[(sequence * all + rank * heads + head) * queries + query] =
            ended[rank].lse[(sequence * heads + head) * queries + query];
      }
    }
  }
  return result;
}

// Expects the decode over `ranks` ranks to agree with the reference.
void expect_right(const Stage& stage, const DataSet& data, HostTensors& host,
                  const ReferenceResult& expected, const ParallelSettings& settings, int ranks) {
  SCOPED_TRACE(stage.slug + " " + data.spec.name() + " ranks=" + std::to_string(ranks) +
               " pages_per_turn=" + std::to_string(settings.pages_per_turn) + " " +
               to_string(settings.exchange) +
               (settings.first_ranks != nullptr ? " first ranks" : ""));
  const std::vector<Ended> ended = run_ranks(stage, data, host, settings, ranks);
  for (const Ended& rank : ended) ASSERT_OK(rank.status);
  if (settings.exchange == Exchange::kAllGather) {
    for (const Ended& rank : ended) EXPECT_EQ(rank, ended[0]) << "ranks differ";
  }
  const Ended result = whole(data, settings, ended);
  const Layout layout = data.layout();
  const std::vector<uint16_t> out = gather_out(data.problem, layout, result.out);
  const std::vector<float> lse = gather_lse(data.problem, layout, result.lse);
  if (ranks == 1) {
    EXPECT_OK(compare_decode(data.problem, out, lse, expected));
    return;
  }
  const Comparison of_out = compare(data.problem.dtype, out, expected.out, kHeadDimV,
                                    merged_tolerance(data.problem.dtype));
  EXPECT_TRUE(of_out.ok) << of_out.failure;
  const Comparison of_lse = compare_lse(data.problem, lse, expected);
  EXPECT_TRUE(of_lse.ok) << of_lse.failure;
}

// First ranks of so many sequences: any numbers.
std::vector<int32_t> some_first_ranks(size_t batch) {
  std::vector<int32_t> first_ranks;
  for (size_t i = 0; i < batch; ++i) first_ranks.push_back(int32_t(i * 5 % 13) - 4);
  return first_ranks;
}

DecodeCase small_case() {
  DecodeCase spec;
  spec.page_size = 16;
  spec.num_heads_q = 24;
  return spec;
}

// Every case over all numbers of ranks, with shares and exchanges by turns. Each number of query tokens is a test, of which
// the first is quick.
constexpr int kQueryTokens[] = {1, 2, 4, 19};
class ParallelCases : public testing::TestWithParam<size_t> {};
INSTANTIATE_TEST_SUITE_P(QueryTokens, ParallelCases,
                         testing::Range(size_t{0}, std::size(kQueryTokens)), [](const auto& param) {
                           return std::to_string(kQueryTokens[param.param]);
                         });

TEST_P(ParallelCases, MatchTheReference) {
  const int seqlen_q = kQueryTokens[GetParam()];
  size_t turn = GetParam() * 4 * (std::size(kRanks) + 1);
  for (const bool causal : {false, true}) {
    for (const int num_heads_kv : {1, 3}) {
      DecodeCase spec = small_case();
      spec.dtype = turn % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
      spec.seqlen_q = seqlen_q;
      spec.causal = causal;
      spec.num_heads_kv = num_heads_kv;
      if (seqlen_q == 19 && num_heads_kv == 3) continue;  // more of the same, and slow
      spec.seed = turn;
      spec.data = turn % 3 == 0 ? DataKind::kNeedles : DataKind::kFlat;
      // Empty, shorter than the queries, shorter than the ranks' pages, around pages and turns of them.
      spec.lengths = {0, 1, 3, 15, 16, 17, 31, 33, 64, 128, 129, 145};
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      ReferenceResult expected;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
      const std::vector<int32_t> first_ranks = some_first_ranks(spec.lengths.size());
      for (const int ranks : kRanks) {
        const int run = contiguous_pages(data.problem.max_pages_per_seq, ranks);
        const int shares[] = {1, run, 2};
        ++turn;
        expect_right(stage_of_model(), data, host, expected,
                     {shares[turn % 3], kExchanges[turn / 3 % 3], 1 + int(turn % 5),
                      turn % 4 < 2 ? nullptr : first_ranks.data()},
                     ranks);
        if (HasFailure()) return;  // one failure is enough
      }
      ++turn;
    }
  }
}

// Pages that lie anywhere, of which each rank says how many tokens it has: all on one rank, too. By a plan, and by a stage
// that makes none and asks for the lengths themselves.
TEST(Parallel, RanksMaySayTheirOwnLengths) {
  size_t turn = 0;
  for (const int seqlen_q : {1, 3}) {
    DecodeCase spec = small_case();
    spec.seqlen_q = seqlen_q;
    spec.causal = seqlen_q == 1;  // which masks nothing
    spec.lengths = {0, 1, 16, 17, 33, 64, 129, 145};
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    ReferenceResult expected;
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    for (const int ranks : kRanks) {
      for (const Exchange exchange : kExchanges) {
        // pages_per_turn is not read.
        const ParallelSettings settings{7, exchange, 1 + int(turn++ % 3), nullptr,
                                        /*own_lengths=*/true};
        const Stage& stage = stage_of_model(exchange == Exchange::kAllToAll ? "03" : "04");
        expect_right(stage, data, host, expected, settings, ranks);
        if (HasFailure()) return;
      }
    }
  }
}

// Of eight ranks each has one column of pages, and a query token's tail two: its scores need more memory than the bulk's.
TEST(Parallel, ATailMayNeedMoreScratchMemoryThanTheBulk) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 2;
  spec.seqlen_q = 3;
  spec.causal = true;
  spec.lengths = {33, 5};
  const DataSet data = make_data_set(spec);
  ASSERT_LE(data.problem.max_pages_per_seq, 8);
  HostTensors host = generate(data);
  ReferenceResult expected;
  ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
  expect_right(stage_of_model("01"), data, host, expected, {}, 8);
}

// Every stage, with every format that it reads; with a tail and without, where a plan's kernel cuts, if there is a plan.
TEST(Parallel, EveryStageDecodesAShare) {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    for (const CacheFormat format : stage.cache_formats) {
      DecodeCase spec = small_case();
      spec.page_size = 64;
      spec.num_heads_q = 4;
      spec.seqlen_q = 2;
      spec.causal = true;
      spec.cache_format = format;
      spec.lengths = {193, 5, 0};
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      ReferenceResult expected;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
      expect_right(stage, data, host, expected, {}, 2);
      if (format != stage.cache_formats[0]) continue;
      const std::vector<int32_t> first_ranks = {1, 0, 1};
      DataSet plain = data;
      plain.problem.causal = false;
      ASSERT_OK(reference_attention(plain.problem, host.tensors(plain), &expected));
      expect_right(stage, plain, host, expected, {1, Exchange::kAllToAll, 1, first_ranks.data()},
                   2);
    }
  }
}

TEST(Parallel, TensorsMayHaveStrides) {
  DecodeCase spec = small_case();
  spec.seqlen_q = 2;
  spec.num_heads_q = 3;
  spec.strided = true;
  spec.lengths = {70, 0, 33};
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  ReferenceResult expected;
  ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
  // The rank's cache is contiguous here: its pages come from the cache of the same case without strides.
  DecodeCase plain = spec;
  plain.strided = false;
  const HostTensors contiguous = generate(make_data_set(plain));
  HostTensors mixed = host;
  mixed.kv_cache = contiguous.kv_cache;
  const std::vector<int32_t> first_ranks = {1, 0, 5};
  expect_right(stage_of_model(), data, mixed, expected,
               {1, Exchange::kAllGather, 1, first_ranks.data()}, 3);
}

// More results than the merge loads at once.
TEST(Parallel, ElevenRanksAreMerged) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 1;
  spec.lengths = {200, 33};
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  ReferenceResult expected;
  ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
  expect_right(stage_of_model(), data, host, expected, {}, 11);
}

// A worker of the plan reads the rank's lengths again where it goes on to another sequence.
TEST(Parallel, AWorkerHasManySequences) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 1;
  for (int i = 0; i < 24; ++i) spec.lengths.push_back(1 + i * 37 % 50);
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  ReferenceResult expected;
  ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
  const int before = std::exchange(gpu_model::device().multiprocessors, 1);
  expect_right(stage_of_model(), data, host, expected, {}, 2);
  gpu_model::device().multiprocessors = before;
}

TEST(Parallel, OtherLengthsCountAsTheNearestThatMayBe) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 1;
  spec.lengths = {7 * 16, 0, 20};
  const DataSet data = make_data_set(spec);
  const HostTensors host = generate(data);
  const Spoil full = [](int, Arguments* arguments) {
    arguments->problem.max_pages_per_seq = 7;  // the first sequence fills its table
  };
  const Spoil others = [&](int rank, Arguments* arguments) {
    full(rank, arguments);
    auto* lengths = const_cast<int32_t*>(arguments->tensors.seqlens_k);  // the model's memory
    lengths[0] = 1000000;
    lengths[1] = -100;
  };
  const std::vector<Ended> expected = run_ranks(stage_of_model(), data, host, {}, 2, full);
  const std::vector<Ended> ended = run_ranks(stage_of_model(), data, host, {}, 2, others);
  for (size_t rank = 0; rank < 2; ++rank) {
    ASSERT_OK(ended[rank].status);
    EXPECT_EQ(ended[rank], expected[rank]);
  }
}

// A token that outweighs all others is put on either side of every cut, of pages and of turns, and at each query's
// mask. Query tokens that see it get its row, to the bit, and the others do not.
TEST(Parallel, NeedlesAtEveryCutAreFound) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 8;
  spec.seqlen_q = 3;
  spec.causal = true;
  constexpr int kLength = 16 * 9 + 1;
  std::vector<int> needles = {0, kLength - 3, kLength - 2, kLength - 1};
  for (int cut = 16; cut < kLength - 3; cut += 16) needles.insert(needles.end(), {cut - 1, cut});
  spec.lengths.assign(needles.size(), kLength);
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  const auto bits = [](float value) {
    return generator::round_to_16_bits(DType::kBFloat16, value);
  };
  for (size_t row = 0; row < host.q.size() / kHeadDimQK; ++row) {
    host.q[(row + 1) * kHeadDimQK - 1] = bits(8);
  }
  const auto row_of = [&](size_t sequence, int token) {
    const int32_t page =
        data.block_table[sequence * size_t(data.problem.max_pages_per_seq) + size_t(token / 16)];
    return &host.kv_cache[(size_t(page) * 16 + size_t(token % 16)) * kHeadDimQK];
  };
  for (size_t sequence = 0; sequence < needles.size(); ++sequence) {
    for (int token = 0; token < kLength; ++token) row_of(sequence, token)[575] = 0;
    row_of(sequence, needles[sequence])[575] = bits(128);  // a logit of 42
  }
  const std::vector<int32_t> first_ranks = some_first_ranks(needles.size());
  for (const int ranks : kRanks) {
    for (const int pages_per_turn :
         {1, 2, contiguous_pages(data.problem.max_pages_per_seq, ranks)}) {
      for (const Exchange exchange : kExchanges) {
        if (exchange != Exchange::kAllGather && (8 % ranks != 0 || pages_per_turn == 2)) continue;
        const bool moved = exchange == Exchange::kAllToAll || pages_per_turn == 2;
        const ParallelSettings settings{pages_per_turn, exchange, 1,
                                        moved ? first_ranks.data() : nullptr};
        SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(pages_per_turn) +
                     " pages, " + to_string(exchange));
        const std::vector<Ended> ended = run_ranks(stage_of_model(), data, host, settings, ranks);
        for (const Ended& rank : ended) ASSERT_OK(rank.status);
        const Ended result = whole(data, settings, ended);
        for (size_t sequence = 0; sequence < needles.size(); ++sequence) {
          for (int query = 0; query < 3; ++query) {
            for (size_t head = 0; head < 8; ++head) {
              const bool sees = needles[sequence] <= kLength - 3 + query;
              const bool found =
                  std::memcmp(&result.out[((sequence * 3 + size_t(query)) * 8 + head) * kHeadDimV],
                              row_of(sequence, needles[sequence]), kHeadDimV * 2) == 0;
              ASSERT_EQ(found, sees) << "token " << needles[sequence] << " query " << query;
            }
          }
        }
      }
    }
  }
}

TEST(Parallel, TheSameBitsEveryTime) {
  DecodeCase spec = small_case();
  spec.seqlen_q = 2;
  spec.causal = true;
  spec.lengths = {200, 17, 0, 65};
  const DataSet data = make_data_set(spec);
  const HostTensors host = generate(data);
  for (const int ranks : kRanks) {
    for (const Exchange exchange : kExchanges) {
      const ParallelSettings settings{1, exchange};
      const std::vector<Ended> first = run_ranks(stage_of_model(), data, host, settings, ranks);
      for (const Ended& rank : first) ASSERT_OK(rank.status);
      // The last ranks come first, and kernels run under another schedule.
      gpu_model::schedule().seed = 7;
      const Spoil late = [&](int rank, Arguments*) {
        std::this_thread::sleep_for(milliseconds(5 * (ranks - 1 - rank)));
      };
      const std::vector<Ended> again =
          run_ranks(stage_of_model(), data, host, settings, ranks, late);
      gpu_model::schedule() = {};
      for (const Ended& rank : again) ASSERT_OK(rank.status);
      for (size_t rank = 0; rank < first.size(); ++rank) EXPECT_EQ(first[rank], again[rank]);
    }
  }
}

// The heads are shared out, and each share has a group of ranks that share the pages.
TEST(Parallel, HeadsAndPagesAreSharedTogether) {
  for (const auto& [num_heads_kv, head_ranks] : {std::pair{1, 4}, {2, 2}, {4, 2}, {2, 4}}) {
    DecodeCase spec = small_case();
    spec.num_heads_q = 8;
    spec.num_heads_kv = num_heads_kv;
    spec.seqlen_q = 2;
    spec.causal = true;
    spec.lengths = {100, 17, 0, 33};
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    ReferenceResult expected;
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    const size_t tokens = 4 * 2;
    std::vector<uint16_t> out(host.out.size());
    for (int head_rank = 0; head_rank < head_ranks; ++head_rank) {
      HeadShare share;
      ASSERT_OK(share_heads(data.problem, head_rank, head_ranks, &share));
      const Spoil of_heads = [&](int, Arguments* arguments) {
        const Problem& all = data.problem;
        Tensors& tensors = arguments->tensors;
        arguments->problem.num_heads_q = share.num_q;
        arguments->problem.num_heads_kv = share.num_kv;
        tensors.q = static_cast<const uint16_t*>(tensors.q) + share.first_q * kHeadDimQK;
        tensors.q_strides = {int64_t{2} * 8 * kHeadDimQK, int64_t{8} * kHeadDimQK, kHeadDimQK};
        tensors.kv_cache =
            static_cast<const uint16_t*>(tensors.kv_cache) + share.first_kv * kHeadDimQK;
        const int64_t row = int64_t{all.num_heads_kv} * kHeadDimQK;
        tensors.kv_strides = {all.page_size * row, row, kHeadDimQK};
      };
      const std::vector<Ended> ended = run_ranks(stage_of_model(), data, host, {}, 2, of_heads);
      for (const Ended& rank : ended) ASSERT_OK(rank.status);
      for (size_t token = 0; token < tokens; ++token) {
        std::memcpy(&out[(token * 8 + size_t(share.first_q)) * kHeadDimV],
                    &ended[0].out[token * size_t(share.num_q) * kHeadDimV],
                    size_t(share.num_q) * kHeadDimV * 2);
      }
    }
    const Comparison of_out = compare(data.problem.dtype, out, expected.out, kHeadDimV,
                                      merged_tolerance(data.problem.dtype));
    EXPECT_TRUE(of_out.ok) << num_heads_kv << " KV heads: " << of_out.failure;
  }
}

// What an observer is told, and between that what the stage is asked to decode.
thread_local std::string told;
Status (*decode_unobserved)(const Problem&, const Tensors&, const DevicePlan&, void*,
                            const DeviceLimits&, Stream) = nullptr;

class Listener final : public RankObserver {
 public:
  Status mark(RankPhase phase, Stream) override {
    const char* names[] = {"cut",      "bulk",      "tail",  "local merge", "wait",
                           "exchange", "exchanged", "weigh", "merge",       "done"};
    told += std::string(names[static_cast<int>(phase)]) + " ";
    said = told;
    if (--marks_left != 0) return {};
    return {StatusCode::kCudaError, "no event"};
  }
  std::string said;
  int marks_left = 1000;
};

TEST(Parallel, AnObserverIsToldOfEveryPhase) {
  Stage stage = stage_of_model();
  decode_unobserved = stage.decode;
  stage.decode = [](const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, const DeviceLimits& limits, Stream stream) {
    told += "[decodes " + std::to_string(problem.batch) + "] ";
    return decode_unobserved(problem, tensors, plan, scratch, limits, stream);
  };
  DecodeCase spec = small_case();
  spec.num_heads_q = 6;
  spec.seqlen_q = 2;
  spec.lengths = {40, 17, 0};
  for (const bool causal : {false, true}) {
    spec.causal = causal;
    const DataSet data = make_data_set(spec);
    const HostTensors host = generate(data);
    for (const int ranks : {1, 2, 3}) {
      for (const int slices : {1, 2}) {
        for (const Exchange exchange : kExchanges) {
          std::vector<Listener> listeners(static_cast<size_t>(ranks));
          const Spoil listen = [&](int rank, Arguments* arguments) {
            told.clear();
            arguments->observer = &listeners[static_cast<size_t>(rank)];
          };
          const auto ended = run_ranks(stage, data, host, {1, exchange, slices}, ranks, listen);
          std::string expected;
          for (int slice = 0; slice < slices && ranks > 1; ++slice) {
            const int batch = slices == 1 ? 3 : 1 + slice;
            expected += "cut bulk [decodes " + std::to_string(batch) + "] ";
            if (causal) {
              expected += "tail [decodes " + std::to_string(2 * batch) + "] local merge ";
            }
            expected += "wait exchange exchanged ";
            if (exchange == Exchange::kReduceScatter) expected += "weigh wait exchange exchanged ";
          }
          for (int slice = 0; slice < slices && ranks > 1; ++slice) expected += "merge ";
          if (ranks > 1) expected += "done ";
          for (size_t rank = 0; rank < listeners.size(); ++rank) {
            ASSERT_OK(ended[rank].status);
            EXPECT_EQ(listeners[rank].said, expected)
                << to_string(exchange) << " " << slices << " slices";
          }
        }
      }
    }
  }
}

// With a tail and without, with own lengths, of a stage that makes no plan: one plan serves two decodes.
TEST(Parallel, APlanServesSeveralDecodes) {
  const std::vector<int32_t> first_ranks = {1, 0, 2, 1};
  for (const char* slug : {"03", "04"}) {
    for (const bool causal : {false, true}) {
      DecodeCase spec = small_case();
      spec.seqlen_q = 2;
      spec.num_heads_q = 6;
      spec.causal = causal;
      spec.lengths = {100, 17, 0, 33};
      const DataSet data = make_data_set(spec);
      const HostTensors host = generate(data);
      for (const int ranks : {1, 2, 3}) {
        for (const ParallelSettings& settings :
             {ParallelSettings{1, Exchange::kAllGather, 3},
              ParallelSettings{2, Exchange::kAllToAll, 1, first_ranks.data()},
              ParallelSettings{1, Exchange::kReduceScatter, 2, nullptr, !causal}}) {
          SCOPED_TRACE(std::string(slug) + " " + std::to_string(ranks) + " ranks, " +
                       to_string(settings.exchange) + (causal ? ", causal" : ""));
          std::vector<Listener> listeners(static_cast<size_t>(ranks));
          const Spoil planned = [&](int rank, Arguments* arguments) {
            told.clear();
            arguments->is_planned = true;
            arguments->observer = &listeners[static_cast<size_t>(rank)];
          };
          const Stage& stage = stage_of_model(slug);
          const auto ended = run_ranks(stage, data, host, settings, ranks, planned);
          const auto expected = run_ranks(stage, data, host, settings, ranks);
          for (size_t rank = 0; rank < ended.size(); ++rank) {
            ASSERT_OK(ended[rank].status);
            EXPECT_EQ(ended[rank], expected[rank]) << "rank " << rank;
            std::string cuts;  // of all slices, before any is decoded, and never again
            for (int slice = 0; slice < settings.slices && ranks > 1; ++slice) cuts += "cut ";
            const std::string& said = listeners[rank].said;
            EXPECT_EQ(said.substr(0, cuts.size()), cuts) << said;
            EXPECT_EQ(said.find("cut", cuts.size()), std::string::npos) << said;
          }
        }
      }
    }
  }
}

TEST(Parallel, AnObserversErrorEndsTheDecodeOfAll) {
  DecodeCase spec = small_case();
  spec.num_heads_q = 6;
  spec.seqlen_q = 2;
  spec.causal = true;
  spec.lengths = {40, 17, 0};
  const DataSet data = make_data_set(spec);
  const HostTensors host = generate(data);
  const int marks =
      14;  // five until the exchange, three times two in it and around, merge, done, and one too many
  for (int last = 1; last <= marks; ++last) {
    std::vector<Listener> listeners(2);
    listeners[1].marks_left = last;
    const Spoil listen = [&](int rank, Arguments* arguments) {
      told.clear();
      arguments->observer = &listeners[static_cast<size_t>(rank)];
    };
    const auto ended =
        run_ranks(stage_of_model(), data, host, {1, Exchange::kReduceScatter}, 2, listen);
    EXPECT_EQ(ended[1].status.ok(), last == marks) << listeners[1].said;
    if (last == marks) break;
    EXPECT_EQ(ended[1].status.message(), "no event") << listeners[1].said;
  }
}

TEST(Parallel, NoSequencesAreNoError) {
  DecodeCase spec = small_case();
  DataSet data = make_data_set(spec);
  const HostTensors host = generate(data);
  const Spoil empty = [](int, Arguments* arguments) {
    arguments->problem.batch = 0;
    arguments->tensors = {};
  };
  for (const Ended& rank : run_ranks(stage_of_model(), data, host, {}, 2, empty)) {
    EXPECT_OK(rank.status);
  }
}

// ---- Errors: every rank gets a status

class ParallelErrors : public testing::Test {
 protected:
  ParallelErrors() {
    DecodeCase spec = small_case();
    spec.seqlen_q = 2;
    spec.causal = true;
    spec.lengths = {40, 50};
    data_ = make_data_set(spec);
    host_ = generate(data_);
  }

  // Returns the status of rank 1 of three after `spoil` has changed its arguments. Expects the other ranks to be told.
  Status of_spoilt(const std::function<void(Arguments*)>& spoil) {
    const Spoil one = [&](int rank, Arguments* arguments) {
      if (rank == 1) spoil(arguments);
    };
    const std::vector<Ended> ended =
        run_ranks(stage_of_model(), data_, host_, {}, 3, one, milliseconds(20000));
    for (const size_t other : {size_t{0}, size_t{2}}) {
      EXPECT_EQ(ended[other].status.code(), StatusCode::kRankFailed);
      EXPECT_EQ(ended[other].status.message(), "rank 1 failed: " + ended[1].status.to_string());
    }
    return ended[1].status;
  }

  DataSet data_;
  HostTensors host_;
};

TEST_F(ParallelErrors, AnArgumentOfOneRank) {
  const auto expect = [&](StatusCode code, const std::string& text,
                          const std::function<void(Arguments*)>& spoil) {
    if (HasFailure()) return;  // one failure is enough; the next may wait for its time limit, too
    const Status status = of_spoilt(spoil);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  const StatusCode invalid = StatusCode::kInvalidArgument;
  expect(StatusCode::kWorkspaceTooSmall,
         "workspace.bytes = ", [](Arguments* a) { a->workspace.bytes -= 16; });
  expect(invalid, "workspace.data", [](Arguments* a) { a->workspace.data = nullptr; });
  expect(invalid, "workspace.data is null or not 16-byte aligned",
         [](Arguments* a) { a->workspace.data = static_cast<char*>(a->workspace.data) + 4; });
  expect(StatusCode::kWorkspaceTooSmall, "plan.bytes = ", [](Arguments* a) {
    a->is_planned = true;
    a->plan.bytes -= 16;
  });
  expect(StatusCode::kWorkspaceTooSmall, "scratch.bytes = ", [](Arguments* a) {
    a->is_planned = true;
    a->scratch.bytes -= 16;
  });
  expect(invalid, "pages_per_turn = 0", [](Arguments* a) { a->settings.pages_per_turn = 0; });
  expect(invalid, "slices = 0 must be at least 1", [](Arguments* a) { a->settings.slices = 0; });
  expect(invalid, "q is null", [](Arguments* a) { a->tensors.q = nullptr; });
  expect(invalid, "out is null", [](Arguments* a) { a->tensors.out = nullptr; });
  expect(invalid, "softmax_scale", [](Arguments* a) { a->problem.softmax_scale = -1; });
  expect(invalid, "q_strides.batch = ", [](Arguments* a) {
    a->tensors.q_strides = {3 * 24 * 576, 24 * 576, 576};
  });
  expect(invalid, "out stride of num_heads_q = 513",
         [](Arguments* a) { a->tensors.out_strides.head = 513; });
}

TEST_F(ParallelErrors, WhatRanksCannotShare) {
  size_t bytes = 0;
  for (const Exchange exchange : kExchanges) {
    const Status status =
        parallel_workspace_bytes(stage_of_model(), data_.problem, {1, exchange}, 5, &bytes);
    EXPECT_EQ(status.ok(), exchange == Exchange::kAllGather) << status.message();
  }
  EXPECT_EQ(parallel_workspace_bytes(stage_of_model(), data_.problem, {}, 0, &bytes).message(),
            "ranks = 0 must be at least 1");
  EXPECT_EQ(
      parallel_workspace_bytes(stage_of_model(), data_.problem, {.own_lengths = true}, 2, &bytes)
          .message(),
      "own_lengths: a causal decode must have seqlen_q = 1, not 2");
}

TEST_F(ParallelErrors, AnotherShapeOnOneRank) {
  const Spoil fewer = [](int rank, Arguments* arguments) {
    if (rank == 1) arguments->problem.batch = 1;
  };
  for (const Ended& rank : run_ranks(stage_of_model(), data_, host_, {}, 3, fewer)) {
    EXPECT_EQ(rank.status.code(), StatusCode::kInvalidArgument) << rank.status.to_string();
    EXPECT_NE(rank.status.message().find(", rank 1 all_gather of"), std::string::npos)
        << rank.status.message();
  }
}

// ---- The transport

// Runs body(transport) of every rank on a thread.
std::vector<Status> on_ranks(std::vector<std::unique_ptr<Transport>>& transports,
                             const std::function<Status(Transport&)>& body) {
  std::vector<Status> ended(transports.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < transports.size(); ++i) {
    threads.emplace_back([&, i] { ended[i] = body(*transports[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  return ended;
}

std::vector<std::unique_ptr<Transport>> make_ranks(int ranks, milliseconds limit) {
  std::vector<std::unique_ptr<Transport>> transports;
  EXPECT_OK(make_thread_transports(ranks, limit, &transports));
  return transports;
}

TEST(ThreadTransport, EveryRankGetsWhatItShould) {
  for (const int ranks : kRanks) {
    auto transports = make_ranks(ranks, kPatient);
    const auto statuses = on_ranks(transports, [&](Transport& transport) -> Status {
      EXPECT_EQ(transport.ranks(), ranks);
      const int me = transport.rank();
      for (int turn = 0; turn < 50; ++turn) {  // buffers are free again after each call
        std::vector<float> send(size_t(2 * ranks)), receive(send.size()), sum(2, NAN);
        for (int i = 0; i < 2 * ranks; ++i) send[size_t(i)] = float(1000 * turn + 100 * me + i);
        MLA_RETURN_IF_ERROR(transport.all_gather(send.data(), receive.data(), 8, nullptr));
        for (int i = 0; i < 2 * ranks; ++i) {
          EXPECT_EQ(receive[size_t(i)], float(1000 * turn + 100 * (i / 2) + i % 2));
        }
        std::vector<float> in_place(send.size(), NAN);
        std::copy_n(send.begin(), 2, in_place.begin() + 2 * me);
        MLA_RETURN_IF_ERROR(
            transport.all_gather(&in_place[size_t(2 * me)], in_place.data(), 8, nullptr));
        EXPECT_EQ(in_place, receive);
        MLA_RETURN_IF_ERROR(transport.all_to_all(send.data(), receive.data(), 8, nullptr));
        for (int i = 0; i < 2 * ranks; ++i) {
          // A rank's own part is not touched, and is still what the last call left.
          const int place = i / 2 == me ? i % 2 : 2 * me + i % 2;
          EXPECT_EQ(receive[size_t(i)], float(1000 * turn + 100 * (i / 2) + place));
        }
        MLA_RETURN_IF_ERROR(transport.reduce_scatter(send.data(), sum.data(), 2, nullptr));
        for (int i = 0; i < 2; ++i) {
          EXPECT_EQ(sum[size_t(i)],
                    float(ranks * (1000 * turn + 2 * me + i) + 50 * ranks * (ranks - 1)));
        }
      }
      return {};
    });
    for (const Status& status : statuses) EXPECT_OK(status);
  }
  std::vector<std::unique_ptr<Transport>> none;
  EXPECT_EQ(make_thread_transports(0, kPatient, &none).message(), "ranks = 0 must be at least 1");
}

TEST(ThreadTransport, ARankThatDoesNotComeIsNamedInTime) {
  auto transports = make_ranks(4, milliseconds(100));
  const auto gather = [](Transport& transport) {
    char receive[16];
    return transport.all_gather("abc", receive, 4, nullptr);
  };
  const auto begin = std::chrono::steady_clock::now();
  const auto statuses = on_ranks(transports, [&](Transport& transport) -> Status {
    return transport.rank() % 2 == 1 ? Status() : gather(transport);
  });
  for (const size_t rank : {size_t{0}, size_t{2}}) {
    EXPECT_EQ(statuses[rank].code(), StatusCode::kRankFailed);
    EXPECT_NE(statuses[rank].message().find("did not come to all_gather of 4 bytes within 100 ms"),
              std::string::npos)
        << statuses[rank].message();
    EXPECT_NE(statuses[rank].message().find("rank 1, rank 3"), std::string::npos);
  }
  // A rank that comes later is told at once, and so is one that calls again.
  for (auto& transport : transports) {
    EXPECT_EQ(gather(*transport).code(), StatusCode::kRankFailed);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

TEST(ThreadTransport, ARankThatFailsIsToldAtOnce) {
  auto transports = make_ranks(3, milliseconds(20000));
  const auto begin = std::chrono::steady_clock::now();
  const auto gather = [](Transport& transport) {
    char receive[16];
    return transport.all_gather("abc", receive, 4, nullptr);
  };
  const auto statuses = on_ranks(transports, [&](Transport& transport) -> Status {
    if (transport.rank() != 1) return gather(transport);
    std::this_thread::sleep_for(milliseconds(20));  // the others wait by then
    transport.fail({StatusCode::kCudaError, "it burns"});
    return {};
  });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(15));
  transports[0]->fail({StatusCode::kCudaError, "a second failure"});
  for (const Status& status : {statuses[0], statuses[2], gather(*transports[1])}) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_EQ(status.message(), "rank 1 failed: CUDA error: it burns");
  }
}

TEST(ThreadTransport, CallsThatDifferAreNamed) {
  for (const bool another_kind : {false, true}) {
    auto transports = make_ranks(3, kPatient);
    const auto call = [&](Transport& transport) {
      float receive[24] = {};
      const float send[24] = {};
      if (transport.rank() < 2) return transport.all_gather(send, receive, 8, nullptr);
      return another_kind ? transport.reduce_scatter(send, receive, 2, nullptr)
                          : transport.all_gather(send, receive, 4, nullptr);
    };
    const std::string named = another_kind ? "reduce_scatter of 8 bytes" : "all_gather of 4 bytes";
    for (int turn = 0; turn < 2; ++turn) {  // after that the group cannot be used again
      for (const Status& status : on_ranks(transports, call)) {
        EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
        EXPECT_EQ(status.message(), "rank 0 calls all_gather of 8 bytes, rank 2 " + named);
      }
    }
  }
}

// ---- Shares

TEST(ContextShare, CountsWhatItHolds) {
  for (const int ranks : kRanks) {
    for (const int pages_per_turn : {1, 2, 5}) {
      for (int rank = 0; rank < ranks; ++rank) {
        const ContextShare share{rank, ranks, pages_per_turn};
        int64_t pages = 0, tokens = 0;
        for (int token = 0; token < 16 * 90; ++token) {
          const int page = token / 16;
          const bool mine = page / pages_per_turn % ranks == rank;
          ASSERT_EQ(share.owner(page) == rank, mine);
          ASSERT_EQ(share.tokens(token, 16), tokens);
          if (token % 16 == 0) {
            ASSERT_EQ(share.pages(page), pages);
            if (mine) {
              ASSERT_EQ(share.page_in(pages), page);
              ++pages;
            }
            // No rank has more pages than rank 0.
            ASSERT_LE(pages, share_columns(page + 1, ranks, pages_per_turn));
            if (rank == 0) {
              ASSERT_EQ(pages, share_columns(page + 1, ranks, pages_per_turn));
            }
          }
          if (mine) ++tokens;
        }
      }
    }
  }
  EXPECT_EQ(contiguous_pages(9, 4), 3);
  EXPECT_EQ(contiguous_pages(8, 4), 2);
  EXPECT_EQ(contiguous_pages(1, 4), 1);
}

// Counted from a sequence's first rank, places in the turn are 0, 1, ...
TEST(ContextShare, ASequenceMayBeginWithAnyRank) {
  for (const int ranks : kRanks) {
    for (const int first :
         {0, 1, ranks - 1, ranks, 3 * ranks + 2, -1, -2 * ranks - 1, INT32_MAX, INT32_MIN}) {
      const int begin = (first % ranks + ranks) % ranks;
      for (int rank = 0; rank < ranks; ++rank) {
        const ContextShare share = ContextShare{rank, ranks, 3}.begun_by(first);
        for (int page = 0; page < 100; ++page) {
          ASSERT_EQ(share.owner(page) == share.rank, (page / 3 + begin) % ranks == rank);
        }
        EXPECT_LE(share.pages(100), share_columns(100, ranks, 3));
      }
    }
  }
  const int32_t first_ranks[] = {5, 2};
  EXPECT_EQ((SequenceShares{{1, 4, 1}, first_ranks}.of(1).rank), 3);
  EXPECT_EQ((SequenceShares{{1, 4, 1}, nullptr}.of(1).rank), 1);
}

// Entries of a rank's table are checked as far as the rank has pages.
TEST(ContextShare, PagingOfAShareIsChecked) {
  DecodeCase spec = small_case();
  std::vector<int32_t> lengths = {7 * 16, 4 * 16 + 1, 0}, first_ranks = {0, 2, 1};
  spec.lengths = lengths;
  Problem problem = make_data_set(spec).problem;
  problem.max_pages_per_seq = 7;  // of whole sequences; a share of a third has 3 columns
  problem.num_pages = 5;
  ContextShare share{1, 3, 1};
  std::vector<int32_t> table(9, kGarbagePage);
  const auto message = [&](bool moved) {
    Machine& machine = model_machine();
    DeviceBuffer of_lengths, of_table, of_first;
    EXPECT_OK(of_lengths.assign(machine, lengths.data(), lengths.size() * 4));
    EXPECT_OK(of_table.assign(machine, table.data(), table.size() * 4));
    EXPECT_OK(of_first.assign(machine, first_ranks.data(), first_ranks.size() * 4));
    const Status status =
        check_paging(machine, problem, share, of_table.as<int32_t>(), of_lengths.as<int32_t>(),
                     nullptr, kContiguous, moved ? of_first.as<int32_t>() : nullptr);
    return status.message().substr(0, status.message().find(" must"));
  };
  const std::string garbage = std::to_string(kGarbagePage);
  // Rank 1 has pages 1 and 4 of either sequence; of the second only page 2, where that begins with rank 2.
  EXPECT_EQ(message(false), "block_table[0, 0] = " + garbage);
  table[0] = 4;
  EXPECT_EQ(message(false), "block_table[0, 1] = " + garbage);
  table[1] = 0;
  EXPECT_EQ(message(false), "block_table[1, 0] = " + garbage);
  table[3] = 5;
  EXPECT_EQ(message(true), "block_table[1, 0] = 5");
  table[3] = 3;
  EXPECT_EQ(message(false), "block_table[1, 1] = " + garbage);
  EXPECT_EQ(message(true), "");
  lengths[2] = 7 * 16 + 1;  // more than a whole sequence may have
  EXPECT_EQ(message(true), "seqlens_k[2] = 113");
  lengths[2] = 0;
  for (const ContextShare& wrong : {ContextShare{-1, 3, 1}, ContextShare{3, 3, 1},
                                    ContextShare{0, 0, 1}, ContextShare{0, 1, 0}}) {
    share = wrong;
    EXPECT_EQ(message(false), "share: rank = " + std::to_string(wrong.rank));
  }
}

TEST(HeadShare, EveryHeadIsSomebodysOnce) {
  for (const int num_heads_kv : {1, 2, 4, 8, 24}) {
    for (const int ranks : {1, 2, 4, 8, 24}) {
      Problem problem;
      problem.num_heads_q = 48;
      problem.num_heads_kv = num_heads_kv;
      int next = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        HeadShare share;
        ASSERT_OK(share_heads(problem, rank, ranks, &share));
        EXPECT_EQ(share.first_q, next);
        next += share.num_q;
        EXPECT_EQ(share.num_q % share.num_kv, 0);
        for (int head = 0; head < share.num_q; ++head) {  // each reads the same KV head as before
          EXPECT_EQ(share.first_kv + head / (share.num_q / share.num_kv),
                    (share.first_q + head) / problem.group_size());
        }
      }
      EXPECT_EQ(next, 48);
    }
  }
  Problem problem;
  problem.num_heads_q = 6;
  problem.num_heads_kv = 3;
  HeadShare share;
  EXPECT_EQ(share_heads(problem, 2, 2, &share).message(), "rank = 2 must be in [0, ranks = 2)");
  EXPECT_EQ(share_heads(problem, -1, 2, &share).message(), "rank = -1 must be in [0, ranks = 2)");
  EXPECT_EQ(share_heads(problem, 0, 4, &share).message(),
            "num_heads_q = 6 must be a multiple of ranks = 4");
  EXPECT_EQ(share_heads(problem, 0, 2, &share).message(),
            "num_heads_kv = 3 must be a multiple of ranks = 2, or divide it");
}

}  // namespace
}  // namespace mla
