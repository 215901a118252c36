"""What a plan says, in words, tables and pictures."""

import re
from collections.abc import Iterable

from matplotlib.figure import Figure

from moe.planner.pictures import draw_bar, draw_memory, draw_roofline, named
from moe.planner.plan import Plan
from moe.planner.predict import Prediction
from moe.planner.report import Report, Section, table
from moe.planner.totals import flops_by_format
from moe.planner.units import amount, digits, flop, gib, number, seconds, share, times
from moe.planner.work import Buffer

STEPS = {"train": "one training step", "prefill": "one prefill", "decode": "one decoding step"}
ESTIMATED = "Estimated, not compiled: from the settings by formulas, without the program that XLA would make."
BUFFERS = 12
"""So many kinds of the largest are shown; the JSON has all that are known."""
NAME = 44
"""Characters of a buffer's name that are shown."""


def report_of(plan: Plan, name: str) -> Report:
    """
    Args:
        name: of what is planned.
    """
    return Report(
        title=f"{name}: {STEPS[plan.job.kind]} on {plan.devices} x {plan.chip.device}",
        verdict=verdict(plan),
        good=plan.fits,
        warnings=(ESTIMATED,) if plan.origin == "estimated" else (),
        sections=(
            _summary(plan),
            _memory(plan),
            _buffers(plan),
            _router(plan),
            _arithmetic(plan),
            _transfers(plan),
            _time(plan),
            _uses(plan),
            _assumptions(plan),
        ),
    )


def pictures_of(plan: Plan) -> dict[str, Figure]:
    """By the names that the sections give."""
    terms = {named(term): time for term, time in plan.prediction.terms.items() if time}
    return {
        "memory": draw_memory(plan.memory, plan.chip.memory, plan.room.total),
        "terms": draw_bar(terms, "seconds of a step"),
        "roofline": draw_roofline(_reached(plan), plan.peak, plan.chip.bandwidth),
    }


def _reached(plan: Plan) -> dict[str, tuple[float, float]]:
    """FLOP a byte, and FLOP/s, of each use that does a thousandth of the arithmetic at least."""
    uses, least = plan.prediction.uses, plan.work.flops / 1000
    return {
        named(each.use): (each.flops / each.bytes, each.flops / uses[each.use])
        for each in plan.uses
        if each.flops > least and each.bytes and uses.get(each.use)
    }


def verdict(plan: Plan) -> str:
    """One line: whether it fits and by how much, and how fast it is."""
    taken, limit = gib(plan.memory.allocated), gib(plan.chip.memory)
    fits = (
        f"fits: {taken} of {limit} per GPU, {gib(plan.spare)} to spare"
        if plan.fits
        else f"does not fit: {taken} and {gib(plan.room.total)} of room are {gib(-plan.spare)} over a GPU's {limit}"
    )
    prediction = plan.prediction
    return f"{fits} · {_step(prediction)} · {digits(prediction.tokens_per_second)} tokens/s · MFU {prediction.mfu:.1%}"


def _step(prediction: Prediction) -> str:
    return f"{seconds(prediction.seconds)} a step ({seconds(prediction.low)} to {seconds(prediction.high)}, predicted)"


def _summary(plan: Plan) -> Section:
    job, cluster, facts = plan.job, plan.cluster, plan.facts
    network = f"{cluster.nics_per_node} x {cluster.nic_rate:g} Gb/s {cluster.fabric} a node" + (
        ", GPUDirect RDMA" if cluster.gpudirect else ", staged through the host"
    )
    prediction = plan.prediction
    best, worst = (prediction.mfu * prediction.seconds / bound for bound in (prediction.low, prediction.high))
    rows = [
        ("model", f"{number(plan.parameters)} parameters, {number(plan.active)} active for a token"),
        ("step", f"{job.batch_size:,} sequences of {job.sequence_length:,}: {job.tokens:,} tokens"),
        ("mesh", f"{job.mesh.text}; experts over {' x '.join(job.layout.experts) or 'none'}, ZeRO-{job.layout.zero}"),
        ("cluster", f"{cluster.nodes} x {cluster.gpus_per_node} {plan.chip.device}, {cluster.gpu_link}"),
        ("network", network if cluster.nodes > 1 else "one node, none"),
        ("time", _step(prediction)),
        (
            "tokens/s",
            f"{digits(prediction.tokens_per_second)}, {digits(prediction.tokens_per_second_per_gpu)} a GPU",
        ),
        ("MFU", f"{prediction.mfu:.1%} ({worst:.1%} to {best:.1%})"),
        ("1e12 tokens", f"{digits(plan.chip_hours_per_trillion)} hours of one {plan.chip.name}"),
        (
            "compiling",
            f"{facts.seconds:.0f} s, {gib(facts.resident)} of host memory, jax {facts.jax}"
            if facts
            else "not done: all figures are estimated",
        ),
    ]
    return Section("In short", table(("", ""), rows, words=2))


