"""Leverage's model, training and serving. `from moe import HunyuanMoE` is what a notebook needs."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported when asked for: the floors below serving must not load it.
    if name == "HunyuanMoE":
        from moe.serve.language_model import HunyuanMoE

        return HunyuanMoE
    raise AttributeError(f"module 'moe' has no attribute {name!r}")
