"""auto_LiRPA's side of a comparison: the same network in torch, bounded by the same methods.

`library` imports torch and auto_LiRPA, so only `--peer auto_LiRPA` needs them. jax is not imported,
so the process's memory is theirs alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.benchmarks.process import Case, Prepared
from experiments.settings.errors import ExperimentError

RELEASE = "0.7.1"
_TRACER = "torch.onnx._internal.torchscript_exporter"
_INSTALL = (
    f"install torch and a source checkout of its release {RELEASE} "
    "(`pip install --no-deps -e CHECKOUT`, and what the import then misses: appdirs, pyyaml, "
    "ninja, tqdm, graphviz, packaging); the package on PyPI is 0.3 and too old"
)


def library() -> tuple[Any, Any]:
    """Imports the modules torch and auto_LiRPA, with torch's tracer set to one opset.

    Raises:
      ExperimentError: if they cannot be imported, or auto_LiRPA is another release.
    """
    try:
        torch = importlib.import_module("torch")
        # Since 2.9 the tracer silently falls back to opset 9 unless the modules of the symbolic
        # functions were imported.
        if importlib.util.find_spec(_TRACER) is not None:
            for opset in range(9, 21):
                importlib.import_module(f"{_TRACER}.symbolic_opset{opset}")
            importlib.import_module(f"{_TRACER}._globals").GLOBALS.export_onnx_opset_version = 17
        peer = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise ExperimentError(f"auto_LiRPA cannot be imported ({error}): {_INSTALL}") from error
    version = getattr(peer, "__version__", "unknown")
    if version != RELEASE:
        raise ExperimentError(f"auto_LiRPA is {version}, not {RELEASE}: {_INSTALL}")
    return torch, peer


def channels_first(images: np.ndarray) -> np.ndarray:
    """Transposes images `[B, H, W, C]` to torch's layout `[B, C, H, W]`."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def rows_first(kernel: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Reorders a dense kernel `[H * W * C, out]` behind a flattening to `[out, C * H * W]`."""
    ordered = kernel.reshape(*shape, -1).transpose(3, 2, 0, 1)
    return np.ascontiguousarray(ordered.reshape(kernel.shape[1], -1))


def torch_model(torch: Any, case: Case) -> Any:
    """Builds the network of a case in torch, in evaluation mode."""
    nn, architecture, arrays = torch.nn, case.architecture, case.variables
    layers: list[Any] = []
    normalised = 0

    def fill(tensor: Any, value: np.ndarray) -> None:
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def activate(kind: Any, width: int) -> None:
        nonlocal normalised
        if architecture["batch_norm"]:
            layer, path = kind(width, eps=1e-5), f"BatchNorm_{normalised}"
            fill(layer.weight, arrays[f"params/{path}/scale"])
            fill(layer.bias, arrays[f"params/{path}/bias"])
            fill(layer.running_mean, arrays[f"batch_stats/{path}/mean"])
            fill(layer.running_var, arrays[f"batch_stats/{path}/var"])
            layers.append(layer)
            normalised += 1
        layers.append(nn.ReLU())

    height, width, channels = case.images.shape[1:]
    for i, (filters, kernel, stride, padding) in enumerate(architecture["convolutions"]):
        layer = nn.Conv2d(channels, filters, kernel, stride=stride, padding=padding)
        fill(layer.weight, arrays[f"params/Conv_{i}/kernel"].transpose(3, 2, 0, 1))
        fill(layer.bias, arrays[f"params/Conv_{i}/bias"])
        layers.append(layer)
        activate(nn.BatchNorm2d, filters)
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        channels = filters
    layers.append(nn.Flatten())
    widths = (*architecture["hidden"], architecture["classes"])
    for i, features in enumerate(widths):
        weights = arrays[f"params/Dense_{i}/kernel"]
        layer = nn.Linear(*weights.shape)
        fill(layer.weight, rows_first(weights, (height, width, channels)) if i == 0 else weights.T)
        fill(layer.bias, arrays[f"params/Dense_{i}/bias"])
        layers.append(layer)
        if i + 1 < len(widths):
            activate(nn.BatchNorm1d, features)
    return nn.Sequential(*layers).eval()