def _memory(plan: Plan) -> Section:
    memory, room, limit = plan.memory, plan.room, plan.chip.memory
    rows = [(named(part), amount(count), share(count, limit)) for part, count in memory.parts.items() if count]
    rows += [
        (label, amount(count), share(count, limit))
        for label, count in (
            ("peak: alive at once", memory.peak),
            ("allocated, gaps in the block of temporaries included", memory.allocated),
            ("room for CUDA", room.cuda),
            ("room for NCCL", room.nccl),
            ("room for fragmentation", room.fragmentation),
            ("left over" if plan.fits else "lacking", abs(plan.spare)),
            ("the chip's", limit),
        )
    ]
    notes = [
        f"Peak and allocated are {plan.origin}"
        + (" by XLA; the room is assumed." if plan.origin == "compiled" else "; the room is assumed."),
        f"Start with XLA_CLIENT_MEM_FRACTION={plan.memory_fraction:.2f}: JAX takes 0.75 of a GPU's memory otherwise.",
    ]
    if memory.host:
        notes.append(f"Of the host's memory each GPU needs {gib(memory.host)} besides.")
    return Section(
        "Memory of one GPU", table(("part, at the peak", "bytes", "of the chip"), rows), tuple(notes), "memory"
    )


def _buffers(plan: Plan) -> Section:
    title = "Largest buffers at the peak"
    if not plan.memory.largest:
        return Section(title, notes=("Known of compiled programs only.",))
    alike: dict[tuple[str, ...], list[Buffer]] = {}
    for each in plan.memory.largest:
        alike.setdefault((named(each.part), each.shape.partition("{")[0], each.source or "–"), []).append(each)
    rows = [
        (*key, _readable(group[0].name), str(len(group)), amount(group[0].bytes))
        for key, group in list(alike.items())[:BUFFERS]
    ]
    columns = ("part", "shape", "source", "made by, or argument", "how many", "bytes of each")
    return Section(title, table(columns, rows, words=4))


def _readable(name: str) -> str:
    """state.params['stacks'][0]['w'] → params.stacks.0.w, of which the end says most."""
    path = re.sub(r"\['?([^]']*)'?\]", r".\1", name).removeprefix("state.")
    return path if len(path) <= NAME else "…" + path[1 - NAME :]


def _router(plan: Plan) -> Section:
    title = "If the router is unbalanced"
    if not plan.unbalanced:
        return Section(title, notes=("The model has no experts.",))
    even = plan.prediction.seconds
    rows = [
        (
            times(each.skew.load),
            times(each.skew.kept),
            f"{each.skew.over:.1%} {each.skew.fate}" if each.skew.over else "none",
            gib(plan.memory.allocated),
            seconds(each.prediction.seconds),
            times(each.prediction.seconds / even),
        )
        for each in plan.unbalanced
    ]
    notes = [
        "Modelled: one device's experts get so many times the mean of the rows, the others share the rest evenly, in "
        "every layer and sequence; all wait for that device.",
        "Shapes are static: each buffer has room for the most rows that can come, so memory is the same and nothing "
        "runs out of it in the first steps.",
    ]
    devices = plan.unbalanced[0].skew.devices
    if devices < 4:
        notes.append(f"{devices} device(s) share out the experts, so one can have {devices} x the mean at most.")
    columns = ("rows for the worst device", "rows it takes", "over capacity", "memory", "step", "to the even step")
    return Section(title, table(columns, rows, words=0), tuple(notes))


