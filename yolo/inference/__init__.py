"""A trained network at work: predictions, speed, export."""
