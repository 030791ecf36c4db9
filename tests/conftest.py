"""What pytest gives to the tests that ask for it; see helpers.py for what they import."""

import os
import signal

import pytest

TESTS = os.path.dirname(os.path.abspath(__file__))
# Before PyTorch is imported. Tests share the cores, a run takes one GPU, and nothing but our own
# words is printed; then for the processes that are started.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "no_proxy": "127.0.0.1"}
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(TESTS), TESTS])

# Tests send these; a shell's `pytest &` or nohup may have them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_up():
    """A test that fails leaves no process and no threads to the next."""
    yield
    helpers().statuses(helpers().STARTED, timeout=0)
    helpers().STARTED.clear()
    helpers().torch.set_num_threads(1)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A test starts where a user starts: in a folder without runs. Fewer shapes are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.read_shapes", helpers().few_shapes)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    """The test runs on the CPU, and where there is a GPU on that, too: `pytest -k cuda`."""
    torch = helpers().torch
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that PyTorch can use")
        # As NVIDIA's containers do. The scripts set what is exact.
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
        torch.set_float32_matmul_precision("high")
    yield request.param
    torch.set_float32_matmul_precision("highest")


def helpers():
    """Imported late: with pytest-xdist the process that only hands out tests needs none of it."""
    import helpers

    return helpers
