"""Hunyuan-Large on what is old or made for games: V100, RTX 4090, A800, beside an H20.

    python -m experiments.old_hardware [--estimate] [--json FILE] [--html FILE] [--picture FILE]

How many GPU-days, days and megawatt-hours 7T tokens take on each, and what each lever is worth there. Each chip has the
layout that `python -m experiments.search experiments/hunyuan_large.py --chip CHIP --gpus N` found for it: LAYOUTS. An RTX
4090 has 24 GB and no NVLink, so a node's GPUs share PCIe; a V100 has 32 GB, and no bfloat16: XLA computes its products in
float32 (moe/planner/backends.py), so it is planned with the rate of these. Times are predicted, of programs that XLA
compiled for each chip, or with --estimate of estimated ones.
"""
