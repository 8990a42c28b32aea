"""Measures of pictures, poses and times, and of the machine."""
