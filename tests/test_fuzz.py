"""A sample of ./run fuzz, and one input for each fault that it must find."""

import gc
import os
import random
import time

import pytest
from fuzz import fuzz
from fuzz_doors import DOORS, Door

from mae.data.pixels import BadImage

INPUTS = 40


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    assert [fault for _, faults, _ in fuzz([name], INPUTS, tmp_path, processes=1) for fault in faults] == []


READ = {
    "fine": lambda: _raise("two is no number"),
    "an error that is not on purpose": lambda: int("two"),
    "two lines": lambda: _raise("one\ntwo"),
    "the process ends": lambda: os._exit(3),
    "no end": lambda: time.sleep(60),
    "an escape sequence": lambda: print("\x1b[2J"),
    "memory": lambda: gc.collect() + len(b"1" * (1000 << 20)),
}


def _raise(message):
    raise BadImage(message)


@pytest.fixture
def large_garbage():
    # A cycle of 1,200 MB that is freed by the first collection in a child of this process, as after many other tests.
    gc.collect()
    gc.disable()
    cycle = [bytearray(1200 << 20)]
    cycle.append(cycle)
    del cycle
    yield
    gc.enable()
    gc.collect()


@pytest.mark.slow
def test_fuzz_reports_every_kind_of_fault(tmp_path, monkeypatch, large_garbage):
    names = {random.Random(f"crooked {number}").random(): name for number, name in enumerate(READ)}
    door = Door(lambda folder: [], lambda seeds, generator: names[generator.random()], lambda name, *_: READ[name]())
    monkeypatch.setitem(DOORS, "crooked", door)
    monkeypatch.setattr("fuzz.SECONDS", 6)
    monkeypatch.setattr("fuzz.MAX_GROWTH", 50)
    found = [fault for _, faults, _ in fuzz(["crooked"], len(READ), tmp_path, processes=1) for fault in faults]
    # The faults of a process that ends are lost; the next process starts after the input that ended it.
    assert [(fault.number, fault.what[:18]) for fault in found] == [
        (3, "ends the process ("), (4, "hangs"), (5, "inputs 5 to 6 took"), (5, "a message with an "),
    ]  # fmt: skip
    monkeypatch.setitem(READ, "the process ends", lambda: None)
    monkeypatch.setitem(READ, "no end", lambda: None)
    found = [fault for _, faults, _ in fuzz(["crooked"], len(READ), tmp_path / "b", processes=1) for fault in faults]
    assert [(fault.number, fault.what[:10]) for fault in found[:2]] == [(1, "ValueError"), (2, "BadImage o")]
