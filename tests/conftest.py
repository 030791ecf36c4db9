"""What pytest gives to the tests that ask for it; see helpers.py for what they import."""

import os

import pytest

# Before PyTorch is imported. Tests share the cores, and a run takes one GPU.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A test starts where a user starts: in a folder without runs. Fewer shapes are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.read_shapes", helpers().few_shapes)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    """The test runs on the CPU, and where there is a GPU on that, too: `pytest -k cuda`."""
    if request.param == "cuda":
        if not helpers().torch.cuda.is_available():
            pytest.skip("no GPU that PyTorch can use")
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    return request.param


def helpers():
    """Imported late: with pytest-xdist the process that only hands out tests needs none of it."""
    import helpers

    return helpers
