"""bench/report/peers.py: shapes, the port of the data generator, the protocol on a false clock, what is written; and, where
PyTorch is installed, its peers (Triton's under its interpreter) and the check that every peer must pass."""
import contextlib
import io
import json
import os
import re
import struct
import sys
import tempfile
import types
import unittest
import warnings
import zlib
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when peers.py defines its kernels
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import peers  # noqa: E402
import report  # noqa: E402

torch = peers.torch
needs_torch = unittest.skipIf(torch is None, "PyTorch is not installed")


class ShapeTest(unittest.TestCase):
    def test_names(self):
        shape = peers.Shape("h128x2_q3_b5_k4096_causal_fp16")
        self.assertEqual((shape.h_q, shape.h_kv, shape.s_q, shape.b), (128, 2, 3, 5))
        self.assertEqual((shape.causal, shape.dtype, shape.group, shape.rows), (True, "fp16", 64, 192))
        self.assertEqual(shape.lengths, [4096] * 5)
        shape = peers.Shape("h16_q1_b64_k4097")
        self.assertEqual((shape.h_kv, shape.causal, shape.dtype, shape.padded), (1, False, "bf16", 4160))
        self.assertEqual(peers.Shape("h128_q1_b64_k4096").flop(), 2 * 64 * 128 * 4096 * 1088)

    def test_lengths_are_those_of_shapes_cpp(self):
        # From parse_shape and make_data_set: CRC-32 of the lengths as little-endian int32, and the first few.
        for name, crc, first in [
                ("h128_q1_b128_klognormal8192", 0xCF46DEF1, [5916, 25628, 4593, 8255, 15602, 7661]),
                ("h16_q1_b6_klognormal4096", 0xA85DA1E9, [2958, 12814, 2297, 4128, 7801, 3830]),
                ("h128_q1_b8192_klognormal2048", 0xE2AB75FB, [1479, 6407, 1148]),
                ("h16_q2_b16_kvaried256_causal", 0xFBFAEEB2, [516, 262, 267, 258, 424, 309, 0, 402]),
                ("h16_q1_b1000_kvaried300", 0xE3F55412, [604, 307, 313]),
                ("h128_q1_b5_kskew131072", 0x2E22E687, [512, 512, 512, 512, 131072])]:
            lengths = peers.Shape(name).lengths
            self.assertEqual(lengths[:len(first)], first, name)
            self.assertEqual(zlib.crc32(struct.pack(f"<{len(lengths)}i", *lengths)), crc, name)

    def test_stepped_lengths(self):
        self.assertEqual(peers.Shape("h128_q1_b128_kstepped32768").lengths, [256 * (i + 1) for i in range(128)])
        self.assertEqual(peers.Shape("h1_q1_b3_kstepped10").lengths, [3, 7, 10])
        self.assertEqual(peers.Shape("h1_q1_b8_kstepped2").lengths, [1, 1, 1, 1, 1, 2, 2, 2])

    def test_refusals(self):
        for name, why in [("h128_q1_b1", "is not of the form"), ("h128_q1_b1_k4096_fp16_causal", "is not of the form"),
                          ("h128_q1_b1_k4096_split64", "batch-invariant"), ("h3x2_q1_b1_k1", "do not divide"),
                          ("h0_q1_b1_k1", "zero or too large"), ("h1_q1_b1_k99999999999", "zero or too large"),
                          ("h١_q1_b1_k1", "is not of the form")]:
            with self.assertRaisesRegex(peers.Refusal, why):
                peers.Shape(name)

    def test_default_is_the_main_suite(self):
        main = re.search(r'\{"main",\s*"[^"]*",\s*\{(.*?)\}\}', (ROOT / "bench" / "measure" / "shapes.cpp").read_text(), re.DOTALL)[1]
        self.assertEqual(re.findall(r'"(.*?)"', main), peers.SUITES["main"])
        self.assertEqual([shape.name for shape in peers.select_shapes(None, "main", "bf16")], peers.SUITES["main"])

    def test_selection(self):
        shapes = peers.select_shapes("h1_q1_b1_k1,h2_q1_b1_k1_fp16,h1_q1_b1_k1", "main", "fp16")
        self.assertEqual([shape.name for shape in shapes], ["h1_q1_b1_k1_fp16", "h2_q1_b1_k1_fp16"])
        self.assertEqual([peer.key for peer in peers.select_peers("eager,Triton")], ["triton", "eager"])
        self.assertEqual(len(peers.select_peers(None)), len(peers.PEERS))
        with self.assertRaisesRegex(peers.Refusal, "'fa9' is none of flashmla, "):
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
    def __init__(self, inputs):
        pass

    def compare(self, output):
        ok = output != "wrong"
        return peers.Verdict(ok, 1.5e-3 if ok else float("nan"), None if ok else "wrong: out[0] is nan")


