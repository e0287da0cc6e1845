"""How a failure is told at the command line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from wdmoe.errors import MissingExtraError, WdmoeError

EXIT_INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C

_SYSTEM = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "not a folder",
    errno.EISDIR: "a folder, where a file is needed",
    errno.EEXIST: "already there",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}


def explain(error: BaseException) -> str | None:
    """One line for a failure a user can act on; None for a bug, which deserves its traceback."""
    if isinstance(error, WdmoeError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names) or 'writing or reading a file'}: {_SYSTEM[error.errno]}"
    return None


def check_installed(extra: str, *packages: str) -> None:
    """Say at once what is missing, before the seconds that its import would take, or that of others.

    Raises:
        MissingExtraError: one of the packages, which `extra` brings, is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise _missing(package, extra)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of an optional part of the installation.

    Raises:
        MissingExtraError: a package that the extra brings is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "wdmoe":
            raise  # a bug of ours
        raise _missing(error.name, extra) from error


def _missing(package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"this command needs {package}, which is not installed: pip install 'wdmoe[{extra}]'")
