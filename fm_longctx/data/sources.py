"""Where documents come from: files on disk, one document each."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Third-party code and test suites differ from one installation of a Python version to the next.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class TextFiles:
    """Files under a root, one document a file, in the sorted order of their names. Bytes are taken as they are.

    Args:
        root: the folder the names are relative to.
        names: POSIX-style relative paths. Empty files are left out.
        max_bytes: longer files are left out too; None takes them all.

    Raises:
        ValueError: no file is left.
    """

    def __init__(self, root: Path, names: Sequence[str], *, max_bytes: int | None = None) -> None:
        self.root = root
        sizes = {name: (root / name).stat().st_size for name in sorted(names)}
        self.names = tuple(
            name for name, size in sizes.items() if size > 0 and (max_bytes is None or size <= max_bytes)
        )
        self.sizes = tuple(sizes[name] for name in self.names)
        if not self.names:
            limit = "" if max_bytes is None else f" of at most {max_bytes} bytes"
            raise ValueError(f"{root} holds no document: {len(sizes)} files matched, none with content{limit}.")

    @classmethod
    def from_path(cls, path: str | Path, *, pattern: str = "**/*", max_bytes: int | None = None) -> TextFiles:
        """One file, or every file of a folder that matches `pattern` and has no hidden part in its relative path."""
        root, names = found_files(path, pattern)
        return cls(root, names, max_bytes=max_bytes)

    @classmethod
    def python_stdlib(cls, *, max_bytes: int | None = None) -> TextFiles:
        """The standard library's own `.py` files, without its tests: real text that is on any machine with Python."""
        root = Path(sysconfig.get_paths()["stdlib"])
        names = []
        for folder, folders, files in os.walk(root):
            # Not even looked into: installed packages may be a hundred times as many files.
            folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
            place = Path(folder)
            names += [
                (place / name).relative_to(root).as_posix()
                for name in files
                if name.endswith(".py") and (place / name).is_file()
            ]
        return cls(root, names, max_bytes=max_bytes)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_bytes(self) -> int:
        """Of all documents."""
        return sum(self.sizes)

    def read(self, index: int) -> bytes:
        """A document's bytes; a ValueError if the file no longer has the size it had at the start."""
        path = self.root / self.names[index]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read document {path}: {error.strerror or error}.") from error
        if len(content) != self.sizes[index]:
            raise ValueError(
                f"{path} changed while it was being read: {self.sizes[index]} bytes at the start, {len(content)} now. "
                "Packing stands on the sizes; start the run again."
            )
        return content

    def fingerprint(self) -> str:
        """32 hexadecimal digits of names and sizes: a resumed run can tell whether it reads the same text."""
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\0{size}\0".encode())
        return digest.hexdigest()


def found_files(path: str | Path, pattern: str) -> tuple[Path, list[str]]:
    """A root and the files under it: `path` itself if it is a file, else what matches in the folder and is not hidden.

    Raises:
        ValueError: there is nothing at `path`.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise ValueError(f"data path {str(path)!r} does not exist. Give a file or a folder of files.")
    found = (f.relative_to(path) for f in path.glob(pattern) if f.is_file())
    return path, [f.as_posix() for f in found if not any(part.startswith(".") for part in f.parts)]
