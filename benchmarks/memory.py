"""``python -m benchmarks.memory BUNDLE BACKEND DATA``: peak resident memory of a process that renders ten frames."""

from __future__ import annotations

import sys

from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.measure.machine import peak_memory_bytes
from rpfm_edge.people.splits import open_splits


def main(bundle: str, backend: str, data: str) -> None:
    """Print the bytes."""
    test = open_splits(data).test
    source, target = (int(index) for index in test.pairs[0])
    with Pipeline.open(bundle, backend) as pipe:
        person, pose = pipe.prepare(test.image(source, pipe.size)), test.pose(target, pipe.size)
        for _ in range(10):
            pipe.render(person, pose)
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
