"""The papers' objectives on one image at a time, in NumPy: nothing here asks boundjax.

What an objective draws at random is drawn here as well, by `jax.random` from the keys that it
derives.
"""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from plain_bounds import Layers, Set, backward, box, chord, interval_margins, intervals, values

from experiments.methods.method import Coefficients
from experiments.settings.config import Config


class Image(NamedTuple):
    """One image and the network that sees it.

    `held` are the layers at which a gradient takes what it holds constant. `key` is that of the
    image, `bound_key` that of the step's bounds; `vector` is of the first layer's power iteration.
    """

    x: np.ndarray
    label: int
    layers: Layers
    held: Layers
    config: Config
    weights: Coefficients
    key: jax.Array
    bound_key: jax.Array
    vector: np.ndarray | None

    @property
    def rows(self):
        """`z_y - z_m` for the other classes `m`, `[C - 1, C]`."""
        eye = np.eye(len(self.layers[-1][1]))
        others = (self.label + 1 + np.arange(len(eye) - 1)) % len(eye)
        return eye[self.label] - eye[others]

    @property
    def set(self):
        """What the image may become."""
        robust, eps = self.config.robust, self.weights.eps
        return Set(self.x, eps, "2") if robust.norm == "2" else box(*self.ends(eps))

    def ends(self, eps):
        ends = self.x - eps, self.x + eps
        return np.clip(ends, 0, 1) if self.config.robust.clip else ends

    def margins(self, x):
        return self.rows @ values(self.layers, x)[-1]


class Found(NamedTuple):
    """What takes the place of the worst cross-entropy, certified margins, bounds before each ReLU.

    `relaxed`: margins of the relaxation, where they are attained, rows on each ReLU's output.
    """

    loss: float
    verified: np.ndarray
    bounds: list[tuple[np.ndarray, np.ndarray]] = []  # noqa: RUF012
    relaxed: tuple | None = None


def ce(margins):
    """`log(1 + sum_m exp(-margin_m))`."""
    return np.log1p(np.sum(np.exp(-margins), axis=-1))


# Lower slopes of unstable ReLUs, from an image and its bounds.


def adaptive(image, bounds):
    return [(upper > -lower).astype(float) for lower, upper in bounds]


def parallel(image, bounds):
    return [chord(*layer) for layer in bounds]


def uniform(image, bounds):
    """A key for every op: the image's, folded with the op's label."""
    result = []
    for number, (lower, _) in enumerate(bounds):
        digest = hashlib.sha256(f"Dense_{number}/relu".encode()).digest()
        key = jax.random.fold_in(image.key, int.from_bytes(digest[:4], "little"))
        result.append(np.asarray(jax.random.uniform(key, lower.shape)))
    return result


def zero_or_one(image, bounds):
    """1 with probability `p` where `|l| > |u|`, with `q` elsewhere."""
    p, q = image.config.relaxation.p, image.config.relaxation.q
    return [
        (number < np.where(abs(lower) > abs(upper), p, q)).astype(float)
        for number, (lower, upper) in zip(uniform(image, bounds), bounds, strict=True)
    ]


# ------------------------------------------------------------------ robust losses on bounds


def natural(image):
    margins = image.margins(image.x)
    return Found(ce(margins), margins)


def ibp(image, around=None):
    around = image.set if around is None else around
    margins = interval_margins(image.layers, image.rows, around)
    return Found(ce(margins), margins, intervals(image.layers, around)[0])


def mixed(slopes_of):
    """CE of `(1 - beta) IBP + beta linear` (Zhang et al. 2020)."""

    def loss(image):
        interval, beta = ibp(image), image.weights.beta
        slopes = slopes_of(image, interval.bounds)
        relaxed = backward(image.layers, image.rows, image.set, interval.bounds, slopes)
        margins = (1 - beta) * interval.verified + beta * relaxed[0]
        verified = np.maximum(interval.verified, relaxed[0])
        return Found(ce(margins), verified, interval.bounds, relaxed)

    return loss


def fused(image):
    """`exp(s) <= k s + d` on the interval of every `s = -margin`, and one row for all (Xu et al.).

    Of the row the better one of its linear and its interval bound counts.
    """
    interval, beta = ibp(image), image.weights.beta
    low, high = interval_margins(image.layers, -image.rows, image.set), -interval.verified
    slopes = (np.exp(high) - np.exp(low)) / (high - low)
    offsets = np.exp(low) - slopes * low
    row, lines = (slopes @ image.rows)[None], adaptive(image, interval.bounds)
    linear = backward(image.layers, row, image.set, interval.bounds, lines)[0]
    (bound,) = np.maximum(linear, interval_margins(image.layers, row, image.set))
    loss = np.log(1 + np.sum(offsets) - bound)
    return interval._replace(loss=(1 - beta) * interval.loss + beta * loss)


