"""A Space is built, started as it stands, and used: by programs and in a browser."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from lively import lively_detector
from packaging.requirements import Requirement
from PIL import Image
from test_app import bomb, random_classifier, save

import app
from yolo.app import space
from yolo.app.detector import COLUMNS
from yolo.app.models import Model, load_models
from yolo.app.samples import read_samples, write_samples
from yolo.errors import UserError
from yolo.files import bundled
from yolo.inference.sources import open_video
from yolo.inference.video import mp4_writer
from yolo.runs.checkpoint import bundled_weights, load_weights

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
# score, iou, method, target, layer, opacity
CONTROLS = (0.3, 0.45, "hirescam", "class", "auto", 0.7)


@dataclass
class Server:
    """A Space at work."""

    folder: Path
    url: str
    log: Path

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def build(folder: Path, tasks: str) -> Path:
    loaded = {"d": lively_detector, "c": random_classifier}
    checkpoints = [str(save(loaded[task](), folder)) for task in tasks]
    flags = [word for checkpoint in checkpoints for word in ("--checkpoint", checkpoint)]
    url = ["--model-url", "https://huggingface.co/owner/name"]
    assert app.main([*flags, *url, "--build-space", str(folder / "space"), "--samples", "3"]) == 0
    return folder / "space"


def serve(folder: Path, *flags: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder.parent / "log.txt"
    environment = {
        **os.environ,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        command = [sys.executable, "-X", "importtime", "app.py", "--port", str(port), *flags]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    server = Server(folder, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_up(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_up(server: Server, process: subprocess.Popen) -> None:
    for _ in range(600):
        try:
            if server.status("/config") == 200:
                return
        except OSError:
            assert process.poll() is None, server.log.read_text()[-2000:]
            time.sleep(0.2)
    raise AssertionError(f"the app did not start: {server.log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(build(tmp_path_factory.mktemp("both"), "dc"))


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    return Client(server.url, verbose=False, download_files=tmp_path, analytics_enabled=False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "my holiday.png"
    noise = np.random.default_rng(3).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def value(output: Any) -> Any:
    return output["value"] if isinstance(output, dict) and "__type__" in output else output


def keys(choices: dict[str, Any]) -> list[str]:
    return [key for _, key in choices["choices"]]


def detect(client: Client, photo: Path, *controls: Any) -> tuple:
    return client.predict(handle_file(photo), *(controls or CONTROLS), api_name="/detect")


def test_a_space_is_complete(server: Server):
    front = yaml.safe_load((server.folder / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and front["sdk_version"] == version("gradio")
    assert front["app_file"] == "app.py" and front["models"] == ["owner/name"]
    assert len(front["short_description"]) <= 60
    assert all("==" in line or line.startswith("--") for line in space.requirements().splitlines())
    assert "CC BY" in (server.folder / "MODEL_CARD.md").read_text()
    assert (server.folder / "packages.txt").read_text().split() == ["libgl1", "libglib2.0-0"]
    assert (
        load_weights(server.folder / "weights" / "detection.safetensors").config.data_root is None
    )
    index = json.loads((server.folder / "samples" / "detection" / "index.json").read_text())
    assert len(index["samples"]) == 3 and index["samples"][0]["boxes"]
    assert not list(server.folder.rglob("__pycache__"))


def test_a_space_imports_nothing_that_it_does_not_install(server: Server):
    """Other libraries take what they find: what our modules import at their top is needed."""
    imported = set(re.findall(r"\| +([\w.]+)$", server.log.read_text(), re.MULTILINE))
    assert {"torch", "gradio", "pytorch_grad_cam", "yolo.app.page"} <= imported
    assert not imported & {"lightning", "pytorch_lightning", "tensorboard", "torchmetrics"}
    modules = [Path(*name.split(".")) for name in imported if name.startswith("yolo.")]
    files = [server.folder / module.with_suffix(".py") for module in modules]
    wanted = set().union(*(imports_at_top(file) for file in files if file.exists()))
    installed, providers = needed_by({"gradio", *space.PACKAGES}), packages_distributions()
    assert {"torch", "gradio", "PIL"} <= wanted
    for name in wanted & set(providers):
        assert installed & set(map(plain, providers[name])), name


def imports_at_top(file: Path) -> set[str]:
    """The top-level packages that a module imports when it is loaded."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def plain(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub("[-_.]+", "-", name).lower()


