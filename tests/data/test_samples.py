"""The batches of training: equal whatever makes them, other in each epoch, boxes on objects."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from yolo.config import Config
from yolo.data.cache import cache_images
from yolo.data.dataset import Annotation, DetectionDataset
from yolo.data.mosaic import letterbox_tile, mosaic_tiles, place_boxes
from yolo.data.samplers import MultiSizeBatchSampler, SampleKey
from yolo.data.samples import EvalSamples, MosaicCollate, TrainSamples, init_worker, plain_collate
from yolo.data.transforms import Affine, Canvas, augment, build_transforms, cut_threshold
from yolo.data.voc import read_voc

SIZES = (64, 96, 128)
CFG = Config(img_sizes=SIZES, batch_size=8, epochs=10)


@pytest.fixture(scope="module")
def digits(tiny_digits: Path) -> DetectionDataset:
    return read_voc(tiny_digits, "train", None)


def make_loader(
    dataset: DetectionDataset,
    cfg: Config = CFG,
    *,
    workers: int = 0,
    start_method: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    position: tuple[int, int] = (1, 0),
) -> DataLoader:
    sampler = MultiSizeBatchSampler(
        len(dataset),
        int(cfg.batch_size),
        cfg.img_sizes,
        cfg.seed,
        rank,
        world_size,
        cfg.grad_accum_steps,
    )
    sampler.set_position(*position)
    return DataLoader(
        TrainSamples(dataset, cfg, cfg.seed),
        batch_sampler=sampler,
        collate_fn=MosaicCollate(cfg, cfg.seed),
        num_workers=workers,
        multiprocessing_context=start_method,
        worker_init_fn=init_worker,
    )


def epoch_of(loader: DataLoader) -> Iterator[tuple]:
    """The batches from the sampler's position to the end of its epoch."""
    sampler = loader.batch_sampler
    return islice(loader, (len(sampler) - sampler.first_batch) * sampler.grad_accum_steps)


def digests(loader: DataLoader) -> list[str]:
    """One digest per image of an epoch with its target: order and bytes."""
    found = []
    for images, targets in epoch_of(loader):
        for image, target in zip(images, targets, strict=True):
            state = hashlib.sha256(image.numpy().tobytes())
            for key in ("boxes", "labels", "difficult"):
                state.update(target[key].numpy().tobytes())
            found.append(f"{image.shape[-1]} {state.hexdigest()}")
    return found


def samples_of(
    dataset: DetectionDataset, cfg: Config, count: int, size: int = 416
) -> Iterator[tuple]:
    """Plans of `count` samples with their annotations; nothing is decoded."""
    samples = TrainSamples(dataset, cfg, cfg.seed)
    for number in range(count):
        key = SampleKey(number // len(dataset), number % len(dataset), size)
        tiles = samples.plan(key)
        yield key, tiles, [dataset.annotation(tile.index) for tile in tiles]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_byte_identical_for_any_number_of_workers(
    digits: DetectionDataset, workers: int
):
    assert digests(make_loader(digits, workers=workers)) == digests(make_loader(digits))


def test_workers_started_by_spawn_read_the_shared_cache_and_make_the_same_batches(
    tiny_digits: Path,
):
    dataset = read_voc(tiny_digits, "train", None)
    cache_images(dataset, max(SIZES), progress=False)
    assert digests(make_loader(dataset, workers=1, start_method="spawn")) == digests(
        make_loader(dataset)
    )


def test_two_ranks_and_two_micro_batches_make_the_batches_of_one(digits: DetectionDataset):
    whole = digests(make_loader(digits))
    cfg = replace(CFG, grad_accum_steps=2)
    shares = [digests(make_loader(digits, cfg, rank=rank, world_size=2)) for rank in (0, 1)]
    for step in range(3):
        mine = slice(step * 4, step * 4 + 4)
        assert sorted(shares[0][mine] + shares[1][mine]) == sorted(whole[step * 8 : step * 8 + 8])


def test_starting_at_any_batch_continues_the_epoch(digits: DetectionDataset):
    whole = digests(make_loader(digits, position=(2, 0)))
    for batch in (1, 2, 3):
        assert digests(make_loader(digits, position=(2, batch))) == whole[8 * batch :]


def test_the_epochs_follow_one_another_without_an_end(digits: DetectionDataset):
    sampler = make_loader(digits, position=(1, 1)).batch_sampler
    steps = 2 * len(sampler) - 1
    found = list(islice(sampler, steps))
    assert [keys[0].epoch for keys in found] == [1] * (len(sampler) - 1) + [2] * len(sampler)
    sampler.set_position(2, 0)
    assert list(islice(sampler, len(sampler))) == found[-len(sampler) :]


def test_two_epochs_share_no_sample(digits: DetectionDataset):
    first, second = (set(digests(make_loader(digits, position=(epoch, 0)))) for epoch in (0, 1))
    assert not first & second


def test_another_seed_gives_other_batches(digits: DetectionDataset):
    assert not set(digests(make_loader(digits))) & set(
        digests(make_loader(digits, replace(CFG, seed=1)))
    )


def test_every_rank_and_micro_batch_of_a_step_has_one_size_and_every_size_occurs():
    samplers = [
        MultiSizeBatchSampler(64, 8, SIZES, seed=3, rank=rank, world_size=2, grad_accum_steps=2)
        for rank in (0, 1)
    ]
    seen = set()
    for epoch in range(5):
        for sampler in samplers:
            sampler.set_position(epoch, 0)
        batches = list(islice(zip(*samplers, strict=True), 2 * len(samplers[0])))
        for step in range(len(samplers[0])):
            keys = [
                key for pair in batches[2 * step : 2 * step + 2] for share in pair for key in share
            ]
            assert len({key.img_size for key in keys}) == 1
            assert len({key.index for key in keys}) == 8
            seen.add(keys[0].img_size)
    assert seen == set(SIZES)


def test_images_have_the_size_drawn_and_boxes_lie_inside(digits: DetectionDataset):
    sizes = set()
    for epoch in range(4):
        for images, targets in epoch_of(make_loader(digits, position=(epoch, 0))):
            size = images.shape[-1]
            sizes.add(size)
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, size, size)
            assert images.is_contiguous(memory_format=torch.channels_last)
            for target in targets:
                boxes = target["boxes"]
                assert boxes.dtype == torch.float32 and target["labels"].dtype == torch.int64
                assert (boxes >= 0).all() and (boxes <= size).all()
                assert (boxes[:, 2:] - boxes[:, :2] >= 2 - 1e-3).all()
    assert sizes == set(SIZES)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_data_set_smaller_than_a_batch_is_repeated_with_other_augmentations(
    digits: DetectionDataset, count: int
):
    few = DetectionDataset(
        "few",
        digits.class_names,
        digits.image_ids[:count],
        digits.paths[:count],
        digits.annotations[:count],
    )
    found = digests(make_loader(few, replace(CFG, mosaic_prob=1.0)))
    assert len(found) == 8
    assert len(set(found)) == 8


