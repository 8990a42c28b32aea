"""rpfm-edge: person synthesis by latent flow matching, distilled, quantized and deployed to small devices."""

from rpfm_edge.bundle.pipeline import Person, Pipeline

__all__ = ["Person", "Pipeline"]
