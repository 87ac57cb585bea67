"""Whether a confidence of 80 % is right 80 times in 100 (Guo et al. 2017)."""

from typing import Any

import numpy as np

CALIBRATION_BINS = 15  # equal in width, as in section 2 of the paper


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Compare confidence [N] with the hit rate of `correct` [N] (bool), in bins of equal width.

    Returns:
        `expected_error`: the mean gap between the two, weighted by predictions (ECE, equation 3 of the
        paper), None without any; `bins`: the occupied ones, each with `confidence`, `accuracy` and `count`.
    """
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    occupied = np.flatnonzero(count)
    sums = (np.bincount(place, weights, CALIBRATION_BINS)[occupied] for weights in (confidence, correct))
    mean_confidence, accuracy = (total / count[occupied] for total in sums)
    gaps = np.abs(mean_confidence - accuracy)
    return {
        "expected_error": float((gaps * count[occupied]).sum() / count.sum()) if len(occupied) else None,
        "bins": [
            {"confidence": float(c), "accuracy": float(a), "count": int(n)}
            for c, a, n in zip(mean_confidence, accuracy, count[occupied], strict=True)
        ],
    }
