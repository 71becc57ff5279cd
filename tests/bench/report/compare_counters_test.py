"""bench/report/counters.py: what ncu writes is read, decodes are told apart, and the model's figures stand beside ncu's. The
sample of ncu's table is composed from its documented format (`--csv --page raw`), not recorded."""
import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import counters  # noqa: E402

LOADS = "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum"
SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"
NCU = f'''==PROF== Connected to process 1234 (/build/bench/mla_run)
==PROF== Profiling "scores" - 0: 0%....50%....100% - 2 passes
==PROF== Disconnected from process 1234
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","{LOADS}","{SECTORS}","launch__registers_per_thread"
"","","","","","","","","","","","","sector","register/thread"
"0","1234","mla_run","127.0.0.1","void mla::gpu::naive::scores<__nv_bfloat16, (mla::gpu::naive::Mapping)0>(mla::Problem, mla::Tensors, int)","1","7","(256, 1, 1)","(640, 1, 1)","0","9.0","1,000","2000","32"
"1","1234","mla_run","127.0.0.1","mla::gpu::naive::softmax(mla::Problem, mla::Tensors)","1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","10","40","24"
"2","1234","mla_run","127.0.0.1","fill(unsigned int *)","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0","7","7","8"
"3","1234","mla_run","127.0.0.1","void mla::gpu::naive::scores<__nv_bfloat16, (mla::gpu::naive::Mapping)0>(mla::Problem, mla::Tensors, int)","1","7","(256, 1, 1)","(640, 1, 1)","0","9.0","1,000","2004","32"
"4","1234","mla_run","127.0.0.1","mla::gpu::naive::softmax(mla::Problem, mla::Tensors)","1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","10","40","24"
'''


def model(sectors=2000):
    kernel = {"name": "scores", "flop": 0, "global": {"loads": {"requests": 1000, "sectors": sectors}}}
    return {"context": {"schema": counters.COUNTERS_SCHEMA, "machine": "model", "commit": "abc", "date": "2026-11-29"},
            "runs": [{"stage": "01_naive", "shape": counters.SHAPES[0], "kernels": [kernel]}]}


def gpu():
    rows = counters.parse_ncu(NCU)
    kernels = counters.sum_of_decodes(rows, ["scores", "softmax"], 2)
    return {"context": {"schema": counters.COUNTERS_SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200"},
            "runs": [{"stage": "01_naive", "shape": counters.SHAPES[0], "kernels": kernels}]}


class NcuTest(unittest.TestCase):
    def test_rows(self):
        rows = counters.parse_ncu(NCU)
        self.assertEqual([name for name, _ in rows], ["scores", "softmax", "fill", "scores", "softmax"])
        self.assertEqual(rows[0][1][LOADS], 1000)
        self.assertEqual(rows[0][1]["launch__registers_per_thread"], 32)

    def test_no_table(self):
        with self.assertRaisesRegex(counters.Error, "ncu wrote no table:\n==ERROR== permissions"):
            counters.parse_ncu("==ERROR== permissions\n")

    def test_decodes(self):
        kernels = gpu()["runs"][0]["kernels"]
        self.assertEqual(sorted(kernels), ["scores", "softmax"])
        self.assertEqual(kernels["scores"], {"launches": 1, "registers": 32, "metrics": {LOADS: 1000, SECTORS: 2002}})
        with self.assertRaisesRegex(counters.Error, "scores was launched 2 times, in 3 decodes"):
            counters.sum_of_decodes(counters.parse_ncu(NCU), ["scores"], 3)

    def test_kernel_names(self):
        for function, name in [("void a::b<int, (a::M)0>(a::P, int)", "b"), ("decode(int)", "decode"),
                               ("void mla::gpu::(anonymous namespace)::make_plan(int)", "make_plan"), ("plain", "plain")]:
            self.assertEqual(counters.kernel_name(function), name)

    def test_a_metric_that_is_not_known_is_left_out(self):
        calls = []
        def run(command, **_):
            metrics = command[command.index("--metrics") + 1]
            calls.append(metrics)
            if "no.sum" in metrics:
                return SimpleNamespace(returncode=1, stdout="", stderr="==ERROR== Failed to find metric no.sum\n")
            Path(command[command.index("--log-file") + 1]).write_text(NCU)
            return SimpleNamespace(returncode=0, stdout="", stderr="")
        metrics = [LOADS, "no.sum"]
        options = SimpleNamespace(ncu="ncu", program="mla_run")
        with mock.patch.object(counters, "run", run), contextlib.redirect_stderr(io.StringIO()) as said:
            rows = counters.ncu(options, "01", "h1_q1_k1", metrics)
        self.assertEqual((len(rows), metrics, calls), (5, [LOADS], [LOADS + ",no.sum", LOADS]))
        self.assertEqual(said.getvalue(), "ncu has no no.sum\n")

    def test_what_ncu_says_when_it_fails(self):
        def run(command, **_):
            return SimpleNamespace(returncode=9, stdout="==ERROR== ERR_NVGPUCTRPERM", stderr="")
        with mock.patch.object(counters, "run", run), self.assertRaisesRegex(counters.Error, "ERR_NVGPUCTRPERM"):
            counters.ncu(SimpleNamespace(ncu="ncu", program="mla_run"), "01", "h1_q1_k1", [LOADS])


class CompareTest(unittest.TestCase):
    def test_pairs(self):
        rows = counters.compare(model(), gpu())
        self.assertEqual([row[3:6] for row in rows],
                         [("global load requests", 1000, 1000), ("global load sectors", 2000, 2002)])

    def test_differences(self):
        for of_model, of_gpu, text, close in [(100, 100, "0%", True), (102, 100, "+2.0%", True), (97, 100, "-3.0%", False),
                                              (1, 0, "—", False)]:
            self.assertEqual(counters.difference(of_model, of_gpu), text)
            self.assertEqual(counters.within(of_model, of_gpu), close)

    def test_a_chapters_table(self):
        header, rows = counters.stage_table(model(), "01_naive")
        self.assertEqual(rows, [["scores", "1000", "2", "—", "—", "—", "—", "—"]])
        self.assertEqual(len(header), len(rows[0]))

    def test_the_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "bench", "results")
            results.mkdir(parents=True)
            def main(*arguments):
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = counters.main([*arguments, "--root", folder])
                return code, out.getvalue(), err.getvalue()
            self.assertEqual(main("--compare"), (2, "", "counters.py: nothing to compare: --model and --gpu record it\n"))
            (results / "counters_model.json").write_text(json.dumps(model()))
            (results / "counters_gpu.json").write_text(json.dumps(gpu()))
            code, out, _ = main("--compare")
            self.assertEqual(code, 0)
            self.assertIn("-0.1%", out)
            (results / "counters_gpu.json").write_text("{}")
            self.assertIn("the schema is None, not flashmla_stages/counters/1", main("--compare")[2])
            self.assertIn("no_such_program: No such file", main("--model", "--program", "no_such_program")[2])


if __name__ == "__main__":
    unittest.main()
