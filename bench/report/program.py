"""How the Python programs of the bench write a file, whole or not at all, and how they end."""
import argparse
import os
import secrets
import stat
import sys
from pathlib import Path


class CannotWrite(Exception):
    """A message for the user, with the path and the reason."""


def _place(path):
    """Where a file goes, links followed, and what is there: None, or its os.stat()."""
    place = Path(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise CannotWrite(f"{path}: cannot be written: it is a folder")
    if found is not None and (not os.access(path, os.W_OK)
                              or stat.S_ISREG(found.st_mode) and not found.st_mode & 0o222):  # root may even so
        raise CannotWrite(f"{path}: cannot be written: it is write-protected")
    if not place.parent.is_dir():
        raise CannotWrite(f"{path}: cannot be written: there is no folder {place.parent}")
    return place, found


def _temporary(place):
    """A new file beside `place`: its path and descriptor."""
    path = place.with_name(f"{place.name[:200]}.{secrets.token_hex(4)}.part")
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def write_text(path, text):
    """Writes a temporary file beside the target and gives it the target's name once it is on the disk. Whatever fails
    before leaves the old file as it was. A link is followed; owner and mode stay. A pipe or a device is written to."""
    try:
        place, found = _place(path)
        if found is not None and os.path.samestat(found, os.fstat(1)):  # /dev/stdout, into a file, too
            print(text, end="", flush=True)
            return
        if found is not None and not stat.S_ISREG(found.st_mode):
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return
        temporary, descriptor = _temporary(place)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                if found is not None:
                    if os.geteuid() == 0:
                        os.fchown(descriptor, found.st_uid, found.st_gid)
                    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written: {error.strerror}") from None


def check_writable(path):
    """Raises CannotWrite if write_text could not begin: to be asked before minutes of measuring, not after."""
    try:
        place, found = _place(path)
        if found is None or stat.S_ISREG(found.st_mode):
            temporary, descriptor = _temporary(place)
            os.close(descriptor)
            temporary.unlink()
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written: {error.strerror}") from None


def _end(code):
    """What is left in stdout's buffer may fail once more when the interpreter ends; it has been said."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


class Parser(argparse.ArgumentParser):
    """One whose --help fails where stdout does; argparse's own overlooks that."""

    def _print_message(self, message, file=None):
        if message:
            (file or sys.stderr).write(message)


def run(program, main):
    """Runs main() and returns the exit code: its own, or 1 with a line on stderr if a file or stdout could not be
    written. A reader that leaves a pipe early is no matter for a message."""
    if sys.stdout is None:
        print(f"{program}: standard output is closed", file=sys.stderr)
        return 1
    try:
        try:
            code = main()
        except SystemExit as end:  # of argparse
            code = end.code
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _end(1)
    except CannotWrite as error:
        print(f"{program}: {error}", file=sys.stderr)
    except UnicodeEncodeError as error:
        print(f"{program}: standard output is {error.encoding}, which has no {ascii(error.object[error.start])}: "
              "set PYTHONIOENCODING=utf-8", file=sys.stderr)
    except OSError as error:
        where = error.filename or "standard output cannot be written"
        print(f"{program}: {where}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return _end(130)
    return _end(1)
