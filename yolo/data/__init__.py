"""Data sets, augmentation, mosaic, samplers and the cache: from files on disk to uint8 batches."""
