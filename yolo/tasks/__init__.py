"""What is learned: detection or classification."""
