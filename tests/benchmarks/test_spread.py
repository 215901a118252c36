from benchmarks.spread import spread


def test_spread():
    assert spread([3.0, 1.0, 1200.0], 0) == "3 (1 to 1,200)"
