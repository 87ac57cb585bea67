"""Which cells answer for which box, and the four terms of the YOLOv3 loss.

Everything is vectorised over the batch: there is no loop over boxes. The counts that normalise the
terms are computed outside, over the whole global batch, so that the gradient does not depend on who
shares it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import complete_box_iou_loss

from yolo.boxes import paired_iou, shape_iou
from yolo.config import Assignment, LossSettings
from yolo.models.yolov3 import MAX_LOG_SCALE, STRIDES, decode_boxes, place_boxes

# an anchor fits a box if no side of one is this many times the other's, as in YOLOv5
FIT_RATIO = 4.0


class ScaleTargets(NamedTuple):
    """What one scale is taught: P positive cells, and the empty ones; all others are ignored."""

    cells: Tensor  # [P, 4] int64: image, anchor, row, column
    boxes: Tensor  # [P, 4] xyxy pixels
    labels: Tensor  # [P] int64
    empty: Tensor  # [B, A, H, W] bool
    gt_boxes: Tensor  # [B, M, 4] the boxes of each image, padded with zeros; M = 0 without `paper`


def assign_targets(
    targets: Sequence[Mapping[str, Tensor]],
    anchors: Tensor,
    img_size: int,
    *,
    rule: Assignment = "reference",
    ignore_iou: float = 0.5,
    use_difficult: bool = True,
    device: torch.device | str = "cpu",
) -> list[ScaleTargets]:
    """Decide for each scale which cells are positive, which are empty and which are ignored.

    `reference`: per box and scale, the free anchor of the best shape in the box's cell is positive
    (boxes come in their order: the first takes the anchor); its other anchors whose shape IoU
    exceeds `ignore_iou` are ignored, unless another box takes them. `paper` (section 2.1): only the
    best of all nine anchors is positive, and the loss ignores predictions that overlap a box by
    more than `ignore_iou`. `multi`: every anchor that fits the box is positive (`FIT_RATIO`; the
    best of all nine if none does), and its cells on other scales are ignored.

    The index arithmetic stays on the CPU: a GPU would be asked how many cells are taken, and stall.

    Args:
        targets: per image `boxes` [M, 4] xyxy pixels, `labels` [M], `difficult` [M].
        anchors: [3, A, 2] pixels, coarse to fine, on the CPU.
        img_size: side of the square network input.
        rule: one of those above.
        ignore_iou: see above.
        use_difficult: without, objects flagged as `difficult` are not there.
        device: where the result, one `ScaleTargets` per scale, coarse to fine, is needed.
    """
    keep = [~target["difficult"] if not use_difficult else slice(None) for target in targets]
    boxes_of = [target["boxes"][kept].float() for target, kept in zip(targets, keep, strict=True)]
    boxes = torch.cat(boxes_of)
    labels = torch.cat([target["labels"][kept] for target, kept in zip(targets, keep, strict=True)])
    counts = torch.tensor([len(own) for own in boxes_of])
    image = torch.repeat_interleave(torch.arange(len(targets)), counts)
    sizes = boxes[:, 2:] - boxes[:, :2]
    overlaps, ignored = _anchors_of_boxes(sizes, anchors.to(boxes), rule, ignore_iou)
    gt_boxes = boxes.new_zeros(len(targets), 0, 4)
    if rule == "paper":
        gt_boxes = pad_sequence(boxes_of, batch_first=True)
    gt_boxes = gt_boxes.to(device, non_blocking=True)
    assigned = []
    for scale, stride in enumerate(STRIDES):
        side = img_size // stride
        centres = (boxes[:, :2] + boxes[:, 2:]) / (2 * stride)
        column, row = centres.long().clamp(0, side - 1).T  # edges stay in the grid
        cell = (image * side + row) * side + column
        box, anchor = (_take_all if rule == "multi" else _take_best)(cell, overlaps[:, scale])
        cells = torch.stack([image[box], anchor, row[box], column[box]], dim=1)
        near, similar = ignored[:, scale].nonzero(as_tuple=True)
        others = torch.stack([image[near], similar, row[near], column[near]], dim=1)
        parts = (cells, boxes[box], labels[box], torch.cat([cells, others]))
        cells, own_boxes, own_labels, used = (part.to(device, non_blocking=True) for part in parts)
        shape = (len(targets), anchors.shape[1], side, side)
        empty = torch.ones(shape, dtype=torch.bool, device=device)
        empty[tuple(used.T)] = False
        assigned.append(ScaleTargets(cells, own_boxes, own_labels, empty, gt_boxes))
    return assigned


def _anchors_of_boxes(
    sizes: Tensor, anchors: Tensor, rule: Assignment, ignore_iou: float
) -> tuple[Tensor, Tensor]:
    """Return which anchors of its cells a box may take, and which it makes ignored if free.

    Args:
        sizes: [N, 2] width and height.
        anchors: [3, A, 2] width and height.
        rule: as in `assign_targets`.
        ignore_iou: as there.

    Returns:
        [N, 3, A] the shape IoU of anchors that it may take, -1 for others; and [N, 3, A] bool.
    """
    overlaps = shape_iou(sizes[:, None, None], anchors)
    similar = overlaps > ignore_iou
    if rule == "reference":
        return overlaps, similar
    best = functional.one_hot(overlaps.flatten(1).argmax(1), anchors[..., 0].numel()).bool()
    best = best.view_as(overlaps)
    if rule == "paper":
        return overlaps.masked_fill(~best.any(-1, keepdim=True), -1.0), torch.zeros_like(similar)
    ratios = sizes[:, None, None] / anchors
    fits = torch.maximum(ratios, 1 / ratios).amax(-1) < FIT_RATIO
    fits |= best & ~fits.flatten(1).any(1)[:, None, None]
    return overlaps.masked_fill(~fits, -1.0), similar | ~fits.any(-1, keepdim=True)


def _take_all(cell: Tensor, overlaps: Tensor) -> tuple[Tensor, Tensor]:
    """Give each box all anchors that it may take; of several boxes the first takes an anchor."""
    box, anchor = (overlaps >= 0).nonzero(as_tuple=True)
    first = _turn_within(cell[box] * overlaps.shape[1] + anchor) == 0
    return box[first], anchor[first]


def _take_best(cell: Tensor, overlaps: Tensor) -> tuple[Tensor, Tensor]:
    """Give each box the best anchor that it may take and no earlier box of the same cell took.

    Boxes that share a cell are served in rounds: a round serves at most one box per cell, the
    earliest waiting.

    Args:
        cell: [N] int64, the same number for boxes in the same cell of the same image.
        overlaps: [N, A] shape IoU with each anchor, -1 for one that must not be taken.

    Returns:
        The boxes that got an anchor, rising, and the anchors.
    """
    box = (overlaps >= 0).any(1).nonzero()[:, 0]
    _, cell = cell[box].unique(return_inverse=True)
    anchor = torch.full_like(cell, -1)
    free = torch.ones(len(cell), overlaps.shape[1], dtype=torch.bool)
    turn = _turn_within(cell)
    for round_number in range(overlaps.shape[1]):  # a cell has this many anchors to give
        now = (turn == round_number).nonzero()[:, 0]
        value, best = overlaps[box[now]].masked_fill(~free[cell[now]], -1.0).max(1)
        anchor[now] = torch.where(value >= 0, best, -1)
        free[cell[now], best] &= value < 0
    return box[anchor >= 0], anchor[anchor >= 0]


def _turn_within(cell: Tensor) -> Tensor:
    """Return, for each entry, how many earlier entries have the same value."""
    order = torch.argsort(cell, stable=True)
    sorted_cell = cell[order]
    places = torch.arange(len(cell), device=cell.device)
    first = torch.searchsorted(sorted_cell, sorted_cell)
    return torch.empty_like(places).scatter_(0, order, places - first)


def count_targets(assigned: Sequence[ScaleTargets]) -> Tensor:
    """Return [3, 2] float32: per scale the number of positive and of empty cells."""
    positives = torch.tensor([len(scale.labels) for scale in assigned])
    empties = torch.stack([scale.empty.sum() for scale in assigned])
    return torch.stack([positives.to(empties.device, non_blocking=True), empties], dim=1).float()


class YoloLoss(nn.Module):
    """The weighted terms `box`, `object`, `no_object` and `class`.

    The reference's: per scale and global batch, and summed over scales, box = mean squared error of
    (sigmoid(tx), sigmoid(ty), tw, th); object = binary cross-entropy of the logit with the detached
    IoU (or 1) as target; no_object = binary cross-entropy on empty cells; class = softmax
    cross-entropy. `yolo.config.LossConfig` says what else each can be. Nothing is changed in place.
    """

    anchors: Tensor
    no_object_scales: Tensor

    def __init__(
        self, anchors: Tensor, settings: LossSettings, label_smoothing: float = 0.0
    ) -> None:
        """Keep `anchors` [3, A, 2] (pixels, coarse to fine) as a buffer, and the settings."""
        super().__init__()
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer(
            "no_object_scales", torch.tensor(settings.no_object_scales), persistent=False
        )
        self.settings = settings
        self.label_smoothing = label_smoothing

    def forward(
        self, outputs: Sequence[Tensor], assigned: Iterable[ScaleTargets], counts: Tensor
    ) -> dict[str, Tensor]:
        """Return the four weighted terms as scalars; without any cell one is 0, but has a gradient.

        Args:
            outputs: per scale [B, A, H, W, 5 + C], raw.
            assigned: per scale, from `assign_targets`.
            counts: [3, 2] positive and empty cells of the whole global batch, from `count_targets`.
        """
        settings = self.settings
        scales = zip(outputs, self.anchors, STRIDES, assigned, strict=True)
        sums = [self._scale_sums(*scale) for scale in scales]
        box, has_object, no_object, classes = (
            torch.stack(values) for values in zip(*sums, strict=True)
        )
        positives = counts[:, 0].clamp(min=1)
        per_cell = no_object * self.no_object_scales / counts[:, 1].clamp(min=1)
        return {
            "box": settings.box_weight * (box / positives).sum(),
            "object": settings.object_weight * (has_object / positives).sum(),
            "no_object": settings.no_object_weight * per_cell.sum(),
            "class": settings.class_weight * (classes / positives).sum(),
        }

    def _scale_sums(
        self, output: Tensor, anchors: Tensor, stride: int, target: ScaleTargets
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four terms of one scale, summed over its cells."""
        image, anchor, row, column = target.cells.T
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        predicted = output[image, anchor, row, column]  # [P, 5 + C]
        cell = torch.stack([column, row], dim=1)
        boxes = place_boxes(predicted[:, :4].detach(), anchors[anchor], cell, stride)
        object_target = paired_iou(boxes, target.boxes).to(output)
        if self.settings.object_target == "one":
            object_target = torch.ones_like(object_target)
        has_object = functional.binary_cross_entropy_with_logits(
            predicted[:, 4], object_target, reduction="sum"
        )
        empty = target.empty
        if target.gt_boxes.shape[1]:
            everywhere = decode_boxes(output.detach(), anchors, stride).flatten(1, 3)
            overlaps = paired_iou(everywhere[:, :, None], target.gt_boxes[:, None]).amax(-1)
            empty = empty & (overlaps <= self.settings.ignore_iou).view_as(empty)
        return (
            self._box_term(predicted[:, :4], target.boxes, anchors[anchor], cell, stride),
            has_object,
            (functional.softplus(output[..., 4]) * empty).sum(),
            functional.cross_entropy(
                predicted[:, 5:],
                target.labels,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            ),
        )

    def _box_term(
        self, raw: Tensor, boxes: Tensor, anchors: Tensor, cell: Tensor, stride: int
    ) -> Tensor:
        """Return 1 - CIoU (Zheng et al. 2020, section 3.3), or the error's mean of four, summed."""
        if self.settings.box_loss == "ciou":
            sizes = raw[:, 2:].clamp(min=-MAX_LOG_SCALE)  # a side of 0 has no aspect ratio
            predicted = place_boxes(torch.cat([raw[:, :2], sizes], dim=1), anchors, cell, stride)
            return complete_box_iou_loss(predicted, boxes.to(predicted), reduction="sum")
        predicted = torch.cat([raw[:, :2].sigmoid(), raw[:, 2:]], dim=1)
        encoded = encode_boxes(boxes, anchors, cell, stride).to(raw)
        return functional.mse_loss(predicted, encoded, reduction="sum") / 4


def encode_boxes(boxes: Tensor, anchors: Tensor, cell: Tensor, stride: int) -> Tensor:
    """Return what the network should say of boxes, its first two outputs after their sigmoid.

    Args:
        boxes: [P, 4] xyxy pixels.
        anchors: [P, 2] pixels.
        cell: [P, 2] column and row.
        stride: pixels per cell.

    Returns:
        [P, 4]: the centre's offset in its cell, in [0, 1], and log(size / anchor).
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / (2 * stride)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    return torch.cat([centres - cell, (sizes / anchors).log()], dim=1)