def one_step(image):
    """Signed-gradient steps on the slopes of one layer, from random ones (Lee et al. 2021).

    The iterate of the least loss is trained on, and every iterate certifies.
    """
    interval, beta = ibp(image), image.weights.beta
    (slopes,), relaxation = uniform(image, interval.bounds), image.config.relaxation
    iterates = []
    for _ in range(relaxation.steps + 1):
        relaxed = backward(image.layers, image.rows, image.set, interval.bounds, [slopes])
        margins = (1 - beta) * interval.verified + beta * relaxed[0]
        iterates.append((ce(margins), relaxed))
        # d margin_m / d slope_j = max(row_mj, 0) z_j, z the pre-activations at the worst input.
        rises = np.maximum(relaxed[2][0], 0) * values(image.layers, relaxed[1])[0]
        direction = np.sign(np.exp(-margins) @ rises)
        slopes = np.clip(slopes + relaxation.step_size * direction, 0, 1)
    best, relaxed = min(iterates, key=lambda iterate: iterate[0])
    verified = np.max([interval.verified, *(r[0] for _, r in iterates)], axis=0)
    return Found(best, verified, interval.bounds, relaxed)


def cap(image):
    """The bounds of every layer by the same walk, with parallel slopes (Wong & Kolter 2018)."""
    layers, bounds = image.layers, []
    for number, (weight, _) in enumerate(layers[:-1]):
        part, slopes, eye = layers[: number + 1], parallel(image, bounds), np.eye(len(weight))
        lower = backward(part, eye, image.set, bounds, slopes)[0]
        upper = -backward(part, -eye, image.set, bounds, slopes)[0]
        bounds.append((lower, upper))
    relaxed = backward(layers, image.rows, image.set, bounds, parallel(image, bounds))
    # Intervals from the last bounds on certify as well.
    weight, bias = layers[-1]
    last = box(*(np.maximum(end, 0) for end in bounds[-1]))
    interval = last.least(image.rows @ weight)[0] + image.rows @ bias
    return Found(ce(relaxed[0]), np.maximum(relaxed[0], interval), bounds, relaxed)


def cap_projected(image):
    """The first layer's l1 norms are medians of Cauchy numbers, the same for all images."""
    (weight, bias), count = image.layers[0], image.config.relaxation.projections
    key = jax.random.fold_in(image.bound_key, 0)  # 0 is the input
    rows = np.asarray(jax.random.cauchy(key, (count, image.x.size)))
    radius = np.median(np.abs((rows * image.set.radius) @ weight.T), axis=0)
    center = weight @ image.set.center + bias
    bounds = [(center - radius, center + radius)]
    relaxed = backward(image.layers, image.rows, image.set, bounds, parallel(image, bounds))
    return Found(ce(relaxed[0]), ibp(image).verified, bounds, relaxed)


def cap_all_projected(image):
    """As many projections as units: every norm is exact, but only intervals certify."""
    return cap(image)._replace(verified=ibp(image).verified)


# ------------------------------------------------------------------ attacks and small boxes


def attacked(image):
    """Signed steps on the cross-entropy from the image itself; the least margin's iterate is kept.

    When the weights change a little, the point stays where it is.
    """
    adversary = image.config.adversary
    eps, point, iterates = adversary.scale * image.weights.eps, image.x, []
    for _ in range(adversary.steps + 1):
        iterates.append(point)
        # The gradient, up to a positive factor.
        rises = -np.exp(-image.margins(point)) @ image.rows
        for number in reversed(range(len(image.layers))):
            rises = rises @ image.layers[number][0]
            if number:
                rises = rises * (values(image.layers, point)[number - 1] > 0)
        moved = point + adversary.step_size * eps * np.sign(rises)
        point = np.clip(moved, *image.ends(eps))
    return min(iterates, key=lambda iterate: min(image.margins(iterate)))


def pgd(image):
    return ibp(image)._replace(loss=ce(image.margins(attacked(image))))


def small_box(image):
    """A part of the clipped ball, around the attacked image as far as it fits into that ball."""
    lower, upper = image.ends(image.weights.eps)
    radius = image.config.adversary.box * (upper - lower) / 2
    return Set(np.clip(attacked(image), lower + radius, upper - radius), radius)


