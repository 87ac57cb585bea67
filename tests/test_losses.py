"""The assignment against a loop over boxes, and the loss against plain formulas of each term."""

import math

import pytest
import torch
from torch.nn import functional
from torchvision.ops import complete_box_iou_loss

from yolo.boxes import paired_iou, shape_iou
from yolo.config import COCO_ANCHORS, LossSettings
from yolo.losses import YoloLoss, assign_targets, count_targets, encode_boxes
from yolo.models.yolov3 import STRIDES, YoloV3, decode_boxes, make_anchors

SIZE = 224
CLASSES = 4
ANCHORS = make_anchors(COCO_ANCHORS, SIZE)
TERMS = ("box", "object", "no_object", "class")


def make_targets(
    counts: list[int], seed: int = 0, size: int = SIZE
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator) * size
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1).clamp(max=size)
        targets.append(
            {"boxes": boxes, "labels": torch.randint(CLASSES, (count,), generator=generator)}
        )
    return targets


def make_outputs(batch: int, seed: int = 0, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            batch, 3, size // stride, size // stride, 5 + CLASSES, generator=generator
        ).requires_grad_()
        for stride in STRIDES
    ]


def loss_of(outputs, targets, *, counts=None, size=SIZE, config=None):
    assigned = assign_targets(targets, ANCHORS, size, rule=(config or LossSettings()).assignment)
    counts = count_targets(assigned) if counts is None else counts
    return YoloLoss(ANCHORS, config or LossSettings())(outputs, assigned, counts)


def assign_by_loop(targets, scale: int, stride: int, side: int):
    """The rule in words: box by box, the best free anchor of its cell; similar ones are ignored."""
    positive, ignored = {}, set()
    for image, target in enumerate(targets):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            column, row = (
                min(int(c / stride), side - 1) for c in ((box[:2] + box[2:]) / 2).tolist()
            )
            overlaps = shape_iou(box[2:] - box[:2], ANCHORS[scale])
            for anchor in overlaps.argsort(descending=True, stable=True).tolist():
                if (image, anchor, row, column) not in positive:
                    positive[image, anchor, row, column] = (box, label)
                    break
            ignored |= {(image, a, row, column) for a in range(3) if overlaps[a] > 0.5}
    return positive, ignored - set(positive)


