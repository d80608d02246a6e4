from __future__ import annotations

import os
import random

import pytest
import torch

from model.data import DataConfig, DataError, load


def test_the_standard_library_is_always_there():
    data = load(DataConfig())
    assert data.train.dtype == torch.uint8
    assert 4_000_000 < data.train.numel() + data.validation.numel() <= 8_100_000
    assert data.validation.numel() == pytest.approx(0.05 * data.train.numel() / 0.95, rel=0.01)
    assert data.digest == load(DataConfig()).digest
    text = bytes(data.train[:200_000].tolist())
    assert b"import " in text
    assert b"def " in text


def test_no_held_out_region_is_trained_on(tmp_path):
    source = random.Random(0)
    text = "".join(source.choices("abcdefghij", k=400_000))
    (tmp_path / "a.txt").write_text(text)
    data = load(DataConfig(path=str(tmp_path / "a.txt"), validation_fraction=0.1))
    assert data.train.numel() + data.validation.numel() == len(text) + 1
    assert data.validation.numel() == pytest.approx(0.1 * len(text), rel=0.01)
    train = bytes(data.train.tolist())
    held_out = bytes(data.validation.tolist())
    # 20 random letters do not repeat by chance; a window across a seam of regions is in neither.
    windows = [held_out[i : i + 20] for i in range(0, len(held_out) - 20, 20)]
    assert not any(window in train for window in windows)
    assert sum(window in text.encode() for window in windows) > 0.99 * len(windows)


def test_a_folder_is_read_in_order_hidden_and_foreign_files_left_out(tmp_path):
    for name, text in {
        "b.txt": "bb", "a.md": "aa", "sub/c.py": "cc", ".hidden.txt": "no", ".git/d.txt": "no",
        "image.png": "no", "empty.txt": "",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    data = load(DataConfig(path=str(tmp_path)))
    assert bytes(torch.cat((data.train, data.validation)).tolist()) == b"aa\0bb\0cc\0"


def test_the_digest_tells_corpora_apart(tmp_path):
    digests = set()
    for text in ("some text", "some text.", "same text"):
        (tmp_path / "a.txt").write_text(text)
        digests.add(load(DataConfig(path=str(tmp_path / "a.txt"))).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no text"), (b"ab\0cd", "offset 2"), (b"caf\xe9 x", "not UTF-8 at offset 3")],
)
def test_bad_files_are_one_line(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load(DataConfig(path=str(tmp_path / "a.txt")))
    assert "a.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_path_an_empty_folder_and_a_device(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"no file ending in .*\.txt"):
        load(DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(DataConfig(path=os.devnull))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        load(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("fraction", [0.0, 0.6, float("nan")])
def test_a_wrong_fraction_is_refused(fraction):
    with pytest.raises(DataError, match="validation_fraction"):
        DataConfig(validation_fraction=fraction)
