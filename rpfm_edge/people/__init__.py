"""Pictures, poses and data sets of people."""
