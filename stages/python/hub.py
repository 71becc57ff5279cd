#!/usr/bin/env python3
"""Makes a repository for the Kernel Hub from a wheel; Hugging Face's package `kernels` can load it.

    stages/python/hub.py WHEEL FOLDER                   adds the build variant for a CPU
    stages/python/hub.py WHEEL FOLDER --backend cu130   the one for PyTorch with CUDA 13.0

    FOLDER/README.md                                  the card, if there is none
    FOLDER/build/tvm-ffi01-cpu-x86_64-linux/          a variant: the wheel's files, and
        metadata.json                                 what it is, with a hash of each file
        mla_stages/__init__.py                        for versions of `kernels` that look there
"""
import argparse
import base64
import hashlib
import json
import pathlib
import re
import sys
import zipfile

COMPATIBLE = '''"""For versions of `kernels` that look for the package here: what the folder above has."""
import importlib.util
import pathlib
import sys

_spec = importlib.util.spec_from_file_location("{id}", pathlib.Path(__file__).parent.parent / "__init__.py")
if _spec.name not in sys.modules:
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
globals().update({{name: value for name, value in vars(sys.modules[_spec.name]).items() if name[:2] != "__"}})
'''

CARD = '''---
library_name: kernels
license: mit
---

# mla-stages

Multi-head latent attention decoding, stage by stage, for arrays of any framework, on a GPU or on a model of one:

```python
from kernels import get_local_kernel

mla_stages = get_local_kernel(path)  # the folder of this file
out, lse = mla_stages.decode(q, kv_cache, block_table, seqlens_k, scale=0.135234)
```
'''


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).digest()


def build_variant(wheel, folder, backend):
    """Unpacks the wheel's package to a variant's folder, whose path it returns."""
    archive = zipfile.ZipFile(wheel)
    about = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    version = re.search(r"^Version: (\d+)\.", about, re.M)[1]
    tvm_ffi = re.search(r"^Requires-Dist: apache-tvm-ffi==(\d+)\.(\d+)\.", about, re.M)
    machine = re.search(r"-(?:many)?linux_(?:\d+_\d+_)?(\w+?)(?:\.\w+)?\.whl$", wheel.name)
    if tvm_ffi is None or machine is None:
        raise ValueError(f"{wheel.name} is no wheel of mla_stages for Linux")
    variant = folder / "build" / f"tvm-ffi{tvm_ffi[1]}{tvm_ffi[2]}-{backend}-{machine[1]}-linux"
    if variant.exists():
        raise ValueError(f"{variant} is there already")
    files = {name: name.removeprefix("mla_stages/") for name in archive.namelist() if name.startswith("mla_stages/")}
    for name, target in files.items():
        path = variant / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read(name))
    # Unique to this build: the name of its module, and of its operators in PyTorch.
    contents = hashlib.sha256(b"".join(digest_of(variant / target) for target in sorted(files.values())))
    kind = "cpu" if backend == "cpu" else "cuda"
    identity = f"_mla_stages_{kind}_{contents.hexdigest()[:12]}"
    compatible = variant / "mla_stages" / "__init__.py"
    compatible.parent.mkdir()
    compatible.write_text(COMPATIBLE.format(id=identity))
    digests = {str(path.relative_to(variant)): base64.b64encode(digest_of(path)).decode()
               for path in sorted(variant.rglob("*")) if path.is_file()}
    (variant / "metadata.json").write_text(json.dumps({
        "name": "mla-stages",
        "id": identity,
        "version": int(version),
        "license": "mit",
        "python-depends": [],
        "backend": {"type": kind},
        "digest": {"algorithm": "sha256", "files": digests},
    }, indent=2) + "\n")
    return variant


def main(arguments):
    parser = argparse.ArgumentParser(description="Makes a repository for the Kernel Hub from a wheel.")
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--backend", default="cpu", help="cpu, or cu and the version of PyTorch's CUDA: cu130")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"cpu|cu\d{3}", options.backend):
        parser.error(f"--backend {options.backend} is neither cpu nor of the form cu130")
    try:
        print(build_variant(options.wheel, options.folder, options.backend))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"hub.py: {error}", file=sys.stderr)
        return 1
    card = options.folder / "README.md"
    if not card.exists():
        card.write_text(CARD)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