def test_the_mosaic_share_is_what_was_asked_for(digits: DetectionDataset):
    share = np.mean([len(tiles) == 4 for _, tiles, _ in samples_of(digits, CFG, 4000)])
    assert share == pytest.approx(0.75, abs=0.02)


def test_the_last_epochs_can_do_without_mosaic(digits: DetectionDataset):
    samples = TrainSamples(digits, replace(CFG, mosaic_prob=1.0, mosaic_off_epochs=2), 0)
    tiles = [len(samples.plan(SampleKey(epoch, 0, 64))) for epoch in range(10)]
    assert tiles == [4] * 8 + [1] * 2


def test_mosaic_ends_within_an_epoch_when_the_run_is_shorter_than_one(digits: DetectionDataset):
    cfg = Config(mosaic_prob=1.0, mosaic_off_share=0.25, epochs=0.8)
    samples = TrainSamples(digits, cfg, 0)
    tiles = [len(samples.plan(SampleKey(0, 0, 64, passed))) for passed in (0.0, 0.59, 0.61, 0.79)]
    assert tiles == [4, 4, 1, 1]


def test_a_mosaic_fills_the_canvas_and_shows_only_what_its_images_hold(digits: DetectionDataset):
    for _, tiles, annotations in samples_of(digits, replace(CFG, mosaic_prob=1.0), 300):
        covered = np.zeros((416, 416), int)
        for tile, annotation in zip(tiles, annotations, strict=True):
            x, y, right, bottom = tile.region
            covered[y:bottom, x:right] += 1
            left, top, window_right, window_bottom = tile.window
            assert 0 <= left < window_right <= annotation.width
            assert 0 <= top < window_bottom <= annotation.height
        assert (covered == 1).all()


def test_objects_in_a_mosaic_keep_a_useful_size(digits: DetectionDataset):
    """Not halved, as where four whole images share the canvas."""
    ratios = [
        tile.scale / (416 / max(annotation.height, annotation.width))
        for _, tiles, annotations in samples_of(digits, replace(CFG, mosaic_prob=1.0), 300)
        for tile, annotation in zip(tiles, annotations, strict=True)
    ]
    assert np.mean(ratios) > 0.75
    assert np.quantile(ratios, 0.05) > 0.5


