"""bench/report/peers.py with the mla_bench that MLA_BENCH names: shapes, the protocol on a false clock, and what is
written. Where PyTorch is installed, its peers (Triton's under its interpreter) run on inputs that mla_bench saved, and the
check that every peer must pass is tested."""
import contextlib
import io
import json
import os
import sys
import tempfile
import types
import unittest
import warnings
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when peers.py defines its kernels
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import peers  # noqa: E402
import report  # noqa: E402

bench = peers.Bench(os.environ.get("MLA_BENCH", ROOT / "build" / "bench" / "mla_bench"), "model")
bench.shapes()  # for the protocol and the tolerances
torch = peers.torch
needs_torch = unittest.skipIf(torch is None, "PyTorch is not installed")


def shape_of(name):
    return bench.shapes(name)[0]


def data_of(name):
    return bench.data(shape_of(name), "cpu")


class ShapeTest(unittest.TestCase):
    def test_fields(self):
        shape = shape_of("h128x2_q3_b5_k4097_causal_peak4_fp16")
        self.assertEqual((shape.h_q, shape.h_kv, shape.s_q, shape.b), (128, 2, 3, 5))
        self.assertEqual((shape.causal, shape.dtype, shape.group, shape.rows), (True, "fp16", 64, 192))
        self.assertEqual((shape.lengths, shape.tokens, shape.longest), ([4097] * 5, 5 * 4097, 4097))
        self.assertEqual((shape.pages, shape.padded), ([65] * 5, 4160))
        self.assertAlmostEqual(shape.scale, 4 / 0.24, places=5)
        self.assertEqual(shape_of("h128_q1_b64_k4096").flop, 2 * 64 * 128 * 4096 * 1088)
        self.assertEqual(shape_of("h1_q1_k0+1+65").lengths, [0, 1, 65])

    def test_refusals(self):
        for name, why in [("h7_q1_b1", "is not of the form"), ("h128_q1_b1_k4096_split64", "batch-invariant"),
                          ("h1_q1_b2_k1_fp8_tensor", "has a cache of fp8_tensor, which peers are not given"),
                          ("h1_q1_b2_k1+2+3", "lists 3 lengths for 2 sequences")]:
            with self.assertRaisesRegex(peers.Refusal, why):
                bench.shapes(name)
        with self.assertRaisesRegex(peers.Refusal, "needs a built mla_bench"):
            peers.Bench("/nowhere/mla_bench").shapes()

    def test_selection(self):
        shapes = bench.shapes("h1_q1_b1_k1,h2_q1_b1_k1_fp16,h1_q1_b1_k1", dtype="fp16")
        self.assertEqual([shape.name for shape in shapes], ["h1_q1_b1_k1_fp16", "h2_q1_b1_k1_fp16"])
        self.assertIn("h128_q1_b64_k4096", [shape.name for shape in bench.shapes()])
        self.assertEqual([peer.key for peer in peers.select_peers("eager,Triton")], ["triton", "eager"])
        self.assertEqual(len(peers.select_peers(None)), len(peers.PEERS))
        with self.assertRaisesRegex(peers.Refusal, "'fa9' is not one of flashmla, "):
            peers.select_peers("fa9")


class FakePeer(peers.Peer):
    """An operation that gives `outputs` in turn, the last one for ever, and takes `us`."""

    def __init__(self, name, us=100.0, outputs=("right",), raises=None, reads_past_end=False, seconds=0.0, note=""):
        super().__init__()
        self.says = note
        self.name, self.us, self.outputs, self.raises = name, us, list(outputs), raises
        self.reads_past_end, self.seconds = reads_past_end, seconds

    def predicted_seconds(self, shape):
        return self.seconds

    def prepare(self, inputs):
        self.note = self.says
        if self.raises == "prepare":
            raise ValueError("no such kernel")

        def operation():
            output = self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0]
            return "wrong" if output == "spreads NaN" and inputs.unused != 0 else output

        operation.peer = self
        return operation


class FakeInputs:
    def __init__(self, shape):
        self.shape, self.unused = shape, None

    def fill_unused(self, value):
        self.unused = value


class FakeTruth:
    def compare(self, output):
        ok = output != "wrong"
        return peers.Verdict(ok, 1.5e-3 if ok else float("nan"), None if ok else "wrong: out[0] is nan")


class FakeBench:
    """The real protocol, with inputs that hold nothing."""
    protocol, run_counts, describe_protocol = bench.protocol, bench.run_counts, bench.describe_protocol

    @staticmethod
    def data(shape):
        return FakeInputs(shape), FakeTruth()


