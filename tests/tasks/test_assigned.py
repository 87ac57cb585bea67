"""Targets in one block of bytes: the same as before they were packed, wherever they go."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from yolo.config import COCO_ANCHORS, Config
from yolo.losses import ScaleTargets, assign_targets, count_targets
from yolo.models.yolov3 import make_anchors
from yolo.tasks.assigned import AssignedCollate, AssignedTargets

SIZE = 96
ANCHORS = make_anchors(COCO_ANCHORS, SIZE)


def make_targets(counts: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator) * SIZE
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1).clamp(max=SIZE)
        labels = torch.randint(4, (count,), generator=generator)
        targets.append(
            {"boxes": boxes, "labels": labels, "difficult": torch.zeros(count, dtype=torch.bool)}
        )
    return targets


def collate(counts: list[list[int]]) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    (images,) = counts
    return torch.zeros(len(images), 3, SIZE, SIZE, dtype=torch.uint8), make_targets(images)


def assert_equal(found: AssignedTargets, scales: list[ScaleTargets]) -> None:
    assert torch.equal(found.counts, count_targets(scales))
    for own, scale in zip(found, scales, strict=True):
        for name in ScaleTargets._fields:
            torch.testing.assert_close(getattr(own, name), getattr(scale, name), rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["reference", "paper"])
@pytest.mark.parametrize("counts", [[0], [3, 0, 7], [40, 25]])
def test_packing_changes_nothing(rule, counts):
    scales = assign_targets(make_targets(counts), ANCHORS, SIZE, rule=rule)
    packed = AssignedTargets.pack(scales)
    assert_equal(packed, scales)
    assert_equal(pickle.loads(pickle.dumps(packed)), scales)


def test_a_batch_goes_to_a_device_in_one_piece_and_shares_its_block():
    packed = AssignedTargets.pack(assign_targets(make_targets([5, 2]), ANCHORS, SIZE, rule="paper"))
    moved = packed.to("meta")
    assert all(tensor.device.type == "meta" for scale in moved for tensor in scale)
    own = packed.block.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == own for scale in packed for tensor in scale)
    coarse, middle, fine = packed
    assert coarse.gt_boxes.data_ptr() == middle.gt_boxes.data_ptr() == fine.gt_boxes.data_ptr()


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_assign_as_the_loss_was_told(workers):
    config = Config(assignment="paper", ignore_iou=0.3, img_sizes=(SIZE,))
    counts = [[4, 0, 9], [1, 1, 30]]
    loader = DataLoader(
        counts, collate_fn=AssignedCollate(collate, ANCHORS, config), num_workers=workers
    )
    for (images, targets), wanted in zip(loader, counts, strict=True):
        assert images.shape == (3, 3, SIZE, SIZE)
        scales = assign_targets(make_targets(wanted), ANCHORS, SIZE, rule="paper", ignore_iou=0.3)
        assert_equal(targets, scales)
