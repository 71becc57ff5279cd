"""gdb commands for kernels that run on the GPU model.

    (gdb) source reference/gpu_model/gdb.py
    (gdb) gpu threads       which GPU threads there are, and where each waits
    (gdb) gpu thread 5      where in the kernel GPU thread 5 is
    (gdb) gpu thread 5 bt   its whole backtrace; any gdb command may take the place of bt
    (gdb) gpu thread 3,0,0:5 bt     the same of block (3,0,0), if several blocks run

`gpu thread` reads what Boost.Context saves when it leaves a fiber, which it knows for x86-64 alone. It needs a live
process: gdb cannot set the registers of a core file.
"""

import re

import gdb

WARP_SIZE = 32
NAMESPACE = "gpu_model::detail::"

# Offsets in what jump_fcontext pushes, Boost.Context 1.61 and later, System V x86-64.
SAVED_REGISTERS = {"r12": 0x08, "r13": 0x10, "r14": 0x18, "r15": 0x20, "rbx": 0x28, "rbp": 0x30, "pc": 0x38}
SAVED_BYTES = 0x40


def elements(vector):
    """The elements of a std::vector, without needing its pretty-printer."""
    start, finish = vector["_M_impl"]["_M_start"], vector["_M_impl"]["_M_finish"]
    return [(start + i).dereference() for i in range(finish - start)]


def pointee(unique_ptr):
    """What a std::unique_ptr points to: its only pointer, some classes deep."""
    def pointer(value):
        kind = value.type.strip_typedefs()
        if kind.code == gdb.TYPE_CODE_PTR:
            return value
        if kind.code == gdb.TYPE_CODE_STRUCT:
            for field in kind.fields():
                found = pointer(value[field])
                if found is not None:
                    return found
        return None
    return pointer(unique_ptr).dereference()


def multiprocessors():
    """All that run a block now."""
    try:
        pointer = gdb.parse_and_eval(NAMESPACE + "Multiprocessor::first")
    except gdb.error:
        raise gdb.GdbError("The GPU model is not part of this program, or has not started.")
    found = []
    while pointer != 0:
        if int(pointer["count_"]) > 0:
            found.append(pointer.dereference())
        pointer = pointer["next"]
    if not found:
        raise gdb.GdbError("No kernel is running.")
    return sorted(found, key=lambda one: [int(one["block_index_"][axis]) for axis in "zyx"])


def selected():
    """The multiprocessor whose GPU thread gdb stopped in, or else the first that runs a block."""
    running = multiprocessors()
    try:
        current = gdb.parse_and_eval(NAMESPACE + "Multiprocessor::current_")
        for multiprocessor in running:
            if multiprocessor.address == current:
                return multiprocessor
    except gdb.error:  # no thread-local storage to read, in a core file say
        pass
    return running[0]


def running(block):
    """The multiprocessor that runs this block, "(3,0,0)"."""
    for multiprocessor in multiprocessors():
        if triple(multiprocessor["block_index_"]) == block:
            return multiprocessor
    raise gdb.GdbError("Block {} does not run.".format(block))


def threads_of(multiprocessor):
    all_threads = elements(multiprocessor["threads_"])
    return [pointee(thread) for thread in all_threads[: int(multiprocessor["count_"])]]


def path_in_repository(path):
    for folder in ("/stages/", "/tests/", "/reference/"):
        if folder in path:
            return path[path.rindex(folder) + 1:]
    return path


def print_kernel_frames():
    """The frames between the model below and the launch above, by level, as `frame apply level` wants it."""
    frame = gdb.newest_frame()
    while frame is not None and "Multiprocessor::run_thread" not in str(frame.name()):
        table = frame.find_sal().symtab
        path = path_in_repository(table.fullname()) if table else ""
        if path and not path.startswith(("reference/gpu_model/", "stages/common/machine/launch.h", "/usr/")):
            # Without template arguments, parameters and namespaces.
            name = str(frame.name()).replace("(anonymous namespace)::", "")
            name = re.sub(r"<.*|\(.*", "", name).split("::")[-1]
            print("#{:<2} {} at {}:{}".format(frame.level(), name, path, frame.find_sal().line))
        frame = frame.older()


def triple(index):
    return "({},{},{})".format(int(index["x"]), int(index["y"]), int(index["z"]))


