import copy

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor, nn

from yolo.boxes import letterbox
from yolo.config import COCO_ANCHORS
from yolo.errors import UsageError
from yolo.explain.cam import (
    CLASSIFIER_LAYERS,
    LAYERS,
    METHODS,
    TARGETS,
    CamSettings,
    Cell,
    Trace,
    cell_of,
    explain_cells,
    explain_class,
    explain_classification,
    explain_detections,
    explain_missed,
    from_letterbox,
    likeliest_class,
    overlay,
    responsible_cell,
    trace_detector,
)
from yolo.losses import assign_targets
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import STRIDES, YoloV3, decode, make_anchors, postprocess

SIZE = 320
CLASSES = 4
ANCHORS = make_anchors(COCO_ANCHORS, SIZE)


@pytest.fixture(scope="module")
def model() -> YoloV3:
    """A narrow detector whose heads and normalisations are random: no map is flat."""
    torch.manual_seed(0)
    model = YoloV3(CLASSES, width=0.125).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.ones_(module.weight)  # residual blocks start at zero
    for head in model.heads:
        nn.init.normal_(head[-1].weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A square picture, so that its pixels are those of the network input."""
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def trace(model: YoloV3, image: np.ndarray) -> Trace:
    return trace_detector(model, image, SIZE)


class InsertedIdentity(nn.Module):
    """The whole detector with an identity before a neck, and one scale's output: the naive use."""

    def __init__(self, model: YoloV3, start: int, end: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layer = nn.Identity()
        self.model.necks[start] = nn.Sequential(self.layer, self.model.necks[start])
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[self.end]


def naive_map(
    method: str, model: YoloV3, images: Tensor, start: int, cell: Cell, label: int
) -> np.ndarray:
    whole = InsertedIdentity(model, start, cell.scale)
    cam = METHODS[method](whole, [whole.layer])
    return cam(
        images / 255, [lambda output: output[cell.anchor, cell.row, cell.column, 5 + label]]
    )[0]


@pytest.mark.parametrize(
    ("method", "cell", "layer", "start"),
    [
        *((method, Cell(0, 1, 4, 5), "auto", 0) for method in METHODS),
        # in a corner: the window is shifted into the map
        ("hirescam", Cell(0, 0, 0, 9), "stride32", 0),
        ("gradcam", Cell(1, 2, 19, 3), "auto", 1),
        ("layercam", Cell(2, 0, 20, 39), "auto", 2),
        ("gradcam", Cell(2, 0, 20, 11), "stride32", 0),  # two scales upstream
        ("hirescam", Cell(2, 2, 20, 11), "stride16", 1),
    ],
)
def test_a_map_equals_the_library_on_the_whole_model(method, cell, layer, start, model, trace):
    [explanation] = explain_cells(trace, [cell], [1], CamSettings(method, layer=layer))
    naive = naive_map(method, model, trace.images, start, cell, 1)
    # after enlarging a map the library takes its minimum off once more
    np.testing.assert_allclose(scale_cam_image(explanation.heat[None])[0], naive, rtol=0, atol=5e-4)


def test_fused_is_the_mean_of_the_upstream_maps(trace):
    cell = Cell(2, 0, 20, 11)
    parts = [
        explain_cells(trace, [cell], [1], CamSettings("gradcam", layer=layer))[0]
        for layer in LAYERS[1:4]
    ]
    [fused] = explain_cells(trace, [cell], [1], CamSettings("gradcam", layer="fused"))
    mean = np.mean([part.heat for part in parts], axis=0)
    np.testing.assert_allclose(fused.heat, mean / mean.max(), atol=1e-3)
    assert fused.layer == "stride 32 + 16 + 8"


@pytest.mark.parametrize("method", ["hirescam", "layercam"])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_elementwise_methods_light_more_than_one_cell_but_only_those_in_reach(method, scale, trace):
    stride = STRIDES[scale]
    [explanation] = explain_cells(trace, [Cell(scale, 0, 5, 4)], [2], CamSettings(method))
    centres = explanation.heat[stride // 2 :: stride, stride // 2 :: stride]
    lit = np.argwhere(centres > 1e-4)
    assert len(lit) > 1
    assert np.abs(lit - [5, 4]).max() <= 3 + 1  # interpolation spreads a cell into its neighbours


def test_ten_boxes_together_equal_ten_boxes_alone(trace):
    [detections] = postprocess(
        trace.outputs, ANCHORS, score_threshold=0, iou_threshold=0.3, max_detections=20
    )
    index, labels = detections["index"].tolist(), detections["labels"].tolist()
    together = explain_detections(trace, index, labels)
    assert len(together) == 20  # more than are explained at once
    for i in (0, 7, 19):
        [alone] = explain_detections(trace, [index[i]], [labels[i]])
        np.testing.assert_allclose(together[i].heat, alone.heat, atol=1e-3)
        assert together[i].score == pytest.approx(float(detections["scores"][i]), rel=1e-4)
        assert together[i].label == int(detections["labels"][i])


def test_the_flat_index_names_the_cell_that_decode_put_there(trace):
    boxes, objectness, _ = decode(trace.outputs, ANCHORS)
    for index in (0, 299, 300, 1500, boxes.shape[1] - 1):
        cell = cell_of(index, trace.outputs)
        raw = trace.outputs[cell.scale][0, cell.anchor, cell.row, cell.column]
        assert raw[4].sigmoid() == pytest.approx(float(objectness[0, index]))
        centre = (boxes[0, index, :2] + boxes[0, index, 2:]) / 2 / STRIDES[cell.scale]
        middle = torch.tensor([cell.column + 0.5, cell.row + 0.5])
        torch.testing.assert_close(centre, middle, atol=0.5 + 1e-4, rtol=0)


@pytest.mark.parametrize(
    "box", [(10, 20, 22, 40), (100, 50, 180, 200), (0, 0, 320, 320), (300, 300, 320, 320)]
)
def test_a_missed_object_is_explained_by_the_cell_that_training_assigns_to_it(box):
    target = {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([1])}
    assigned = assign_targets([target], ANCHORS, SIZE, rule="paper")
    [(scale, cells)] = [(i, part.cells) for i, part in enumerate(assigned) if len(part.cells)]
    assert responsible_cell(torch.tensor(box).float(), ANCHORS, SIZE) == Cell(
        scale, *cells[0, 1:].tolist()
    )


def test_a_missed_object_is_found_through_the_letterbox(model):
    wide = np.random.default_rng(2).integers(0, 256, (200, 640, 3), dtype=np.uint8)
    trace = trace_detector(model, wide, SIZE)
    explanation = explain_missed(
        trace, torch.tensor([400, 80, 480, 140]), 3, ANCHORS, CamSettings("layercam")
    )
    halved = torch.tensor([200.0, 150, 240, 180])  # and 110 further down
    cell = responsible_cell(halved, ANCHORS, SIZE)
    [same] = explain_cells(trace, [cell], [3], CamSettings("layercam"))
    np.testing.assert_array_equal(explanation.heat, same.heat)
    row, column = np.unravel_index(explanation.heat.argmax(), explanation.heat.shape)
    reach = 4 * STRIDES[cell.scale] / trace.place.scale
    assert explanation.heat.shape == (200, 640)
    assert abs(row - 110) < reach and abs(column - 440) < reach


def test_the_letterbox_is_undone_and_its_padding_cut_off():
    place = letterbox(100, 400, 64)
    heat = np.zeros((64, 64), np.float32)
    heat[: place.top] = 1
    assert not from_letterbox(heat, place, 100, 400).any()

    heat[:] = 0
    heat[place.top :, place.left : place.left + 32] = 1
    cut = from_letterbox(heat, place, 100, 400)
    assert cut.shape == (100, 400)
    assert cut[:, :190].min() == 1 and cut[:, 210:].max() == 0


def test_a_map_of_nothing_says_so_and_stays_zero(model, image):
    dead = copy.deepcopy(model)
    for head in dead.heads:
        nn.init.zeros_(head[-1].weight)
    [explanation] = explain_cells(
        trace_detector(dead, image, SIZE), [Cell(1, 0, 3, 3)], [0], CamSettings("gradcam")
    )
    assert explanation.is_zero
    assert not explanation.heat.any()


def test_an_only_class_is_explained_by_its_objectness(image):
    torch.manual_seed(0)
    trace = trace_detector(YoloV3(1, width=0.125), image, 96)
    [by_class] = explain_cells(trace, [Cell(0, 0, 1, 1)], [0], CamSettings("gradcam"))
    [by_object] = explain_cells(trace, [Cell(0, 0, 1, 1)], [0], CamSettings("gradcam", "object"))
    assert by_class.target == "object"
    np.testing.assert_array_equal(by_class.heat, by_object.heat)


def test_targets_differ_and_eigencam_ignores_them(trace):
    cell = Cell(1, 1, 9, 9)
    heats = [
        explain_cells(trace, [cell], [0], CamSettings("layercam", target))[0].heat
        for target in TARGETS
    ]
    assert not np.allclose(heats[0], heats[1], atol=0.01)
    assert not np.allclose(heats[1], heats[2], atol=0.01)
    blind = [
        explain_cells(trace, [cell], [0], CamSettings("eigencam", target))[0].heat
        for target in TARGETS
    ]
    np.testing.assert_array_equal(blind[0], blind[1])


def test_a_whole_image_map_of_the_likeliest_class_has_its_best_score(trace):
    label = likeliest_class(trace)
    _, objectness, class_probs = decode(trace.outputs, ANCHORS)
    scores = objectness[0, :, None] * class_probs[0]
    assert label == int(scores.max(0).values.argmax())
    explanation = explain_class(trace, label)
    assert explanation.score == pytest.approx(float(scores.max()), rel=1e-4)
    assert explanation.heat.shape == (SIZE, SIZE) and not explanation.is_zero
    one = explain_class(trace, label, CamSettings(layer="stride16"))
    assert one.layer == "stride 16"


def test_explaining_leaves_the_model_as_it_was(model, image):
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    explain_class(trace_detector(model, image, 96), 0)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layer", CLASSIFIER_LAYERS)
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "eigencam"])
def test_a_classifier_is_explained_in_the_pixels_of_the_original(layer, method, image):
    torch.manual_seed(0)
    model = ResNet(10, width=0.25)
    explanation = explain_classification(
        model, image[:50, :70], 3, CamSettings(method, layer=layer)
    )
    assert explanation.heat.shape == (50, 70)
    assert explanation.is_zero or (
        0.9 < explanation.heat.max() <= 1 and explanation.heat.min() >= 0
    )
    assert 0 < explanation.score < 1
    assert model.training


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"method": "camgrad"}, "method camgrad: choose from gradcam, "),
        ({"target": "box"}, "target box: choose from class, object, score"),
        ({"layer": "stride4"}, "layer stride4: choose from auto, stride32, "),
        (
            {"layer": "stride8"},
            "layer stride8 does not feed this box, which comes from stride 16: choose ",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(names, message, trace):
    with pytest.raises(UsageError, match=message):
        explain_cells(trace, [Cell(1, 0, 3, 3)], [0], CamSettings(**names))


def test_an_overlay_leaves_the_cold_pixels_alone(image):
    heat = np.zeros(image.shape[:2], np.float32)
    heat[5, 7] = 1
    painted = overlay(image, heat, opacity=1.0)
    changed = (painted != image).any(-1)
    assert changed[5, 7] and changed.sum() == 1
