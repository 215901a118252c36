"""Pictures of a run, drawn from its metrics: the loss, and how the experts were loaded."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe.train.metrics import Record

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"  # Okabe and Ito's, told apart by colour-blind readers


def draw_loss(records: list[Record], unigram_entropy: float | None, title: str) -> Figure:
    """Training and validation loss over the steps, beside the unigram entropy of the corpus (nats per token)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = _series(records, "loss")
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=BLUE, label="training")
    if (validation := _series(records, "validation_loss"))[0].size:
        axes.plot(*validation, "o-", color=ORANGE, markersize=4, linewidth=1, label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.2f}", (1, unigram_entropy), xycoords=("axes fraction", "data"),
            xytext=(-4, 4), textcoords="offset points", ha="right", color=GREY,
        )  # fmt: skip
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return figure


def draw_expert_load(records: list[Record], title: str) -> Figure | None:
    """Each expert's share of the choices over the steps, one strip a MoE layer; None for a model without experts.

    White is the even share; a shared colour scale tells how many times more or less an expert got.
    """
    told = [record for record in records if "layers" in record]
    if not told:
        return None
    load_SLE = np.array([record["layers"]["load"] for record in told])
    num_layers, num_experts = load_SLE.shape[1:]
    figure = Figure(figsize=(7, 1.2 + 1.1 * num_layers), layout="constrained")
    strips = figure.subplots(num_layers, 1, sharex=True, squeeze=False)[:, 0]
    extent = (told[0]["step"] - 0.5, told[-1]["step"] + 0.5, num_experts - 0.5, -0.5)
    for layer, axes in enumerate(strips):
        image = axes.imshow(
            load_SLE[:, layer].T * num_experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
            extent=extent, interpolation="nearest",
        )  # fmt: skip
        axes.set_ylabel(f"layer {layer}\nexpert")
        axes.yaxis.get_major_locator().set_params(integer=True)
    strips[0].set_title(title)
    strips[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(strips), label="load, times the even share", extend="max")
    return figure


def save_pictures(records: list[Record], folder: Path, unigram_entropy: float | None, title: str) -> list[Path]:
    """Writes loss.png and, with experts, expert_load.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "loss.png": draw_loss(records, unigram_entropy, f"{title}: loss"),
        "expert_load.png": draw_expert_load(records, f"{title}: load of the experts"),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / name)
            paths.append(folder / name)
    return paths


def _series(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a window around each step, a thirtieth of the run wide; at the ends over what there is of it."""
    window = np.ones(1 + 2 * (len(values) // 60))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
