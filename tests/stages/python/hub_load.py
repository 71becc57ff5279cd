"""Loads a repository of the Kernel Hub from disk, beside the installed package; hub_test.sh calls it."""
import base64
import hashlib
import importlib
import importlib.util
import json
import pathlib
import sys

import numpy
from kernels import get_local_kernel

import mla_stages


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder):
    kernel = get_local_kernel(folder, backend="cpu")
    assert kernel is not mla_stages and kernel.__name__ != "mla_stages"
    assert kernel.__all__ == mla_stages.__all__ and kernel.__version__ == mla_stages.__version__

    random = numpy.random.default_rng(0)
    q, cache = (random.standard_normal((*shape, 576)).astype("f2") for shape in ((1, 1, 16), (4, 64, 1)))
    arrays = q, cache, numpy.arange(4, dtype="i4")[None], numpy.array([200], "i4")
    expected = mla_stages.decode(*arrays, scale=0.135234, stage="05")
    truth, _ = kernel.reference(*arrays, scale=0.135234)
    assert abs(expected[0] - truth).max() < 0.01

    variant, = (folder / "build").iterdir()
    older = load("older", variant / "mla_stages" / "__init__.py")  # as versions of `kernels` do that look there
    for module in (kernel, older):
        out, lse = module.decode(*arrays, scale=0.135234, stage="05")
        assert (out == expected[0]).all() and (lse == expected[1]).all(), module
    assert older.decode is kernel.decode
    assert importlib.import_module(kernel.__name__ + ".flash_mla").get_mla_metadata()

    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"] == kernel.__name__
    files = {str(path.relative_to(variant)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
             for path in variant.rglob("*") if path.is_file() and path.name != "metadata.json" and path.suffix != ".pyc"}
    assert metadata["digest"]["files"] == files and "libmla_stages.so" in files
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    print(f"loaded {variant.name} as {kernel.__name__}")


main(pathlib.Path(sys.argv[1]))
