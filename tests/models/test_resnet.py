"""The classifier's size, shapes and inputs."""

import pytest
import torch
from torch import nn

from yolo.models.resnet import ResNet


def test_the_reference_width_has_6573130_parameters() -> None:
    with torch.device("meta"):
        model = ResNet(10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_573_130


def test_layers_have_the_shapes_of_the_description() -> None:
    with torch.device("meta"):
        model = ResNet(10).eval()
        images = torch.rand(2, 3, 32, 32)
    shapes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    model(images)
    assert shapes == {
        "prep": (64, 32, 32),
        "layer1": (128, 16, 16),
        "layer2": (256, 8, 8),
        "layer3": (512, 4, 4),
        "pool": (512, 1, 1),
        "classifier": (10,),
    }
    assert [
        name for name in ("layer1", "layer2", "layer3") if "body" in repr(getattr(model, name))
    ] == [
        "layer1",
        "layer3",
    ]


def test_bytes_and_fractions_are_the_same_images() -> None:
    model = ResNet(10, width=0.125).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model(images), model(images.float() / 255))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = ResNet(3, width=0.125)
    loss = nn.functional.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8) % 3)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_gives_what_its_images_give_alone(batch: int) -> None:
    model = ResNet(4, width=0.125).eval()
    images = torch.rand(batch, 3, 32, 32)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)
