"""What ncu, the program of Nsight Compute, writes about the launches of kernels: `ncu --csv --page raw`."""
import csv
import re

from recordings import Error


def kernel_name(function):
    """'scores' of 'void mla::gpu::naive::scores<__nv_bfloat16, 0>(mla::Problem, int)'"""
    name, depth, i = "", 0, 0
    while i < len(function):
        if function[i] == "<":
            depth += 1
        if depth == 0 and function[i] == "(" and not function.startswith("(anonymous ", i):
            break
        if depth == 0:
            name += function[i]
        if function[i] == ">":
            depth -= 1
        i += 1
    return re.split("[: ]", name.strip())[-1]


def numbers(row):
    """{metric: number} of a row; what is no number is left out."""
    found = {}
    for metric, value in row.items():
        try:
            found[metric] = float(value.replace(",", ""))
        except (AttributeError, ValueError):
            continue
    return found


def parse_launches(text):
    """[(kernel, {metric: number})], a launch each. The first lines are ncu's own remarks; the first row below the header
    has the units, and no ID."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise Error("ncu wrote no table:\n" + "\n".join(lines[-10:]))
    return [(kernel_name(row["Kernel Name"]), numbers(row)) for row in csv.DictReader(lines[begin:]) if row["ID"]]