def test_every_box_in_a_mosaic_shows_more_than_the_minimum_share(digits: DetectionDataset):
    dropped = 0
    for _, tiles, annotations in samples_of(digits, replace(CFG, mosaic_prob=1.0), 500):
        for tile, annotation in zip(tiles, annotations, strict=True):
            boxes, kept = place_boxes(tile, annotation, min_share=0.4)
            whole = (annotation.boxes[kept, 2:] - annotation.boxes[kept, :2]).prod(
                axis=1
            ) * tile.scale**2
            assert (
                (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / whole > 0.4 * 0.95
            ).all()  # rounded scale
            dropped += len(annotation.labels) - len(kept)
    assert dropped > 0


def test_a_window_is_chosen_that_cuts_fewer_objects_than_chance(digits: DetectionDataset):
    """Slivers teach little: compare with the first window that comes."""

    def share_cut(tries: int, monkeypatch: pytest.MonkeyPatch) -> float:
        monkeypatch.setattr("yolo.data.mosaic.WINDOW_TRIES", tries)
        cut = whole = 0
        for _, tiles, annotations in samples_of(digits, replace(CFG, mosaic_prob=1.0), 300):
            for tile, annotation in zip(tiles, annotations, strict=True):
                inside = np.clip(annotation.boxes, tile.window[:2] * 2, tile.window[2:] * 2)
                area = (annotation.boxes[:, 2:] - annotation.boxes[:, :2]).prod(axis=1)
                share = (inside[:, 2:] - inside[:, :2]).prod(axis=1) / area
                cut += ((share > 0) & (share < 1)).sum()
                whole += (share == 1).sum()
        return cut / (cut + whole)

    with pytest.MonkeyPatch.context() as monkeypatch:
        chance, chosen = share_cut(1, monkeypatch), share_cut(8, monkeypatch)
    assert chosen < 0.7 * chance


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (7, 3)])
def test_images_of_extreme_shape_fill_a_tile(size: tuple[int, int]):
    annotation = Annotation(
        np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), *size
    )
    tiles = mosaic_tiles([0] * 4, [annotation] * 4, 416, np.random.default_rng(0))
    for tile in [*tiles, letterbox_tile(0, annotation, 416)]:
        left, top, right, bottom = tile.window
        assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
        assert tile.region[0] < tile.region[2] and tile.region[1] < tile.region[3]


def test_letterboxed_test_images_carry_what_leads_back_to_the_original(digits: DetectionDataset):
    images, targets = plain_collate([EvalSamples(digits, 96)[index] for index in range(4)])
    assert images.shape == (4, 3, 96, 96)
    for index, target in enumerate(targets):
        annotation = digits.annotation(index)
        assert (target["image_index"], target["height"], target["width"]) == (
            index,
            annotation.height,
            annotation.width,
        )
        place = target["letterbox"]
        back = (target["boxes"].numpy() - [place.left, place.top] * 2) / place.scale
        np.testing.assert_allclose(back, annotation.boxes, atol=1 / place.scale)


PAINTS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8
)


@cache
def digit_shape(label: int) -> np.ndarray:
    """A handwritten digit as a bool array whose outermost rows and columns all show ink."""
    bunch = load_digits()
    ink = bunch.images[bunch.target == label][0] > 3
    return ink[ink.any(axis=1)][:, ink.any(axis=0)]


class PaintedDigits(DetectionDataset):
    """Scenes on black, each digit in a paint of its own: pixels say which object they are."""

    def image(self, index: int, min_side: int | None = None) -> np.ndarray:
        annotation = self.annotations[index]
        canvas = np.zeros((annotation.height, annotation.width, 3), np.uint8)
        for (left, top, right, bottom), label in zip(
            annotation.boxes.astype(int), annotation.labels, strict=True
        ):
            ink = digit_shape(int(label))
            rows = np.arange(bottom - top) * ink.shape[0] // (bottom - top)
            columns = np.arange(right - left) * ink.shape[1] // (right - left)
            canvas[top:bottom, left:right][ink[rows][:, columns]] = PAINTS[index]
        return canvas


@pytest.fixture(scope="module")
def painted() -> PaintedDigits:
    rng = np.random.default_rng(5)
    annotations = []
    for label in range(len(PAINTS)):
        height, width = rng.integers(200, 400, size=2)
        side = rng.integers(60, 120)
        left, top = rng.integers(width - side), rng.integers(height - side)
        box = np.array([[left, top, left + side, top + side]], np.float32)
        annotations.append(
            Annotation(box, np.array([label]), np.zeros(1, bool), int(height), int(width))
        )
    names = [str(label) for label in range(len(PAINTS))]
    return PaintedDigits(
        "painted", tuple(names), names, [Path(name) for name in names], annotations
    )


