from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import vectors


def test_the_mean_of_what_was_sent_leaves_out_who_sent_nothing_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 100)
    everybody = [0, 1, 2]
    spans = [(0, 70, everybody), (70, 230, [0, 2]), (230, 260, [1]), (260, 350, everybody)]
    sums, weights = np.zeros(350), np.zeros(350)
    for number in everybody:
        vector_N = vectors.vector(7, number, 350).astype(np.float64)
        for start, stop, numbers in spans:
            if number in numbers:
                sums[start:stop] += vectors.weight(number) * vector_N[start:stop]
                weights[start:stop] += vectors.weight(number)
    mean_N = np.concatenate(list(vectors.mean_of_sent(7, spans)))
    np.testing.assert_allclose(mean_N, sums / weights, rtol=1e-12)
    result_N = mean_N.astype(np.float32)
    assert max(vectors.errors(result_N, vectors.mean_of_sent(7, spans))) < 1e-9
    # Who counts one that was left out is found.
    assert min(vectors.errors(result_N, vectors.mean_of_sent(7, [(0, 350, everybody)]))) > 1e-4


def test_where_all_was_sent_both_means_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mean"
    vectors.write_mean(path, 3, 4, 1000)
    written_N = np.concatenate(list(vectors.read_mean(path, 1000)))
    sent_N = np.concatenate(list(vectors.mean_of_sent(3, [(0, 1000, [0, 1, 2, 3])])))
    np.testing.assert_allclose(written_N, sent_N, rtol=1e-12)