def state_of(thread, multiprocessor):
    if thread.address == multiprocessor["running_"]:
        return "running"
    if thread.address == multiprocessor["rejected_"]:
        return "rejected"
    if bool(thread["finished"]):
        return "returned"
    wait = thread["wait"]
    if int(wait["what"]) == 0:
        return "ready to run"
    argument = ""
    if int(wait["mask"]) != 0:
        argument = "(mask 0x{:08x})".format(int(wait["mask"]))
    if int(wait["barrier"]) > 0:
        argument = "({}, {})".format(int(wait["barrier"]), int(wait["threads"]))
    if int(wait["mbarrier"]) >= 0:
        argument = "(barrier at byte {}, parity {})".format(
            int(wait["mbarrier"]), int(wait["parity"]))
    if int(thread["counter"]) != 0:
        wanted = int(thread["wanted"])
        argument = "(counter at 0x{:x}{} holds {})".format(
            int(thread["counter"]), " wants {},".format(wanted) if wanted else "",
            int(thread["counter"].dereference()))
    path = path_in_repository(wait["file"].string())
    return "waits in {}{} at {}:{}".format(
        wait["what"].string(), argument, path, int(wait["line"]))


class Gpu(gdb.Command):
    """GPU threads on the GPU model: gpu threads, gpu thread NUMBER COMMAND."""

    def __init__(self):
        super().__init__("gpu", gdb.COMMAND_STACK, prefix=True)


class GpuThreads(gdb.Command):
    """List the GPU threads of every running block, and what each waits for."""

    def __init__(self):
        super().__init__("gpu threads", gdb.COMMAND_STACK)

    def invoke(self, argument, from_tty):
        for multiprocessor in multiprocessors():
            threads = threads_of(multiprocessor)
            print("block {}, {} threads".format(triple(multiprocessor["block_index_"]), len(threads)))
            begin = 0
            while begin < len(threads):
                state = state_of(threads[begin], multiprocessor)
                end = begin + 1
                while end < len(threads) and state_of(threads[end], multiprocessor) == state:
                    end += 1
                numbers = str(begin) if end == begin + 1 else "{}-{}".format(begin, end - 1)
                marker = "*" if state == "running" else " "
                print("{} {:>9}  {:<12} {}".format(marker, numbers, triple(threads[begin]["index"]), state))
                begin = end


class GpuThread(gdb.Command):
    """Where a GPU thread of the current block, or of block X,Y,Z, is; or run a gdb command as if it were stopped: gpu thread 5 bt."""

    def __init__(self):
        super().__init__("gpu thread", gdb.COMMAND_STACK)

    def invoke(self, argument, from_tty):
        words = argument.split(None, 1)
        which = re.fullmatch(r"(?:(\d+,\d+,\d+):)?(\d+)", words[0]) if words else None
        if which is None:
            raise gdb.GdbError("usage: gpu thread [X,Y,Z:]NUMBER [COMMAND], as in gpu thread 5 bt")
        number, command = int(which.group(2)), words[1] if len(words) > 1 else None
        multiprocessor = selected() if which.group(1) is None else running("({})".format(which.group(1)))
        threads = threads_of(multiprocessor)
        if number >= len(threads):
            raise gdb.GdbError("The block has threads 0 to {}.".format(len(threads) - 1))
        thread = threads[number]
        print("block {}, thread {}: {}".format(
            triple(multiprocessor["block_index_"]), triple(thread["index"]), state_of(thread, multiprocessor)))
        if thread.address == multiprocessor["running_"]:
            self.show(command, from_tty)
        elif not bool(thread["finished"]):
            self.run_suspended(pointee(thread["fiber"]), command, from_tty)

    @staticmethod
    def show(command, from_tty):
        if command is None:
            print_kernel_frames()
        else:
            gdb.execute(command, from_tty)

    @staticmethod
    def run_suspended(fiber, command, from_tty):
        frame = gdb.newest_frame()
        if frame.architecture().name() != "i386:x86-64":
            raise gdb.GdbError("gpu thread knows the registers of x86-64 alone; this is {}.".format(
                frame.architecture().name()))
        old_frame = gdb.selected_frame()
        context = int(fiber["context_"])
        registers = {"sp": context + SAVED_BYTES}
        for name, offset in SAVED_REGISTERS.items():
            registers[name] = int(gdb.parse_and_eval("*(unsigned long *) {}".format(context + offset)))
        # Registers can be set in the newest frame alone.
        frame.select()
        before = {name: int(gdb.parse_and_eval("(unsigned long) ${}".format(name))) for name in registers}
        level = 0
        while old_frame != gdb.newest_frame() and old_frame.newer() is not None:
            level, old_frame = level + 1, old_frame.newer()
        try:
            for name, value in registers.items():
                gdb.execute("set var ${} = {}".format(name, value), to_string=True)
            GpuThread.show(command, from_tty)
        finally:
            gdb.execute("frame 0", to_string=True)
            for name, value in before.items():
                gdb.execute("set var ${} = {}".format(name, value), to_string=True)
            gdb.execute("frame {}".format(level), to_string=True)


Gpu()
GpuThreads()
GpuThread()
