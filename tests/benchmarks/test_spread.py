import os

import jax

from benchmarks.spread import machine, processor, spread


def test_spread():
    assert spread([3.0, 1.0, 1200.0], 0) == "3 (1 to 1,200)"


def test_a_machine_of_virtual_devices_is_named_after_its_processor():
    assert machine() == f"{os.cpu_count()} x {processor()}, jax {jax.__version__}"
    assert processor()
