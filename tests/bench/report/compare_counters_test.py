"""bench/report/counters.py: it reads what ncu writes, tells decodes apart, and puts the model's figures beside ncu's. The
sample of ncu's table is composed from its documented format (`--csv --page raw`), not recorded."""
import contextlib
import io
import json
import re
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
    rows = counters.parse_launches(NCU)
    kernels = counters.sum_of_decodes(rows, ["scores", "softmax"], 2)
    return {"context": {"schema": counters.COUNTERS_SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200"},
            "runs": [{"stage": "01_naive", "shape": counters.SHAPES[0], "kernels": kernels}]}


class NcuTest(unittest.TestCase):
    def test_decodes(self):
        kernels = gpu()["runs"][0]["kernels"]
        self.assertEqual(sorted(kernels), ["scores", "softmax"])
        self.assertEqual(kernels["scores"], {"launches": 1, "registers": 32, "metrics": {LOADS: 1000, SECTORS: 2002}})
        with self.assertRaisesRegex(counters.Error, "scores was launched 2 times, in 3 decodes"):
            counters.sum_of_decodes(counters.parse_launches(NCU), ["scores"], 3)

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
            rows = counters.under_ncu(options, "01", "h1_q1_k1", metrics)
        self.assertEqual((len(rows), metrics, calls), (5, [LOADS], [LOADS + ",no.sum", LOADS]))
        self.assertEqual(said.getvalue(), "ncu has no no.sum\n")

    def test_what_ncu_says_when_it_fails(self):
        def run(command, **_):
            return SimpleNamespace(returncode=9, stdout="==ERROR== ERR_NVGPUCTRPERM", stderr="")
        with mock.patch.object(counters, "run", run), self.assertRaisesRegex(counters.Error, "ERR_NVGPUCTRPERM"):
            counters.under_ncu(SimpleNamespace(ncu="ncu", program="mla_run"), "01", "h1_q1_k1", [LOADS])


def hardware_kernel(ns, **metrics):
    return {"launches": 1, "metrics": {counters.TIME: ns, **metrics}}


class HardwareTest(unittest.TestCase):
    """How busy each part of the device is, is measured for every stage."""

    def record(self, run, root):
        options = ["--hardware", "--root", root, "--program", "mla_run", "--out", str(Path(root, "out.json"))]
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(counters, "run", run), mock.patch.object(counters.shutil, "which", return_value="/bin/ncu"), \
             contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = counters.main(options)
        path = Path(root, "out.json")
        return code, json.loads(path.read_text()) if path.exists() else None, err.getvalue()

    def fake(self, of_stage):
        def run(command, **_):
            if "--csv" not in command or "--log-file" not in command:
                said = "mla_run, commit abc1234-dirty" if command == ["mla_run", "--version"] else "known"
                return SimpleNamespace(returncode=0, stdout=said + "\n", stderr="")
            stage, shape = command[command.index("--stage") + 1], command[command.index("--shape") + 1]
            code, said, rows = of_stage(stage, shape)
            header = ["ID", "Kernel Name", counters.TIME, "dram__bytes.sum.per_second", counters.CONFLICTS[0]]
            lines = [",".join(f'"{cell}"' for cell in row) for row in [header, [""] * 5, *rows]]
            Path(command[command.index("--log-file") + 1]).write_text("\n".join(lines) if rows else "")
            return SimpleNamespace(returncode=code, stdout="", stderr=said)
        return run

    def tree(self, *stages):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        for stage in stages:
            place = Path(folder.name, "stages", stage)
            place.mkdir(parents=True)
            (place / "kernel.cuh").write_text("")
        return folder.name

    def test_every_stage_is_recorded_or_says_why_not(self):
        root = self.tree("08_seesaw", "12_fp8", "99_broken", "template")
        def of_stage(stage, shape):
            if stage == "99_broken":
                return 2, "==PROF== Connected\nmla_run: unavailable: no such device\n", []
            if stage == "12_fp8" and not shape.endswith(counters.QUANTISED):
                return 2, "mla_run: unsupported: 12_fp8 cannot read a cache of cache_format = 16bit\n", []
            rows = [[i, "void mla::gpu::seesaw::decode<0>(int)", ns, rate, 5] for i, (ns, rate) in
                    enumerate([(1000, 3e12)] * 5 + [(3000, 1e12)])]
            return 0, "", rows + [[9, "mla::gpu::fill_q(int)", 7, 7, 7]]
        code, data, said = self.record(self.fake(of_stage), root)
        self.assertEqual(code, 0)
        self.assertEqual([(run["stage"], run["shape"], run.get("why_not")) for run in data["runs"]],
                         [("08_seesaw", counters.HARDWARE_SHAPE, None),
                          ("12_fp8", counters.HARDWARE_SHAPE + counters.QUANTISED, None),
                          ("99_broken", counters.HARDWARE_SHAPE, "unavailable: no such device")])
        self.assertIn("no such device", said)
        self.assertEqual(data["context"]["commit"], "abc1234-dirty")
        kernels = data["runs"][0]["kernels"]
        self.assertEqual(list(kernels), ["decode"])
        metrics = kernels["decode"]["metrics"]
        self.assertAlmostEqual(metrics[counters.TIME], 8000 / 6)
        self.assertAlmostEqual(metrics["dram__bytes.sum.per_second"], (5 * 3e15 + 3e15) / 8000)  # all bytes over all time
        self.assertEqual(metrics[counters.CONFLICTS[0]], 5)

    def test_nothing_measured_is_an_error(self):
        code, data, said = self.record(self.fake(lambda *_: (2, "mla_run: unavailable: no GPU\n", [])), self.tree("08_seesaw"))
        self.assertEqual((code, data), (1, None))
        self.assertIn("no stage was measured", said)

    def test_a_missing_ncu_is_named(self):
        for found, wanted in [([], None), (["/opt/nvidia/nsight-compute/2025.3.1/ncu", "/opt/nvidia/nsight-compute/2025.10.0/ncu"],
                                           "/opt/nvidia/nsight-compute/2025.10.0/ncu")]:
            with mock.patch.object(counters.shutil, "which", return_value=None), \
                 mock.patch.object(counters.glob, "glob", return_value=found):
                if wanted:
                    self.assertEqual(counters.find_ncu("ncu"), wanted)
                else:
                    with self.assertRaisesRegex(counters.Error, "ncu, of NVIDIA Nsight Compute, is not there: looked in"):
                        counters.find_ncu("ncu")

    def test_the_kernels_of_all_stages_are_meant(self):
        """Nobody would notice the absence of a kernel that the list does not name."""
        files = [*ROOT.glob("stages/[0-9][0-9]_*/kernel.cuh"), *ROOT.glob("stages/common/split/*.cu")]
        kernels = {name for path in files for name in
                   re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^\n]*\)\s+)?(\w+)\(", path.read_text())}
        self.assertGreater(len(files), 12)
        self.assertEqual(kernels, set(counters.KERNELS))

    def test_tables(self):
        kernels = {"combine": hardware_kernel(5.0), "softmax": hardware_kernel(1000.0),
                   "scores": hardware_kernel(4000.0, **{"lts__t_bytes.sum.per_second": 2.5e12, "lts__throughput.avg.pct_of_peak_sustained_elapsed": 41.6,
                                                        counters.CONFLICTS[0]: 1.0, counters.CONFLICTS[1]: 8.0,
                                                        counters.INSTRUCTIONS: 2e6, counters.pipe("fma"): 5e5})}
        hardware = {"runs": [{"stage": "02_s", "shape": "x", "kernels": kernels},
                             {"stage": "09_s", "shape": "y", "kernels": {}, "why_not": "no such device"}]}
        header, rows = counters.hardware_table(hardware, lambda stage, shape: f"limit of {stage} {shape}")
        cells = [dict(zip(header, row)) for row in rows]
        self.assertEqual([(row["stage"], row["kernel"], row["own limit"]) for row in cells],
                         [("02_s", "scores", "limit of 02_s x"), ("", "softmax", ""), ("09_s", "no such device", "limit of 09_s y")])
        self.assertEqual((cells[0]["µs under ncu"], cells[0]["L2"], cells[0]["DRAM"], cells[0]["bank conflicts"]),
                         ("4.0", "2500 GB/s, 42%", "—", "12.5%"))
        header, rows = counters.instructions_table(hardware)
        self.assertEqual([dict(zip(header, row)) for row in rows],
                         [{**dict.fromkeys(header, "—"), "stage": "02_s", "kernel": "scores", "million": "2", "fma": "25.0%"}])


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
