"""Why the network says what it says: Grad-CAM and how faithful it is."""
