"""Tiny data sets in every layout that is known, for the tests that read and train on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

NAMES = ("cup", "spoon", "plate")
SIZE = (48, 64)  # height, width
XML = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height>
<depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>
<ymax>{y1}</ymax></bndbox></object>"""
COUNTS = {"train": 10, "val": 4, "test": 3}
Boxes = list[tuple[int, tuple[int, int, int, int]]]


def scene(seed: int) -> tuple[np.ndarray, Boxes]:
    """One picture with a rectangle of each of two classes."""
    rng = np.random.default_rng(seed)
    image = np.full((*SIZE, 3), 100, np.uint8) + rng.integers(0, 20, (*SIZE, 3), dtype=np.uint8)
    boxes: Boxes = []
    for side in (0, 1):
        label = int(rng.integers(3))
        x, y = 32 * side + int(rng.integers(2, 8)), int(rng.integers(2, 20))
        box = (x, y, x + int(rng.integers(12, 22)), y + int(rng.integers(12, 24)))
        image[box[1] : box[3], box[0] : box[2]] = np.eye(3, dtype=np.uint8)[label] * 155 + 50
        boxes.append((label, box))
    return image, boxes


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def label_text(boxes: Boxes) -> str:
    height, width = SIZE
    return "".join(
        f"{label} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height} {(x1 - x0) / width} "
        f"{(y1 - y0) / height}\n"
        for label, (x0, y0, x1, y1) in boxes
    )


def xml_text(name: str, boxes: Boxes) -> str:
    objects = [
        OBJECT.format(name=NAMES[label], x0=x0 + 1, y0=y0 + 1, x1=x1, y1=y1)
        for label, (x0, y0, x1, y1) in boxes
    ]
    return XML.format(name=name, objects="".join(objects))


def scenes(split: str, count: int) -> list[tuple[str, np.ndarray, Boxes]]:
    start = 100 * list(COUNTS).index(split)
    return [(f"{split}{i}", *scene(start + i)) for i in range(count)]


def pairs(root: Path, images: str, labels: str, counts: dict[str, int] = COUNTS) -> None:
    """Write pictures and label files; `{split}` in the folders becomes the split."""
    for split, count in counts.items():
        for name, image, boxes in scenes(split, count):
            write_image(root / images.format(split=split) / f"{name}.jpg", image)
            write_text(root / labels.format(split=split) / f"{name}.txt", label_text(boxes))


def voc_folder(root: Path) -> None:
    for split, count in COUNTS.items():
        for name, image, boxes in scenes(split, count):
            write_image(root / "JPEGImages" / f"{name}.jpg", image)
            write_text(root / "Annotations" / f"{name}.xml", xml_text(name, boxes))
        ids = "\n".join(f"{split}{i}" for i in range(count))
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", ids)


def xml_and_images(root: Path) -> None:
    for name, image, boxes in scenes("train", 10):
        write_image(root / "images" / f"{name}.jpg", image)
        write_text(root / "annotations" / f"{name}.xml", xml_text(name, boxes))


def xml_side_by_side(root: Path) -> None:
    for split, count in {"train": 10, "valid": 4}.items():
        for name, image, boxes in scenes(split.replace("valid", "val"), count):
            write_image(root / split / f"{name}.jpg", image)
            write_text(root / split / f"{name}.xml", xml_text(name, boxes))


def yolo_images_first(root: Path) -> None:
    pairs(root, "images/{split}", "labels/{split}")
    write_text(root / "classes.txt", "\n".join(NAMES))


def roboflow(root: Path) -> None:
    """`train/images` and a `data.yaml` whose paths start one folder too high."""
    pairs(root, "{split}/images", "{split}/labels")
    (root / "val").rename(root / "valid")
    text = (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
        f"nc: 3\nnames: {[*NAMES]}\n"
    )
    write_text(root / "data.yaml", text)


def by_yaml(root: Path) -> None:
    """Ultralytics: a root that is elsewhere, a list of folders, names by number."""
    pairs(root, "images/{split}", "labels/{split}")
    pairs(root, "more/images", "more/labels", {"train": 10})
    names = "".join(f"  {label}: {name}\n" for label, name in enumerate(NAMES))
    text = "path: /content/flowers\ntrain: [images/train, more/images]\nval: images/val\nnames:\n"
    write_text(root / "flowers.yaml", text + names)


def darknet(root: Path) -> None:
    """CVAT's YOLO 1.1: pictures and labels in one folder, lists, `obj.data`."""
    pairs(root, "obj_train_data", "obj_train_data", {"train": 10, "val": 4})
    for split, file in (("train", "train"), ("val", "valid")):
        lines = [f"data/obj_train_data/{split}{i}.jpg" for i in range(COUNTS[split])]
        write_text(root / f"{file}.txt", "\n".join(lines) + "\n")
    write_text(root / "obj.names", "\n".join(NAMES))
    text = "classes = 3\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"
    write_text(root / "obj.data", text + "backup = backup/\n")


