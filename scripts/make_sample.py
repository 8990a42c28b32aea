"""Cut the packaged data sample out of the rendered data set ``people``: 12 test identities and one clip, bytes kept.

Run ``python scripts/make_sample.py PEOPLE rpfm_edge/assets/people``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import typer

from rpfm_edge.core.files import scratch_folder, write_text
from rpfm_edge.people.deepfashion import open_split

IDENTITIES = 12
CLIP = "p00999"


def make_sample(people: Path, out: Path) -> None:
    """Identities are spread evenly over the test split, the last of them is the clip's."""
    names = open_split(people, "test").names
    identities = sorted({name.partition("_")[0] for name in names})
    chosen = {identities[i] for i in np.linspace(0, len(identities) - 1, IDENTITIES).round().astype(int)}
    assert CLIP in chosen
    with scratch_folder(out) as scratch:
        (scratch / "test_highres").mkdir()
        for name in names:
            if name.partition("_")[0] in chosen:
                shutil.copyfile(people / "test_highres" / name, scratch / "test_highres" / name)
        for kind in ("annotation", "pairs"):  # pairs never join two identities
            file = f"fasion-resize-{kind}-test.csv"
            header, *lines = (people / file).read_text(encoding="utf-8").splitlines()
            kept = [header, *(line for line in lines if line.partition("_")[0] in chosen)]
            write_text(scratch / file, "\n".join(kept) + "\n")
        shutil.copytree(people / "clips" / CLIP, scratch / "clips" / CLIP)
        scratch.rename(out)  # refused if it is there, and not empty


if __name__ == "__main__":
    typer.run(make_sample)
