"""What a model is judged by: cell accuracies, average precision, errors and calibration."""
