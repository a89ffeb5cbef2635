"""Programs that XLA has compiled, kept on disk, so that the next run need not compile them again.

Commands call `enable_if_possible`; other programs call `enable` before they compile anything.
Entries lie in the user's cache folder, in a folder for this jaxlib, backend and processor, since
XLA stores machine code. `BOUNDJAX_CACHE` names another folder or is `off`.

What a cached program is trusted for: JAX finds an entry by the SHA-256 of the program with its
constants, the compiler's options and flags, the versions of jaxlib and the backend, and the
devices. Bounds from an entry are therefore those of the program that would be compiled,
provided that the entry is what an earlier run wrote. Two checks stand for that: nobody but the user
(and root) can write into the folder, and each entry begins with the SHA-256 of its key and content.
An entry that fails the second check is compiled again and replaced. Entries contain the weights of
networks that are constants of a program, so nobody else may read the folder either.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIABLE = "BOUNDJAX_CACHE"
MAX_BYTES = 2 * 2**30

_SUFFIX = ".executable"
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_NAME = 200  # characters of a key that are kept; its hash is at the end
_LEAST_BYTES = 16 * 2**10  # what an entry counts at least, which also limits their number
_ABANDONED = 3600.0  # seconds after which an unfinished file has no writer any more
# The lines of /proc/cpuinfo that identify a processor.
_PROCESSOR = re.compile(
    r"^(?:vendor_id|cpu family|model|flags|CPU implementer|CPU part|Features)\s*:.*$", re.M
)


class CacheError(ValueError):
    """A folder that cannot be a cache; the message is one line."""


def enable(
    folder: str | os.PathLike[str] | None = None, *, max_bytes: int = MAX_BYTES
) -> Path | None:
    """Keeps compiled programs on disk, and reads those that earlier runs left there.

    Call it before the first compilation, and after `jax.distributed.initialize` if you call that.
    It sets JAX's persistent compilation cache for the whole process. Programs that call back into
    Python are not kept by JAX 0.10.

    Args:
      folder: where caches lie; each jaxlib, backend and processor has its own folder in it. By
        default the one that the environment variable `BOUNDJAX_CACHE` names; else the cache that
        JAX is already set to (`JAX_COMPILATION_CACHE_DIR`), which stays as it is; else `boundjax`
        in the user's cache folder: `$XDG_CACHE_HOME`, `~/.cache` or `~/Library/Caches`.
      max_bytes: the least recently used entries are deleted when all of them together take more.

    Returns:
      The folder in which the entries lie, or None if `BOUNDJAX_CACHE` is `off` or JAX's cache is
      disabled.

    Raises:
      CacheError: if the folder cannot be created, or somebody else can write into it.
    """
    import jax

    location = os.environ.get(VARIABLE, "") if folder is None else os.fspath(folder)
    settings: Any = jax.config  # static tools do not know its options
    if (folder is None and location == "off") or not settings.jax_enable_compilation_cache:
        return None
    if not location and settings.jax_compilation_cache_dir:
        return Path(settings.jax_compilation_cache_dir)
    root = Path(location).expanduser() if location else default_folder()
    if not root.is_absolute():
        name = VARIABLE if folder is None else "folder"
        raise CacheError(f"{name}: expected 'off' or an absolute path, got {location!r}")
    private = private_folder(root.resolve() / _machine(jax.default_backend()))
    _install(Entries(private, max_bytes))
    return private


def enable_if_possible() -> None:
    """Enables the cache for a command, or says in one line on stderr why it runs without one."""
    try:
        enable()
    except CacheError as error:
        print(f"note: no compilation cache: {error}", file=sys.stderr, flush=True)


def default_folder() -> Path:
    """The folder `boundjax` in the user's cache folder.

    Raises:
      CacheError: if the user has no home folder.
    """
    listed = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(listed):  # the standard says to ignore other values
        return Path(listed) / "boundjax"
    try:
        home = Path.home()
    except RuntimeError:
        raise CacheError(f"expected a home folder, got none; name a folder in {VARIABLE}") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "boundjax"


def _machine(backend: str) -> str:
    """A name for this jaxlib, backend and processor: machine code runs where its name is equal."""
    from jaxlib.version import __version__ as version

    processor = "\n".join([sys.platform, platform.machine(), *_processor()])
    return f"jaxlib-{version}-{backend}-{hashlib.sha256(processor.encode()).hexdigest()[:12]}"


def _processor() -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(set(_PROCESSOR.findall(Path("/proc/cpuinfo").read_text())))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return [subprocess.run(command, capture_output=True, text=True, check=True).stdout]
    return [platform.processor()]


def private_folder(folder: Path) -> Path:
    """Creates a folder that only the user can read and write, or checks that it is one.

    Args:
      folder: an absolute path without symbolic links.

    Raises:
      CacheError: if the folder cannot be created; if it, or a folder that it lies in, belongs to
        somebody else or is open to others. Whoever can replace an entry decides what a proof
        computes.
    """
    if not hasattr(os, "geteuid"):
        raise CacheError("expected a system whose folders have owners and modes")
    try:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        _check_folder(folder, {os.geteuid()})
        # Unprivileged containers show root's folders as those of another user.
        trusted = {os.geteuid(), 0, Path(folder.anchor).stat().st_uid}
        for path in _ancestors(folder):
            _check_folder(path, trusted, sticky=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror}; name another in {VARIABLE}") from None
    return folder


def _ancestors(folder: Path) -> Sequence[Path]:
    return folder.parents


def _check_folder(path: Path, owners: set[int], *, sticky: bool = False) -> None:
    """Checks who owns a folder and who may write into it.

    With `sticky`, everybody may if it has the sticky bit, as `/tmp`: then others cannot rename or
    delete what is in it.
    """
    state, advice = path.lstat(), f"name another in {VARIABLE}, or set {VARIABLE}=off"
    if not stat.S_ISDIR(state.st_mode):
        raise CacheError(f"expected a folder, got {path}; {advice}")
    if state.st_uid not in owners:
        raise CacheError(
            f"expected a folder that only you can write into, got {path}, which belongs to user "
            f"{state.st_uid}; {advice}"
        )
    open_to_others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if open_to_others and not (sticky and state.st_mode & stat.S_ISVTX):
        raise CacheError(
            f"expected a folder that only you can write into, got {path}, which others can write "
            f"into; run chmod go-w {path}, or {advice}"
        )


def _install(entries: Entries) -> None:
    """Makes JAX keep its programs in `entries`."""
    import jax
    from jax._src import compilation_cache as internal  # JAX has no public way to replace its files
    from jax.experimental.compilation_cache import compilation_cache

    if not hasattr(internal, "get_file_cache"):
        raise CacheError(f"expected JAX 0.9 to 0.12, got {jax.__version__}, which has other caches")
    files: Any = getattr(internal.get_file_cache, "replaced", internal.get_file_cache)

    def get_file_cache(path: str) -> Any:
        return (entries, path) if path == str(entries.folder) else files(path)

    get_file_cache.replaced = files  # type: ignore[attr-defined]
    internal.get_file_cache = get_file_cache
    jax.config.update("jax_compilation_cache_dir", str(entries.folder))
    # By default JAX keeps only what took a second; a search has dozens of smaller programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


class Entries:
    """The files of a cache, in place of JAX's.

    JAX writes into the final file, so a process that is killed leaves half an entry, which JAX
    never replaces; it limits the size only with another package, and takes longer for every write.

    Attributes:
      folder: where the entries lie. Folders beside it hold those of other machines and versions;
        the limit is on all of them together.
    """

    def __init__(self, folder: Path, max_bytes: int):
        """Keeps at most `max_bytes` in the folders beside `folder` and in it."""
        self.folder, self._max_bytes = folder, max_bytes
        self._bytes: int | None = None  # unknown before the first entry is written
        self._broken = False

    def get(self, key: str) -> bytes | None:
        """Returns what was put under a key; None if there is nothing, or nothing undamaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            digest, value = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest != _digest(key, value):
                return None
            os.utime(path)  # used just now
        except OSError:  # absent, deleted meanwhile, or unreadable: compile
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Writes an entry, whole or not at all.

        Raises:
          OSError: if it cannot be written, the first time; JAX makes that a warning.
        """
        size = _size(len(value))
        if self._broken or size > self._max_bytes:
            return
        if self._bytes is None or self._bytes + size > self._max_bytes:
            self._bytes = self._trim(self._max_bytes - size)
        self._bytes += size
        try:
            _write(self._path(key), _digest(key, value) + value)
        except OSError:
            self._broken = True
            raise

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[-_MAX_NAME:]}{_SUFFIX}"

    def _trim(self, max_bytes: int) -> int:
        """Deletes the least recently used entries if there are too many; returns what is left."""
        entries, now = [], time.time()
        for path in self.folder.parent.glob(f"jaxlib-*/*{_SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                if path.suffix == _SUFFIX:
                    entries.append((state.st_mtime, _size(state.st_size), path))
                elif state.st_mtime < now - _ABANDONED:
                    path.unlink()
        left = sum(size for _, size, _ in entries)
        if left <= max_bytes:
            return left
        for _, size, path in sorted(entries):
            if left <= 0.75 * max_bytes:  # not for every new entry again
                break
            path.unlink(missing_ok=True)
            left -= size
        return left


def _digest(key: str, value: bytes) -> bytes:
    digest = hashlib.sha256(key.encode() + b"\0")
    digest.update(value)
    return digest.digest()


def _size(count: int) -> int:
    return max(count, _LEAST_BYTES)


def _write(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
