"""The project's own programs and the GPU model's library, for the notebooks: from build, or from $MLA_BUILD."""
import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("MLA_BUILD") or ROOT / "build")


def run(*command):
    """What a command prints. If it fails, its error message becomes that of an exception."""
    try:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not there: bash tests/run.sh builds it") from None
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return result.stdout


def profile(stage, shape):
    """What the kernels of a stage do to memory, by name: docs/counters.md."""
    text = run(BUILD / "bench" / "mla_run", "profile", "--stage", stage, "--shape", shape, "--json")
    return {kernel["name"]: kernel for kernel in json.loads(text)["kernels"]}


def compile_for_model(source, program, *flags):
    """Compiles CUDA C++ for the GPU model, and for its race detector, to a program that can be run."""
    path = pathlib.Path(program).with_suffix(".cpp")
    path.write_text(source)
    model = BUILD / "reference" / "gpu_model" / "libflashmla_gpu_model.a"
    if not model.exists():
        raise RuntimeError(f"{model} is not there: bash tests/run.sh builds it")
    run("g++", "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-Wno-tsan", "-ftrivial-auto-var-init=pattern", *flags,
        "-I", ROOT, "-c", path, "-o", path.with_suffix(".o"))
    # Linked without -fsanitize=thread: the functions called at each access are the model's own.
    run("g++", path.with_suffix(".o"), model, "-lboost_context", "-pthread", "-o", program)
    return program
