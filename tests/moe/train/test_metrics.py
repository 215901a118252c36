import json

import numpy as np

from moe.train.metrics import MetricsWriter, read_metrics, record_of
from moe.train.run_folder import RunFolder
from moe.train.step import LayerStats, StepMetrics

LAYERS = LayerStats(
    np.array([[0.25, 0.75], [0.5, 0.5]], np.float32), np.zeros(2), np.zeros(2), np.full(2, 0.6),
    np.full(2, 1024.0), np.zeros(2),
)  # fmt: skip
METRICS = StepMetrics(2.0, 1.0, 3.0, 0.5, 1e-3, 0.0, 100, LAYERS)


def test_a_record_in_plain_numbers():
    record = record_of(7, METRICS, seconds=0.5, flops_per_token=1e6, peak_flops=1e9)
    assert json.loads(json.dumps(record)) == record
    assert (record["step"], record["loss"], record["tokens"], record["tokens_per_second"]) == (7, 2.0, 100, 200.0)
    assert record["mfu"] == 200.0 * 1e6 / 1e9
    assert record["layers"]["load"] == [[0.25, 0.75], [0.5, 0.5]]
    assert set(record["layers"]) == {"load", "dropped", "recycled", "entropy", "wire_bytes", "across_bytes"}
    without = record_of(7, METRICS._replace(layers=None), 0.5, 1e6, None)
    assert not {"mfu", "layers"} & set(without)


def test_resuming_cuts_what_lies_beyond_and_what_was_cut_short(tmp_path):
    folder = RunFolder(tmp_path, None)
    writer = MetricsWriter(folder, 0)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 1.0 / step})
    writer.write({"step": 4, "validation_loss": 0.5})
    writer.close()
    with open(folder.metrics, "a") as file:
        file.write('{"step": 6, "lo')
    resumed = MetricsWriter(folder, 3)
    resumed.write({"step": 4, "loss": 9.0})
    resumed.close()
    assert [(r["step"], r.get("loss")) for r in read_metrics(folder.metrics)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
