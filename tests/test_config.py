"""Flags and YAML: what is refused, and how it is said."""

import dataclasses
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from yolo import cli
from yolo.config import LOSSES, Config, LossSettings, anchor_sizes, parse_interval
from yolo.errors import UsageError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Args(Config):
    config: str | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_go_over_the_yaml_file(tmp_path):
    file = write(
        tmp_path / "c.yaml", "img_sizes: [192, 224]\nmax_lr: 2e-3\nskip_bad: true\nepochs: 3\n"
    )
    args = cli.parse(Args, ["--epochs", "5", "--no-skip-bad"], "", file)
    assert (args.img_sizes, args.max_lr, args.epochs, args.skip_bad) == ((192, 224), 2e-3, 5, False)


def test_sizes_are_a_comma_list():
    assert cli.parse(Args, ["--img-sizes", "320,416,512"], "").img_sizes == (320, 416, 512)


def test_a_stored_configuration_reads_back_the_same(tmp_path):
    config = Config(
        img_sizes=(320, 416), max_steps=7, batch_size="auto", data_root="a b", skip_bad=True
    )
    file = write(tmp_path / "config.yaml", yaml.safe_dump(config.to_dict()))
    assert Config.from_dict(cli.parse(Args, [], "", file).to_dict()) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epohcs: 3", "did you mean 'epochs'"),
        ("epochs: many", "'epochs: many'"),
        ("log_every: 3.5", "'log_every: 3.5' has a value of the wrong type"),
        ("epochs: true", "'epochs: True'"),
        ("epochs: null", "'epochs: None'"),
        ("skip_bad: 1", "'skip_bad: 1'"),
        ("nms: fast", "'nms: fast'"),
        ("img_sizes: [320, big]", "'img_sizes: [320, 'big']'"),
        ("img_sizes: [300]", "multiples of 32"),
        ("- a list", "key: value"),
        ("out_dir: here", "'out_dir' is of one start alone: write it on the command line"),
        ("mirror: /drive/runs", "'mirror' is of one start alone"),
        ("a: [", "line 2: is not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_one_clear_line(tmp_path, text, expected):
    file = write(tmp_path / "bad.yaml", text + "\n")
    with pytest.raises(UsageError, match=r".") as error:
        cli.parse(Args, [], "", file)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_lr: 2e-3", 2e-3),  # text for YAML, which wants 2.0e-3
        ("max_lr: 1", 1.0),
        ("max_lr: auto", "auto"),
        ("batch_size: '16'", 16),
        ("save_every: 500", "500"),
        ("classes: [0, 1, 2]", "0,1,2"),
        ("data_root: null", None),
        ("test_size: 320", 320),
        ("img_sizes: 320", (320,)),
        ("img_sizes: 320,416", (320, 416)),
        ("no_object_scales: [1, 1, 0.5]", (1.0, 1.0, 0.5)),
    ],
)
def test_a_value_of_a_yaml_file_becomes_what_its_field_wants(tmp_path, text, value):
    args = cli.parse(Args, [], "", write(tmp_path / "c.yaml", text + "\n"))
    found = getattr(args, text.split(":")[0])
    assert (found, type(found)) == (value, type(value))


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        cli.parse(Args, [], "", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"img_sizes": (300,)}, "--img-sizes"),
        ({"img_sizes": ()}, "--img-sizes"),
        ({"test_size": 100}, "--test-size"),
        ({"mosaic_prob": 1.5}, "--mosaic-prob"),
        ({"epochs": 0}, "--epochs"),
        ({"max_steps": -1}, "--max-steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"max_lr": 0.0}, "--max-lr"),
        ({"width": -1.0}, "--width"),
        ({"anchors": "1,2,3"}, "--anchors"),
        ({"save_every": "soon"}, "soon"),
        ({"seed": -1}, "--seed"),
        ({"workers": -1}, "--workers"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"devices": 0}, "--devices 0: must be positive"),
        ({"ignore_iou": 1.5}, "--ignore-iou 1.5: must lie between 0 and 1"),
        ({"score_threshold": float("nan")}, "--score-threshold"),
        ({"epochs": float("inf")}, "--epochs inf: must be positive and finite"),
        ({"width": float("inf")}, "--width inf: must be positive and finite"),
        ({"max_lr": float("nan")}, "--max-lr nan: must be positive and finite"),
        ({"weight_decay": float("inf")}, "--weight-decay inf: must be finite"),
        ({"box_weight": float("nan")}, "--box-weight nan: must be finite"),
        ({"no_object_scales": (1.0, float("nan"), 1.0)}, "--no-object-scales 1.0,nan,1.0: want"),
        ({"anchors": ",".join(["nan", *["9"] * 17])}, "--anchors nan,9"),
        ({"anchors": ",".join([*["9"] * 17, "nan"])}, "--anchors 9,9"),
        ({"anchors": ",".join([*["9"] * 17, "inf"])}, "18 positive, finite numbers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_their_flag(values, flag):
    with pytest.raises(UsageError) as error:
        Config(**values)
    assert flag in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "test_size"),
    [((320, 416, 512), 416), ((192, 224, 256), 224), ((512,), 512), ((320, 352), 352)],
)
def test_the_test_size_is_416_or_the_middle_one(sizes, test_size):
    assert Config(img_sizes=sizes).resolved_test_size == test_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", (500, None)),
        ("90s", (None, 90)),
        ("10m", (None, 600)),
        ("2h45m", (None, 9900)),
        ("1.5h", (None, 5400)),
    ],
)
def test_intervals_are_steps_or_times(text, expected):
    assert parse_interval(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "10x", "m", "-5", "2h45", "1.2.3m", "²", "9" * 5000, "9" * 400 + "h"]
)
def test_bad_intervals_are_refused(text):
    with pytest.raises(UsageError):
        parse_interval(text)


