"""What the operating system refused, in words that say what to do."""

from __future__ import annotations

import errno

from trtforge.runtime.errors import ArtifactError

__all__ = ["explain_os_error"]

_FIXES = {
    errno.ENOSPC: "free space there, or choose another --output",
    errno.EDQUOT: "free space within your quota, or choose another --output",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`)",
    errno.EACCES: "give permission there, or choose another --output",
    errno.EPERM: "give permission there, or choose another --output",
    errno.EROFS: "choose an --output that can be written",
    errno.ENOENT: "something removed it meanwhile: put it back, and run this again",
    errno.ENOTDIR: "something replaced a folder meanwhile: put it back, and run this again",
    errno.ESTALE: "something removed it meanwhile: put it back, and run this again",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "free memory, or use a larger machine",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`), or run fewer at once",
    errno.EIO: "the disk or the network file system fails: choose another --output",
}


def explain_os_error(error: OSError) -> ArtifactError | None:
    """The error for the user; None for what says more of a program than of this machine (no code, or an odd one).

    Libraries derive errors of their own from `OSError`, without a code.
    """
    fix = _FIXES.get(error.errno or 0)
    if fix is None:
        return None
    at = f"{error.filename}: " if error.filename else ""
    return ArtifactError(f"{at}{error.strerror or error}", why="the operating system refused", fix=fix)