def label_img(root: Path) -> None:
    pairs(root, ".", ".", {"train": 12})
    write_text(root / "classes.txt", "\n".join(NAMES))


def coco_entry(number: int, name: str, boxes: Boxes) -> tuple[dict, list[dict]]:
    image = {"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
    notes = [
        {
            "id": 10 * number + i,
            "image_id": number,
            "category_id": label + 1,
            "iscrowd": 0,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for i, (label, (x0, y0, x1, y1)) in enumerate(boxes)
    ]
    return image, notes


def coco_text(split: str, count: int) -> str:
    entries = [
        coco_entry(i, name, boxes) for i, (name, _, boxes) in enumerate(scenes(split, count))
    ]
    notes = [note for _, some in entries for note in some]
    polygon, crowd = notes[0], {**notes[1], "id": 999, "iscrowd": 1}
    x, y, w, h = polygon.pop("bbox")
    polygon["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y + h, x + 1, y]]
    categories = [
        {"id": i + 1, "name": name, "supercategory": "kitchen"} for i, name in enumerate(NAMES)
    ]
    categories.append({"id": 0, "name": "kitchen", "supercategory": "none"})
    images = [image for image, _ in entries]
    return json.dumps({"images": images, "annotations": [*notes, crowd], "categories": categories})


def coco(root: Path) -> None:
    for split in ("train", "val"):
        for name, image, _ in scenes(split, COUNTS[split]):
            write_image(root / f"{split}2017" / f"{name}.jpg", image)
        text = coco_text(split, COUNTS[split])
        write_text(root / "annotations" / f"instances_{split}2017.json", text)


def roboflow_coco(root: Path) -> None:
    for split in COUNTS:
        folder = root / split.replace("val", "valid")
        for name, image, _ in scenes(split, COUNTS[split]):
            write_image(folder / f"{name}.jpg", image)
        write_text(folder / "_annotations.coco.json", coco_text(split, COUNTS[split]))


def kaggle(root: Path) -> None:
    pairs(root, "images", "labels", {"train": 10, "test": 3})
    for split in ("train", "test"):
        lines = [f"{split}{i}.jpg,{split}{i}.txt" for i in range(COUNTS[split])]
        write_text(root / f"{split}.csv", "\n".join(lines))


def devkit(root: Path) -> None:
    voc_folder(root / "VOCdevkit" / "VOC2007")
    main = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    ids = [(main / f"{split}.txt").read_text() for split in ("train", "val")]
    (main / "trainval.txt").write_text("\n".join(ids))
    for path in root.rglob("*.xml"):
        text = path.read_text()
        for name, other in zip(NAMES, ("cat", "dog", "person"), strict=True):
            text = text.replace(f"<name>{name}<", f"<name>{other}<")
        path.write_text(text)


def class_folders(root: Path) -> None:
    for split, count in {"train": 10, "test": 3}.items():
        for i, (name, image, _) in enumerate(scenes(split, count)):
            write_image(root / split / NAMES[i % 3] / f"{name}.jpg", image)


def classes_alone(root: Path) -> None:
    for i, (name, image, _) in enumerate(scenes("train", 10)):
        write_image(root / NAMES[i % 3] / f"{name}.jpg", image)


def zipped(make: Callable[[Path], None]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        make(root / "inside")
        archive = shutil.make_archive(str(root / "export"), "zip", root / "inside")
        shutil.rmtree(root / "inside")
        return Path(archive)

    return write


def named(make: Callable[[Path], None], file: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        make(root)
        return root / file

    return write


LAYOUTS: dict[str, Callable[[Path], Path | None]] = {
    "voc folder": voc_folder,
    "voc xml and images": xml_and_images,
    "voc xml side by side": xml_side_by_side,
    "yolo images/train": yolo_images_first,
    "yolo train/images": roboflow,
    "yolo by a yaml": by_yaml,
    "yolo: the yaml itself": named(by_yaml, "flowers.yaml"),
    "darknet lists": darknet,
    "darknet: obj.data itself": named(darknet, "obj.data"),
    "darknet: train.txt itself": named(darknet, "train.txt"),
    "labelImg": label_img,
    "coco": coco,
    "coco: the json itself": named(coco, "annotations/instances_train2017.json"),
    "roboflow coco zip": zipped(roboflow_coco),
    "roboflow yolo zip": zipped(roboflow),
    "cvat yolo zip": zipped(darknet),
    "cvat coco zip": zipped(coco),
    "cvat voc zip": zipped(voc_folder),
    "kaggle csv": kaggle,
    "voc devkit": devkit,
    "class folders": class_folders,
    "class folders without splits": classes_alone,
    "class folders zip": zipped(class_folders),
}


def make(name: str, folder: Path) -> Path:
    """Write the data set into a new folder; return what `--data-root` would name."""
    folder.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[name](folder) or folder
