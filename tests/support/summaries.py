"""What `summary.json` holds of a run, and of several seeds."""

ERRORS = {"standard_error": 0.25, "pgd_error": 0.375, "verified_error": 0.5}
COMMON = {
    "experiment": "digits_ibp",
    "data": "UCI digits",
    "test_images": 360,
    "norm": "inf",
    "eps_test": 0.02,
    "eps_train": 0.03,
    "clip": [0.0, 1.0],
    "bounds": ["interval", "crown-ibp"],
    "attack": "PGD-3, 2 start(s), margin loss, best iterate",
    "method": "ibp",
    "model": "tiny",
    "selection": "none: trained on all training images, the last epoch is reported",
    "device": "2 x cpu",
    "versions": {"python": "3.12.3", "jax": "0.11.2", "flax": "0.12.10", "numpy": "2.4.6"},
    "train_seconds": 1.5,
    "finished": "2026-11-28 20:32:00 UTC",
}
BY = {"verified_error_by": {"interval": 0.625, "crown-ibp": None}}
ONE = COMMON | {
    "results": {"last epoch (3)": ERRORS | BY, "selected epoch (2)": ERRORS | BY},
    "seed": 0,
    "parameters_sha256": "0" * 64,
    "evaluation_seconds": 2.5,
    "epochs": 3,
}
SEVERAL = COMMON | {
    "seeds": [0, 1],
    "errors": {key: [value, value] for key, value in ERRORS.items()},
    "mean": ERRORS,
    "std": dict.fromkeys(ERRORS, 0.0),
    "parameters_sha256": ["0" * 64, "1" * 64],
}
