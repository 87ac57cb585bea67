"""The networks: Darknet-53 with the YOLOv3 heads, and the CIFAR ResNet."""
