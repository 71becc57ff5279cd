// How much memory a decode takes, compared with what is free.
#include "bench/measure/memory.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "bench/measure/shapes.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

double bytes_of(const auto&... vectors) {
  return (0.0 + ... + static_cast<double>(vectors.size() * sizeof(vectors[0])));
}

TEST(Memory, AFootprintIsWhatIsAllocated) {
  for (const char* name :
       {"h3_q2_b2_k100", "h4x2_q1_k0+64+65", "h1_q1_b4_kskew1000", "h16_q3_b1_k1_causal",
        "h4x2_q1_b2_k100_int8_tile128", "h4_q1_b2_k100_fp8_tensor"}) {
    SCOPED_TRACE(name);
    Shape shape;
    ASSERT_OK(parse_shape(name, &shape));
    const DataSet data = make_data_set(shape.spec);
    const HostTensors tensors = generate(data);
    const double tables =
        bytes_of(data.block_table, data.seqlens_k, data.page_sequence, data.page_position);
    for (const Footprint& one : {footprint(shape.spec), footprint(data.problem)}) {
      EXPECT_EQ(one.inputs, bytes_of(tensors.q, tensors.kv_cache, tensors.quantised_cache));
      EXPECT_EQ(one.outputs, bytes_of(tensors.out, tensors.lse));
      EXPECT_EQ(one.expected, 8.0 * static_cast<double>(tensors.out.size() + tensors.lse.size()));
      EXPECT_GE(one.tables, tables);
      EXPECT_LE(one.tables, 1.5 * tables + 100);
    }
  }
}

TEST(Memory, SaysBytesNeededAndBytesThere) {
  EXPECT_OK(check_memory("a", 5, 5, "host memory"));
  const Status status = check_memory("shape a", 2.5e12, 1234, "GPU memory");
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(status.message(), "shape a needs 2.50 TB of GPU memory; 1.23 kB are there");
}

TEST(Memory, RefusesWhatNoMachineHolds) {
  Shape shape;
  ASSERT_OK(parse_shape("h1_q1_b1048576_k1073741824", &shape));  // more bytes than 2^60
  const Status status = check_fits("shape", footprint(shape.spec), &model_machine(), 1);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_NE(status.message().find("needs 2.59 EB of host memory; "), std::string::npos)
      << status.message();
  ASSERT_OK(parse_shape("h1_q1_b1_k64", &shape));
  EXPECT_OK(check_fits("shape", footprint(shape.spec), &model_machine(), 1));
  EXPECT_OK(check_fits("shape", footprint(shape.spec), nullptr, 1));
}

TEST(Memory, IsWhatMachineAndProcessLeave) {
  const double there = host_memory_there();
  EXPECT_GT(there, 0);
  EXPECT_LE(there, double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // their shadows are larger
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  const rlimit small{rlim_t{64} << 20, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &small), 0);
  const double left = host_memory_there();
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_LT(left, 64 << 20);
#endif
}

}  // namespace
}  // namespace mla::bench