def _arithmetic(plan: Plan) -> Section:
    whole, moved = plan.work.flops, plan.work.bytes
    total = [sum(column) for column in zip(*((s.forward, s.backward, s.recomputed) for s in plan.uses), strict=True)]
    lines = [(named(s.use), (s.forward, s.backward, s.recomputed), s.bytes) for s in plan.uses]
    rows = [
        (use, *map(flop, split), flop(sum(split)), share(sum(split), whole), amount(count), share(count, moved))
        for use, split, count in [*lines, ("all", total, moved)]
    ]
    formats = flops_by_format(plan.work)
    in_products = ", ".join(f"{name} {share(count, sum(formats.values()))}" for name, count in formats.items())
    notes = (
        f"Executed to model FLOPs: {plan.executed_ratio:.3f}. The model's are {flop(plan.model_flops / plan.devices)} "
        f"a GPU: 2 for each active weight and token in a forward pass, {4 if plan.job.lora is None else 2} more in a "
        "backward one, and causal attention.",
        f"Products by number format: {in_products}.",
    )
    columns = ("use", "forward", "backward", "recomputed", "all", "share", "read and written", "share")
    return Section("Arithmetic of one GPU in a step", table(columns, rows), notes)


def _transfers(plan: Plan) -> Section:
    rows = [
        (
            each.kind, " x ".join(each.axes) or "–", ", ".join(map(named, each.uses)),
            f"{each.devices} on {each.nodes}", f"{each.count:,.0f}", amount(each.inside), amount(each.across),
            seconds(each.hidden), seconds(each.exposed),
        )
        for each in plan.exchanges
    ]  # fmt: skip
    columns = (
        "kind",
        "mesh axes",
        "for",
        "devices on nodes",
        "times",
        "inside nodes",
        "across nodes",
        "hidden",
        "exposed",
    )
    notes = (
        "Bytes that one GPU sends in a step, and seconds that it spends on them, beside arithmetic (hidden) or not. "
        f"In all {amount(sum(each.inside for each in plan.exchanges))} inside nodes, "
        f"{amount(sum(each.across for each in plan.exchanges))} across.",
    )
    if not rows:
        return Section("Exchanges between GPUs", notes=("None: one device.",))
    return Section("Exchanges between GPUs", table(columns, rows, words=4), notes)


def _time(plan: Plan) -> Section:
    whole = plan.prediction.seconds
    rows = [(named(term), seconds(time), share(time, whole)) for term, time in plan.prediction.terms.items() if time]
    rows.append(("step", seconds(whole), "100%"))
    return Section("Predicted step time", table(("term", "seconds", "share"), rows), picture="terms")


def _uses(plan: Plan) -> Section:
    whole, reached = plan.prediction.seconds, _reached(plan)
    rows = []
    for use, time in sorted(plan.prediction.uses.items(), key=lambda item: -item[1]):
        intensity, rate = reached.get(named(use), (0.0, 0.0))
        figures = (digits(intensity), f"{digits(rate / 1e12)} TFLOP/s", share(rate, plan.peak)) if rate else ("–",) * 3
        rows.append((named(use), seconds(time), share(time, whole), *figures))
    note = (
        f"Waiting for an exchange counts for what it is for. Above {plan.peak / plan.chip.bandwidth:.0f} FLOP a byte "
        "arithmetic limits this chip, below it memory."
    )
    columns = ("use", "seconds", "share", "FLOP a byte", "reached", "of the peak")
    return Section("The same by use, below the chip's roof", table(columns, rows), (note,), "roofline")


def _assumptions(plan: Plan) -> Section:
    return Section("Assumptions", notes=tuple(assumptions(plan)))


def assumptions(plan: Plan) -> Iterable[str]:
    """What the figures rest on, each a sentence."""
    if plan.origin == "compiled":
        yield (
            "Compiled: memory, arithmetic, bytes and exchanges are those of the program that XLA makes for this chip, "
            "loops times their trip counts, with the flags of `python -m parallel.network env`."
        )
    else:
        yield ESTIMATED
    yield "Modelled: times. Nothing ran."
    yield "Grouped products are counted for an even router, causal attention for what its mask lets through."
    yield (
        "MFU: the model's FLOPs, without recomputation, of the chip's dense "
        f"{'bfloat16' if plan.chip.bf16 else 'float16'} rate, {plan.peak / 1e12:g} TFLOP/s."
    )
    if plan.job.precision.compute == "bfloat16" and not plan.chip.bf16:
        yield "The chip has no bfloat16: XLA computes these products in float32, from copies in that format."
    if plan.cluster.nodes > 1 and not plan.cluster.gpudirect:
        yield "No GPUDirect RDMA: what goes across nodes is staged through the host's memory, and modelled so."
    yield f"Figures of the chip: {'; '.join(plan.chip.sources)}."