@pytest.mark.parametrize(("mosaic_prob", "quarter_turns"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)])
def test_every_box_of_an_augmented_image_covers_its_object(
    painted: PaintedDigits, mosaic_prob: float, quarter_turns: float
):
    """By pixels: the paint of an object that is seen lies in its box, and fills most of it."""
    cfg = Config(
        mosaic_prob=mosaic_prob,
        aug_affine=1.0,
        aug_color=0.0,
        aug_blur=0.0,
        aug_clahe=0.0,
        aug_gray=0.0,
        aug_rotate90=quarter_turns,
        min_visible=0.5,
    )
    samples, collate = TrainSamples(painted, cfg, 0), MosaicCollate(cfg, 0)
    checked = 0
    for number in range(120):
        sample = samples[SampleKey(number // 6, number % 6, 256)]
        indices = [tile.index for tile in sample.tiles]
        canvas = collate.compose(sample)
        for box, label in zip(canvas.boxes, canvas.labels, strict=True):
            if indices.count(label) > 1:
                continue  # two objects of one paint
            distance = np.abs(canvas.image.astype(int) - PAINTS[label]).sum(axis=2)
            rows, columns = np.nonzero(distance < 200)
            left, top, right, bottom = box
            assert columns.min() >= left - 1.5 and columns.max() + 1 <= right + 1.5
            assert rows.min() >= top - 1.5 and rows.max() + 1 <= bottom + 1.5
            seen = (columns.max() + 1 - columns.min()) * (rows.max() + 1 - rows.min())
            assert seen > 0.5 * (right - left) * (
                bottom - top
            )  # a turned box is loose, a cut digit may be bare
            checked += 1
    assert checked > 80


def test_an_affine_of_four_channels_gives_the_bits_of_three(digits: DetectionDataset):
    import albumentations as A

    settings: dict = {
        "scale": (0.75, 1.3),
        "rotate": (-3, 3),
        "shear": (-2, 2),
        "fill": 114,
        "p": 1.0,
    }
    ours, plain = A.Compose([Affine(**settings)], seed=1), A.Compose([A.Affine(**settings)], seed=1)
    for index in range(8):
        image = digits.image(index)
        np.testing.assert_array_equal(ours(image=image)["image"], plain(image=image)["image"])


def test_the_images_of_a_sample_are_decoded_after_the_sample_before_is_composed(
    digits: DetectionDataset,
):
    events = []

    class Watched(TrainSamples):
        def _load(self, key, attempt):
            events.append("decode")
            return super()._load(key, attempt)

    class WatchedCollate(MosaicCollate):
        def compose(self, sample):
            events.append("compose")
            return super().compose(sample)

    keys = [SampleKey(0, index, 64) for index in range(3)]
    collate = WatchedCollate(CFG, 0)
    batch, _ = collate(Watched(digits, CFG, 0).__getitems__(keys))
    assert events == ["decode", "compose"] * 3
    whole, _ = collate([TrainSamples(digits, CFG, 0)[key] for key in keys])
    assert torch.equal(batch, whole)


def test_two_transforms_of_probability_one_half_fire_independently():
    """With `set_random_seed` instead of `set_random_state` they would always fire together."""
    import albumentations as A

    transforms = A.Compose(
        [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)],
        bbox_params=A.BboxParams(format="pascal_voc", check_each_transform=False),
    )
    image = np.zeros((8, 8, 3), np.uint8)
    image[0, 0] = 255
    empty = Canvas(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    counts = np.zeros((2, 2))
    for index in range(800):
        result = augment(empty, transforms, (0, 0, index)).image
        counts[int(result[:, 7].any()), int(result[7].any())] += 1
    assert (np.abs(counts - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)).all()


def test_augmentation_drops_a_box_that_is_cut_too_far_and_keeps_labels_with_their_boxes():
    transforms = build_transforms(replace(CFG, aug_affine=1.0, min_visible=0.49), mosaic=True)
    canvas = Canvas(
        np.zeros((128, 128, 3), np.uint8),
        np.array([[0, 0, 6, 6], [50, 50, 78, 78], [122, 122, 128, 128]], np.float32),
        np.array([3, 4, 5]),
        np.array([False, True, False]),
    )
    results = [augment(canvas, transforms, (0, 0, index)) for index in range(50)]
    assert all(4 in result.labels for result in results)
    assert all(result.difficult[list(result.labels).index(4)] for result in results)
    assert any(len(result.labels) < 3 for result in results)
    assert cut_threshold(0.49) == pytest.approx(0.7)


def test_a_single_image_is_cut_once_a_mosaic_twice():
    limits = [
        build_transforms(replace(CFG, min_visible=0.49), mosaic)
        .processors["bboxes"]
        .params.min_visibility
        for mosaic in (False, True)
    ]
    assert limits == pytest.approx([0.49, 0.7])


def test_digits_are_never_mirrored_by_the_default_configuration():
    import yaml

    values = yaml.safe_load((Path(__file__).parents[2] / "configs" / "digits.yaml").read_text())
    assert values["aug_flip"] == 0
