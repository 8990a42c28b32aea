"""Quality and speed of a bundle, judged and kept as its evidence."""
