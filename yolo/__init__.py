"""YOLOv3 and a small ResNet in plain Lightning Fabric: the parts that the scripts assemble."""
