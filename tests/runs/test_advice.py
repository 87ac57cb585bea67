"""Advice follows from a run's figures, names its command, and is never over three sentences."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolo.config import Config
from yolo.data.dataset import Annotation, DetectionDataset
from yolo.runs.advice import advice, training_facts
from yolo.runs.folder import RunFolder

GOOD: dict[str, Any] = {
    "class_accuracy": 0.9,
    "best_f1_confidence": 0.4,
    "best_f1_precision": 0.9,
    "training": {"boxes": {"cup": 300}, "small": 0.0},
}
FLAT = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def make_run(path: Path, maps: list[float], validation_loss: float = 1.0) -> RunFolder:
    folder = RunFolder(path)
    folder.write_config(Config(data_root="cups", epochs=10, img_sizes=(320, 416)))
    lines: list[dict[str, Any]] = [
        {"kind": "evaluation", "step": i, "map_50": value, "validation_loss": validation_loss}
        for i, value in enumerate(maps)
    ]
    lines.append({"kind": "train", "step": 99, "loss": 1.0})
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_good_figures_need_no_advice(tmp_path: Path) -> None:
    assert advice(make_run(tmp_path, FLAT), GOOD) == []
    assert advice(RunFolder(tmp_path / "nowhere"), GOOD) == []


@pytest.mark.parametrize(
    ("maps", "loss", "changed", "words"),
    [
        (RISING, 1.0, {}, "mAP still rose .*0.400 to 0.600.*--resume .* --epochs 20 --replan"),
        (FLAT, 2.0, {}, "2.0 times that on training.*--data-root cups --epochs 5"),
        (FLAT, 1.0, {"training": {"boxes": {"lid": 7}}}, "lid has 7 boxes.*--check-data"),
        (
            FLAT,
            1.0,
            {"training": {"boxes": {"cup": 300}, "small": 0.4}},
            "40% of the boxes.*--img-sizes 640,832 --test-size 832",
        ),
        (FLAT, 1.0, {"best_f1_precision": 0.3}, "30% are right.*--score-threshold 0.60"),
        (
            FLAT,
            1.0,
            {"shown": {"score_threshold": 0.3, "precision": 0.2}, "best_f1_confidence": 0.7},
            "from a confidence of 0.30 on, 20% are right.*--score-threshold 0.70",
        ),
    ],
)
def test_a_figure_that_calls_for_it_gets_a_sentence_with_the_next_command(
    tmp_path: Path, maps: list[float], loss: float, changed: dict[str, Any], words: str
) -> None:
    (sentence,) = advice(make_run(tmp_path, maps, loss), {**GOOD, **changed})
    assert re.search(words, sentence)


def test_three_sentences_are_the_most(tmp_path: Path) -> None:
    bad = {"training": {"boxes": {"cup": 1}, "small": 0.9}, "best_f1_precision": 0.1}
    assert len(advice(make_run(tmp_path, RISING, 9.0), {**GOOD, **bad})) == 3


def test_the_training_pictures_are_counted_at_the_size_of_the_network() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 100, 100]], np.float32)
    note = Annotation(boxes, np.array([1, 1]), np.zeros(2, bool), 832, 832)
    dataset = DetectionDataset("cups", ("cup", "lid"), ["a"], [Path("a.jpg")], [note])
    assert training_facts(dataset, 416) == {"boxes": {"cup": 0, "lid": 2}, "small": 0.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "["),
        ("results.json", "[" * 200_000),
        ("results.json", '{"training": 5}'),
        ("results.json", '{"training": {"boxes": {"cup": "x"}}}'),
        ("config.yaml", "a: ["),
        ("config.yaml", "- 5"),
    ],
)
def test_a_run_whose_records_are_damaged_gets_no_advice(
    tmp_path: Path, name: str, text: str
) -> None:
    folder = make_run(tmp_path, FLAT)
    (tmp_path / name).write_text(text)
    results = {key: value for key, value in GOOD.items() if key != "training"}
    assert advice(folder, results) == []
