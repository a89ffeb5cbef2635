"""The objectives of random networks in NumPy: nothing here asks boundjax."""

from typing import Any, NamedTuple

import numpy as np

Layers = list[tuple[np.ndarray, np.ndarray]]


class Draw(NamedTuple):
    """A pass: its layers `[out, in]`, the noise on the input of each, the slope of a LeakyReLU."""

    layers: Layers
    noises: list[Any]
    slope: float

    def logits(self, x):
        """Of one image, a vector."""
        return self.trace(x)[-1]

    def trace(self, x):
        """The pre-activations of every layer."""
        values = []
        for number, ((weight, bias), noise) in enumerate(
            zip(self.layers, self.noises, strict=True)
        ):
            x = x if number == 0 else np.where(x > 0, x, self.slope * x)
            x = weight @ (x + noise) + bias
            values.append(x)
        return values

    def gradient(self, x, label):
        """Of the cross-entropy with respect to the image."""
        trace = self.trace(x)
        row = softmax(trace[-1]) - np.eye(len(trace[-1]))[label]
        for number in reversed(range(len(self.layers))):
            row = row @ self.layers[number][0]
            if number:
                row = row * np.where(trace[number - 1] > 0, 1, self.slope)
        return row


def softmax(z):
    e = np.exp(z - np.max(z))
    return e / np.sum(e)


def ce(z, label):
    return -np.log(softmax(z)[label])


def gaussian(mean, log_std, xi):
    """`w = mean + e^s xi`, layer by layer."""
    return [
        tuple(m + np.exp(s) * x for m, s, x in zip(*parts, strict=True))
        for parts in zip(mean, log_std, xi, strict=True)
    ]


def kl(mean, log_std, prior):
    total = 0.0
    for means, logs in zip(mean, log_std, strict=True):
        for mu, s in zip(means, logs, strict=True):
            total += np.sum(np.log(prior) - s + (np.exp(2 * s) + mu**2) / (2 * prior**2) - 0.5)
    return total


def attacked(image, label, eps, length, draws):
    """PGD from the image, one draw per step; the last iterate."""
    point = image
    for draw in draws:
        moved = point + length * np.sign(draw.gradient(point, label))
        point = np.clip(np.clip(moved, image - eps, image + eps), 0, 1)
    return point


def measure(gradients, name):
    """GradDiv's measures of the gradients of one image, `[n, p]`; (2.2.16) as Banerjee has it."""
    count, size = gradients.shape
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    cosines = units @ units.T
    different = cosines[~np.eye(count, dtype=bool)]
    if name == "kappa":
        rho = np.linalg.norm(np.mean(units, axis=0))
        return rho * (size - rho**2) / (1 - rho**2) / size
    if name == "dpp":
        return -np.log(np.linalg.det(cosines + 1e-6 * np.eye(count)))
    if name == "smoothmax":
        return np.log(np.sum(np.exp(different)))
    return np.mean(different) if name == "mean" else np.max(different)
