#!/usr/bin/env python3
"""Host code with one fault at a time. The tests that the list names for a fault must notice it, and pass without it.

    host_mutant_test.py HOST MODEL [SERVICE]    host_mutants, model_mutants and service_mutants, built from
                                                stages/mutants/mutants.txt; without the last, faults in bench/ are left out
"""
import concurrent.futures
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "stages" / "mutants"))
import mutants  # noqa: E402


def run(program, tests, number, limit_s=120):
    """Runs these tests with a mutant; number 0 is the code without a fault."""
    command = [program, f"--gtest_filter={tests}", "--gtest_fail_fast", "--gtest_brief=1"]
    environment = {**os.environ, "MLA_MUTANT": str(number)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s)


# Mutants at a time: most of the time they wait, for ranks that do not come.
AT_ONCE = 4


def main(host, model, service=None):
    failures, found = [], 0

    def program_of(mutant):
        return service if mutant.stage.startswith("bench/") else model if "/gpu_model/" in mutant.stage else host

    chosen = [(number, mutant, program_of(mutant))
              for number, mutant in enumerate(mutants.read_list(), 1) if mutant.tests and program_of(mutant)]
    # Without a fault they run together, each test once whatever filters name it; a filter with an exception runs alone.
    for program in filter(None, (host, model, service)):
        filters = sorted({mutant.tests for _, mutant, its in chosen if its == program})
        together = [tests for tests in filters if "-" not in tests]
        for tests in [":".join(together), *(set(filters) - set(together))]:
            result = run(program, tests, 0, 1200)
            if result.returncode != 0:
                failures.append(f"{tests} fail without a fault:\n{result.stdout.decode(errors='replace')[-2000:]}")

    def failure_of(number, mutant, program):
        try:
            mutant.span(mutants.source_of(mutant.stage).read_text())
        except ValueError as error:
            return str(error)
        if run(program, mutant.tests, number).returncode == 0:
            return f"mutants.txt:{mutant.line}: '{mutant.name}' of {mutant.stage} goes unnoticed"
        return None

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for failure in pool.map(lambda one: failure_of(*one), chosen):
            if failure is None:
                found += 1
            else:
                failures.append(failure)
    print("\n".join(failures))
    print(f"{found} of {len(chosen)} faults in host code found")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__.strip())
    sys.exit(main(*sys.argv[1:]))
