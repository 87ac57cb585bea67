"""A run on the disk: folder, checkpoints, records, mirror."""