def prepare(case: Case, method: str) -> Prepared:
    """Prepares a method of auto_LiRPA for a case: one of `METHODS`, or `forward` for clean values.

    Its options are the defaults (patches, rows for unstable units only) without the early stop.
    The last of its n iterations takes no step, so they equal n - 1 of our steps.

    Raises:
      ExperimentError: if the library is missing, or torch computes different logits.
    """
    torch, peer = library()
    version = f"auto_LiRPA {peer.__version__}, torch {torch.__version__}"
    model = torch_model(torch, case)
    centers = torch.from_numpy(channels_first(case.images))
    specification = torch.from_numpy(case.rows)

    def forward() -> np.ndarray:
        with torch.no_grad():
            return (specification @ model(centers)[..., None])[..., 0].numpy()

    with torch.no_grad():
        difference = np.abs(model(centers).numpy() - case.logits).max()
    if not difference <= 1e-4:
        raise ExperimentError(f"torch's logits of {case.net} differ from ours by {difference:.1e}")
    if method == "forward":
        return Prepared(forward, None, version)
    options = {"iteration": case.steps, "early_stop_patience": case.steps + 1}
    options |= _OPTIMIZATION.get(method, {})
    bounded = peer.BoundedModule(
        model,
        torch.zeros_like(centers),
        bound_opts={"conv_mode": "patches", "optimize_bound_args": options},
    )
    ball = peer.PerturbationLpNorm(
        norm=np.inf,
        x_L=(centers - case.eps).clamp(0.0, 1.0),
        x_U=(centers + case.eps).clamp(0.0, 1.0),
    )
    inputs = (peer.BoundedTensor(centers, ball),)
    only_lower = {"C": specification, "bound_lower": True, "bound_upper": False}

    def lower() -> np.ndarray:
        return METHODS[method](torch, bounded, inputs, only_lower).detach().numpy()

    return Prepared(lower, None, version)


def _plain(method: str) -> Callable[..., Any]:
    """Makes a method without optimisation, which records no gradient."""

    def lower(torch: Any, bounded: Any, inputs: tuple[Any], only_lower: dict[str, Any]) -> Any:
        with torch.no_grad():
            return bounded.compute_bounds(x=inputs, method=method, **only_lower)[0]

    return lower


def _last_rows(by_intervals: bool) -> Callable[..., Any]:
    """Makes alpha-CROWN with fixed intermediate bounds, as in alpha-beta-CROWN: CROWN runs once."""

    def lower(torch: Any, bounded: Any, inputs: tuple[Any], only_lower: dict[str, Any]) -> Any:
        fixed = None
        if by_intervals:
            with torch.no_grad():
                bounded.compute_bounds(x=inputs, method="IBP", **only_lower)
                nodes = [node.inputs[0] for node in bounded.relus]
                fixed = {node.name: (node.lower, node.upper) for node in nodes}
        start = bounded.init_alpha(
            inputs, c=only_lower["C"], bound_upper=False, interm_bounds=fixed
        )
        fixed = start[-1] if fixed is None else fixed
        return bounded.compute_bounds(
            x=inputs, method="alpha-crown", interm_bounds=fixed, **only_lower
        )[0]

    return lower


def _everywhere(torch: Any, bounded: Any, inputs: tuple[Any], only_lower: dict[str, Any]) -> Any:
    """Runs alpha-CROWN that also optimises the slopes behind the intermediate bounds."""
    return bounded.compute_bounds(x=inputs, method="alpha-crown", **only_lower)[0]


# Keyed by our names in `experiments.benchmarks.cases`.
METHODS: Mapping[str, Callable[..., Any]] = {
    "interval": _plain("IBP"),
    "crown-ibp": _plain("CROWN-IBP"),
    "20 steps": _last_rows(by_intervals=True),
    "crown": _plain("CROWN"),
    "crown, 20 steps": _last_rows(by_intervals=False),
    "alpha-crown": _everywhere,
}
_OPTIMIZATION: Mapping[str, Mapping[str, Any]] = {
    "20 steps": {"init_alpha": False, "fix_interm_bounds": True},
    "crown, 20 steps": {"init_alpha": False, "fix_interm_bounds": True},
    "alpha-crown": {"fix_interm_bounds": False},
}
