"""Overlaps against torchvision's, and the letterbox against its inverse."""

import pytest
import torch
from torchvision.ops import box_iou

from yolo.boxes import boxes_from_letterbox, boxes_to_letterbox, letterbox, paired_iou, shape_iou


def random_boxes(count: int, seed: int = 0, size: float = 100) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_paired_iou_is_the_diagonal_of_torchvisions():
    a, b = random_boxes(500, 0), random_boxes(500, 1)
    torch.testing.assert_close(paired_iou(a, b), box_iou(a, b).diagonal())


def test_shape_iou_is_the_iou_of_boxes_with_a_common_centre():
    sizes = torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0)) * 50
    centred = [torch.cat([-size / 2, size / 2], dim=1) for size in sizes.unbind(1)]
    torch.testing.assert_close(shape_iou(sizes[:, 0], sizes[:, 1]), paired_iou(*centred))


@pytest.mark.parametrize("empty", [[0, 0, 0, 0], [5, 5, 5, 9], [9, 9, 5, 5]])
def test_empty_and_inverted_boxes_overlap_nothing(empty):
    boxes = torch.tensor([empty], dtype=torch.float32)
    assert paired_iou(boxes, boxes).item() == 0


@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (640, 480), (416, 416), (1, 1), (1, 1000), (333, 500), (10000, 3)],
)
def test_letterbox_fits_is_centred_and_keeps_the_shape(height, width):
    place = letterbox(height, width, 416)
    assert max(place.height, place.width) == 416
    assert abs(place.left * 2 + place.width - 416) <= 1
    assert abs(place.top * 2 + place.height - 416) <= 1
    assert abs(place.height - max(1, height * place.scale)) <= 0.5
    assert abs(place.width - max(1, width * place.scale)) <= 0.5


def test_boxes_come_back_from_the_letterbox():
    boxes = random_boxes(100, size=333)
    place = letterbox(333, 500, 416)
    back = boxes_from_letterbox(boxes_to_letterbox(boxes, place), place, 333, 500)
    torch.testing.assert_close(back, boxes, atol=1e-3, rtol=0)


def test_boxes_that_reach_into_the_padding_are_clipped_to_the_image():
    place = letterbox(100, 200, 416)
    back = boxes_from_letterbox(torch.tensor([[-50.0, 0.0, 500.0, 416.0]]), place, 100, 200)
    assert back.tolist() == [[0, 0, 200, 100]]
