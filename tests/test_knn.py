"""Nearest neighbors against scikit-learn's, in one process and in several."""

import multiprocessing
import re
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mae.evaluate import knn


def clouds(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 5, (count,), generator=generator)
    return centers[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


def ours(bank, queries, ks=(1, 5, 20), temperatures=(0.07,)):
    return knn.classify(*bank, *queries, ks=ks, temperatures=temperatures, num_classes=5, device=torch.device("cpu"))


def predictions(bank, queries, k, temperature):
    def weights(distances):  # of unit vectors: half of the squared distance is 1 - cosine
        return np.exp(-(distances**2) / 2 / temperature)

    unit = [torch.nn.functional.normalize(features, dim=1).numpy() for features, _ in (bank, queries)]
    return KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(unit[0], bank[1]).predict(unit[1])


def test_a_low_temperature_does_not_overflow():
    """The nearest neighbor decides."""
    found = ours(clouds(600, 0), clouds(300, 1), ks=(1, 20), temperatures=(1e-5,))
    assert found[20, 1e-5] == found[1, 1e-5]
    with pytest.raises(ValueError, match=r"k=20: .* 9 "):
        ours(clouds(9, 0), clouds(5, 1))


def test_the_chunk_size_has_no_effect(monkeypatch):
    bank, queries = clouds(100, 0), clouds(50, 1)
    whole = ours(bank, queries)
    monkeypatch.setattr(knn, "CHUNK", 700)
    monkeypatch.setattr(knn, "SLICE", 33)  # the last slice has one row
    assert ours(bank, queries) == whole


def test_a_bank_of_halves_is_multiplied_in_full_precision(monkeypatch):
    monkeypatch.setattr(knn, "SLICE", 100)
    bank, queries = (torch.nn.functional.normalize(clouds(*options)[0], dim=1) for options in ((250, 0), (40, 1)))
    bank = bank.half()
    similarity, places = knn.nearest(queries, bank, 7)
    exact = queries @ bank.float().T
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, exact.sort(dim=1, descending=True).values[:, :7], rtol=0, atol=1e-6)
    torch.testing.assert_close(exact.gather(1, places), similarity, rtol=0, atol=1e-6)


IN_PROCESSES = """
import torch
from test_knn import clouds, knn, ours
from mae import parallel
parallel.init("cpu", "env://")
share = slice(parallel.rank(), None, parallel.world_size())
bank, queries = ([column[share] for column in clouds(count, seed)] for count, seed in ((601, 0), (303, 1)))
knn.CHUNK = 14100  # 70 queries of parts of 200, 69 of parts of 201
found = ours(bank, queries)
if parallel.is_main():
    print("FOUND", found)
parallel.teardown()
"""


@pytest.mark.slow
def test_the_number_of_processes_has_no_effect(tmp_path):
    output = forks.run_code(IN_PROCESSES, tmp_path, count=3)
    assert f"FOUND {ours(clouds(601, 0), clouds(303, 1))}" in output


def test_the_peak_memory_does_not_contain_a_second_bank(monkeypatch):
    """Beside the bank (m, D): the similarities of a chunk in fp32, and their largest values."""
    monkeypatch.setattr(knn, "CHUNK", 2**20)
    monkeypatch.setattr(knn, "SLICE", 2**11)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def peak() -> int:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    def measure() -> None:
        bank, labels = torch.rand(2**16, 512), torch.zeros(2**16, dtype=torch.int64)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak()
        ours((bank, labels), (torch.rand(128, 512), labels[:128]))
        queue.put((bank.nbytes, peak() - before, float(bank.norm(dim=1).sub(1).abs().max())))

    process = context.Process(target=measure)
    process.start()
    size, growth, error = queue.get()
    process.join()
    assert size == 2**27
    assert growth < size / 2
    assert error < 1e-5