class FakeRunner:
    """Each run takes the time that its peer says; `log` lists what ran."""

    def __init__(self):
        self.log, self.lost = [], False

    def prepare(self, operation):
        return types.SimpleNamespace(operation=operation, note="", peer=operation.peer)

    def run_poisoned(self, handle):
        return handle.operation()

    def run(self, what, handle, runs):
        if handle.peer.raises == what and runs > 1:
            raise RuntimeError("CUDA error: misaligned\naddress")
        if handle.peer.raises == "lost" and what == "sustained":
            self.lost = True
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.log.append((what, handle.peer.name, runs))
        return [handle.peer.us + i for i in range(runs)]

    def run_cold(self, handle, runs):
        return self.run("cold", handle, runs)

    def run_sustained(self, handle, expected_us, warmup_s, runs):
        assert (expected_us, warmup_s) == (handle.peer.us, 1.2)
        return self.run("sustained", handle, runs)

    def survives(self):
        return not self.lost


class ProtocolTest(unittest.TestCase):
    shape = shape_of("h16_q1_b2_k64")

    def measure(self, *fakes):
        self.runner = FakeRunner()
        results = peers.Measurement(FakeBench, FakeInputs(self.shape), fakes, self.runner, FakeTruth()).run()
        return {result.peer.name: result for result in results}

    def test_rounds_are_interleaved(self):
        results = self.measure(FakePeer("a"), FakePeer("b", us=2e3), FakePeer("c", us=30e3))
        check = [("cold", name, 1) for name in "abc"]
        warm = [("cold", "a", 10), ("cold", "b", 2), ("cold", "c", 0)]
        cold = [("cold", "a", 25), ("cold", "b", 9), ("cold", "c", 1)] * 4
        sustained = [("sustained", "a", 100), ("sustained", "b", 36), ("sustained", "c", 4)]
        self.assertEqual(self.runner.log, check + warm + cold + sustained)
        self.assertEqual(results["a"].times(), [112.0, 149.5])
        self.assertEqual(results["b"].entry(), {"cold": [2000.5, 2007.5, 36], "sustained": [2003.5, 2031.5, 36],
                                                "checked": 0.0015, "note": ""})

    def test_tenths_are_the_quantiles_of_statistics_cpp(self):
        self.assertEqual([round(value, 9) for value in peers.tenths([4, 1, 2, 3])], [1.3, 2.5, 3.7])
        self.assertEqual(peers.tenths([7]), (7, 7, 7))

    def test_run_counts(self):
        self.assertEqual([bench.run_counts(us)["runs"] for us in (999, 1000, 1e9)], [25, 9, 1])
        self.assertIn("under 1 ms: 10 warm-ups, 4 x 25; under 20 ms: 2 warm-ups, 4 x 9; else: 0 warm-ups, 4 x 1",
                      bench.describe_protocol())

    def test_what_is_wrong_gets_no_time_but_the_reason(self):
        results = self.measure(FakePeer("wrong", outputs=["wrong"]), FakePeer("late", outputs=["right", "wrong"]),
                               FakePeer("right"))
        for name, why in [("wrong", "wrong: out[0] is nan"), ("late", "after timing: wrong: out[0] is nan")]:
            self.assertEqual(results[name].times(), [None, None])
            self.assertIn(why, results[name].entry()["note"])
        self.assertNotIn("wrong", [name for _, name, _ in self.runner.log])
        self.assertEqual(results["right"].times(), [112.0, 149.5])

    def test_nan_past_the_end(self):
        results = self.measure(FakePeer("masks after", outputs=["spreads NaN"]), FakePeer("masks before"),
                               FakePeer("pads", outputs=["spreads NaN"], reads_past_end=True))
        self.assertEqual(results["masks after"].entry()["note"], "wrong with NaN past a sequence's end: zeros there")
        self.assertEqual(results["masks before"].entry()["note"], "")
        self.assertEqual(results["pads"].entry()["note"], "zeros past a sequence's end, not NaN")
        self.assertTrue(all(result.cold for result in results.values()))

    def test_slow_peers(self):
        results = self.measure(FakePeer("once", us=300e3), FakePeer("slow", us=3e6), FakePeer("no", seconds=5.0))
        self.assertEqual(results["once"].times(), [300e3, None])
        self.assertIn("over 200 ms", results["once"].entry()["note"])
        self.assertIn("left out: a run takes 3.0 s", results["slow"].entry()["note"])
        self.assertIn("left out: a run is predicted to take up to 5.0 s", results["no"].entry()["note"])
        self.assertNotIn("no", [name for _, name, _ in self.runner.log])

    def test_an_exception_loses_no_other_figures(self):
        results = self.measure(FakePeer("a", raises="prepare"), FakePeer("b", raises="sustained"), FakePeer("c"))
        self.assertEqual(results["a"].reason, "ValueError: no such kernel")
        self.assertEqual(results["b"].reason, "RuntimeError: CUDA error: misaligned address")
        self.assertEqual(results["b"].times(), [None, None])
        self.assertEqual(results["c"].times(), [112.0, 149.5])

    def test_a_lost_device_ends_the_run_and_what_is_there_is_written(self):
        fakes = [FakePeer("a"), FakePeer("b", raises="lost"), FakePeer("c")]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
            path = Path(folder) / "out.json"
            file = peers.new_report(FakeBench, {"gpu": "NVIDIA H200"}, [])
            shapes = [self.shape, shape_of("h16_q1_b3_k64")]
            survived = peers.measure_shapes(FakeBench, shapes, fakes, FakeRunner(), file, path)
            written = json.loads(path.read_text())
        self.assertFalse(survived)
        self.assertEqual(written["shapes"], {self.shape.name: {"a": [112.0, 149.5], "c": [112.0, None]}})
        self.assertIn("the device is lost with it", written["spread"][self.shape.name]["b"]["note"])
        self.assertIn("lost in the run of b", written["spread"][self.shape.name]["c"]["note"])
        self.assertIn(f"The run ended at {self.shape.name}", written["context"]["notes"])
        self.assertIn("112.0 (", shown.getvalue())

    def test_no_data(self):
        class NoData(FakeBench):
            @staticmethod
            def data(shape):
                raise MemoryError("no memory")

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = peers.new_report(FakeBench, {"gpu": "NVIDIA H200"}, [])
            self.assertTrue(peers.measure_shapes(NoData, [self.shape], [FakePeer("a")], FakeRunner(), file,
                                                 Path(folder) / "out.json"))
        self.assertEqual(file["shapes"], {})
        self.assertEqual(file["spread"][self.shape.name]["a"]["note"], "no data: MemoryError: no memory")