def needed_by(packages: set[str]) -> set[str]:
    """The packages and, without extras, everything that they install here."""
    found: set[str] = set()
    waiting = set(packages)
    while waiting:
        name = plain(waiting.pop())
        found.add(name)
        for line in requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {plain(requirement.name)} - found
    return found


def test_a_program_detects_filters_and_explains(client: Client, photo: Path):
    _, heat_map, caption, _, choices, table, csv, files, answer = detect(client, photo)
    assert value(heat_map) and "made the model call it" in caption
    assert answer == json.loads(Path(files).read_text())
    assert table["headers"] == list(COLUMNS) and len(table["data"]) == len(keys(choices)) > 1
    assert Path(csv).read_text().startswith("status,class,score")
    assert len(json.loads(Path(files).read_text())["detections"]) == len(table["data"])

    fewer = client.predict(keys(choices)[0], 0.5, *CONTROLS[1:], api_name="/filter")
    assert 0 < len(keys(fewer[4])) < len(keys(choices))

    last = keys(fewer[4])[-1]
    explained = client.predict(
        last, 0.5, 0.45, "layercam", "score", "fused", 0.9, api_name="/explain"
    )
    assert "LayerCAM" in explained[1]["label"] and "find it and call it" in explained[2]


def test_a_sample_lists_its_missed_objects_and_explains_them(client: Client):
    choices = client.predict(0, 0.9, *CONTROLS[1:], api_name="/sample")[5]
    missed = [key for key in keys(choices) if key.startswith("missed")]
    assert missed and keys(choices)[0].startswith("picture")  # nothing is found with this score
    _, _, caption, _ = client.predict(missed[0], 0.9, *CONTROLS[1:], api_name="/explain")
    assert "missed" in caption


def test_a_program_classifies(client: Client, photo: Path):
    settings = (-1, "gradcam", "auto", 0.6)
    probabilities, _, caption = client.predict(handle_file(photo), *settings, api_name="/classify")
    best = probabilities["confidences"][0]
    assert best["label"] == probabilities["label"] and f"**{best['label']}, " in caption
    heat_map, caption = client.predict(3, *settings[1:], api_name="/explain_class")
    assert heat_map["label"].startswith("Why 3?") and caption.startswith("**3, ")


def test_hostile_uploads_get_a_message_and_leave_no_trace(
    server: Server, client: Client, tmp_path: Path
):
    contents = {
        "bomb.png": bomb(),
        "diary.jpg": b"dear diary",
        "vector.svg": b"<svg>dear diary</svg>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AppError, match="picture"):
            detect(client, tmp_path / name)
    log = server.log.read_text()
    assert "diary" not in log and "Traceback" not in log


def test_too_large_files_are_refused(client: Client, tmp_path: Path):
    (tmp_path / "large.png").write_bytes(b"\0" * (16 << 20))
    with pytest.raises(AppError, match="more than 15 MB"):
        detect(client, tmp_path / "large.png")
    (tmp_path / "large.mp4").write_bytes(b"\0" * (101 << 20))
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(handle_file(tmp_path / "large.mp4"), 0.3, 0.45, api_name="/video")


def test_a_program_gets_a_film_with_frames_around_what_was_found(client: Client, tmp_path: Path):
    with mp4_writer(tmp_path / "film.mp4", 25) as write:
        for k in range(12):
            write(np.full((64, 96, 3), 20 * k, np.uint8), k / 25)
    film, caption, lines = client.predict(
        handle_file(tmp_path / "film.mp4"), 0.3, 0.45, api_name="/video"
    )
    frames = list(open_video(film["video"] if isinstance(film, dict) else film, "film").frames)
    assert [round(frame.seconds, 2) for frame in frames] == [
        0,
        0.12,
        0.2,
        0.32,
        0.4,
    ]  # ten a second
    assert caption.startswith("**5 pictures") and len(Path(lines).read_text().splitlines()) == 5
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    with pytest.raises(AppError, match="is no video that can be read"):
        payload = handle_file(tmp_path / "list.mp4")
        client.predict(payload, 0.3, 0.45, api_name="/video")


def test_nothing_but_the_pages_own_pictures_is_served(server: Server, client: Client):
    private = [
        "/etc/passwd",
        "app.py",
        f"{server.folder}/app.py",
        f"{server.folder}/weights/detection.safetensors",
    ]
    for path in [*private, "../../etc/passwd", f"{server.folder}/samples/detection/index.json"]:
        assert server.status(f"/gradio_api/file={path}") in (403, 404), path
    payload = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError):
        client.predict(payload, *CONTROLS, api_name="/detect")


