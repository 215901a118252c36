import io

from rich.console import Console

from moe.train.progress import TrainingProgress


def record(step, loss=2.0):
    return {"step": step, "loss": loss, "tokens": 100, "tokens_per_second": 50.0, "mfu": 0.25}


def told(is_terminal, peak=None):
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=150, highlight=False)
    with TrainingProgress(console, 0, 3, peak) as progress:
        for step in (1, 2):
            progress.update(record(step))
        progress.update({"step": 2, "validation_loss": 1.5})
        progress.update(record(3, loss=5.0))
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = told(is_terminal=False).splitlines()
    assert lines == [
        "step 2: validation loss 1.500",
        "step 3/3  loss 3.000  validation 1.500  50 tokens/s  0 s left",
    ]


def test_mfu_names_its_peak():
    assert "MFU 25.0% of 148 TFLOP/s a device" in told(is_terminal=False, peak=148.0)
    assert "MFU" not in told(is_terminal=False)


def test_a_live_bar_in_a_terminal():
    assert "3/3" in told(is_terminal=True)