class OutputTest(unittest.TestCase):
    def test_schema(self):
        absent = FakePeer("absent")
        absent.available = lambda: "package x is not installed"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
            root = Path(folder)
            (root / "bench" / "results").mkdir(parents=True)
            path = root / "bench" / "results" / "peers_new.json"
            machine = {"gpu": "NVIDIA H200", "ceiling_read_gbps": "4562", "ceiling_launch_us": "3.0"}
            file = peers.new_report(FakeBench, machine, [absent])
            shapes = bench.shapes("h16_q1_b2_k64,h16_q1_b2_k128")
            fakes = [FakePeer("a", note="64 tokens a split"), FakePeer("b")]
            peers.measure_shapes(FakeBench, shapes, fakes, FakeRunner(), file, path)
            text = path.read_text()
            written, = report.load_peers(root, types.SimpleNamespace(context={"gpu": "NVIDIA H200"})).files
            self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(written, json.loads(text))
        recorded = json.loads((ROOT / "bench" / "results" / "peers_h200_2026-11-28.json").read_text())
        self.assertLessEqual(set(recorded["context"]), set(written["context"]))
        self.assertEqual(written["context"]["schema"], recorded["context"]["schema"])
        self.assertLessEqual({"torch", "triton", "commit"}, set(written["context"]))
        self.assertEqual(written["context"]["ceilings"], "in this run: read 4562 GB/s; empty kernel 3.0 us")
        self.assertRegex(written["context"]["date"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(written["shapes"]["h16_q1_b2_k64"], {"a": [112.0, 149.5], "b": [112.0, 149.5]})
        self.assertEqual(written["spread"]["h16_q1_b2_k128"]["b"],
                         {"cold": [102.0, 122.0, 100], "sustained": [109.9, 189.1, 100], "checked": 0.0015, "note": ""})
        self.assertEqual([written["spread"][shape.name]["a"]["note"] for shape in shapes], ["64 tokens a split"] * 2)
        self.assertEqual(shown.getvalue().count("1.5e-03  64 tokens a split\n"), 2)
        self.assertEqual(written["absent"], {"absent": "package x is not installed"})
        self.assertIn('"a": [112.0, 149.5]', text)

    def test_peers_that_are_not_there(self):
        for peer in peers.select_peers("flashmla,flashinfer,fa3"):
            with mock.patch.object(peers, "torch", object()), mock.patch.object(peers.importlib.util, "find_spec",
                                                                                return_value=None):
                self.assertEqual(peer.available(), f"package {peer.package} is not installed")
            with mock.patch.object(peers, "torch", None):
                self.assertEqual(peer.available(), "PyTorch is not installed")
            broken = mock.Mock(side_effect=ImportError("libcudart.so.12"))
            with mock.patch.object(peers, "torch", mock.MagicMock(cuda=mock.Mock(OutOfMemoryError=MemoryError))), \
                    mock.patch.object(peers.importlib.util, "find_spec"), \
                    mock.patch.object(peers.importlib, "import_module", broken):
                self.assertEqual(peer.available(),
                                 f"package {peer.package} cannot be imported: ImportError: libcudart.so.12")


class CommandLineTest(unittest.TestCase):
    def run_main(self, *arguments):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                status = peers.main(list(arguments))
            except SystemExit as stop:  # argparse
                status = stop.code
        return status, out.getvalue(), error.getvalue()

    def test_list(self):
        status, out, _ = self.run_main("--list")
        self.assertEqual(status, 0)
        for peer in peers.PEERS:
            self.assertIn(f" {peer.name} ", out)
        for shape in bench.shapes():
            self.assertIn(f"  {shape.name}\n", out)

    def test_messages(self):
        no_gpu = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.json")
            for arguments, module, why in [
                    (["--shapes", "h1_"], None, "shape 'h1_' is not of the form"),
                    (["--peers", "x"], None, "'x' is not one of"), ([], None, "--out FILE is missing"),
                    (["--out", path + "/y.json"], None, "there is no folder"),
                    (["--suite", "main", "--shapes", "h1_q1_b1_k1"], None, "not allowed with"),
                    (["--out", path], None, "needs PyTorch"), (["--out", path], no_gpu, "needs an NVIDIA GPU")]:
                with mock.patch.object(peers, "torch", module):
                    status, _, error = self.run_main(*arguments)
                self.assertEqual(status, 2, arguments)
                self.assertIn(why, error)
            self.assertEqual(os.listdir(folder), [])


@needs_torch
class DataTest(unittest.TestCase):
    def test_the_cache_holds_each_sequence_by_its_table_and_nan_elsewhere(self):
        inputs, truth = data_of("h4x2_q1_k0+1+65+130")
        lengths = inputs.shape.lengths
        self.assertEqual((tuple(inputs.q.shape), inputs.q.dtype), ((4, 1, 4, 576), torch.bfloat16))
        self.assertEqual(inputs.lengths.tolist(), lengths)
        rows = [inputs.kv[inputs.table[i, :n].long()].flatten(0, 1) for i, n in enumerate(inputs.shape.pages)]
        for row, length in zip(rows, lengths):
            self.assertFalse(bool(row[:length].isnan().any()))
        self.assertEqual(int((~inputs.kv.isnan()).sum()), sum(lengths) * 2 * 576)
        self.assertEqual(len(set(inputs.page_ids.tolist())), 6)
        unused = [page for i, n in enumerate(inputs.shape.pages) for page in inputs.safe_table[i, n:].tolist()]
        self.assertFalse(set(unused) & set(inputs.page_ids.tolist()))
        self.assertLess(max(unused), len(inputs.kv))
        inputs.fill_unused(0.0)
        self.assertFalse(bool(inputs.kv.isnan().any()))
        self.assertEqual(truth.rows, [(i, 0) for i in range(4)])

    def test_fp16(self):
        inputs, _ = data_of("h1_q1_b1_k1_fp16")
        self.assertEqual(inputs.q.dtype, torch.float16)
        self.assertLess(float(inputs.q.abs().max()), 1)


CASES = [  # every kind of Triton's row tiles; rows that see nothing; both types
    "h16_q1_k0+1+65+130", "h16_q1_b3_k64_fp16", "h16x2_q2_k0+1+65+200_causal", "h8_q3_k2+129_causal_fp16",
    "h40_q1_b1_k100", "h128_q1_b1_k65_fp16", "h4_q1_k0+0", "h4_q1_b1_k65_peak1_fp16"]


def triton_or_skip(test):
    """Skips the test where Triton's interpreter does not work: some versions of NumPy break it."""
    warnings.simplefilter("ignore")  # log2(0) where a row sees nothing; NumPy about Triton's code
    if peers.triton is None:
        test.skipTest("Triton is not installed")
    try:
        peers.Triton().prepare(data_of("h1_q1_b1_k1")[0])()
    except Exception as error:
        if "0-dimensional arrays" in str(error):
            test.skipTest(f"Triton {peers.triton.__version__}'s interpreter does not work with this NumPy: {error}")
        raise
    return peers.Triton()


@needs_torch
class PeersTest(unittest.TestCase):
    def hold(self, peer):
        for name in CASES:
            inputs, truth = data_of(name)
            inputs.fill_unused(0.0 if peer.reads_past_end else float("nan"))
            operation = peer.prepare(inputs)
            for _ in range(2):  # an operation is run again and again
                out = operation()
                verdict = truth.compare(out)
                self.assertTrue(verdict.ok, f"{peer.name}, {name}: {verdict.why}")
                out.fill_(float("nan"))

    def test_eager(self):
        self.hold(peers.Eager())

    def test_sdpa(self):
        peer = peers.Sdpa()
        self.hold(peer)
        self.assertRegex(peer.note, "^backend [A-Z_]+")

    def test_in_chunks(self):
        for peer in (peers.Eager(), peers.Sdpa()):
            peer.chunk_bytes = 2 * peer.sequence_bytes(shape_of("h16x2_q2_k0+1+65+200_causal"))
            self.hold(peer)

    def test_triton(self):
        peer = triton_or_skip(self)
        self.hold(peer)
        inputs, truth = data_of("h20_q1_k300+64")
        out = inputs.new_out()
        for tile, step in sorted({config[:2] for config in peer.MANY + peer.SOME + peer.FEW}):
            for chunk in (64, 320):
                verdict = truth.compare(peer.launcher(inputs, tile, step, 4, 2, chunk, out.fill_(float("nan")))())
                self.assertTrue(verdict.ok, f"{tile}, {step}, {chunk}: {verdict.why}")

    def test_splits(self):
        peer = peers.Triton()
        for name in ["h128_q1_b1_k4096", "h16_q1_b128_k8192", "h128_q1_b128_kskew131072", "h16_q1_b1_k1",
                     "h128_q1_b128_klognormal8192"]:
            shape = shape_of(name)
            chunks = peer.chunks(shape, 64)
            self.assertTrue(chunks and all(chunk > 0 and chunk % 64 == 0 for chunk in chunks), (name, chunks))


@needs_torch
class AdaptorTest(unittest.TestCase):
    """The three packages by stand-ins with their documented interfaces: arguments arrive where they belong."""

    @staticmethod
    def attend(q, k, lengths, scale, causal):
        """q [b, s_q, h_q, 576], k: a list of [s_k, 576] -> [b, s_q, h_q, 512]"""
        out = torch.zeros(*q.shape[:3], 512, dtype=q.dtype)
        for b, s_q in ((b, i) for b in range(q.shape[0]) for i in range(q.shape[1])):
            seen = int(lengths[b]) - (q.shape[1] - 1 - s_q if causal else 0)
            if seen > 0:
                keys = k[b][:seen].double()
                weights = torch.softmax(scale * q[b, s_q].double() @ keys.T, -1)
                out[b, s_q] = (weights @ keys[:, :512]).to(q.dtype)
        return out

    @staticmethod
    def pages(cache, table, lengths):
        return [cache[table[b].long()].flatten(0, 1)[:int(n), 0] for b, n in enumerate(lengths)]

    def hold(self, peer, modules):
        with mock.patch.dict(sys.modules, modules):
            for name in ("h16_q1_k1+65+130", "h8_q2_k2+129_causal_fp16"):
                inputs, truth = data_of(name)
                verdict = truth.compare(peer.prepare(inputs)())
                self.assertTrue(verdict.ok, verdict.why)

    def test_flash_mla(self):
        def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):
            return (tuple(cache_seqlens.tolist()), num_heads_per_head_k), num_heads_k

        def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
                                   num_splits=None, softmax_scale=None, causal=False):
            self.assertEqual(tile_scheduler_metadata, (tuple(cache_seqlens.tolist()), q.shape[1] * q.shape[2]))
            self.assertEqual((head_dim_v, num_splits), (512, 1))
            keys = self.pages(k_cache, block_table, cache_seqlens)
            return self.attend(q, keys, cache_seqlens, softmax_scale, causal), None

        self.hold(peers.FlashMla(), {"flash_mla": types.SimpleNamespace(
            get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)})

    def test_flash_attention_3(self):
        def get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
                                   cache_seqlens, qkv_dtype, headdim_v=None, page_size=None, causal=False):
            self.assertGreaterEqual(max_seqlen_k, int(cache_seqlens.max()))
            return (batch_size, max_seqlen_q, num_heads_q, num_heads_kv, headdim, headdim_v, page_size)

        def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None,
                                    softmax_scale=None, causal=False, scheduler_metadata=None):
            self.assertEqual(scheduler_metadata, (*q.shape[:3], 1, 64, 512, 64))
            keys = self.pages(torch.cat([v_cache, k_cache], -1), page_table, cache_seqlens)
            return self.attend(torch.cat([qv, q], -1), keys, cache_seqlens, softmax_scale, causal)

        functions = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
        functions.get_scheduler_metadata = get_scheduler_metadata
        self.hold(peers.FlashAttention3(), {"flash_attn_interface": functions})

    def test_flash_infer(self):
        test = self

        class Wrapper:
            def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto"):
                self._backend = "fa3"

            def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe,
                     page_size, causal, sm_scale, q_data_type, kv_data_type):
                test.assertEqual((head_dim_ckv, head_dim_kpe, page_size), (512, 64, 64))
                test.assertEqual({qo_indptr.dtype, kv_indptr.dtype, kv_indices.dtype, kv_len_arr.dtype}, {torch.int32})
                self.q, self.kv, self.pages = qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.long()
                self.lengths, self.rest = kv_len_arr, (sm_scale, causal)

            def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None):
                cache = torch.cat([ckv_cache, kpe_cache], -1)
                keys = [cache[self.pages[a:b]].flatten(0, 1) for a, b in zip(self.kv, self.kv[1:])]
                q = torch.cat([q_nope, q_pe], -1).unflatten(0, (len(keys), -1))
                test.assertEqual(self.q, [i * q.shape[1] for i in range(len(keys) + 1)])
                out.copy_(test.attend(q, keys, self.lengths, *self.rest).flatten(0, 1))

        mla = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper)
        peer = peers.FlashInfer()
        self.hold(peer, {"flashinfer": types.SimpleNamespace(mla=mla), "flashinfer.mla": mla})
        self.assertEqual(peer.note, "backend fa3")
        self.assertEqual(peer.refuses(shape_of("h4x2_q1_b1_k1")), "one KV head only")


