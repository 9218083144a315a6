"""Writing: one way to publish a file, a directory or a line, so that a kill or a full disk leaves the old or the new.

A file is written beside its place, synced and renamed. A directory is built beside its place and exchanged with what is
there in one system call. A journal only grows, one write for each line. Whatever the disk refuses is a `DiskError` that
names the file. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vlm.errors import ConfigError, DataError, DiskError, VLMError

MARKERS = ("config.json", "manifest.json")
"""Without these a directory is no model and no checkpoint: where a directory cannot be exchanged, they go first and
come back last."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Numbers of the errors by which a disk says that it takes no more."""


# --- one file ---------------------------------------------------------------------------------------------------------


@contextmanager
def publishing_file(path: str | Path, *, several: bool = False) -> Iterator[Path]:
    """Write a file beside its place and put it there in one step, when the block ends without an error.

    A reader, or a run after a kill, sees the old or the new content, never half. The file gets the mode of the user's
    umask, whatever library writes it.

    Args:
        several: other processes may write the same file in the same moment; each has a partial file of its own.

    Yields:
        the path to write to: an empty file.

    Raises:
        DiskError: the disk refuses; what was there before is left as it was.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp" if several else f"{target.name}.tmp")
    with disk_errors(target):
        try:
            partial.write_bytes(b"")
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            partial.chmod(mode)
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            with suppress(OSError):  # an error that led here is the one to tell
                partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes, *, several: bool = False) -> None:
    """Replace a file in one step, as `publishing_file` does. Raises `DiskError`."""
    with publishing_file(path, several=several) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str, *, several: bool = False) -> None:
    """`write_bytes` of a text in UTF-8; a lone surrogate becomes its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), several=several)


def write_json(path: str | Path, value: Any, *, several: bool = False) -> None:
    """`write_bytes` of a JSON value."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n", several=several)


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """`write_bytes` of a JSONL file."""
    write_bytes(path, b"".join(encode(record) for record in records))


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8. A lone surrogate becomes its JSON escape, so every text comes back as it was."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def sha256(file: str | Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """Wait until a file or a directory is on the disk. Windows cannot sync a directory: nothing is done there."""
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: str | Path, numbers: Container[int | None] | None = None) -> Iterator[None]:
    """Turn what the system says while `path` is written into a `DiskError` that names it.

    Args:
        numbers: only errors with these numbers (`errno`), such as `FULL`; None means all.
    """
    try:
        yield
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        raise DiskError(
            f"cannot write {path}: {error.strerror or error}; make room or write to another place"
        ) from error


@contextmanager
def rust_disk_errors() -> Iterator[None]:
    """Turn what safetensors and tokenizers say of the disk, as exceptions of their own with the system's number in the
    text, into the OSError that it was."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
        if number is None or isinstance(error, OSError | VLMError):
            raise
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code)) from error


# --- a file that grows ------------------------------------------------------------------------------------------------


class Journal:
    """A JSONL file that only grows: every append is one write that waits for the disk. A context manager.

    A last line that a kill has torn is cut off when the file is opened, so that the next one never continues it.

    Args:
        path: made if it does not exist.
        busy: makes the error for a file that another process has open; None takes no lock.

    Attributes:
        records: the records that were there when the file was opened, in order.

    Raises:
        DataError: a line that is no JSON object; names file and line.
        DiskError: the file cannot be opened or written.
    """

    def __init__(self, path: str | Path, busy: Callable[[], VLMError] | None = None) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by `close`
        try:
            if busy is not None and not _lock(self._file.fileno()):
                raise busy()
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records in one call and wait until they are on the disk; a part that a full disk took is cut off."""
        data = b"".join(encode(record) for record in records)
        with disk_errors(self.path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                self._file.write(data)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), end)
                raise

    def close(self) -> None:
        """Close the file and give its lock back."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with disk_errors(self.path):
                self._file.truncate(whole)
        return parse_lines(data[:whole], self.path)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a journal, without a last line that was torn; an absent file has none.

    Raises:
        DataError: a line that is no JSON object; names file and line.
    """
    if not Path(path).exists():
        return []
    data = Path(path).read_bytes()
    return parse_lines(data[: data.rfind(b"\n") + 1], path)


def parse_lines(data: bytes, path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of whole lines; `path` is for messages. Split at newlines only: U+2028 is legal inside."""
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: damaged line ({str(error)[:100]}); delete the line, or the file to start again"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {line[:80]!r}")
        records.append(record)
    return records


# --- one directory ----------------------------------------------------------------------------------------------------


