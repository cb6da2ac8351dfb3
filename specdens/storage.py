"""Files: arrays and a JSON header in one ``.npz``, written atomically, read without pickle."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specdens.arguments import checked_path

_HEADER = "header"
# What NumPy and zipfile raise for files that are cut, altered or something else.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


def write_npz(
    path: str | Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Write `arrays` and a JSON `header` to `path`: the file is complete or it is the old one."""
    path = checked_path("path", path)
    if not path.parent.is_dir():
        msg = f"path={str(path)!r}: there is no folder {str(path.parent)!r}; make it first."
        raise FileNotFoundError(msg)
    text = json.dumps({"kind": kind, "arrays": sorted(arrays), **header}, default=str)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent or ".", prefix=path.name, suffix=".part"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            contents: dict[str, Any] = {_HEADER: np.array(text), **arrays}
            np.savez(file, **contents)  # numbers as random as these do not compress
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_npz(
    path: str | Path, kind: str, version: int, name: str = "path"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a file that `write_npz` wrote; errors call the path `name`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, is of another kind, or was written by a newer version.
    """
    path = checked_path(name, path)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop(_HEADER)))
        if sorted(arrays) != header["arrays"]:
            msg = f"it holds {sorted(arrays)}, not {header['arrays']}"
            raise KeyError(msg)
        found = header["kind"], header["format_version"]
    except FileNotFoundError as error:
        msg = f"{name}={str(path)!r}: there is no such file."
        raise FileNotFoundError(msg) from error
    except _DAMAGE as error:
        msg = (
            f"{name}={str(path)!r} is damaged or truncated, or not a specdens {kind} file "
            f"({error})."
        )
        raise ValueError(msg) from error
    if found[0] != kind:
        msg = f"{name}={str(path)!r} holds a specdens {found[0]}, expected a {kind}."
        raise ValueError(msg)
    if found[1] > version:
        msg = f"{name}={str(path)!r} has format {found[1]}, this version reads {version}; upgrade."
        raise ValueError(msg)
    return header, arrays
