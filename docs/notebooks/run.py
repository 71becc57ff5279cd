#!/usr/bin/env python3
"""Runs the notebooks, each in a fresh kernel, and compares what they show with what is stored.

    docs/notebooks/run.py                   all; text must be the same, and a picture must be where one is stored
    docs/notebooks/run.py 3*.ipynb          these
    docs/notebooks/run.py --write           stores what they show

They are stored without what changes from run to run: numbers of executions, times, names of people's kernels.
Exit code: 0 all is as stored; 1 it is not, or a cell failed; 77 a package is missing.
"""
import difflib
import pathlib
import sys
import time

FOLDER = pathlib.Path(__file__).resolve().parent
try:
    import nbclient
    import nbformat
except ImportError as error:
    print(f"{error}: pip install '.[notebooks]' in the folder of the project")
    sys.exit(77)


def without_accidents(notebook):
    """Keeps cells, their text and pictures, and that this is Python."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 4  # cells without ids
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": output.data["image/png"]}
    return notebook


def text_of(notebook):
    """Sources and outputs, line by line, to be compared."""
    lines = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        lines.append(f"cell {number}: {cell.source.splitlines()[0]}")
        for output in cell.outputs:
            if output.output_type == "stream":
                lines += [f"  {output.name}: {line}" for line in output.text.splitlines()]
            elif "image/png" in output.get("data", {}):
                lines.append("  a picture")
            else:
                lines += ["  " + line for line in output.get("data", {}).get("text/plain", "").splitlines()]
    return lines


def run(path, write):
    """Whether the notebook shows what is stored."""
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    begin = time.monotonic()
    client = nbclient.NotebookClient(fresh, timeout=120, kernel_name="python3", store_widget_state=False,
                                     coalesce_streams=True, extra_arguments=["--IPKernelApp.log_level=ERROR"],
                                     resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        print(f"{path.name}: {error}")
        return False
    fresh = without_accidents(fresh)
    print(f"{path.name}: {time.monotonic() - begin:.1f} s", flush=True)
    if write:
        path.write_text(nbformat.writes(fresh) + "\n")
        return True
    difference = list(difflib.unified_diff(text_of(stored), text_of(fresh), "stored", "now", lineterm="", n=1))
    if difference:
        print(f"{path.name}: --write would store", *difference, sep="\n")
    return not difference


def main(arguments):
    write = "--write" in arguments
    names = [name for name in arguments if name != "--write"]
    paths = [pathlib.Path(name).resolve() for name in names] or sorted(FOLDER.glob("*.ipynb"))
    return 0 if all([run(path, write) for path in paths]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