@contextmanager
def publishing(target: str | Path, keep: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Build a directory beside `target` and put it in its place in one step, when the block ends without an error.

    At every instant `target` is the old directory or the new one, whole. Where the system cannot exchange a directory
    (a mount point, the working directory of a shell, a parent that may not be written) files are moved one by one, and
    in between the directory lacks the files that make it a model (`MARKERS`): it can be refused, never be a mixture.

    Args:
        target: the directory; a symbolic link to one is followed.
        keep: which entries at the top of the old directory stay, by name; None keeps none. New entries win.

    Yields:
        an empty directory on the same disk. Its files get the mode that the user's umask gives.

    Raises:
        ConfigError: `target` is a file.
        DiskError: the disk refuses; the old directory is left as it was.
    """
    place = Path(os.path.realpath(target))
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{target}: is a file, expected a directory to write into; give another name")
    with disk_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        inside = place.is_dir() and not _can_move(place)
        staging = _staging(place, inside)
    try:
        with disk_errors(target, FULL):
            yield staging
        with disk_errors(target):
            carried = set() if keep is None or inside or not place.is_dir() else _carry(place, staging, keep)
            _finish(staging, place, carried)
            if inside:
                _move_files(staging, place, keep)
            else:
                _exchange(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(place: Path, inside: bool) -> Path:
    """A new hidden directory for `place`; those that killed processes of this machine have left are removed."""
    parent = place if inside else place.parent
    writer = f".writing-{platform.node()}-"
    for left in parent.glob(".*.writing-*"):
        if not _alive(left.name.rpartition(writer)[2].partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    number = 0
    while True:
        staging = parent / f".{place.name[:100]}{writer}{os.getpid()}-{number}"
        try:
            staging.mkdir()
            return staging
        except FileExistsError:  # another thread of this process
            number += 1


def _alive(pid: str) -> bool:
    if not pid.isdigit() or os.name == "nt":  # Windows: os.kill would end the process
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _can_move(place: Path) -> bool:
    """Whether a directory may give way to another: no mount point, nobody here stands in it, its parent is writable."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = Path(os.sep)
    return not os.path.ismount(place) and not here.is_relative_to(place) and os.access(place.parent, os.W_OK)


def _carry(old: Path, new: Path, keep: Callable[[str], bool]) -> set[str]:
    """Take over the entries of the old directory that stay, as hard links where the disk has them; their names."""
    carried = set()
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists() or not keep(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(target))
        carried.add(entry.name)
    return carried


def link_or_copy(source: str, target: str) -> None:
    """A hard link to a file, or a copy where the disk has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _finish(staging: Path, place: Path, carried: set[str]) -> None:
    """Give every new file the mode of the user's umask (libraries write 0600), and wait until all is on the disk."""
    mode = stat.S_IMODE(staging.stat().st_mode) & 0o666  # mkdir has applied the umask
    for folder, names, files in os.walk(staging):
        if Path(folder) == staging:
            names[:] = [name for name in names if name not in carried]
            files = [name for name in files if name not in carried]
        for file in (Path(folder) / name for name in files):
            if not file.is_symlink():
                file.chmod(mode)
                sync(file)
        sync(folder)
    if place.is_dir():
        staging.chmod(stat.S_IMODE(place.stat().st_mode))


def _exchange(staging: Path, place: Path) -> None:
    """Put `staging` in the place of `place`; the old directory is then at the name of `staging`."""
    if not place.exists() or not any(place.iterdir()):
        try:
            staging.rename(place)  # also takes the place of an empty directory
            sync(place.parent)
            return
        except (FileExistsError, PermissionError):
            pass  # Windows does not rename over a directory
    if not _swap(staging, place):
        # No such call here (NFS, Windows): two renames, undone when the second is refused.
        old = staging.with_name(staging.name + ".old")
        place.rename(old)
        try:
            staging.rename(place)
        except OSError:
            old.rename(place)
            raise
        old.rename(staging)
    sync(place.parent)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths in one system call; False where there is none.

    Source: Linux renameat2(2) with RENAME_EXCHANGE; macOS renamex_np(2) with RENAME_SWAP.
    """
    if sys.platform.startswith("linux"):
        call, arguments = "renameat2", (-100, os.fsencode(a), -100, os.fsencode(b), 2)
    elif sys.platform == "darwin":
        call, arguments = "renamex_np", (os.fsencode(a), os.fsencode(b), 2)  # type: ignore[assignment]
    else:
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), call, None)
    return function is not None and function(*arguments) == 0


def _move_files(staging: Path, place: Path, keep: Callable[[str], bool] | None) -> None:
    """The new entries into a directory that must stay where it is: markers away first, back last."""
    new = {entry.name for entry in staging.iterdir()}
    for name in MARKERS:
        if name in new or keep is None or not keep(name):
            (place / name).unlink(missing_ok=True)
    for entry in place.iterdir():
        stays = keep is not None and keep(entry.name)
        if entry != staging and (entry.name in new or not stays):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name in sorted(new, key=lambda name: (name in MARKERS, name)):
        (staging / name).rename(place / name)
    sync(place)


# --- one writer -------------------------------------------------------------------------------------------------------


class Lock:
    """A lock that the process holds until `close`, its end or its death; the file names the holder. See `locked`."""

    def __init__(self, path: Path, busy: Callable[[str], VLMError]) -> None:
        self._path = path
        self._descriptor: int | None = None
        while not self._take(busy):  # whoever held it has removed it in between
            self.close()
        try:
            with disk_errors(path):
                os.ftruncate(self._open, 0)
                os.write(self._open, f"{os.getpid()} on {platform.node()}\n".encode())
        except BaseException:
            self.close()
            raise

    @property
    def _open(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def _take(self, busy: Callable[[str], VLMError]) -> bool:
        """Lock the file; False when it is no longer the one at the path, so that its lock keeps nobody out."""
        with disk_errors(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        if not _lock(self._open):
            owner = os.read(self._open, 100).decode(errors="replace").strip() or "unknown"
            self.close()
            raise busy(owner)
        try:
            return os.path.samestat(os.fstat(self._open), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Delete the lock's file and give the lock back; nothing is done once it was given back."""
        if self._descriptor is None:
            return
        if os.name == "nt":  # no open file can be deleted there
            self.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locked(path: str | Path, busy: Callable[[str], VLMError]) -> Lock:
    """Take the lock of `path`, a file that is made for it and stays, unless the holder removes it.

    Args:
        busy: makes the error when somebody holds it, from a text that names the process.

    Raises:
        what `busy` makes. DiskError: the file cannot be made.
    """
    return Lock(Path(path), busy)


def _lock(descriptor: int) -> bool:
    """Lock an open file without waiting; False when somebody else has."""
    if os.name == "nt":
        import msvcrt

        # A byte far behind any content: Windows keeps others from reading what is locked.
        os.lseek(descriptor, 2**40, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