def test_addresses_are_never_fetched(client: Client):
    payload = {"path": "https://example.com/large.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError, match="upload the picture itself"):
        client.predict(payload, *CONTROLS, api_name="/detect")


def test_eight_people_at_once_get_no_error(server: Server, photo: Path, tmp_path: Path):
    def connect(number: int) -> Client:
        folder = tmp_path / str(number)
        return Client(server.url, verbose=False, download_files=folder, analytics_enabled=False)

    with ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(connect, range(8)))
        answers = list(pool.map(detect, clients, [photo] * 8))
    assert all(len(keys(answer[4])) == len(keys(answers[0][4])) for answer in answers)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page.set_default_timeout(60_000)
    yield page
    page.close()


def test_a_person_uploads_filters_clicks_and_downloads(page: Any, server: Server, photo: Path):
    outside, problems = [], []
    page.on(
        "request",
        lambda r: r.url.startswith((server.url, "data:", "blob:")) or outside.append(r.url),
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.locator("#map img").wait_for()  # the first sample is there without a click

    sample = page.locator("#boxes img").get_attribute("src")
    page.locator("input[type=file]").first.set_input_files(photo)
    page.wait_for_function("old => document.querySelector('#boxes img').src != old", arg=sample)
    found = page.locator("#detections label").count()
    assert found > 1 and page.locator("#detections label.selected").count() == 1

    page.locator("#score input[type=number]").fill("0.4")
    page.locator("#score input[type=number]").press("Enter")
    page.wait_for_function(
        "n => document.querySelectorAll('#detections label').length < n", arg=found
    )

    boxes = [detection["box"] for detection in json.loads(download(page, "#json"))["detections"]]
    assert len(boxes) == page.locator("#detections label").count()
    assert len(download(page, "#csv").splitlines()) == len(boxes) + 1
    chosen = click_somewhere_unambiguous(page, boxes)
    page.wait_for_function(
        "i => document.querySelectorAll('#detections label')[i].classList.contains('selected')",
        arg=chosen,
    )

    page.get_by_role("tab", name="Classify").click()
    page.locator("#class-map img").wait_for()
    assert page.locator("#misclassified .thumbnail-item").count() > 0
    page.get_by_role("tab", name="About").click()
    page.get_by_text("How to read a map").wait_for()
    assert page.locator('a[href="https://huggingface.co/owner/name"]').count() > 0

    page.get_by_role("tab", name="Picture").click()
    photo.with_name("not a picture.png").write_bytes(b"no")
    before = page.locator("#boxes img").get_attribute("src")
    page.get_by_role("button", name="Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(photo.with_name("not a picture.png"))
    page.get_by_text("damaged or no picture").wait_for()
    assert page.locator("#boxes img").get_attribute("src") == before  # what was there stays
    assert not outside and not problems and "Traceback" not in server.log.read_text()


def download(page: Any, button: str) -> str:
    with page.expect_download() as event:
        page.locator(button).click()
    return Path(event.value.path()).read_text()


def click_somewhere_unambiguous(page: Any, boxes: list[list[float]]) -> int:
    """Click the 200 x 120 picture where one box lies alone, not the first; return which."""
    area = page.locator("#boxes img").bounding_box()
    for x, y in ((x, y) for x in range(2, 200, 2) for y in range(2, 120, 2)):
        around = [i for i, box in enumerate(boxes) if box[0] < x < box[2] and box[1] < y < box[3]]
        if len(around) == 1 and around != [0]:
            place = {"x": x / 200 * area["width"], "y": y / 120 * area["height"]}
            page.locator("#boxes img").click(position=place)
            return around[0]
    raise AssertionError("no box has a place of its own")


def test_on_a_phone_nothing_sticks_out(browser: Any, server: Server):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(server.url)
    page.locator("#map img").wait_for()
    for tab in ("Picture", "Video", "Classify", "About"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab
    page.close()


class FakeHub:
    """Stands in for huggingface_hub.HfApi: one repository with one weight file."""

    calls: ClassVar[list[tuple[str, dict]]] = []
    uploaded: ClassVar[list[dict[str, str]]] = []

    def list_repo_files(self, name: str) -> list[str]:
        if name != "owner/name":
            raise OSError("404: no such repository\nRequest id: 1")
        return ["README.md", "model.safetensors"]

    def create_repo(self, name: str, **settings: Any) -> None:
        self.calls.append((name, settings))

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append((settings["repo_id"], settings))
        files = filter(Path.is_file, Path(settings["folder_path"]).iterdir())
        self.uploaded.append({path.name: path.read_text(errors="ignore") for path in files})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeHub]:
    weights = save(lively_detector(), tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(weights))
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "uploaded", [])
    return FakeHub


def test_a_model_on_the_hub_is_found_and_linked(hub: type[FakeHub]):
    model = load_models(["hf://owner/name"], None)["detection"]
    assert model.url == "https://huggingface.co/owner/name"
    with pytest.raises(
        UserError, match=r"hf://owner/other: cannot be fetched \(404: no such repository\)"
    ):
        load_models(["hf://owner/other"], None)


def test_push_uploads_the_folder_as_a_gradio_space(hub: type[FakeHub], tmp_path: Path):
    assert space.push(tmp_path, "owner/demo", {}) == "https://huggingface.co/spaces/owner/demo"
    (_, made), (_, uploaded) = hub.calls
    assert made["repo_type"] == uploaded["repo_type"] == "space" and made["space_sdk"] == "gradio"
    assert uploaded["folder_path"] == str(tmp_path)


def test_push_uploads_the_weights_as_a_model_that_the_space_links(
    hub: type[FakeHub], tmp_path: Path
):
    weights = save(lively_detector(), tmp_path)
    flags = ["--checkpoint", str(weights), "--build-space", str(tmp_path / "space")]
    assert app.main([*flags, "--push", "owner/demo", "--samples", "1"]) == 0
    assert [settings["repo_type"] for _, settings in hub.calls] == ["model"] * 2 + ["space"] * 2
    assert sorted(hub.uploaded[0]) == ["README.md", "detection.safetensors"]
    assert "pipeline_tag: object-detection" in hub.uploaded[0]["README.md"]
    page = "https://huggingface.co/owner/demo"
    settings = yaml.safe_load((tmp_path / "space" / "app.yaml").read_text())
    assert settings == {"public": True, "model_url": page}
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert front["models"] == ["owner/demo"]


def test_a_space_without_a_model_repository_links_the_file_that_it_brings(
    monkeypatch: pytest.MonkeyPatch,
):
    assert load_models((), None)["detection"].url is None
    monkeypatch.setenv("SPACE_ID", "owner/demo")
    assert load_models((), None)["detection"].url == (
        "https://huggingface.co/spaces/owner/demo/blob/main/weights/voc.safetensors"
    )


def test_a_space_is_never_written_over_other_files(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="not empty"):
        space.build(tmp_path, Path(app.__file__).parent, {}, 0, {})


def test_a_space_that_fails_halfway_leaves_nothing(tmp_path: Path):
    loaded = lively_detector()
    model = Model(replace(loaded, config=replace(loaded.config, dataset="voc")), None)
    with pytest.raises(UserError):  # there are no VOC pictures to take samples from
        space.build(
            tmp_path / "space",
            Path(app.__file__).parent,
            {"detection": model},
            2,
            {"data_root": str(tmp_path)},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tab"), [("d", ["Picture", "Video"]), ("c", ["Classify"])])
def test_a_space_of_one_model_shows_its_tab_alone(
    browser: Any, tmp_path: Path, task: str, tab: list[str]
):
    for server in serve(build(tmp_path, task)):
        page = browser.new_page()
        page.goto(server.url)
        page.locator("#map img, #class-map img").first.wait_for()
        assert page.get_by_role("tab").all_inner_texts() == [*tab, "About"]
        page.close()


def test_samples_beside_the_weights_are_shown_where_there_are_no_test_data(tmp_path: Path):
    loaded = lively_detector()
    written = write_samples(tmp_path / "samples" / "detection", loaded, loaded.config, 2)
    model = Model(replace(loaded, config=replace(loaded.config, dataset="voc")), None)
    nowhere = {"data_root": str(tmp_path)}
    found = space.find_samples(tmp_path / "made", model, 12, nowhere, tmp_path / "samples")
    assert found == replace(written, folder=tmp_path / "made")
    given = {"split": "test"}
    fresh = space.find_samples(
        tmp_path / "fresh", Model(loaded, None), 1, given, tmp_path / "samples"
    )
    assert fresh and len(fresh.samples) == 1, "test data that are named come first"
    other = replace(model, loaded=replace(model.loaded, class_names=("cat", "dog")))
    assert space.find_samples(tmp_path / "other", other, 12, nowhere, tmp_path / "samples") is None
    assert space.find_samples(tmp_path / "none", model, 0, nowhere, tmp_path / "samples") is None


def test_without_checkpoints_a_detector_and_a_classifier_are_opened():
    models = load_models((), None)
    assert list(models) == ["detection", "classification"]
    assert {task: model.loaded.path for task, model in models.items()} == bundled_weights()


@pytest.mark.parametrize("task", ["detection", "classification"])
def test_the_bundled_samples_fit_the_bundled_weights_and_name_whom_they_are_from(task: str):
    samples = read_samples(bundled("samples") / task)
    assert samples and samples.class_names == load_weights(bundled_weights()[task]).class_names
    for sample in samples.samples:
        with Image.open(samples.folder / sample.file) as picture:
            assert picture.size == (sample.width, sample.height)
        assert sample.labels and re.search("CC0|public domain", sample.credit)


@pytest.mark.parametrize("task", ["detection", "classification"])
def test_bundled_weights_carry_results_and_name_no_folder(task: str):
    loaded = load_weights(bundled_weights()[task])
    headline = "accuracy" if task == "classification" else "map_50"
    assert 0 < loaded.results[headline] < 1
    assert loaded.config.data_root is None
    assert not re.search(
        r'"[^"]*/[^"]*/[^"]*"', json.dumps([loaded.results, loaded.config.to_dict()])
    )


@pytest.mark.slow
def test_the_bundled_detector_answers_within_a_second(tmp_path: Path, photo: Path):
    """On two otherwise idle cores, from the upload to the last picture in the client's hands."""
    folder = tmp_path / "space"
    assert app.main(["--build-space", str(folder), "--samples", "2"]) == 0
    for server in serve(folder):
        client = Client(server.url, verbose=False, download_files=tmp_path, analytics_enabled=False)
        detect(client, photo)
        seconds = []
        for shade in range(40):
            Image.new("RGB", (640, 480), (shade, 90, 120)).save(tmp_path / "fresh.png")
            start = time.perf_counter()
            detect(client, tmp_path / "fresh.png")
            seconds.append(time.perf_counter() - start)
        median, p95 = np.percentile(seconds, (50, 95))
        print(f"detect and explain: median {median:.3f} s, p95 {p95:.3f} s")
        assert p95 < 1
