"""YOLOv3 and a small ResNet in plain Lightning Fabric: the parts that the scripts assemble."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo.inference.predict import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    """Import `Detector` when it is asked for: torch takes seconds, `--help` needs none of it."""
    if name == "Detector":
        from yolo.inference.predict import Detector

        return Detector
    raise AttributeError(f"module 'yolo' has no attribute '{name}'")
