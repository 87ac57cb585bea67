"""YOLOv3 (Redmon & Farhadi 2018): a backbone, heads from coarse to fine, and their decoding."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from yolo.boxes import boxes_from_letterbox, letterbox
from yolo.config import ANCHOR_REFERENCE_SIZE, Config
from yolo.errors import UsageError
from yolo.models.backbones import TimmBackbone, make_backbone
from yolo.models.darknet import ConvBnAct, images_to_float, scaled

STRIDES = (32, 16, 8)  # coarse to fine, as in the paper and in Darknet
ANCHORS_PER_SCALE = 3
OBJECTNESS_PRIOR = 0.01
# per image: an untrained network may fire in every cell, and NMS is quadratic
MAX_CANDIDATES = 2000
# boxes of one class that overlap the kept one by more than this have a say in where it is
MERGE_IOU = 0.6
MAX_LOG_SCALE = 6.0  # exp(6) anchors are wider than any image: keeps a decoded box finite


class YoloV3(nn.Module):
    """The detector; 61,626,049 parameters with Darknet-53 at width 1 with 20 classes.

    `width` scales every channel count but those of a backbone of timm.

    Per scale, `necks[i]` is the five-convolution block and `heads[i]` the 3x3 and the biased 1x1
    convolution that give `tx, ty, tw, th, objectness, classes`; `laterals[i]` carries scale i to
    the next finer one.
    """

    def __init__(self, num_classes: int, width: float = 1.0, backbone: str = "darknet53") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = make_backbone(backbone, width)
        fine, middle, coarse = self.backbone.channels
        c3, c4, c5 = (scaled(channels, width) for channels in (256, 512, 1024))
        half = {c: scaled(c // 2, 1.0) for c in (c3, c4, c5)}
        self.necks = nn.ModuleList(
            [
                _neck(coarse, half[c5], c5),
                _neck(middle + half[c4], half[c4], c4),
                _neck(fine + half[c3], half[c3], c3),
            ]
        )
        self.laterals = nn.ModuleList(
            [ConvBnAct(half[c5], half[c4], 1), ConvBnAct(half[c4], half[c3], 1)]
        )
        outputs = ANCHORS_PER_SCALE * (5 + num_classes)
        self.heads = nn.ModuleList(
            nn.Sequential(ConvBnAct(half[c], c, 3), nn.Conv2d(c, outputs, 1)) for c in (c5, c4, c3)
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self._init_weights()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, S, S], uint8 or float in [0, 1], to one raw output per scale.

        Returns:
            Three tensors [B, A, S/stride, S/stride, 5 + C] for strides 32, 16 and 8; S is a
            multiple of 32.
        """
        return self.trace(images)[1]

    def trace(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what enters each neck, and the raw outputs of `forward`; both coarse to fine."""
        height, width = images.shape[2:]
        if height % STRIDES[0] or width % STRIDES[0]:
            raise UsageError(
                f"images of {height} x {width} pixels: the detector takes multiples of {STRIDES[0]}"
            )
        fine, middle, coarse = self.backbone(images_to_float(images))
        neck_inputs, outputs = [coarse], []
        for scale, finer in enumerate((middle, fine, None)):
            features = self.necks[scale](neck_inputs[scale])
            outputs.append(self.predict(scale, features))
            if finer is not None:
                neck_inputs.append(torch.cat([self.carry(scale, features), finer], dim=1))
        return neck_inputs, outputs

    def carry(self, scale: int, features: Tensor) -> Tensor:
        """Take the output [B, C', H, W] of one scale's neck to the next scale: [B, C'', 2H, 2W]."""
        return self.upsample(self.laterals[scale](features))

    def predict(self, scale: int, features: Tensor) -> Tensor:
        """Map the output [B, C', H, W] of a scale's neck to its raw output [B, A, H, W, 5 + C]."""
        raw = self.heads[scale](features)
        batch, _, height, width = raw.shape
        shaped = raw.view(batch, ANCHORS_PER_SCALE, 5 + self.num_classes, height, width)
        return shaped.permute(0, 1, 3, 4, 2)

    def _init_weights(self) -> None:
        # timm has given its own layers what suits them
        done = {*self.backbone.modules()} if isinstance(self.backbone, TimmBackbone) else set()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in done:
                nn.init.kaiming_normal_(
                    module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu"
                )
        for head in self.heads:
            last = cast(nn.Conv2d, cast(nn.Sequential, head)[-1])
            nn.init.normal_(last.weight, std=0.01)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                objectness = last.bias.view(ANCHORS_PER_SCALE, -1)[:, 4]
                objectness.fill_(math.log(OBJECTNESS_PRIOR / (1 - OBJECTNESS_PRIOR)))


def _neck(in_channels: int, narrow: int, wide: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBnAct(in_channels, narrow, 1),
        ConvBnAct(narrow, wide, 3),
        ConvBnAct(wide, narrow, 1),
        ConvBnAct(narrow, wide, 3),
        ConvBnAct(wide, narrow, 1),
    )


@torch.no_grad()
def rescale_objectness(model: YoloV3, factors: Tensor) -> None:
    """Let the heads give a * objectness + b for objectness: a calibration of the scores.

    Args:
        model: changed in place.
        factors: [3, 2] a and b of each scale, coarse to fine.
    """
    for head, (a, b) in zip(model.heads, factors.tolist(), strict=True):
        last = cast(nn.Conv2d, cast(nn.Sequential, head)[-1])
        assert last.bias is not None
        last.weight.view(ANCHORS_PER_SCALE, 5 + model.num_classes, -1)[:, 4] *= a
        objectness = last.bias.view(ANCHORS_PER_SCALE, -1)[:, 4]
        objectness.mul_(a).add_(b)


def trained_objectness(outputs: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Undo `rescale_objectness` on raw outputs [B, A, H, W, 5 + C]: what was trained."""
    return [
        torch.cat([output[..., :4], (output[..., 4:5].float() - b) / a, output[..., 5:]], dim=-1)
        for output, (a, b) in zip(outputs, factors.tolist(), strict=True)
    ]


def make_anchors(sizes: Sequence[float], test_size: int) -> Tensor:
    """Scale nine (w, h) given in pixels of a 416 input, small to large, to `test_size`.

    Returns:
        [3, 3, 2] float32, coarse to fine: `anchors[i]` belongs to `STRIDES[i]`.
    """
    pairs = torch.tensor(sizes, dtype=torch.float32).view(len(STRIDES), ANCHORS_PER_SCALE, 2)
    return pairs.flip(0) * (test_size / ANCHOR_REFERENCE_SIZE)


def decode_boxes(output: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Turn the raw boxes of a scale into xyxy pixels of the network input (YOLOv3, figure 2).

    Args:
        output: [B, A, H, W, 4 or more] raw `tx, ty, tw, th, ...`.
        anchors: [A, 2] width and height in pixels.
        stride: pixels per cell.

    Returns:
        [B, A, H, W, 4] float32.
    """
    rows = torch.arange(output.shape[2], device=output.device)
    columns = torch.arange(output.shape[3], device=output.device)
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    return place_boxes(output[..., :4].float(), anchors[:, None, None], cells, stride)


def place_boxes(raw: Tensor, anchors: Tensor, cells: Tensor, stride: int) -> Tensor:
    """Apply the equations of figure 2 to raw boxes, each with its own anchor and cell.

    Args:
        raw: [..., 4] `tx, ty, tw, th`.
        anchors: [..., 2] pixels, broadcast.
        cells: [..., 2] column and row, broadcast.
        stride: pixels per cell.

    Returns:
        [..., 4] xyxy pixels.
    """
    centres = (raw[..., :2].sigmoid() + cells) * stride
    halves = raw[..., 2:4].clamp(max=MAX_LOG_SCALE).exp() * anchors.to(raw) / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


def decode(outputs: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten all scales into boxes, objectness and class probabilities.

    Args:
        outputs: three [B, A, H, W, 5 + C], coarse to fine.
        anchors: [3, A, 2] pixels.

    Returns:
        boxes [B, N, 4] xyxy pixels, objectness [B, N] and class probabilities [B, N, C], N over
        (scale, A, H, W).
    """
    boxes = [
        decode_boxes(output, scale_anchors, stride).flatten(1, 3)
        for output, scale_anchors, stride in zip(outputs, anchors, STRIDES, strict=True)
    ]
    logits = torch.cat([output[..., 4:].flatten(1, 3) for output in outputs], dim=1).float()
    return torch.cat(boxes, dim=1), logits[..., 0].sigmoid(), logits[..., 1:].softmax(-1)


def postprocess(
    outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    all_classes: bool = False,
    nms: Literal["standard", "merge"] = "standard",
) -> list[dict[str, Tensor]]:
    """Decode a whole batch, apply the threshold, and suppress overlapping boxes of the same class.

    A detection's score is objectness x class probability. A prediction stands for its likeliest
    class, which is what a person wants to see; with `all_classes` also for every other one that
    reaches the threshold, as in Darknet's own scoring. With `nms="merge"` a kept box becomes the
    mean, weighted by score, of the boxes of its class that overlap it by more than `MERGE_IOU`,
    itself included.

    Returns:
        Per image, sorted by score: `boxes` [K, 4] xyxy pixels of the network input, `scores` [K],
        `labels` [K], and `index` [K], the place of each among the N predictions of `decode`; K <=
        `max_detections`.
    """
    boxes, objectness, class_probs = decode(outputs, anchors)
    scores = objectness[..., None] * class_probs
    return [
        _suppress(*image, score_threshold, iou_threshold, max_detections, all_classes, nms)
        for image in zip(boxes, scores, strict=True)
    ]


def to_detections(
    outputs: Sequence[Tensor],
    anchors: Tensor,
    config: Config,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    score_threshold: float,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    all_classes: bool = False,
) -> list[dict[str, Tensor]]:
    """Postprocess as a configuration says, and move the boxes to the original images.

    Args:
        outputs: three [B, A, H, W, 5 + C] of square, letterboxed images.
        anchors: [3, A, 2] pixels.
        config: `nms` and the two limits that are not given here.
        sizes: (height, width) of each original image; without them the boxes stay as they are.
        score_threshold: as in `postprocess`.
        iou_threshold: likewise; default `config.iou_threshold`.
        max_detections: likewise; default `config.max_detections`.
        all_classes: likewise.

    Returns:
        As `postprocess`; with `sizes` the `boxes` are in pixels of the original image, clipped to
        it, and `input_boxes` in those of the network input.
    """
    detected = postprocess(
        outputs,
        anchors.to(outputs[0].device),
        score_threshold=score_threshold,
        iou_threshold=config.iou_threshold if iou_threshold is None else iou_threshold,
        max_detections=config.max_detections if max_detections is None else max_detections,
        all_classes=all_classes,
        nms=config.nms,
    )
    if sizes is None:
        return detected
    input_size = outputs[0].shape[2] * STRIDES[0]
    for detections, (height, width) in zip(detected, sizes, strict=True):
        detections["input_boxes"] = detections["boxes"]
        place = letterbox(height, width, input_size)
        detections["boxes"] = boxes_from_letterbox(detections["boxes"], place, height, width)
    return detected


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    all_classes: bool,
    nms: Literal["standard", "merge"],
) -> dict[str, Tensor]:
    """Return the detections of one image from boxes [N, 4] and scores [N, C].

    Image by image, because torchvision tells groups apart by moving them away from each other: over
    a whole batch that would cost the last bits of the coordinates, and images would depend on their
    neighbours.
    """
    if all_classes:
        index, labels = (scores >= score_threshold).nonzero(as_tuple=True)
    else:
        best, likeliest = scores.max(-1)
        index = (best >= score_threshold).nonzero()[:, 0]
        labels = likeliest[index]
    confidence = scores[index, labels]
    order = confidence.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    index, labels, confidence = index[order], labels[order], confidence[order]
    boxes = boxes[index]
    kept = batched_nms(boxes, confidence, labels, iou_threshold)[:max_detections]
    placed = boxes[kept]
    if nms == "merge":
        same = (box_iou(placed, boxes) > MERGE_IOU) & (labels[kept][:, None] == labels)
        same[torch.arange(len(kept), device=kept.device), kept] = True  # also a box without area
        weights = same * confidence
        placed = weights @ boxes / weights.sum(1, keepdim=True)
    scores, labels, index = confidence[kept], labels[kept], index[kept]
    return {"boxes": placed, "scores": scores, "labels": labels, "index": index}
