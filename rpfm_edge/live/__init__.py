"""Poses in, frames out: the live service (extra ``live``)."""
