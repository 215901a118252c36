import pytest

from benchmarks.checkpoint_memory import measure


@pytest.mark.slow
def test_converting_holds_less_than_twice_the_largest_tensor(tmp_path):
    memory = measure(tmp_path, gigabytes=3)
    assert memory.checkpoint > 3.5 * memory.largest
    assert memory.ratio(memory.imported) < 2
    assert memory.ratio(memory.exported) < 2
