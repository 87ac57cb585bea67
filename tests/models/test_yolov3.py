"""The detector's shapes and size, its decoding and NMS against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from yolo.config import COCO_ANCHORS
from yolo.models import yolov3
from yolo.models.darknet import Residual
from yolo.models.yolov3 import (
    ANCHORS_PER_SCALE,
    STRIDES,
    YoloV3,
    decode,
    make_anchors,
    postprocess,
    rescale_objectness,
)

NUM_CLASSES = 3
ANCHORS = make_anchors(COCO_ANCHORS, 416)
SETTINGS = {"score_threshold": 0.05, "iou_threshold": 0.45, "max_detections": 300}


def raw_outputs(batch: int, size: int, seed: int = 0, objectness: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for stride in STRIDES:
        side = size // stride
        output = torch.randn(
            batch, ANCHORS_PER_SCALE, side, side, 5 + NUM_CLASSES, generator=generator
        )
        output[..., 4] += objectness
        outputs.append(output)
    return outputs


@pytest.fixture(scope="module")
def model() -> YoloV3:
    return YoloV3(NUM_CLASSES, width=0.0625)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_full_network_for_voc_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = YoloV3(num_classes=20)
    assert sum(parameter.numel() for parameter in model.parameters()) == 61_626_049


@pytest.mark.parametrize("size", [64, 96])
def test_outputs_are_coarse_to_fine_at_strides_32_16_8(model: YoloV3, size: int) -> None:
    model.eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(images)
        same = model(images / 255)
    for output, stride, other in zip(outputs, STRIDES, same, strict=True):
        assert output.shape == (2, 3, size // stride, size // stride, 5 + NUM_CLASSES)
        torch.testing.assert_close(output, other)


def test_a_residual_block_starts_as_the_identity_and_learns_to_be_more() -> None:
    block, x = Residual(16), torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    (block(x) * torch.randn_like(x)).sum().backward()
    assert block.expand[1].weight.grad.abs().min() > 0


def test_the_first_step_does_not_fire_everywhere(model: YoloV3) -> None:
    model.train()  # as in training: normalised by the batch
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, 64, 64))
    objectness = torch.cat([output[..., 4].flatten() for output in outputs]).sigmoid()
    assert objectness.mean() < 0.03


def test_decoding_equals_the_papers_equations_cell_by_cell() -> None:
    outputs = raw_outputs(batch=2, size=64)
    boxes, objectness, class_probs = decode(outputs, ANCHORS)
    for image in range(2):
        place = 0
        for output, anchors, stride in zip(outputs, ANCHORS.tolist(), STRIDES, strict=True):
            for anchor, (width, height) in enumerate(anchors):
                for row in range(output.shape[2]):
                    for column in range(output.shape[3]):
                        tx, ty, tw, th, logit, *classes = output[
                            image, anchor, row, column
                        ].tolist()
                        x, y = (column + sigmoid(tx)) * stride, (row + sigmoid(ty)) * stride
                        w, h = width * math.exp(tw), height * math.exp(th)
                        expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                        assert boxes[image, place].tolist() == pytest.approx(
                            expected, rel=1e-4, abs=1e-3
                        )
                        assert objectness[image, place].item() == pytest.approx(
                            sigmoid(logit), rel=1e-5
                        )
                        total = sum(map(math.exp, classes))
                        softmax = [math.exp(value) / total for value in classes]
                        assert class_probs[image, place].tolist() == pytest.approx(
                            softmax, rel=1e-5
                        )
                        place += 1
    assert place == boxes.shape[1]


def naive_nms(
    boxes: list, scores: list, labels: list, score_threshold: float, iou_threshold: float
) -> list[int]:
    kept: list[int] = []
    for k in sorted(range(len(scores)), key=lambda k: -scores[k]):
        if scores[k] < score_threshold:
            break
        rivals = [other for other in kept if labels[other] == labels[k]]
        if all(naive_iou(boxes[other], boxes[k]) <= iou_threshold for other in rivals):
            kept.append(k)
    return kept


def naive_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(5))
def test_suppression_equals_a_double_loop_over_boxes(seed: int) -> None:
    outputs = raw_outputs(batch=2, size=64, seed=seed)
    boxes, objectness, class_probs = decode(outputs, ANCHORS)
    scores, labels = (objectness[..., None] * class_probs).max(-1)
    for image, detection in enumerate(postprocess(outputs, ANCHORS, **SETTINGS)):
        one_image = (part[image].tolist() for part in (boxes, scores, labels))
        expected = naive_nms(*one_image, SETTINGS["score_threshold"], SETTINGS["iou_threshold"])
        assert detection["index"].tolist() == expected
        assert torch.equal(detection["boxes"], boxes[image, expected])
        assert torch.equal(detection["scores"], scores[image, expected])
        assert torch.equal(detection["labels"], labels[image, expected])


def test_with_all_classes_a_prediction_stands_for_each_class_above_the_threshold() -> None:
    outputs = raw_outputs(batch=1, size=64)
    boxes, objectness, class_probs = (part[0] for part in decode(outputs, ANCHORS))
    scores = (objectness[:, None] * class_probs).flatten().tolist()
    labels = list(range(NUM_CLASSES)) * len(boxes)
    repeated = boxes.repeat_interleave(NUM_CLASSES, 0).tolist()
    expected = naive_nms(
        repeated, scores, labels, SETTINGS["score_threshold"], SETTINGS["iou_threshold"]
    )
    (detection,) = postprocess(outputs, ANCHORS, **SETTINGS, all_classes=True)
    places = detection["index"] * NUM_CLASSES + detection["labels"]
    assert places.tolist() == expected[: SETTINGS["max_detections"]]


def test_a_batch_gives_exactly_what_its_images_give_alone() -> None:
    outputs = raw_outputs(batch=9, size=128)
    together = postprocess(outputs, ANCHORS, **SETTINGS)
    for image, detection in enumerate(together):
        (alone,) = postprocess(
            [output[image : image + 1] for output in outputs], ANCHORS, **SETTINGS
        )
        assert all(
            torch.equal(detection[key], alone[key])
            for key in ("boxes", "scores", "labels", "index")
        )


def test_images_without_detections_give_empty_tensors() -> None:
    outputs = raw_outputs(batch=2, size=64)
    for output in outputs:
        output[1, ..., 4] = -30
    full, empty = postprocess(outputs, ANCHORS, **SETTINGS)
    assert len(full["scores"]) > 0
    assert empty["boxes"].shape == (0, 4)
    assert len(empty["scores"]) == len(empty["labels"]) == 0


def test_no_more_than_max_detections_stay_and_they_are_the_most_confident() -> None:
    outputs = raw_outputs(batch=1, size=128)
    (every,) = postprocess(outputs, ANCHORS, **SETTINGS)
    (few,) = postprocess(outputs, ANCHORS, **{**SETTINGS, "max_detections": 7})
    assert torch.equal(few["index"], every["index"][:7])
    assert (every["scores"].diff() <= 0).all()


def test_a_network_that_fires_everywhere_costs_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = yolov3.batched_nms
    monkeypatch.setattr(
        yolov3, "batched_nms", lambda *args: seen.append(len(args[0])) or original(*args)
    )
    postprocess(raw_outputs(batch=1, size=416, objectness=9), ANCHORS, **SETTINGS)
    assert seen == [yolov3.MAX_CANDIDATES]


def test_values_that_are_not_numbers_are_never_detected() -> None:
    outputs = raw_outputs(batch=1, size=64)
    for output in outputs:
        output[..., 4:] = float("nan")
    (detection,) = postprocess(outputs, ANCHORS, **SETTINGS)
    assert len(detection["scores"]) == 0


def test_half_precision_outputs_are_decoded_in_single_precision() -> None:
    outputs = [output.bfloat16() for output in raw_outputs(batch=1, size=64)]
    assert all(part.dtype == torch.float32 for part in decode(outputs, ANCHORS))


def test_anchors_grow_with_the_test_size_once() -> None:
    assert torch.equal(make_anchors(COCO_ANCHORS, 208) * 2, ANCHORS)
    assert ANCHORS[2, 0].tolist() == [10, 13]  # the smallest belongs to the finest grid


def _raw_for(boxes: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> list[torch.Tensor]:
    """Outputs at 64 px that say nothing but these boxes, all in the middle cell of stride 8."""
    outputs = [torch.full((1, 3, 64 // s, 64 // s, 7), -20.0) for s in STRIDES]
    anchors = make_anchors(COCO_ANCHORS, 64)[2]
    sizes = boxes[:, 2:] - boxes[:, :2]
    offsets = ((boxes[:, :2] + boxes[:, 2:]) / 16 - 4).clamp(1e-6, 1 - 1e-6)
    outputs[2][0, :, 4, 4, :2] = offsets.logit()
    outputs[2][0, :, 4, 4, 2:4] = (sizes / anchors).log()
    outputs[2][0, :, 4, 4, 4] = scores.logit()
    outputs[2][0, :, 4, 4, 5:] = logits
    return outputs


def test_merging_averages_the_boxes_of_one_class_by_their_scores():
    boxes = torch.tensor([[20.0, 20, 50, 50], [22, 20, 52, 50], [20, 20, 50, 50]])
    scores = torch.tensor([0.6, 0.3, 0.5])
    one, other = [30.0, 0.0], [0.0, 30.0]
    outputs = _raw_for(boxes, torch.tensor([one, one, other]), scores)
    settings = {"score_threshold": 0.01, "iou_threshold": 0.45, "max_detections": 10}
    anchors = make_anchors(COCO_ANCHORS, 64)
    [plain] = postprocess(outputs, anchors, **settings)
    [merged] = postprocess(outputs, anchors, **settings, nms="merge")
    assert plain["labels"].tolist() == merged["labels"].tolist() == [0, 1]
    torch.testing.assert_close(plain["boxes"], boxes[[0, 2]], atol=1e-3, rtol=0)
    expected = torch.stack([(boxes[0] * 0.6 + boxes[1] * 0.3) / 0.9, boxes[2]])
    torch.testing.assert_close(merged["boxes"], expected, atol=1e-3, rtol=0)
    for key in ("scores", "labels", "index"):
        assert torch.equal(plain[key], merged[key])


def test_merging_nothing_gives_nothing():
    outputs = [torch.full((2, 3, 64 // s, 64 // s, 7), -20.0) for s in STRIDES]
    settings = {"score_threshold": 0.5, "iou_threshold": 0.45, "max_detections": 10}
    for found in postprocess(outputs, make_anchors(COCO_ANCHORS, 64), **settings, nms="merge"):
        assert found["boxes"].shape == (0, 4)


def test_rescaling_changes_the_objectness_of_each_scale_and_nothing_else():
    model = YoloV3(2, width=0.0625).eval().to(memory_format=torch.channels_last)
    images = torch.rand(1, 3, 64, 64)
    factors = torch.tensor([[2.0, -1.0], [0.5, 0.25], [1.0, 3.0]])
    before = [output.detach().clone() for output in model(images)]
    rescale_objectness(model, factors)
    for output, old, (a, b) in zip(model(images), before, factors.tolist(), strict=True):
        torch.testing.assert_close(output[..., 4], a * old[..., 4] + b)
        others = [0, 1, 2, 3, 5, 6]
        assert torch.equal(output[..., others], old[..., others])