def uncertified(result):
    return result._replace(verified=np.full_like(result.verified, -np.inf))


def sabr(image):
    return uncertified(ibp(image, small_box(image)))


def mtl_ibp(image):
    alpha, attack = image.config.adversary.alpha, pgd(image)
    return attack._replace(loss=alpha * ibp(image).loss + (1 - alpha) * attack.loss)


def exp_ibp(image):
    alpha, attack = image.config.adversary.alpha, pgd(image)
    return attack._replace(loss=ibp(image).loss ** alpha * attack.loss ** (1 - alpha))


def cc_ibp(image):
    alpha, interval = image.config.adversary.alpha, ibp(image)
    margins = alpha * interval.verified + (1 - alpha) * image.margins(attacked(image))
    return interval._replace(loss=ce(margins))


def taps(image, around=None):
    """IBP up to the first ReLU, an attack on every margin in that box, the product of both."""

    def latent_margins(image, latent):
        weight, bias = image.layers[1]
        return np.sum(image.rows @ weight * np.maximum(latent, 0), axis=-1) + image.rows @ bias

    held, adversary = image._replace(layers=image.held), image.config.adversary
    result, then = ibp(image, around), ibp(held, around)
    lower, upper = then.bounds[0]
    width, rows = upper - lower, held.rows @ held.layers[1][0]
    keys = jax.random.split(image.key, len(rows))
    points = lower + width * np.stack([jax.random.uniform(key, width.shape) for key in keys])
    for _ in range(adversary.steps):
        moved = points - adversary.step_size * width * np.sign(rows) * (points > 0)
        points = np.clip(moved, lower, upper)
    # Gradients reach the ends of the box as if the points moved with an end that is near.
    linked = points
    for end, end_then in zip(result.bounds[0], (lower, upper), strict=True):
        near = np.maximum(0, 1 - abs(points - end_then) / (0.5 * width))
        linked = linked + near * (end - end_then)
    attack, attack_then = ce(latent_margins(image, linked)), ce(latent_margins(held, points))
    # The product, whose gradient weighs the attack `taps_scale` times as much as the intervals.
    share = 2 / (1 + adversary.taps_scale)
    loss = then.loss * attack_then
    loss += share * attack_then * (result.loss - then.loss)
    loss += (2 - share) * then.loss * (attack - attack_then)
    return result._replace(loss=loss)


def taps_at_a_corner(image):
    """Where the rest is linear, enough steps find the corner that intervals have margins of."""
    result = ibp(image)
    return result._replace(loss=result.loss**2)


def staps(image):
    return uncertified(taps(image, small_box(image)))


# ------------------------------------------------------------------ Lipschitz bounds


def last_ball(image):
    """Centre and radius before the ReLU, behind which the radius is the same."""
    (weight, bias), (held, _) = image.layers[0], image.held[0]
    # One power iteration; its vectors are constants.
    left = held @ image.vector
    left = left / np.linalg.norm(left)
    right = left @ held
    norm = left @ weight @ right / np.linalg.norm(right)
    return weight @ image.x + bias, norm * image.weights.eps


def lmt(image):
    _, rho = last_ball(image)
    rows = image.rows @ image.layers[1][0]
    margins = image.margins(image.x) - rho * np.linalg.norm(rows, axis=1)
    return Found(ce(margins), margins)


def bcp(image):
    """Over the last ball and box: intervals, cut with the box around the ball at every layer."""
    (weight, _), (center, rho), eps = image.layers[0], last_ball(image), image.weights.eps
    ((lower, upper),), _ = intervals(image.layers, box(*image.ends(eps)))
    # The spectral norm cuts nothing more, unless its power iteration has hardly begun.
    for reach in (eps * np.linalg.norm(weight, axis=1), rho):
        lower, upper = np.maximum(lower, center - reach), np.minimum(upper, center + reach)
    lower, clean, upper = (np.maximum(end, 0) for end in (lower, center, upper))
    rows = image.rows @ image.layers[1][0]
    lost = [most(-row, rho, clean - lower, upper - clean) for row in rows]
    margins = image.margins(image.x) - lost
    return Found(ce(margins), margins)


def most(row, rho, below, above):
    """`max row @ d` over `||d|| <= rho` and `-below <= d <= above`, by bisection.

    The maximum is at `|d| = min(alpha |row|, room)`.
    """
    row, room = abs(row), np.where(row > 0, above, below)
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        fits = np.linalg.norm(np.minimum(middle * row, room)) <= rho
        low, high = (middle, high) if fits else (low, middle)
    return row @ np.minimum(low * row, room)


