"""The best layout of an experiment on some GPUs: python -m experiments.search experiments/tiny.py --chip h20 --gpus 16

Looks through meshes, microbatches, recomputation and offloading by estimates, compiles the best few, and says why the
others lost. Interrupted, the same command goes on: what was compiled is kept.

Exit codes: 0 found a layout that fits · 1 XLA or the disk refused · 2 a mistake in arguments or settings · 3 nothing fits.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.experiment import Experiment
from experiments.plan import (
    DOES_NOT_FIT,
    FAILURES,
    MISTAKES,
    add_cluster,
    add_experiment,
    asked,
    asked_chip,
    asked_cluster,
    consoles,
    job_of,
)
from experiments.summary import escaped
