"""The fit of a calibration against scores whose truth is known."""

import numpy as np
import pytest
import torch

from yolo.metrics.calibration import calibration, fit_objectness


def test_the_factors_that_made_the_scores_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 60_000
    logits = torch.randn(count, generator=generator) * 2
    class_probs = 0.5 + torch.rand(count, generator=generator) / 2
    scales = torch.randint(0, 2, (count,), generator=generator)
    truth = torch.tensor([[2.0, -1.0], [0.5, 0.3]])
    score = (logits * truth[scales, 0] + truth[scales, 1]).sigmoid() * class_probs
    right = torch.rand(count, generator=generator) < score
    factors = fit_objectness(logits, class_probs, scales, right)
    assert factors[:2].flatten().tolist() == pytest.approx(truth.flatten().tolist(), abs=0.08)
    assert factors[2].tolist() == [1.0, 0.0]  # no detection, nothing to fit
    fitted = (logits * factors[scales, 0] + factors[scales, 1]).sigmoid() * class_probs
    raw = logits.sigmoid() * class_probs
    error = [calibration(s.numpy(), right.numpy())["expected_error"] for s in (raw, fitted)]
    assert error[1] < 0.01 < error[0]


@pytest.mark.parametrize("right", [True, False])
def test_detections_that_are_all_right_or_all_wrong_give_finite_factors(right: bool) -> None:
    logits, scales = torch.tensor([-3.0, 0.0, 40.0]), torch.tensor([0, 1, 2])
    factors = fit_objectness(logits, torch.ones(3), scales, torch.tensor([right] * 3))
    assert np.isfinite(factors.numpy()).all()


def test_without_detections_nothing_changes() -> None:
    none = torch.zeros(0)
    factors = fit_objectness(none, none, none.long(), none.bool())
    assert factors.tolist() == [[1.0, 0.0]] * 3
