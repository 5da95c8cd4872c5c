"""The lab's self-taught pictures: what teaches, what tests, and an encoder that is kept."""

import numpy as np
import pytest
from PIL import Image

from unfused.claims.lab import Lab, self_taught
from unfused.claims.lab.worlds import Absent


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "omniglot" / "small" / "Greek"
    for character in ("character01", "character02"):
        (folder / character).mkdir(parents=True)
        for drawer in range(1, 21):
            picture = Image.fromarray(rng.integers(0, 2, (105, 105), dtype=np.uint8) * 255)
            picture.save(folder / character / f"0108_{drawer:02}.png")
    return tmp_path


def test_the_last_drawers_test(data, tmp_path):
    found = self_taught.pictures(Lab("desk", data_dir=data, cache_dir=tmp_path), "omniglot")
    assert found.test.tolist() == ([False] * 12 + [True] * 8) * 2
    assert sorted(set(found.labels)) == ["Greek/character01", "Greek/character02"]


def test_the_encoder_is_kept(data, tmp_path):
    lab = Lab("smoke", data_dir=data, cache_dir=tmp_path)
    paths = self_taught.pictures(lab, "omniglot").paths
    rows = self_taught.picture_encoder(lab, "omniglot").fit_transform(paths)
    assert rows.shape == (20, 128) and len(list(tmp_path.glob("omniglot-simclr*"))) == 1
    assert np.array_equal(rows, self_taught.picture_encoder(lab, "omniglot").transform(paths))


def test_absent_data_are_said(tmp_path):
    with pytest.raises(Absent, match=r"cifar10: .*is not here; give --data DIR"):
        self_taught.pictures(Lab("smoke", data_dir=tmp_path, cache_dir=tmp_path), "cifar10")
