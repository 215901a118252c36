"""A plan as JSON values, for other programs. Keys are stable within a version, and say their units.

version         of this form: 1
experiment      name · kind "train", "prefill" or "decode" · origin "compiled" or "estimated"
fits            whether allocated_bytes and room leave something of the chip's memory
devices         GPUs · tokens of a step over all of them
memory          of one GPU: parts_bytes by kind at the peak, peak_bytes, allocated_bytes, room_bytes, chip_bytes,
                spare_bytes (below 0: lacking), host_bytes, largest (buffers), over_program ([place, bytes alive])
router          one entry a load: load and kept times the mean, over_capacity as a share of all rows and its fate,
                allocated_bytes, step_seconds
arithmetic      of one GPU in a step: executed_flops, model_flops, executed_to_model, moved_bytes, by_use, by_format
exchanges       of one GPU in a step, by kind and mesh axes: count, inside_bytes and across_bytes sent,
                hidden_seconds beside arithmetic, exposed_seconds
prediction      step_seconds, between low_seconds and high_seconds; terms_seconds and uses_seconds each add up to it;
                tokens_per_second, mfu, chip_hours_per_1e12_tokens
compiling       seconds, host_bytes, jax; null where nothing was compiled
assumptions     sentences
job, chip, cluster   as planned
"""

import dataclasses
from typing import Any

from moe.planner.plan import Plan
from moe.planner.plan_report import assumptions
from moe.planner.totals import flops_by_format

VERSION = 1


def plan_values(plan: Plan, name: str) -> dict[str, Any]:
    """
    Args:
        name: of what is planned.
    """
    return {
        "version": VERSION,
        "experiment": name,
        "kind": plan.job.kind,
        "origin": plan.origin,
        "fits": plan.fits,
        "devices": plan.devices,
        "tokens": plan.job.tokens,
        "parameters": plan.parameters,
        "active_parameters": plan.active,
        "memory": _memory(plan),
        "router": _router(plan),
        "arithmetic": _arithmetic(plan),
        "exchanges": [_exchange(each) for each in plan.exchanges],
        "prediction": _prediction(plan),
        "compiling": plan.facts
        and {"seconds": plan.facts.seconds, "host_bytes": plan.facts.resident, "jax": plan.facts.jax},
        "assumptions": list(assumptions(plan)),
        "job": dataclasses.asdict(plan.job),
        "chip": dataclasses.asdict(plan.chip),
        "cluster": dataclasses.asdict(plan.cluster),
    }


def _memory(plan: Plan) -> dict[str, Any]:
    memory = plan.memory
    return {
        "parts_bytes": dict(memory.parts),
        "peak_bytes": memory.peak,
        "allocated_bytes": memory.allocated,
        "room_bytes": dataclasses.asdict(plan.room),
        "chip_bytes": plan.chip.memory,
        "spare_bytes": plan.spare,
        "host_bytes": memory.host,
        "largest": [dataclasses.asdict(each) for each in memory.largest],
        "over_program": [list(each) for each in memory.over_program],
    }


def _router(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "load": each.skew.load,
            "kept": each.skew.kept,
            "over_capacity": each.skew.over,
            "fate": each.skew.fate,
            "allocated_bytes": plan.memory.allocated,
            "step_seconds": each.prediction.seconds,
        }
        for each in plan.unbalanced
    ]


def _arithmetic(plan: Plan) -> dict[str, Any]:
    return {
        "executed_flops": plan.work.flops,
        "model_flops": plan.model_flops / plan.devices,
        "executed_to_model": plan.executed_ratio,
        "moved_bytes": plan.work.bytes,
        "by_use": {
            each.use: {
                "forward_flops": each.forward,
                "backward_flops": each.backward,
                "recomputed_flops": each.recomputed,
                "moved_bytes": each.bytes,
            }
            for each in plan.uses
        },
        "by_format": flops_by_format(plan.work),
    }


def _exchange(each: Any) -> dict[str, Any]:
    return {
        "kind": each.kind,
        "axes": list(each.axes),
        "uses": list(each.uses),
        "devices": each.devices,
        "nodes": each.nodes,
        "count": each.count,
        "inside_bytes": each.inside,
        "across_bytes": each.across,
        "hidden_seconds": each.hidden,
        "exposed_seconds": each.exposed,
    }


def _prediction(plan: Plan) -> dict[str, Any]:
    return {
        "step_seconds": plan.prediction.seconds,
        "low_seconds": plan.prediction.low,
        "high_seconds": plan.prediction.high,
        "terms_seconds": dict(plan.prediction.terms),
        "uses_seconds": dict(plan.prediction.uses),
        "tokens_per_second": plan.prediction.tokens_per_second,
        "mfu": plan.prediction.mfu,
        "chip_hours_per_1e12_tokens": plan.chip_hours_per_trillion,
    }