class FakeRunner:
    """Time passes as the peers say; `log` has what was run."""

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
    shape = peers.Shape("h16_q1_b2_k64")

    def measure(self, *fakes):
        self.runner = FakeRunner()
        results = peers.Measurement(FakeInputs(self.shape), fakes, self.runner, FakeTruth(None)).run()
        return {result.peer.name: result for result in results}

    def test_rounds_are_interleaved(self):
        results = self.measure(FakePeer("a"), FakePeer("b", us=2e3), FakePeer("c", us=30e3))
        check = [("cold", name, 1) for name in "abc"]
        warm = [("cold", "a", 10), ("cold", "b", 2), ("cold", "c", 0)]
        cold = [("cold", "a", 25), ("cold", "b", 9), ("cold", "c", 1)] * 4
        sustained = [("sustained", "a", 50), ("sustained", "b", 18), ("sustained", "c", 2)] * 2
        self.assertEqual(self.runner.log, check + warm + cold + sustained)
        self.assertEqual(results["a"].times(), [112.0, 124.5])
        self.assertEqual(results["b"].entry(), {"cold": [2000.5, 2007.5, 36], "sustained": [2001.5, 2015.5, 36],
                                                "checked": 0.0015, "note": ""})

    def test_quantiles_are_those_of_statistics_cpp(self):
        self.assertEqual([peers.quantile([4, 1, 2, 3], q) for q in (0, 0.1, 0.5, 0.9, 1)], [1, 1.3, 2.5, 3.7, 4])
        self.assertEqual(peers.quantile([7], 0.9), 7)

    def test_what_is_wrong_gets_no_time_but_the_reason(self):
        results = self.measure(FakePeer("wrong", outputs=["wrong"]), FakePeer("late", outputs=["right", "wrong"]),
                               FakePeer("right"))
        for name, why in [("wrong", "wrong: out[0] is nan"), ("late", "after timing: wrong: out[0] is nan")]:
            self.assertEqual(results[name].times(), [None, None])
            self.assertIn(why, results[name].entry()["note"])
        self.assertNotIn("wrong", [name for _, name, _ in self.runner.log])
        self.assertEqual(results["right"].times(), [112.0, 124.5])

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
        self.assertEqual(results["c"].times(), [112.0, 124.5])

    def test_a_lost_device_ends_the_run_and_what_is_there_is_written(self):
        fakes = [FakePeer("a"), FakePeer("b", raises="lost"), FakePeer("c")]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
            path = Path(folder) / "out.json"
            file = peers.new_report("NVIDIA H200", [], "none")
            shapes = [self.shape, peers.Shape("h16_q1_b3_k64")]
            survived = peers.measure_shapes(shapes, fakes, FakeRunner(), file, path, FakeInputs, FakeTruth)
            written = json.loads(path.read_text())
        self.assertFalse(survived)
        self.assertEqual(written["shapes"], {self.shape.name: {"a": [112.0, 124.5], "c": [112.0, None]}})
        self.assertIn("the device is lost with it", written["spread"][self.shape.name]["b"]["note"])
        self.assertIn("lost in the run of b", written["spread"][self.shape.name]["c"]["note"])
        self.assertIn(f"The run ended at {self.shape.name}", written["context"]["notes"])
        self.assertIn("112.0 (", shown.getvalue())

    def test_no_data(self):
        def no_inputs(shape):
            raise MemoryError("no memory")

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = peers.new_report("NVIDIA H200", [], "none")
            self.assertTrue(peers.measure_shapes([self.shape], [FakePeer("a")], FakeRunner(), file,
                                                 Path(folder) / "out.json", no_inputs, FakeTruth))
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
            file = peers.new_report("NVIDIA H200", [absent], "in this run: read 4562 GB/s")
            shapes = peers.select_shapes("h16_q1_b2_k64,h16_q1_b2_k128", "main", "bf16")
            fakes = [FakePeer("a", note="64 tokens a split"), FakePeer("b")]
            peers.measure_shapes(shapes, fakes, FakeRunner(), file, path, FakeInputs, FakeTruth)
            text = path.read_text()
            written, = report.load_peers(root, types.SimpleNamespace(context={"gpu": "NVIDIA H200"})).files
            self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(written, json.loads(text))
        recorded = json.loads((ROOT / "bench" / "results" / "peers_h200.json").read_text())
        self.assertLessEqual(set(recorded["context"]), set(written["context"]))
        self.assertEqual(written["context"]["schema"], recorded["context"]["schema"])
        self.assertLessEqual({"torch", "triton", "commit"}, set(written["context"]))
        self.assertRegex(written["context"]["date"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(written["shapes"]["h16_q1_b2_k64"], {"a": [112.0, 124.5], "b": [112.0, 124.5]})
        self.assertEqual(written["spread"]["h16_q1_b2_k128"]["b"],
                         {"cold": [102.0, 122.0, 100], "sustained": [104.9, 144.1, 100], "checked": 0.0015, "note": ""})
        self.assertEqual([written["spread"][shape.name]["a"]["note"] for shape in shapes], ["64 tokens a split"] * 2)
        self.assertEqual(shown.getvalue().count("1.5e-03  64 tokens a split\n"), 2)
        self.assertEqual(written["absent"], {"absent": "package x is not installed"})
        self.assertIn('"a": [112.0, 124.5]', text)

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
        for shape in peers.SUITES["main"]:
            self.assertIn(f"  {shape}\n", out)

    def test_messages(self):
        no_gpu = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.json")
            for arguments, module, why in [
                    (["--shapes", "h1"], None, "shape 'h1' is not of the form"),
                    (["--peers", "x"], None, "'x' is none of"), ([], None, "--out FILE is missing"),
                    (["--out", path + "/y.json"], None, "there is no such folder"),
                    (["--suite", "main", "--shapes", "h1_q1_b1_k1"], None, "not allowed with"),
                    (["--out", path], None, "needs PyTorch"), (["--out", path], no_gpu, "needs an NVIDIA GPU")]:
                with mock.patch.object(peers, "torch", module):
                    status, _, error = self.run_main(*arguments)
                self.assertEqual(status, 2, arguments)
                self.assertIn(why, error)
            self.assertEqual(os.listdir(folder), [])


def shape_of(name, lengths):
    shape = peers.Shape(name)
    assert len(lengths) == shape.b
    shape.lengths = lengths
    return shape


@needs_torch
class DataTest(unittest.TestCase):
    # From q_bits and kv_bits, seed 0, flat: CRC-32 of q [3, 2, 5, 576] and of 130 tokens of 3 sequences, 2 KV heads.
    PINNED = {
        "bf16": (0x604C7F53, [0xBD53, 0xBCD4, 0x3B4A, 0xBCF3, 0x3E04, 0x3DB2],
                 0x85B41E7D, [0xBDD0, 0xBDDD, 0x3C99, 0xBC56, 0x3DF1, 0xBDA0], 0xBC63, 0x3BAB, 0x3DED),
        "fp16": (0x3AF6E35A, [0xAA97, 0xA6A1, 0x1A51, 0xA795, 0x3022, 0x2D93],
                 0xEB510869, [0xAE7C, 0xAEEA, 0x24C6, 0xA2B4, 0x2F85, 0xAD00], 0xA314, 0x1D56, 0x2F67),
    }

    @staticmethod
    def bits(tensor):
        return [x & 0xFFFF for x in tensor.contiguous().view(torch.int16).flatten().tolist()]

    def crc(self, tensor):
        bits = self.bits(tensor)
        return zlib.crc32(struct.pack(f"<{len(bits)}H", *bits))

    def test_values_are_those_of_data_generator_h(self):
        for name, (q_crc, q, kv_crc, kv, *single) in self.PINNED.items():
            inputs = peers.Inputs(peers.Shape(f"h5_q2_b3_k1{'_fp16' if name == 'fp16' else ''}"), "cpu")
            self.assertEqual(self.bits(inputs.q)[:6], q)
            self.assertEqual(self.crc(inputs.q), q_crc)
            i, t, h = torch.meshgrid(torch.arange(3), torch.arange(130), torch.arange(2), indexing="ij")
            rows = peers.flat_rows(peers.STREAM_CACHE, i, t, h, inputs.dtype)
            self.assertEqual(self.bits(rows)[:6], kv)
            self.assertEqual(self.crc(rows), kv_crc)

            def element(stream, *place):
                *place, column = place
                row = peers.flat_rows(stream, *(torch.tensor([x]) for x in place), inputs.dtype)
                return self.bits(row)[column]

            self.assertEqual([element(peers.STREAM_CACHE, 127, 131071, 0, 575),
                              element(peers.STREAM_CACHE, 5, 8191, 1, 0),
                              element(peers.STREAM_Q, 127, 1, 127, 575)], single)

    def test_the_cache_holds_each_sequence_by_its_table_and_nan_elsewhere(self):
        shape = shape_of("h4x2_q1_b4_k1", [0, 1, 65, 130])
        with mock.patch.object(peers.Inputs, "CHUNK_ELEMENTS", 40 * 2 * 576):
            inputs = peers.Inputs(shape, "cpu")
        for i, length in enumerate(shape.lengths):
            rows = inputs.tokens(i)
            self.assertEqual(tuple(rows.shape), (length, 2, 576))
            t, h = torch.meshgrid(torch.arange(length), torch.arange(2), indexing="ij")
            expected = peers.flat_rows(peers.STREAM_CACHE, torch.full_like(t, i), t, h, inputs.dtype)
            self.assertTrue(torch.equal(rows, expected))
        self.assertEqual(inputs.kv.shape[0], 6 + peers.SPARE_PAGES)
        self.assertEqual(int((~inputs.kv.isnan()).sum()), sum(shape.lengths) * 2 * 576)
        self.assertTrue(bool((inputs.table[0] == peers.GARBAGE_PAGE).all()))
        used = inputs.table[inputs.table != peers.GARBAGE_PAGE]
        self.assertEqual(len(set(used.tolist())), 6)
        unused = inputs.safe_table[inputs.table == peers.GARBAGE_PAGE]
        self.assertFalse(set(unused.tolist()) & set(used.tolist()))
        inputs.fill_unused(0.0)
        self.assertFalse(bool(inputs.kv.isnan().any()))


CASES = [  # of every way that Triton's row tiles go; rows that see nothing; both types
    ("h16_q1_b4_k1", [0, 1, 65, 130]),
    ("h16_q1_b3_k64_fp16", [64, 64, 64]),
    ("h16x2_q2_b4_k1_causal", [0, 1, 65, 200]),
    ("h8_q3_b2_k1_causal_fp16", [2, 129]),
    ("h40_q1_b1_k1", [100]),
    ("h128_q1_b1_k1_fp16", [65]),
    ("h4_q1_b1_k1", [0]),
]


def triton_or_skip(test):
    """The kernel under Triton's interpreter, which some versions of NumPy break."""
    warnings.simplefilter("ignore")  # of log2(0), where a row sees nothing, and of NumPy to Triton
    if peers.triton is None:
        test.skipTest("Triton is not installed")
    try:
        peers.Triton().prepare(peers.Inputs(peers.Shape("h1_q1_b1_k1"), "cpu"))()
    except Exception as error:
        if "0-dimensional arrays" in str(error):
            test.skipTest(f"Triton {peers.triton.__version__}'s interpreter does not work with this NumPy: {error}")
        raise
    return peers.Triton()


@needs_torch
class PeersTest(unittest.TestCase):
    def hold(self, peer):
        for name, lengths in CASES:
            inputs = peers.Inputs(shape_of(name, lengths), "cpu")
            inputs.fill_unused(0.0 if peer.reads_past_end else float("nan"))
            operation = peer.prepare(inputs)
            truth = peers.Truth(inputs)
            for _ in range(2):  # an operation is run again and again
                out = operation()
                verdict = truth.compare(out)
                self.assertTrue(verdict.ok, f"{peer.name}, {name} {lengths}: {verdict.why}")
                out.fill_(float("nan"))

    def test_eager(self):
        self.hold(peers.Eager())

    def test_sdpa(self):
        peer = peers.Sdpa()
        self.hold(peer)
        self.assertRegex(peer.note, "^backend [A-Z_]+")

    def test_in_chunks(self):
        for peer in (peers.Eager(), peers.Sdpa()):
            peer.chunk_bytes = 2 * peer.sequence_bytes(shape_of("h16x2_q2_b4_k1_causal", [0, 1, 65, 200]))
            self.hold(peer)

    def test_triton(self):
        peer = triton_or_skip(self)
        self.hold(peer)
        inputs = peers.Inputs(shape_of("h20_q1_b2_k1", [300, 64]), "cpu")
        truth, out = peers.Truth(inputs), inputs.new_out()
        for tile, step in sorted({config[:2] for config in peer.MANY + peer.SOME + peer.FEW}):
            for chunk in (64, 320):
                verdict = truth.compare(peer.launcher(inputs, tile, step, 4, 2, chunk, out.fill_(float("nan")))())
                self.assertTrue(verdict.ok, f"{tile}, {step}, {chunk}: {verdict.why}")

    def test_splits(self):
        peer = peers.Triton()
        for name in ["h128_q1_b1_k4096", "h16_q1_b128_k8192", "h128_q1_b128_kskew131072", "h16_q1_b1_k1",
                     "h128_q1_b128_klognormal8192"]:
            shape = peers.Shape(name)
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
            for name, lengths in [("h16_q1_b3_k1", [1, 65, 130]), ("h8_q2_b2_k1_causal_fp16", [2, 129])]:
                inputs = peers.Inputs(shape_of(name, lengths), "cpu")
                verdict = peers.Truth(inputs).compare(peer.prepare(inputs)())
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
        self.assertEqual(peer.refuses(peers.Shape("h4x2_q1_b1_k1")), "one KV head only")


@needs_torch
class TruthTest(unittest.TestCase):
    def setUp(self):
        self.inputs = peers.Inputs(shape_of("h8_q1_b3_k1", [65, 40, 300]), "cpu")
        self.inputs.fill_unused(0.0)
        self.truth = peers.Truth(self.inputs)
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
        for short in ([64, 40, 300], [65, 40, 299]):  # values are functions of place: only the last token is gone
            inputs = peers.Inputs(shape_of("h8_q1_b3_k1", short), "cpu")
            inputs.fill_unused(0.0)
            self.assertFalse(self.truth.compare(peers.Eager().prepare(inputs)()).ok, short)

    def test_errors_too_small_for_the_elements(self):
        verdict = self.truth.compare(self.out * 1.01)
        self.assertRegex(verdict.why, "cosine difference .* is not less than 5e-06")

    def test_another_form(self):
        self.assertIn("output of shape (3, 1, 8, 576)", self.truth.compare(self.inputs.q).why)

    def test_rows(self):
        shape = shape_of("h1_q2_b40_k1_causal", [1] * 17 + [3] + [1] * 22)
        truth = peers.Truth(peers.Inputs(shape, "cpu"))
        self.assertEqual(len(set(truth.rows)), peers.CHECKED_ROWS)
        self.assertIn((17, 1), truth.rows)
        self.assertEqual(truth.rows, peers.Truth(peers.Inputs(shape, "cpu")).rows)


if __name__ == "__main__":
    unittest.main()
