"""The way from data to a bundle, one function per arrow."""
