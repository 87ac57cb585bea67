"""Whether a confidence of 80 % is right 80 times in 100, and what makes it so (Guo et al. 2017)."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_BINS = 15  # equal in width, as in section 2 of the paper


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Compare confidence [N] with the hit rate of `correct` [N] (bool), in bins of equal width.

    Returns:
        `expected_error`: the mean gap between the two, weighted by predictions (ECE, equation 3 of
        the paper), None without any; `bins`: the occupied ones, each with `confidence`, `accuracy`
        and `count`.
    """
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    occupied = np.flatnonzero(count)
    share = count[occupied]
    mean_confidence, accuracy = (
        np.bincount(place, weights, CALIBRATION_BINS)[occupied] / share
        for weights in (confidence, correct)
    )
    gaps = np.abs(mean_confidence - accuracy)
    return {
        "expected_error": float((gaps * share).sum() / share.sum()) if len(share) else None,
        "bins": [
            {"confidence": float(c), "accuracy": float(a), "count": int(n)}
            for c, a, n in zip(mean_confidence, accuracy, share, strict=True)
        ],
    }


def fit_objectness(
    logits: "Tensor",
    class_probs: "Tensor",
    scales: "Tensor",
    right: "Tensor",
    num_scales: int = 3,
) -> "Tensor":
    """Return per scale the a and b [S, 2] that make sigmoid(a logit + b) class_prob most likely.

    It is Platt's scaling of the objectness alone, by maximum likelihood: which class it is was
    learned by comparison, but how often anything is there at all is not the same on all scales.

    Args:
        logits: [N] objectness of detections, before the sigmoid.
        class_probs: [N] probability of each one's class.
        scales: [N] int64 the scale that it comes from; one without detections keeps a = 1, b = 0.
        right: [N] bool, whether it found an object.
        num_scales: S.
    """
    import torch  # here, since scoring somebody's detections does without it
    from torch.nn import functional

    logits, class_probs = logits.double(), class_probs.double().clamp(1e-9, 1)
    factors = torch.tensor([[1.0, 0.0]] * num_scales, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([factors], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> "Tensor":
        optimizer.zero_grad()
        objectness = functional.logsigmoid(logits * factors[scales, 0] + factors[scales, 1])
        log_score = objectness + class_probs.log()
        log_rest = torch.log1p(-log_score.exp().clamp(max=1 - 1e-9))
        negative = -torch.where(right, log_score, log_rest).mean()
        negative.backward()
        return negative

    if len(logits):
        optimizer.step(loss)
    return factors.detach().float()