# ------------------------------------------------------------------ regularizers


def of_relaxation(image, result):
    """REG's `gap sum_t d_t + slack sum_t r_t`."""
    weights = image.config.regularizers
    if not (weights.gap or weights.slack):
        return 0.0
    margins, points, rows = result.relaxed
    *met, logits = values(image.layers, points)
    gaps = np.sum(image.rows * logits, axis=1) - margins
    off, count = 0.0, 0
    for x, row, (lower, upper) in zip(met, rows, result.bounds, strict=True):
        unstable = (lower < 0) & (upper > 0)
        nearest = np.where(row < 0, np.minimum(abs(x - lower), abs(x - upper)), abs(x))
        off, count = off + np.sum(nearest * unstable), count + np.sum(unstable)
    return weights.gap * np.sum(gaps) + weights.slack * off / max(count, 1)


def of_batch(config, ramp, input_radius, layers, kernels):
    """The terms of Shi et al., that of Xiao et al. and the l1 norm.

    `layers`: bounds `[B, n]` before each ReLU.
    """
    weights, tau = config.regularizers, config.regularizers.tau
    total = weights.l1 * sum(np.sum(abs(kernel)) for kernel in kernels)
    for lower, upper in layers:
        total += weights.relu_stability * np.mean(np.sum(-np.tanh(1 + lower * upper), axis=1))
        if not (weights.tightness and weights.relu_balance):
            continue
        center, on, off = (lower + upper) / 2, lower > 0, upper < 0
        square = (center - np.mean(center)) ** 2
        mean = np.mean(center * on) / -np.mean(center * off)
        variance = np.sum(square * on) / np.sum(square * off)
        balance = sum(max(tau - min(r, 1 / r), 0) / tau for r in (mean, variance))
        tightness = max(tau - input_radius / np.mean((upper - lower) / 2), 0) / tau
        falling = weights.tightness * tightness + weights.relu_balance * balance
        total += (1 - ramp) * falling / len(layers)
    return total


# ------------------------------------------------------------------ objectives


def layers_of(params, model):
    """The layers of a network, the first one with the normalisation of its input."""
    layers = [(layer["kernel"].T, layer["bias"]) for layer in params.values()]
    if model.std:
        weight, bias = layers[0]
        weight = weight / model.std[0]
        layers[0] = weight, bias - np.sum(weight, axis=1) * model.mean[0]
    return layers


def objective(loss_of, config, weights, given, params, held):
    """The metrics, from `loss_of` one image.

    `given`: images `[B, ...]`, labels, keys of the images, key of the bounds, power vector. `held`
    are the parameters at which a gradient takes what it holds constant.
    """
    images, labels, keys, *shared = given
    if weights.eps == 0:  # the natural warm-up, regularized at a tiny radius
        weights = weights._replace(eps=1e-6, kappa=1.0)
    networks = [layers_of(p, config.model) for p in (params, held)]
    batch = [
        Image(x.ravel(), label, *networks, config, weights, key, *shared)
        for x, label, key in zip(images, labels, keys, strict=True)
    ]
    result = [loss_of(image) for image in batch]
    clean = [image.margins(image.x) for image in batch]
    natural_loss, robust_loss = np.mean(ce(np.array(clean))), np.mean([f.loss for f in result])
    layers = [np.stack(layer, axis=1) for layer in zip(*(f.bounds for f in result), strict=True)]
    input_radius = np.mean([image.set.radius for image in batch])
    if config.model.std:
        input_radius = input_radius / config.model.std[0]
    kernels = [layer["kernel"] for layer in params.values()]
    terms = [of_relaxation(*pair) for pair in zip(batch, result, strict=True)]
    metrics = {
        "loss": weights.kappa * natural_loss
        + (1 - weights.kappa) * robust_loss
        + weights.ramp * np.mean(terms)
        + of_batch(config, weights.ramp, input_radius, layers, kernels),
        "robust_loss": robust_loss,
        "natural_loss": natural_loss,
        "standard_error": np.mean([not np.all(margins > 0) for margins in clean]),
        "verified_error": np.mean([not np.all(f.verified > 0) for f in result]),
    }
    if layers:
        unstable = [((lower < 0) & (upper > 0)).ravel() for lower, upper in layers]
        metrics["unstable_relus"] = np.mean(np.concatenate(unstable))
    return metrics
