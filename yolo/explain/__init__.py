"""Grad-CAM and its relatives, drawn, and how faithful they are."""
