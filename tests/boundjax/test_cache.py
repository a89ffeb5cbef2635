"""The cache of compiled programs: who may write it, what is read from it, and what is deleted."""

import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax._src import compilation_cache as internal
from jax.experimental.compilation_cache import compilation_cache

import boundjax as bj
from boundjax import cache
from boundjax.ops.domain import DomainWarning
from boundjax.search.programs import Programs

pytestmark = pytest.mark.quick

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Looks at no folder above the test's own, whatever the modes of this machine's /tmp are."""

    def ancestors(folder):
        return [path for path in folder.parents if path.is_relative_to(tmp_path)]

    monkeypatch.setattr(cache, "_ancestors", ancestors)
    tmp_path.chmod(0o700)


@pytest.fixture
def restored(monkeypatch):
    """Leaves JAX without a cache."""
    monkeypatch.setattr(internal, "get_file_cache", internal.get_file_cache)
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def reads(monkeypatch):
    """Whether each program that was asked for lay in the cache."""
    result, get = [], cache.Entries.get

    def recorded(self, key):
        value = get(self, key)
        result.append(value is not None)
        return value

    monkeypatch.setattr(cache.Entries, "get", recorded)
    return result


def computed():
    """Bounds of a function that is new to JAX, which has to compile or to read it."""
    box = bj.Box(-np.ones(3, np.float32), np.ones(3, np.float32))
    return np.asarray(jax.jit(lambda box: bj.linear(lambda x: jnp.tanh(x) * x)(box))(box))


# --- JAX ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored")
def test_programs_are_read_again_and_damaged_ones_compiled_again(tmp_path, reads):
    folder = cache.enable(tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = computed()
    assert reads
    assert not any(reads)
    entries = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(entries) == len(reads)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in entries)

    def read_again():
        reads.clear()
        bounds = computed()
        assert reads
        return bounds

    np.testing.assert_array_equal(read_again(), first)
    assert all(reads)
    for path, content in entries.items():
        path.write_bytes(content[: len(content) // 2])  # as a process that is killed leaves it
    np.testing.assert_array_equal(read_again(), first)
    assert not any(reads)
    np.testing.assert_array_equal(read_again(), first)
    assert all(reads)


@pytest.mark.usefixtures("restored")
def test_a_program_that_calls_back_tells_what_this_process_tells(tmp_path):
    """Two programs that differ only in what Python prints may share an entry, not the message."""
    cache.enable(tmp_path)

    def renamed(x):
        return jnp.log(x)

    for log in (jnp.log, renamed):
        bounds = jax.jit(lambda box, log=log: bj.interval(log)(box))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DomainWarning)
            jax.block_until_ready(bounds(bj.Box(-jnp.ones(2), jnp.ones(2))))
            jax.effects_barrier()
        (warned,) = caught
        assert "leave its domain" in str(warned.message)
        assert ("renamed" in str(warned.message)) == (log is renamed)


def softmax_by_quotient(x):
    terms = jnp.exp(x)
    return terms / (1.0 + jnp.sum(terms))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "function", [softmax_by_quotient, lambda x: 1.0 / x, lambda x: jnp.log(x) * jnp.sqrt(x)]
)
@pytest.mark.sampled(3)
def test_a_search_keeps_programs_on_functions_that_are_not_defined_everywhere(
    function, tmp_path, reads
):
    """Other bounds call back into Python, to warn; proofs do not, before and afterwards."""
    folder = cache.enable(tmp_path / "cache")
    ends = np.full(3, 0.5, np.float32), np.ones(3, np.float32)
    box, rows = bj.Box(*ends), np.eye(3, dtype=np.float32)

    def warns():
        lowered = jax.jit(lambda box: bj.linear(function)(box)).lower(box)
        return "callback" in lowered.as_text()

    def called(programs):
        many = [np.stack([a, a]) for a in (*ends, rows)]
        rest = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32), np.ones((2, 3), bool)
        root = programs.domains.root
        return [
            (programs.bounds("crown"), (*ends, rows)),
            (programs.split("crown"), (*many, *rest)),
            (root, (*ends, rows, programs.domains.unknown)),
        ]

    assert warns()
    for program, arguments in called(Programs(function, (3,))):
        assert "callback" not in program.lower(*arguments).as_text()
        before = len(list(folder.iterdir()))
        first = jax.device_get(program(*arguments))
        assert len(list(folder.iterdir())) > before
        assert np.isfinite(jax.tree.leaves(first)[0]).all()
    reads.clear()
    for program, arguments in called(Programs(function, (3,))):
        program(*arguments)
    assert reads
    assert all(reads)
    assert warns()


@pytest.mark.usefixtures("restored")
def test_jax_keeps_a_cache_that_the_user_set(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    replaced = internal.get_file_cache
    assert cache.enable() == tmp_path / "own"
    assert internal.get_file_cache is replaced
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    # A folder that is named to us is meant for us.
    assert cache.enable(tmp_path / "ours").parent == tmp_path / "ours"
    files, _ = internal.get_file_cache(str(tmp_path / "own"))
    assert not isinstance(files, cache.Entries)


@pytest.mark.usefixtures("restored")
def test_the_variable_moves_the_cache_or_turns_it_off(tmp_path, monkeypatch, capsys):
    assert os.environ[cache.VARIABLE] == "off"  # of all tests
    assert cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "moved"))
    assert cache.enable().parent == tmp_path / "moved"
    monkeypatch.setenv(cache.VARIABLE, "0")
    expected = "BOUNDJAX_CACHE: expected 'off' or an absolute path, got '0'"
    with pytest.raises(cache.CacheError, match=expected):
        cache.enable()
    cache.enable_if_possible()
    assert capsys.readouterr().err == f"note: no compilation cache: {expected}\n"
    jax.config.update("jax_enable_compilation_cache", False)
    assert cache.enable(tmp_path) is None


def test_another_jax_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(internal, "get_file_cache")
    with pytest.raises(cache.CacheError, match=f"got {jax.__version__}, which has other caches"):
        cache.enable(tmp_path)


def test_the_default_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.default_folder() == tmp_path / "x" / "boundjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.default_folder() == tmp_path / ".cache" / "boundjax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.default_folder() == tmp_path / "Library" / "Caches" / "boundjax"

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(cache.CacheError, match="expected a home folder"):
        cache.default_folder()


def test_machines_and_versions_do_not_share_a_folder(monkeypatch):
    def name(backend="cpu", processor="flags: avx"):
        monkeypatch.setattr(cache, "_processor", lambda: [processor])
        return cache._machine(backend)

    assert name() == name()
    assert len({name(), name("gpu"), name("cpu", "flags: avx avx512f")}) == 3
    assert f"jaxlib-{jax.lib.__version__}-cpu-" in name()


def test_the_processor_is_told_from_others(monkeypatch):
    lines = cache._processor()
    assert any(lines)
    if Path("/proc/cpuinfo").exists():
        assert any(line.startswith(("flags", "Features")) for line in lines)
        assert len(set(lines)) == len(lines)

    def absent(self, *arguments):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    answered = subprocess.CompletedProcess([], 0, "Apple M2\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answered)
    assert cache._processor() == ["Apple M2\n"]


# --- who may write -----------------------------------------------------------------------------


def refused(folder, *pieces):
    with pytest.raises(cache.CacheError) as caught:
        cache.private_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "BOUNDJAX_CACHE" in message
    for piece in pieces:
        assert piece in message


def test_a_folder_is_created_for_the_user_alone(tmp_path):
    old = os.umask(0o002)
    try:
        folder = cache.private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(old)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in (folder, *folder.parents[:2]))
    folder.chmod(0o755)  # others could read the weights of networks
    assert stat.S_IMODE(cache.private_folder(folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_write_into_is_refused(mode, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    refused(folder, f"got {folder}, which others can write into; run chmod go-w {folder}")
    assert stat.S_IMODE(folder.stat().st_mode) == mode & 0o1777  # it is not ours to change


def test_a_folder_in_one_that_others_write_into_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused(tmp_path / "open" / "cache", f"got {tmp_path / 'open'}, which others can write into")
    (tmp_path / "open").chmod(0o1777)  # as /tmp: nobody can replace what belongs to the user
    cache.private_folder(tmp_path / "open" / "cache")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    refused(folder, f"got {folder}, which belongs to user {folder.stat().st_uid}")


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "expected a folder, got")
    refused(tmp_path / "file" / "cache", "Not a directory")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    refused(tmp_path / "link", "expected a folder, got")
    # A link of the user's own is followed before.
    (tmp_path / "cache").symlink_to(tmp_path / "folder")


# --- entries -----------------------------------------------------------------------------------


@pytest.fixture
def entries(tmp_path):
    folder = tmp_path / "jaxlib-1-cpu-0"
    folder.mkdir()
    return cache.Entries(folder, 2**20)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_entry_is_no_entry(damage, entries):
    entries.put("key", b"program")
    assert entries.get("key") == b"program"
    (path,) = entries.folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert entries.get("key") is None
    entries.put("key", b"program")
    assert entries.get("key") == b"program"


def test_an_entry_under_the_name_of_another_is_no_entry(entries):
    entries.put("key", b"program")
    (path,) = entries.folder.iterdir()
    path.rename(entries._path("other"))
    assert entries.get("other") is None
    assert entries.get("absent") is None


def test_a_long_name_keeps_its_hash(entries):
    keys = ["jit_" + "f" * 300 + "-" + digest * 64 for digest in "ab"]
    for key in keys:
        entries.put(key, key.encode())
    assert [entries.get(key) for key in keys] == [key.encode() for key in keys]


def test_an_entry_that_cannot_be_read_or_written_is_compiled(entries):
    entries._path("key").mkdir()
    assert entries.get("key") is None
    with pytest.raises(OSError, match="key"):
        entries.put("key", b"program")
    entries.put("key", b"program")  # said once
    assert [path.name for path in entries.folder.iterdir()] == ["key.executable"]


def test_the_least_recently_used_entries_make_room(tmp_path, entries):
    """The limit counts the folders of all versions; there is room for more entries afterwards."""
    other = cache.Entries(tmp_path / "jaxlib-0-cpu-0", 2**20)
    other.folder.mkdir()
    unfinished = other.folder / "x.executable.abc"
    unfinished.touch()
    other.put("oldest", b"a" * 2**18)
    entries.put("old", b"b" * 2**18)
    entries.put("used", b"c" * 2**18)
    now = time.time()
    os.utime(unfinished, (now, now - 7200))
    for age, one, key in ((300, entries, "used"), (200, other, "oldest"), (100, entries, "old")):
        os.utime(one._path(key), (now, now - age))
    later = cache.Entries(entries.folder, 2**20)
    assert later.get("used") == b"c" * 2**18
    later.put("new", b"d" * (2**18 - 100))
    assert other._path("oldest").exists()  # all of it fits still
    assert not unfinished.exists()
    later.put("newest", b"e")
    assert not other._path("oldest").exists()
    assert not later._path("old").exists()
    assert [later.get(key)[:1] for key in ("used", "new", "newest")] == [b"c", b"d", b"e"]


def test_many_small_entries_count_as_16_kib_each(entries):
    for number in range(200):
        entries.put(str(number), b"a")
    assert 2**20 // 2**14 * 0.7 <= len(list(entries.folder.iterdir())) <= 2**20 // 2**14


def test_an_entry_larger_than_the_limit_is_not_kept(entries):
    entries.put("small", b"a")
    entries.put("large", b"b" * (2**20 + 1))
    assert entries.get("small") == b"a"
    assert entries.get("large") is None
