"""What a stage does to memory, counted on the GPU model. A separate program does it, because counted kernels cannot be in one
library with those that are called."""
import json
import os
import pathlib
from typing import Any, Dict

_NAME = "mla_profile"


def _program() -> str:
    """The one that the environment variable MLA_PROFILE names, that was installed beside this file, or that PATH finds."""
    import shutil  # here, as below, because importing the package must be quick

    named = os.environ.get("MLA_PROFILE")
    beside = pathlib.Path(__file__).with_name(_NAME)
    found = named or (str(beside) if beside.is_file() else shutil.which(_NAME))
    if found is None:
        raise RuntimeError(f"profile needs the program {_NAME}, which counts: install with `pip install . -C "
                           f"cmake.define.MLA_STAGES_PROFILE=ON`, or name the one of a build, build/bench/{_NAME}, in the "
                           "environment variable MLA_PROFILE")
    return found


def profile(stage: str = "01", *, batch: int, seqlen_k: int, num_heads_q: int = 128, seqlen_q: int = 1,
            num_heads_kv: int = 1, page_size: int = 64, dtype: str = "bf16", causal: bool = False,
            cache_format: str = "16bit") -> Dict[str, Any]:
    """What a stage does to memory, counted on the GPU model: requests, sectors, bank conflicts, what warps execute; by kernel
    and source line. docs/counters.md says what is counted.

    Generated tensors of this shape are decoded. Raises ValueError for a shape or stage that is not there."""
    import subprocess

    heads = f"h{num_heads_q}x{num_heads_kv}" if num_heads_kv != 1 else f"h{num_heads_q}"
    shape = f"{heads}_q{seqlen_q}_b{batch}_k{seqlen_k}"
    shape += "_causal" * causal + f"_page{page_size}" * (page_size != 64) + f"_{cache_format}" * (cache_format != "16bit")
    shape += f"_{dtype}" * (dtype != "bf16")
    command = [_program(), "profile", "--stage", stage, "--shape", shape, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or f"{command[0]} ended with code {done.returncode}"
        raise (ValueError if done.returncode == 2 else RuntimeError)(said)
    counted: Dict[str, Any] = json.loads(done.stdout)
    return counted