def test_anchors_are_coco_auto_or_18_numbers():
    assert len(anchor_sizes("coco") or ()) == 18
    assert anchor_sizes("auto") is None
    assert anchor_sizes(",".join(map(str, range(1, 19)))) == tuple(range(1, 19))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_configuration_of_the_repository_parses(file):
    assert cli.parse(Args, [], "", file).to_dict()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "gradcam.py", "app.py"])
def test_help_answers_without_importing_torch(script):
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not there yet")
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{script}', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}', run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
    print(f"{script} --help: {time.perf_counter() - start:.2f} s")


def test_a_misspelled_flag_names_the_nearest_and_exits_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Args, ["--img-size", "320"], "")
    assert end.value.code == 2
    assert "--img-sizes" in capsys.readouterr().err


def test_a_killed_worker_is_one_line_with_the_remedy(monkeypatch, capsys):
    def main(argv: object) -> int:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("error: DataLoader worker") and "--workers" in line and "--resume" in line
    )


def test_a_machine_without_libgl_is_told_what_to_install(monkeypatch, capsys):
    def main(argv: object) -> int:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 1
    assert "opencv-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--out-dir a", "a"),
        ("--out-dir=a", "a"),
        ("--out_dir a", "a"),
        ("--out-dir a --seed 1 --out_dir=b", "b"),
        ("--seed 1", None),
        ("--out-dir", None),
        ("--out-dirs a", None),
        ("loader --seed 1 --out-dir a", "a"),
    ],
)
def test_a_flag_is_read_ahead_as_it_will_be_parsed(line, value):
    assert cli.value_of("--out-dir", line.split()) == value


def test_a_stored_configuration_older_than_a_loss_means_the_reference_loss() -> None:
    old = Config.from_dict({"box_weight": 10.0, "assignment": "paper", "ignore_iou": 0.5})
    assert old.loss == "reference"
    assert old.loss_settings == LossSettings(assignment="paper")
    assert (old.nms, old.train_difficult) == ("standard", True)


def test_flags_change_single_settings_of_a_named_loss() -> None:
    settings = Config(loss="ranked", no_object_weight=5.0, box_loss="mse").loss_settings
    assert settings == dataclasses.replace(LOSSES["ranked"], no_object_weight=5.0, box_loss="mse")
    assert Config(loss="reference").loss_settings == LossSettings()


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.0, -1.0)])
def test_factors_of_the_scales_are_three_and_not_negative(scales: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--no-object-scales"):
        Config(no_object_scales=scales)
