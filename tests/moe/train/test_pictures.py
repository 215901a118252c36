import numpy as np

from moe.train.pictures import draw_expert_load, draw_loss, save_pictures

RECORDS = [
    {"step": s, "loss": 5.0 / s, "layers": {"load": [[0.1, 0.9], [0.5, 0.5]]}} for s in range(1, 11)
] + [{"step": 10, "validation_loss": 0.7}]  # fmt: skip


def test_the_loss_is_drawn_as_it_was_told():
    axes = draw_loss(RECORDS, 3.0, "small").axes[0]
    raw, _, validation, entropy = axes.lines
    np.testing.assert_allclose(raw.get_xydata(), [(s, 5.0 / s) for s in range(1, 11)])
    np.testing.assert_allclose(validation.get_xydata(), [(10, 0.7)])
    assert set(entropy.get_ydata()) == {3.0}
    assert axes.get_ylabel() == "cross-entropy (nats per token)"


def test_the_load_is_drawn_in_shares_of_the_even_one():
    figure = draw_expert_load(RECORDS, "small")
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[:, 0], [0.2, 1.8])
    np.testing.assert_allclose(figure.axes[1].images[0].get_array()[:, 0], [1.0, 1.0])


def test_a_dense_model_has_no_load(tmp_path):
    dense = [{"step": 1, "loss": 1.0}]
    assert draw_expert_load(dense, "dense") is None
    assert [path.name for path in save_pictures(dense, tmp_path, None, "dense")] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
