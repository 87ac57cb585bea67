"""Which cells answer for which box, and the four terms of the YOLOv3 loss.

Everything is vectorised over the batch: there is no loop over boxes. The counts that normalise the terms are
computed outside, over the whole global batch, so that the gradient does not depend on who shares it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from yolo.boxes import paired_iou, shape_iou
from yolo.config import LossConfig
from yolo.models.yolov3 import STRIDES, decode_boxes, place_boxes


class ScaleTargets(NamedTuple):
    """What one scale is taught: P positive cells, and the cells that are empty; all others are ignored."""

    cells: Tensor  # [P, 4] int64: image, anchor, row, column
    boxes: Tensor  # [P, 4] xyxy pixels
    labels: Tensor  # [P] int64
    empty: Tensor  # [B, A, H, W] bool
    crowd: Tensor  # [B, M, 4] the boxes of each image, padded with zeros; M = 0 without `paper`


def assign_targets(
    targets: Sequence[Mapping[str, Tensor]],
    anchors: Tensor,
    img_size: int,
    *,
    rule: str = "reference",
    ignore_iou: float = 0.5,
    device: torch.device | str = "cpu",
) -> list[ScaleTargets]:
    """Decide for each scale which cells are positive, which are empty and which are ignored.

    `reference`: per box and scale, the free anchor of the best shape in the box's cell is positive (boxes
    come in their order: the first takes the anchor); its other anchors whose shape IoU exceeds `ignore_iou`
    are ignored, unless another box takes them. `paper` (section 2.1): only the best of all nine anchors is
    positive, and the loss ignores predictions that overlap a box by more than `ignore_iou`.

    The index arithmetic stays where the boxes are, on the CPU: how many cells are taken is known only after
    it, and asking a GPU would stall it. The grids are made on `device`.

    Args:
        targets: per image `boxes` [M, 4] xyxy pixels and `labels` [M].
        anchors: [3, A, 2] pixels, coarse to fine, on the CPU.
        img_size: side of the square network input.
        rule: `reference` or `paper`.
        ignore_iou: see above.
        device: where the result is needed.

    Returns:
        One `ScaleTargets` per scale, coarse to fine, on `device`.
    """
    counts = torch.tensor([len(target["boxes"]) for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets]).float()
    labels = torch.cat([target["labels"] for target in targets])
    image = torch.repeat_interleave(torch.arange(len(targets)), counts)
    shapes = shape_iou((boxes[:, 2:] - boxes[:, :2])[:, None, None], anchors.to(boxes))  # [N, 3, A]
    if rule == "paper":
        best_scale = shapes.flatten(1).argmax(1) // anchors.shape[1]
        keep = [best_scale == scale for scale in range(len(STRIDES))]
        crowd = pad_sequence([target["boxes"].float() for target in targets], batch_first=True)
        ignore_shape = 1.0
    else:
        keep = [torch.ones_like(labels, dtype=torch.bool)] * len(STRIDES)
        crowd = boxes.new_zeros(len(targets), 0, 4)
        ignore_shape = ignore_iou
    crowd = crowd.to(device, non_blocking=True)
    assigned = []
    for scale, stride in enumerate(STRIDES):
        side = img_size // stride
        empty = torch.ones(len(targets), anchors.shape[1], side, side, dtype=torch.bool, device=device)
        cells, ignored, taken = _find_cells(
            image[keep[scale]], boxes[keep[scale]], shapes[keep[scale], scale], side, stride, ignore_shape
        )
        parts = [cells, boxes[keep[scale]][taken], labels[keep[scale]][taken], torch.cat([cells, ignored])]
        cells, taken_boxes, taken_labels, used = (part.to(device, non_blocking=True) for part in parts)
        empty[tuple(used.T)] = False
        assigned.append(ScaleTargets(cells, taken_boxes, taken_labels, empty, crowd))
    return assigned


def _find_cells(
    image: Tensor, boxes: Tensor, shapes: Tensor, side: int, stride: int, ignore_shape: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positive cells [P, 4], ignored cells [K, 4] (maybe positive too), and the boxes placed."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / (2 * stride)
    column, row = centres.long().clamp(0, side - 1).T  # edges stay in the grid
    anchor = _first_come_anchors((image * side + row) * side + column, shapes)
    taken = anchor >= 0
    cells = torch.stack([image, anchor, row, column], dim=1)[taken]
    box, similar = (shapes > ignore_shape).nonzero(as_tuple=True)
    return cells, torch.stack([image[box], similar, row[box], column[box]], dim=1), taken


def _first_come_anchors(cell: Tensor, shapes: Tensor) -> Tensor:
    """Give each box its best anchor that no earlier box of the same cell took; -1 where none is left.

    Boxes that share a cell are served in rounds: a round serves at most one box per cell, the earliest
    waiting.

    Args:
        cell: [N] int64, the same number for boxes in the same cell of the same image.
        shapes: [N, A] shape IoU with each anchor.
    """
    _, cell = cell.unique(return_inverse=True)
    anchor = torch.full_like(cell, -1)
    free = torch.ones(len(cell), shapes.shape[1], dtype=torch.bool)
    turn = _turn_within(cell)
    for round_number in range(shapes.shape[1]):  # a cell has this many anchors to give
        now = (turn == round_number).nonzero()[:, 0]
        anchor[now] = shapes[now].masked_fill(~free[cell[now]], -1.0).argmax(1)
        free[cell[now], anchor[now]] = False
    return anchor


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
    """The weighted terms `box`, `object`, `no_object` and `class`, each summed over scales.

    Per scale and global batch: box = mean squared error of (sigmoid(tx), sigmoid(ty), tw, th); object =
    binary cross-entropy of the logit with the detached IoU (or 1) as target; no_object = binary cross-entropy
    on empty cells; class = softmax cross-entropy. Nothing is changed in place.
    """

    anchors: Tensor

    def __init__(self, anchors: Tensor, config: LossConfig, label_smoothing: float = 0.0) -> None:
        """Keep `anchors` [3, A, 2] (pixels, coarse to fine) as a buffer, and the weights of `config`."""
        super().__init__()
        self.register_buffer("anchors", anchors, persistent=False)
        self.config = config
        self.label_smoothing = label_smoothing

    def forward(
        self, outputs: Sequence[Tensor], assigned: Sequence[ScaleTargets], counts: Tensor
    ) -> dict[str, Tensor]:
        """Return the four weighted terms as scalars; a term without any cell is 0 and still has a gradient.

        Args:
            outputs: per scale [B, A, H, W, 5 + C], raw.
            assigned: per scale, from `assign_targets`.
            counts: [3, 2] positive and empty cells of the whole global batch, from `count_targets`.
        """
        weights = {
            "box": self.config.box_weight,
            "object": self.config.object_weight,
            "no_object": self.config.no_object_weight,
            "class": self.config.class_weight,
        }
        terms = [
            self._scale_terms(
                output, scale_anchors, stride, target, positives.clamp(min=1), empties.clamp(min=1)
            )
            for output, scale_anchors, stride, target, (positives, empties) in zip(
                outputs, self.anchors, STRIDES, assigned, counts, strict=True
            )
        ]
        return {
            name: weight * torch.stack([term[name] for term in terms]).sum()
            for name, weight in weights.items()
        }

    def _scale_terms(
        self,
        output: Tensor,
        anchors: Tensor,
        stride: int,
        target: ScaleTargets,
        positives: Tensor,
        empties: Tensor,
    ) -> dict[str, Tensor]:
        image, anchor, row, column = target.cells.T
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        found = output[image, anchor, row, column]  # [P, 5 + C]
        cell = torch.stack([column, row], dim=1)
        wanted = encode_boxes(target.boxes, anchors[anchor], cell, stride).to(output)
        predicted = torch.cat([found[:, :2].sigmoid(), found[:, 2:4]], dim=1)
        overlap = paired_iou(place_boxes(found[:, :4].detach(), anchors[anchor], cell, stride), target.boxes)
        object_target = (
            overlap.to(output) if self.config.object_target == "iou" else torch.ones_like(found[:, 4])
        )
        box = functional.mse_loss(predicted, wanted, reduction="sum")
        has_object = functional.binary_cross_entropy_with_logits(found[:, 4], object_target, reduction="sum")
        no_object = functional.softplus(output[..., 4]) * self._still_empty(output, anchors, stride, target)
        classes = functional.cross_entropy(
            found[:, 5:], target.labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return {
            "box": box / (4 * positives),
            "object": has_object / positives,
            "no_object": no_object.sum() / empties,
            "class": classes / positives,
        }

    def _still_empty(self, output: Tensor, anchors: Tensor, stride: int, target: ScaleTargets) -> Tensor:
        if not target.crowd.shape[1]:
            return target.empty
        predicted = decode_boxes(output.detach(), anchors, stride).flatten(1, 3)[:, :, None]
        overlaps = paired_iou(predicted, target.crowd[:, None]).amax(-1)
        return target.empty & (overlaps <= self.config.ignore_iou).view_as(target.empty)


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
