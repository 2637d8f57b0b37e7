"""A checkpoint directory that several runs may write: a run that was stopped leaves its finished shards to the next."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.architectures.core.checkpoint import read_json
from zoo.architectures.core.shards import (
    make_directory,
    missing_parents,
    refuse_existing,
    remove_empty,
    sigterm_interrupts,
    write_json,
)
from zoo.errors import ZooError

BLOCK = 1 << 20  # bytes of a file in memory


class Unfinished:
    """`OUT.partial`: the `folder` that becomes the output, and a record of its finished files with their hashes.

    Args:
        out: the output.
        identity: all that decides what is written, as JSON data by name.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.identity = out, dict(identity)
        self.path = out.with_name(f"{out.name}.partial")
        self.folder, self.record = self.path / "checkpoint", self.path / "finished.json"
        self.hashes: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.hashes

    def add(self, name: str) -> None:
        """The file `name` of `folder` is finished."""
        self.hashes[name] = sha256(self.folder / name)
        self._note()

    def take_up(self) -> None:
        """Keep the files of an earlier run that are whole, and nothing else.

        Raises:
            ZooError: that run was of something else, or this is not its directory.
        """
        if self.record.is_file():
            before = read_json(self.record, "record")
            whole = {n: h for n, h in before["finished"].items() if self._is_whole(n, h)}
            if whole:
                self._refuse_other(before["identity"])
                self.hashes = whole
        elif any(not path.name.startswith(f".{self.record.name}.") for path in self.path.iterdir()):
            raise ZooError(
                f"{self.path} is in the way: it is no unfinished conversion; remove it or choose another output"
            )
        self._note()
        self._clear()

    def keep_or_remove(self) -> None:
        """After a stop: all goes, unless a finished file is there."""
        if not self.hashes:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _is_whole(self, name: str, digest: str) -> bool:
        file = self.folder / name
        return file.is_file() and sha256(file) == digest

    def _refuse_other(self, before: Mapping[str, Any]) -> None:
        for name in {**before, **self.identity}:
            was, now = before.get(name), self.identity.get(name)
            if was != now:
                raise ZooError(
                    f"{self.path} holds an unfinished conversion whose {name} was {was!r} and is now {now!r}; "
                    "go on with the same, or remove it"
                )

    def _note(self) -> None:
        write_json(self.record, {"identity": self.identity, "finished": self.hashes})

    def _clear(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.hashes:
                path.unlink()


@contextmanager
def resumable_directory(out: Path, identity: Mapping[str, Any]) -> Iterator[Unfinished]:
    """A directory to write, renamed to `out` at the end.

    A `ZooError` removes it. Anything else that ends the run (a signal, a full disk) leaves `OUT.partial` if a file in
    it is finished; a later run of the same `identity` takes it up.

    Raises:
        ZooError: `out` exists or cannot be made, another process writes it, or an unfinished run was of something else.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    unfinished, made = Unfinished(out, identity), missing_parents(out)
    with sigterm_interrupts():
        make_directory(unfinished.path, out)
        with _alone(unfinished.path):
            unfinished.take_up()
            try:
                yield unfinished
                refuse_existing(out)
                unfinished.folder.rename(out)
                unfinished.remove()
            except ZooError:
                unfinished.remove()
                remove_empty(made)
                raise
            except BaseException:
                unfinished.keep_or_remove()
                remove_empty(made)
                raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the directory's lock, which ends with the process however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ZooError(
                f"{folder} is being written by another process; wait for it or choose another output"
            ) from None
        yield
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