@pytest.mark.parametrize("counts", [[0], [3, 0, 7], [60, 25], [400]])
def test_assignment_equals_a_loop_over_boxes(counts):
    targets = make_targets(counts)
    for scale, (stride, found) in enumerate(
        zip(STRIDES, assign_targets(targets, ANCHORS, SIZE), strict=True)
    ):
        positive, ignored = assign_by_loop(targets, scale, stride, SIZE // stride)
        assert {tuple(cell) for cell in found.cells.tolist()} == set(positive)
        for cell, box, label in zip(found.cells.tolist(), found.boxes, found.labels, strict=True):
            expected_box, expected_label = positive[tuple(cell)]
            assert torch.equal(box, expected_box)
            assert label == expected_label
        occupied = {tuple(cell) for cell in (~found.empty).nonzero().tolist()}
        assert occupied == set(positive) | ignored


def test_paper_rule_gives_each_box_one_cell_at_most():
    targets = make_targets([5, 9])
    assigned = assign_targets(targets, ANCHORS, SIZE, rule="paper")
    assert sum(len(scale.cells) for scale in assigned) == 14
    for scale, found in enumerate(assigned):
        overlaps = shape_iou((found.boxes[:, 2:] - found.boxes[:, :2])[:, None, None], ANCHORS)
        assert (overlaps.flatten(1).argmax(1) // 3 == scale).all()


def test_paper_rule_ignores_predictions_that_overlap_a_box():
    outputs, targets = make_outputs(1), make_targets([6])
    config = LossSettings(assignment="paper", ignore_iou=0.3)
    assigned = assign_targets(targets, ANCHORS, SIZE, rule="paper")
    expected = 0.0
    for output, anchors, stride, found in zip(outputs, ANCHORS, STRIDES, assigned, strict=True):
        boxes = decode_boxes(output, anchors, stride).reshape(-1, 1, 4)
        near = (paired_iou(boxes, targets[0]["boxes"][None]) > 0.3).any(1).view(found.empty.shape)
        taught = found.empty & ~near
        assert near.any()
        expected += functional.softplus(output[..., 4][taught]).sum() / found.empty.sum()
    torch.testing.assert_close(loss_of(outputs, targets, config=config)["no_object"], 10 * expected)


def test_an_ignored_cell_can_become_positive_for_another_box():
    centre = torch.tensor([100.0, 100.0])
    twin = torch.cat([centre - ANCHORS[0, 1] / 2, centre + ANCHORS[0, 1] / 2])
    target = {"boxes": torch.stack([twin, twin]), "labels": torch.tensor([0, 1])}
    found = assign_targets([target], ANCHORS, SIZE, ignore_iou=0.0)[
        0
    ]  # the first box ignores all other anchors
    assert found.cells[:, 1].unique().numel() == 2
    assert found.labels.tolist() == [0, 1]


def test_boxes_on_the_right_and_bottom_edge_stay_in_the_grid():
    corner = torch.tensor([[SIZE - 1.0, SIZE - 1.0, SIZE + 1.0, SIZE + 1.0]])
    for found, stride in zip(
        assign_targets([{"boxes": corner, "labels": torch.tensor([0])}], ANCHORS, SIZE),
        STRIDES,
        strict=True,
    ):
        assert found.cells[0, 2:].tolist() == [SIZE // stride - 1] * 2


def test_encoding_is_the_inverse_of_decoding():
    cells = torch.tensor([[2, 3], [0, 0], [6, 6]])
    boxes = torch.cat([cells * 32.0 + 3, cells * 32.0 + 61], dim=1)
    encoded = encode_boxes(boxes, ANCHORS[0, [0, 1, 2]], cells, 32)
    output = torch.zeros(1, 3, 7, 7, 5)
    for anchor, ((column, row), code) in enumerate(zip(cells.tolist(), encoded, strict=True)):
        output[0, anchor, row, column, :2] = torch.logit(code[:2])
        output[0, anchor, row, column, 2:4] = code[2:]
    decoded = decode_boxes(output, ANCHORS[0], 32)
    for anchor, ((column, row), box) in enumerate(zip(cells.tolist(), boxes, strict=True)):
        torch.testing.assert_close(decoded[0, anchor, row, column], box, rtol=0, atol=1e-3)


def test_terms_equal_the_plain_formulas():
    outputs, targets = make_outputs(2), make_targets([4, 2])
    expected = dict.fromkeys(TERMS, 0.0)
    assigned = assign_targets(targets, ANCHORS, SIZE)
    for output, anchors, stride, found in zip(outputs, ANCHORS, STRIDES, assigned, strict=True):
        image, anchor, row, column = found.cells.T
        predicted = output[image, anchor, row, column]
        overlap = paired_iou(
            decode_boxes(output, anchors, stride)[image, anchor, row, column], found.boxes
        )
        code = encode_boxes(found.boxes, anchors[anchor], torch.stack([column, row], 1), stride)
        xywh = torch.cat([predicted[:, :2].sigmoid(), predicted[:, 2:4]], dim=1)
        bce = functional.binary_cross_entropy_with_logits
        expected["box"] += 10 * functional.mse_loss(xywh, code)
        expected["object"] += bce(predicted[:, 4], overlap.detach())
        empty = output[..., 4][found.empty]
        expected["no_object"] += 10 * bce(empty, torch.zeros_like(empty))
        expected["class"] += functional.cross_entropy(predicted[:, 5:], found.labels)
    found_terms = loss_of(outputs, targets)
    for name in TERMS:
        torch.testing.assert_close(found_terms[name], expected[name], msg=name)


def test_calling_it_twice_gives_the_same_and_changes_nothing():
    outputs, targets = make_outputs(2), make_targets([5, 5])
    before = [output.detach().clone() for output in outputs]
    boxes = [target["boxes"].clone() for target in targets]
    first, second = loss_of(outputs, targets), loss_of(outputs, targets)
    assert all(torch.equal(first[name], second[name]) for name in TERMS)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs, strict=True))
    assert all(torch.equal(a, target["boxes"]) for a, target in zip(boxes, targets, strict=True))


def test_no_boxes_at_all_is_finite_and_every_parameter_gets_a_gradient():
    model = YoloV3(CLASSES, width=0.0625)
    losses = loss_of(model(torch.rand(2, 3, 64, 64)), make_targets([0, 0], size=64), size=64)
    total = sum(losses.values())
    total.backward()
    assert math.isfinite(total.item())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("rule", ["reference", "paper"])
def test_a_batch_is_the_sum_of_its_parts_under_common_counts(rule):
    config = LossSettings(assignment=rule)
    outputs, targets = make_outputs(4), make_targets([3, 0, 9, 1])
    counts = count_targets(assign_targets(targets, ANCHORS, SIZE, rule=rule))
    whole = loss_of(outputs, targets, counts=counts, config=config)
    parts = [
        loss_of([o[part] for o in outputs], targets[part], counts=counts, config=config)
        for part in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    for name in TERMS:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


def test_extreme_outputs_stay_finite():
    outputs = [torch.full_like(output, 1e4).requires_grad_() for output in make_outputs(1)]
    losses = loss_of(outputs, make_targets([5]))
    assert all(value.isfinite() for value in losses.values())


def test_a_box_that_fits_no_anchor_takes_the_best_of_all():
    needle = {"boxes": torch.tensor([[10.0, 100.0, 210.0, 101.0]]), "labels": torch.tensor([1])}
    assigned = assign_targets([needle], ANCHORS, SIZE, rule="multi")
    assert [len(found.cells) for found in assigned].count(1) == 1
    assert sum(len(found.cells) for found in assigned) == 1


def test_multi_ignores_the_cells_of_a_box_on_scales_that_do_not_fit():
    whole = {"boxes": torch.tensor([[2.0, 2.0, 222.0, 222.0]]), "labels": torch.tensor([0])}
    coarse, _, fine = assign_targets([whole], ANCHORS, SIZE, rule="multi")
    assert len(coarse.cells) >= 1 and len(fine.cells) == 0
    assert fine.empty[0, :, 14, 14].sum() == 0
    assert fine.empty.sum() == fine.empty.numel() - 3


def test_multi_takes_every_anchor_that_fits_and_the_first_box_of_two():
    box = torch.tensor([100.0, 100.0, 130.0, 130.0])
    target = {"boxes": torch.stack([box, box]), "labels": torch.tensor([2, 3])}
    for anchors, found in zip(
        ANCHORS, assign_targets([target], ANCHORS, SIZE, rule="multi"), strict=True
    ):
        ratios = 30 / anchors
        fits = (torch.maximum(ratios, 1 / ratios) < 4).all(1)
        assert found.cells[:, 1].tolist() == fits.nonzero()[:, 0].tolist()
        assert found.labels.tolist() == [2] * int(fits.sum())


def test_difficult_objects_can_be_left_out():
    targets = make_targets([6])
    targets[0]["difficult"] = torch.tensor([True, False] * 3)
    kept = {name: targets[0][name][1::2] for name in ("boxes", "labels")}
    left_out = assign_targets(targets, ANCHORS, SIZE, use_difficult=False)
    for found, expected in zip(left_out, assign_targets([kept], ANCHORS, SIZE), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(assign_targets(targets, ANCHORS, SIZE)[0].cells) == 6


def test_each_scale_of_the_no_object_term_has_its_factor():
    outputs, targets = make_outputs(2), make_targets([4, 2])
    means = [
        functional.softplus(o[..., 4][t.empty]).mean()
        for o, t in zip(outputs, assign_targets(targets, ANCHORS, SIZE), strict=True)
    ]
    settings = LossSettings(no_object_weight=2.0, no_object_scales=(1, 0.5, 3))
    expected = 2 * (means[0] + 0.5 * means[1] + 3 * means[2])
    torch.testing.assert_close(loss_of(outputs, targets, config=settings)["no_object"], expected)


def test_ciou_equals_its_formula_and_its_gradient_is_finite_without_overlap():
    outputs, targets = make_outputs(1), make_targets([5])
    assigned = assign_targets(targets, ANCHORS, SIZE)
    settings = LossSettings(box_loss="ciou", box_weight=1.0)
    expected = torch.zeros(())
    for output, anchors, stride, found in zip(outputs, ANCHORS, STRIDES, assigned, strict=True):
        predicted = decode_boxes(output, anchors, stride)[tuple(found.cells.T)]
        expected = expected + complete_box_iou_loss(predicted, found.boxes, reduction="mean")
    torch.testing.assert_close(loss_of(outputs, targets, config=settings)["box"], expected)
    for value in (1e4, -1e4, 0.0):
        extreme = [torch.full_like(output, value).requires_grad_() for output in outputs]
        loss_of(extreme, targets, config=settings)["box"].backward()
        assert all(output.grad.isfinite().all() for output in extreme)
    far = [output.detach().clone() for output in outputs]
    for output in far:
        output[..., 2:4] = -5.0  # a thirtieth of a pixel, away from the centre: no overlap
    far = [output.requires_grad_() for output in far]
    loss_of(far, targets, config=settings)["box"].backward()
    assert all(output.grad.isfinite().all() for output in far)
    assert sum(output.grad.abs().sum() for output in far) > 0


@pytest.mark.parametrize("rule", ["reference", "paper", "multi"])
def test_no_cell_is_positive_twice_or_positive_and_empty(rule):
    for found in assign_targets(make_targets([60, 25, 0]), ANCHORS, SIZE, rule=rule):
        assert len(found.cells.unique(dim=0)) == len(found.cells) == len(found.labels)
        assert not found.empty[tuple(found.cells.T)].any()
