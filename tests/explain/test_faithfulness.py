from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from yolo.boxes import boxes_from_letterbox, letterbox
from yolo.config import COCO_ANCHORS, Config
from yolo.data.dataset import Annotation
from yolo.data.images import letterboxed
from yolo.explain.cam import CamSettings
from yolo.explain.faithfulness import (
    RANDOM,
    SHARES,
    _correct,
    detected_objects,
    draw_images,
    energy_inside,
    measure,
    peaks_inside,
    perturbed,
    similarity,
)
from yolo.models.yolov3 import YoloV3, decode, make_anchors
from yolo.runs.checkpoint import LoadedWeights

BOX = np.array([10, 20, 30, 40], np.float32)


class WhiteSquare:
    """A model of which all is known: its score is the share of the square that is still white."""

    image = np.zeros((64, 64, 3), np.uint8)
    image[20:40, 10:30] = 255
    box = BOX
    cells = (8, 8)

    def heat(self, method: str, *, reset: bool = False) -> np.ndarray:
        heat = np.zeros((64, 64), np.float32)
        if method == "perfect" and not reset:
            heat[20:40, 10:30] = 1
        elif method == "blind":
            heat[:, :5] = np.linspace(0.1, 1, 5)
        return heat

    def scores(self, images) -> np.ndarray:
        return np.array([(image[20:40, 10:30] > 250).mean() for image in images])


def test_a_perfect_map_beats_a_random_one_and_a_blind_one_is_flagged():
    count, results = measure([WhiteSquare()] * 3, ["perfect", "blind"])
    perfect, blind, random = results["perfect"], results["blind"], results[RANDOM]
    assert count == 3
    assert (
        perfect["deletion"] < 0.1 < random["deletion"]
        and perfect["insertion"] > 0.9 > random["insertion"]
    )
    assert perfect["deletion_curve"][0] == perfect["insertion_curve"][-1] == 1
    assert perfect["pointing"] == 1 and blind["pointing"] == 0
    assert perfect["energy"] == 1 and blind["energy"] == 0
    assert random["energy"] == pytest.approx(random["area"], abs=0.04)
    assert blind["blind"] and not perfect["blind"]


def test_an_empty_map_points_nowhere_and_is_counted():
    _, results = measure([WhiteSquare()], ["empty"])
    assert results["empty"]["zero"] == 1
    assert results["empty"]["pointing"] == results["empty"]["energy"] == 0
    assert not results["empty"]["blind"]


@pytest.mark.parametrize(
    ("pixel", "inside"),
    [((20, 10), True), ((39, 29), True), ((40, 29), False), ((39, 30), False), ((19, 10), False)],
)
def test_pointing_counts_pixels_as_the_box_does(pixel, inside):
    heat = np.full((64, 64), 0.1, np.float32)
    heat[pixel] = 1
    assert peaks_inside(heat, BOX) == inside


def test_energy_is_the_share_of_the_heat():
    heat = np.zeros((64, 64), np.float32)
    heat[25, 15], heat[50, 50] = 0.75, 0.25
    assert energy_inside(heat, BOX) == pytest.approx(0.75)


def test_perturbing_changes_exactly_the_hottest_share_even_among_ties():
    image = np.zeros((20, 30, 3), np.uint8)
    background = np.full_like(image, 9)
    heat = np.zeros((20, 30), np.float32)
    heat[3, 4] = 1
    copies = perturbed(image, background, heat, np.random.default_rng(0))
    changed = [float((copy == 9).all(-1).mean()) for copy in copies]
    np.testing.assert_allclose(changed, SHARES, atol=1 / heat.size)
    assert (copies[1][3, 4] == 9).all()
    assert changed[-1] == 1


def test_similarity_is_the_rank_correlation_of_the_lit_pixels_and_a_flat_map_has_none():
    heat = np.zeros((9, 9))
    heat[:3] = np.random.default_rng(0).uniform(0.1, 1, (3, 9))
    reverse = np.where(heat > 0, 1.1 - heat, 0)
    assert similarity(heat, heat**3) == pytest.approx(1)
    # though they agree on all the dark pixels
    assert similarity(heat, reverse) == pytest.approx(-1)
    assert similarity(heat, np.ones_like(heat)) == 0
    assert similarity(np.zeros_like(heat), np.zeros_like(heat)) == 0


def test_images_are_drawn_once_each_and_all_when_there_are_few():
    assert draw_images(3, 10, 0) == [0, 1, 2]
    drawn = draw_images(100, 10, 0)
    assert drawn == draw_images(100, 10, 0) and len(set(drawn)) == 10
    assert drawn != draw_images(100, 10, 1)


def test_a_detection_is_correct_when_it_overlaps_an_object_of_its_class_by_half():
    note = Annotation(
        np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32), np.array([1, 2]), None, 64, 64
    )
    boxes = torch.tensor([[21, 21, 40, 40], [0, 0, 10, 10], [0, 0, 4, 10]]).float()
    found = _correct(boxes, torch.tensor([2, 2, 1]), note)
    assert [k for k, _ in found] == [0]
    np.testing.assert_array_equal(found[0][1], [20, 20, 40, 40])
    assert (
        _correct(
            boxes,
            torch.tensor([2, 2, 1]),
            note._replace(boxes=note.boxes[:0], labels=note.labels[:0]),
        )
        == []
    )


def test_detections_of_a_real_model_are_found_again_and_explained_in_its_pixels():
    torch.manual_seed(0)
    model = YoloV3(2, width=0.125).eval()
    for head in model.heads:
        head[-1].weight.data *= 0.01
    anchors = make_anchors(COCO_ANCHORS, 96)
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    boxes, objectness, class_probs = decode(model(letterboxed(image, 96).image[None]), anchors)
    best = int((objectness[0] * class_probs[0].amax(-1)).argmax())
    label = class_probs[0, best].argmax()
    true_box = boxes_from_letterbox(
        boxes[0, best, None].detach(), letterbox(48, 96, 96), 48, 96
    ).numpy()
    note = Annotation(true_box, label[None].numpy(), np.zeros(1, bool), 48, 96)
    dataset = SimpleNamespace(image=lambda index: image, annotation=lambda index: note)
    loaded = LoadedWeights(model, Config(img_sizes=(96,)), ("a", "b"), anchors, {}, "", Path())
    subject = next(detected_objects(loaded, dataset, [0], CamSettings(), score_threshold=0))
    np.testing.assert_array_equal(subject.box, true_box[0])
    assert subject.heat("gradcam").shape == subject.heat("gradcam", reset=True).shape == (48, 96)
    assert not np.array_equal(subject.heat("layercam"), subject.heat("layercam", reset=True))
    np.testing.assert_array_equal(subject.heat("eigencam"), subject.heat("eigencam", reset=True))
    score = objectness[0, best] * class_probs[0, best, label]
    assert subject.scores([image])[0] == pytest.approx(score.item(), rel=1e-3)
