"""Writes boxes as files that annotation tools and `train.py` read: YOLO, VOC XML or COCO JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from yolo.files import replacing, write_json

LabelLayout = Literal["yolo", "voc", "coco"]


def write_labels(
    folder: Path,
    layout: LabelLayout,
    answers: Mapping[str, Mapping[str, Any]],
    class_names: Sequence[str],
) -> Path:
    """Write label files for pictures; return the file or folder that holds them.

    Args:
        folder: gets `labels/*.txt` with `classes.txt`, `Annotations/*.xml`, or `annotations.json`.
        layout: `yolo`, `voc` or `coco`.
        answers: by the name of the label file without suffix: `image` (its path), `height`,
            `width`, `detections` (each `class`, `score` and `box`, xyxy pixels).
        class_names: in the order of their numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "coco":
        write_json(folder / "annotations.json", _coco(list(answers.values()), class_names))
        return folder / "annotations.json"
    target = folder / {"yolo": "labels", "voc": "Annotations"}[layout]
    target.mkdir(exist_ok=True)
    for name, answer in answers.items():
        with replacing(target / f"{name}{'.txt' if layout == 'yolo' else '.xml'}") as temporary:
            if layout == "yolo":
                temporary.write_text(_yolo(answer, class_names))
            else:
                tree = ElementTree(_voc(answer))
                indent(tree)
                tree.write(temporary, encoding="utf-8")
    if layout == "yolo":
        (target / "classes.txt").write_text("".join(f"{name}\n" for name in class_names))
    return target


def _yolo(answer: Mapping[str, Any], class_names: Sequence[str]) -> str:
    sides = answer["width"], answer["height"]
    lines = []
    for thing in answer["detections"]:
        low, high = thing["box"][:2], thing["box"][2:]
        edges = list(zip(low, high, sides, strict=True))
        shares = [(a + b) / 2 / side for a, b, side in edges] + [
            (b - a) / side for a, b, side in edges
        ]
        numbers = " ".join(f"{share:.6f}" for share in shares)
        lines.append(f"{class_names.index(thing['class'])} {numbers}\n")
    return "".join(lines)


def _voc(answer: Mapping[str, Any]) -> Element:
    root = Element("annotation")
    SubElement(root, "filename").text = Path(answer["image"]).name
    size = SubElement(root, "size")
    for key, side in (("width", answer["width"]), ("height", answer["height"]), ("depth", 3)):
        SubElement(size, key).text = str(side)
    for thing in answer["detections"]:
        node = SubElement(root, "object")
        fields = {"name": thing["class"], "pose": "Unspecified", "truncated": "0", "difficult": "0"}
        for key, text in fields.items():
            SubElement(node, key).text = text
        left, top, right, bottom = (round(edge) for edge in thing["box"])
        corners = {
            "xmin": left + 1,
            "ymin": top + 1,
            "xmax": max(right, left + 1),
            "ymax": max(bottom, top + 1),
        }
        frame = SubElement(node, "bndbox")  # VOC counts from 1 and includes the last pixel
        for key, edge in corners.items():
            SubElement(frame, key).text = str(edge)
    return root


def _coco(answers: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, answer in enumerate(answers, start=1):
        size = {"height": answer["height"], "width": answer["width"]}
        images.append({"id": number, "file_name": Path(answer["image"]).name, **size})
        for thing in answer["detections"]:
            left, top, right, bottom = thing["box"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": class_names.index(thing["class"]) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "score": thing["score"],
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
