"""What a detector is judged by: cell accuracies, average precision, the error budget and calibration."""
