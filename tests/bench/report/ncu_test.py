"""bench/report/ncu.py: what ncu writes about launches is read. The table is composed from its documented format
(`--csv --page raw`), not recorded."""
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import ncu  # noqa: E402
from recordings import Error  # noqa: E402

TABLE = '''==PROF== Connected to process 1234 (/build/bench/mla_run)
==PROF== Profiling "scores" - 0: 0%....50%....100% - 2 passes
"ID","Kernel Name","Block Size","sectors.sum","launch__registers_per_thread","absent.sum"
"","","","sector","register/thread","byte"
"0","void a::scores<__nv_bfloat16, (a::Mapping)0>(a::Problem, int)","(256, 1, 1)","1,000","32","n/a"
"1","a::softmax(a::Problem)","(256, 1, 1)","10","24"
'''


class NcuTest(unittest.TestCase):
    def test_launches(self):
        self.assertEqual(ncu.parse_launches(TABLE),
                         [("scores", {"ID": 0, "sectors.sum": 1000, "launch__registers_per_thread": 32}),
                          ("softmax", {"ID": 1, "sectors.sum": 10, "launch__registers_per_thread": 24})])

    def test_no_launch(self):
        self.assertEqual(ncu.parse_launches("\n".join(TABLE.splitlines()[:4])), [])

    def test_no_table(self):
        for text in ["==ERROR== permissions\n", "first\n" * 10 + "==ERROR== permissions"]:
            with self.assertRaisesRegex(Error, "^ncu wrote no table:\n(first\n){0,9}==ERROR== permissions$"):
                ncu.parse_launches(text)

    def test_kernel_names(self):
        for function, name in [("void a::b<int, (a::M)0>(a::P, int)", "b"), ("decode(int)", "decode"),
                               ("void mla::gpu::(anonymous namespace)::make_plan(int)", "make_plan"), ("plain", "plain")]:
            self.assertEqual(ncu.kernel_name(function), name)


if __name__ == "__main__":
    unittest.main()