@needs_torch
class TruthTest(unittest.TestCase):
    def setUp(self):
        self.inputs, self.truth = data_of("h8_q1_k65+40+300")
        self.inputs.fill_unused(0.0)
        self.out = peers.Eager().prepare(self.inputs)()
        self.assertTrue(self.truth.compare(self.out).ok)

    def test_one_nan(self):
        self.out[1, 0, 7, 511] = float("nan")
        verdict = self.truth.compare(self.out)
        self.assertFalse(verdict.ok)
        self.assertIn("out[1, 0, 7, 511] is nan", verdict.why)
        self.assertFalse(self.truth.compare(self.inputs.new_out()).ok)

    def test_one_wrong_element(self):
        self.out[2, 0, 3, 100] += 0.01
        self.assertRegex(self.truth.compare(self.out).why, r"out\[2, 0, 3, 100\].*; 1 of 12288 elements mismatch")
        self.out[2, 0, 3, 100] = float("inf")
        self.assertFalse(self.truth.compare(self.out).ok)

    def test_a_dropped_token(self):
        for short in ("64+40+300", "65+40+299"):  # values depend on their place alone: only the last token is gone
            inputs, _ = data_of(f"h8_q1_k{short}")
            inputs.fill_unused(0.0)
            self.assertFalse(self.truth.compare(peers.Eager().prepare(inputs)()).ok, short)

    def test_errors_too_small_for_the_elements(self):
        verdict = self.truth.compare(self.out * 1.01)
        self.assertRegex(verdict.why, "cosine difference .* is not less than 5e-06")

    def test_another_form(self):
        self.assertIn("output of shape (3, 1, 8, 576)", self.truth.compare(self.inputs.q).why)

    def test_rows(self):
        _, truth = data_of(f"h1_q2_k{'+'.join(['1'] * 17 + ['3'] + ['1'] * 22)}_causal")
        self.assertEqual(len(set(truth.rows)), bench.protocol["checked_rows"])
        self.assertIn((17, 1), truth.rows)


if __name__ == "__main__":
    unittest.main()
