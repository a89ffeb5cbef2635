"""The memory that a call is estimated to take, what it takes, and the batch size chosen from it."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.certification import memory

MEASURE = """
import re, sys
from pathlib import Path
import flax.linen as nn, jax, numpy as np
import boundjax as bj

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))

method, size = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).uniform(size=(size, 28, 28, 1)).astype("f")
model = Net(), jax.jit(Net().init)(jax.random.key(0), x[:1])
# What is compiled here is not compiled again, whose memory would be measured too.
estimate = bj.memory_estimate(model, x, method, batch_size=size)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
bj.certify(model, x, 0.01, method=method, batch_size=size)
print(estimate.peak, resident("VmHWM") - before)
"""


def model(x):
    return jax.nn.relu(x @ jnp.ones((4, 3))) @ jnp.arange(9.0).reshape(3, 3)


IMAGES = np.linspace(-1.0, 1.0, 40, dtype=np.float32).reshape(10, 4)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak"
)
@pytest.mark.parametrize(("method", "size"), [("interval", 256), ("crown-ibp", 24)])
def test_the_estimate_is_near_the_measured_peak(method, size, project):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, method, str(size)],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    estimate, measured = map(int, result.stdout.split())
    assert 0.7 < estimate / measured < 1.3, (estimate, measured)


def test_the_batch_is_as_large_as_fits():
    whole = bj.memory_estimate(model, IMAGES, "crown-ibp")
    assert whole.batch_size == 10
    part = bj.memory_estimate(model, IMAGES, "crown-ibp", max_bytes=whole.peak - 1)
    assert part.batch_size < 10
    assert part.peak < whole.peak
    expected = bj.certify(model, IMAGES, 0.1)
    small = bj.certify(model, IMAGES, 0.1, max_bytes=part.peak)
    np.testing.assert_allclose(small.margins, expected.margins, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said_before_it_starts():
    need = bj.memory_estimate(model, IMAGES, "interval").peak
    fits = bj.memory_estimate(model, IMAGES, "interval", max_bytes=need - 1).batch_size
    with pytest.raises(MemoryError, match=rf"batch_size 10 .*interval.*batch_size={fits} fits"):
        bj.certify(model, IMAGES, 0.1, method="interval", batch_size=10, max_bytes=need - 1)
    with pytest.raises(MemoryError, match=r"'crown' needs about .* for one example, but 10 bytes"):
        bj.certify(model, IMAGES, 0.1, method="crown", max_bytes=10)


def test_best_takes_what_its_largest_method_takes():
    best = bj.memory_estimate(model, IMAGES, "best").peak
    single = [bj.memory_estimate(model, IMAGES, m).peak for m in ("interval", "crown", "fast-lin")]
    assert best >= max(single)


def test_free_memory_is_some_of_the_machine():
    free = memory.available_bytes()
    assert free is None or 0 <= free < 2**50
    assert memory.readable(3 * 2**29) == "1.5 GiB"
    assert memory.readable(10) == "10 bytes"


def test_one_example_after_the_other_gives_what_all_together_give():
    def together(function):
        return bj.linear(function, sides="lower", intermediate="linear")

    ours = bj.certify(model, IMAGES, 0.1, method="crown", rounding="nearest")
    expected = bj.certify(model, IMAGES, 0.1, method=together)
    np.testing.assert_allclose(ours.margins, expected.margins, rtol=1e-6, atol=1e-6)


def test_a_peak_counts_arguments_results_and_temporaries():
    x = jnp.ones((100, 100))
    compiled = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    assert memory.peak_of(compiled) >= 3 * x.nbytes
