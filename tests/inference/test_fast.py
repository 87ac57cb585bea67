"""A network that sees each picture twice."""

import torch
from torch import nn

from yolo.config import COCO_ANCHORS
from yolo.inference.fast import FlipAveraged
from yolo.models.yolov3 import YoloV3, decode, make_anchors

SIZE = 64


def test_an_average_over_mirror_images_does_not_change_when_the_picture_is_mirrored() -> None:
    torch.manual_seed(0)
    model = FlipAveraged(YoloV3(3, width=0.0625).eval()).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    anchors = make_anchors(COCO_ANCHORS, SIZE)
    with torch.no_grad():
        outputs, mirrored = model(images), model(images.flip(-1))
    for output, other in zip(outputs, mirrored, strict=True):
        torch.testing.assert_close(output[..., 1:], other.flip(3)[..., 1:])
        torch.testing.assert_close(output[..., 0], -other.flip(3)[..., 0])
    boxes, back = decode(outputs, anchors)[0], decode(mirrored, anchors)[0]
    widths, others = boxes[..., 2] - boxes[..., 0], back[..., 2] - back[..., 0]
    torch.testing.assert_close(widths.sort().values, others.sort().values)
    torch.testing.assert_close(boxes[..., 0].sort().values, (SIZE - back[..., 2]).sort().values)


def test_a_symmetric_answer_stays_what_it_is() -> None:
    class Symmetric(nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            output = torch.randn(1, 3, 2, 4, 7, generator=torch.Generator().manual_seed(1))
            output = (output + output.flip(3)) / 2
            output[..., 0] = 0.0  # in the middle of its cell
            return [output]

    images = torch.rand(1, 3, 64, 128)
    torch.testing.assert_close(FlipAveraged(Symmetric())(images)[0], Symmetric()(images)[0])


def test_a_classifier_averages_its_logits() -> None:
    class LeftBrightness(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[..., 0].mean(dim=(1, 2))[:, None]

    images = torch.rand(2, 3, 4, 4)
    expected = (images[..., 0] + images[..., -1]).mean(dim=(1, 2))[:, None] / 2
    torch.testing.assert_close(FlipAveraged(LeftBrightness())(images), expected)
