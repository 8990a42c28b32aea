"""Every command as a Python function of the same name and arguments; the command line only prints what these return."""

from __future__ import annotations

from rpfm_edge.bundle.evidence import inspect as inspect
from rpfm_edge.bundle.pipeline import render as render
from rpfm_edge.chain.build import build as build
from rpfm_edge.chain.graph import quantize as quantize
from rpfm_edge.chain.train import distill as distill
from rpfm_edge.chain.train import distill_decoder as distill_decoder
from rpfm_edge.chain.train import fine_tune as fine_tune
from rpfm_edge.chain.train import train as train
from rpfm_edge.doctor import doctor as doctor
from rpfm_edge.judge.gate import gate as gate
from rpfm_edge.judge.gate import save_baseline as save_baseline
from rpfm_edge.judge.quality import validate as validate
from rpfm_edge.judge.speed import bench as bench
from rpfm_edge.judge.speed import profile as profile
from rpfm_edge.judge.speed import sustain as sustain
from rpfm_edge.recipe.run import run as run
from rpfm_edge.search.frontier import frontier as frontier
from rpfm_edge.search.planner import plan as plan
