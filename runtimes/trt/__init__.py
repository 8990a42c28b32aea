"""TensorRT: build, open and profile engines, and keep them in a cache."""
