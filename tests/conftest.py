"""What the tests of the scripts share: a tiny run, and reading back what it left on the disk."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import re
import socket

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode

import mae_pretrain
import train_classifier
import utils

TESTS = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(TESTS)
TINY = "--patch_size 8 --emb_dim 24 --encoder_layer 1 --device cpu --precision fp32".split()
PRETRAIN = [*TINY, *"--dataset shapes --train_images 60 --decoder_layer 1 -bs 25".split()]
PRETRAIN += "--max_device_batch_size 16 --total_epoch 2 --warmup_epoch 1".split()
CLASSIFY = [*TINY, *"--dataset shapes --train_images 60 --batch_size 25".split()]
CLASSIFY += "--max_device_batch_size 16 --total_epoch 2 --warmup_epoch 1".split()
CLASSIFY += ["--output_model_path", "cls.pth"]


# Two runs that differ in rounding only; sums on a GPU also differ from run to run.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


def few_shapes(image_size=32, num_train=None):
    keep = utils.stratified_subset(torch.arange(90) % 10, num_train)
    train, val = utils.draw_shapes(keep, image_size, 0), utils.draw_shapes(range(37), image_size, 1)
    return utils.ImageSet(*train, *val, list(utils.SHAPES))


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A test starts where a user starts: in a folder without runs. Fewer shapes are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "read_shapes", few_shapes)


class GPUs(TorchFunctionMode):
    """The CPU computes what is asked of these GPUs; of others, {index: message}, it is an error."""

    def __init__(self, failing=()):
        super().__init__()
        self.failing = dict(failing)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, _, index = str(kwargs.get("device")).partition(":")
        if name == "cuda":
            if int(index) in self.failing:
                raise RuntimeError(self.failing[int(index)])
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def compiled_by_default(monkeypatch):
    """--compile is taken as the default of a long run on a GPU: a wish, not a demand."""
    try_micro_batch = utils.try_micro_batch
    wish = lambda *args: try_micro_batch(*args[:-1], must_compile=None)  # noqa: E731
    monkeypatch.setattr(utils, "try_micro_batch", wish)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    """The test runs on the CPU, and where there is a GPU on that, too: `pytest -k cuda`."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that PyTorch can use")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


def new_process(function, *args):
    """Start a process that has imported all it needs, and computed nothing, before it is forked."""
    os.environ["PYTHONPATH"] = os.pathsep.join([REPOSITORY, TESTS])  # not sys.path, on Python 3.11
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_pretrain", "train_classifier", "conftest", "timm"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def statuses(processes, timeout):
    """Wait that many seconds for each, and end what still runs -> their exit statuses."""
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pretrain(*flags):
    mae_pretrain.main(mae_pretrain.get_args([*PRETRAIN, *flags]))


def classify(*flags):
    train_classifier.main(train_classifier.get_args([*CLASSIFY, *flags]))


def read(path):
    return torch.load(path, weights_only=True)


def python_of(readme):
    """The only Python snippet of a readme."""
    with open(os.path.join(REPOSITORY, readme)) as file:
        (snippet,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    return snippet


def events(folder):
    return EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(folder, tag):
    return [(e.step, e.value) for e in events(folder).Scalars(tag)]


def same_weights(path, other, tolerance=0.0):
    a, b = read(path)["model"], read(other)["model"]
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def signal_at_update(number, at):
    """Send the process a signal while its update `at` is under way."""
    end_update, seen = utils.Progress.end_update, []

    def counting(self):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        end_update(self)

    utils.Progress.end_update = counting
    try:
        yield
    finally:
        utils.Progress.end_update = end_update


def write_official_files(monkeypatch, dataset, folder, files, meta, label_key):
    """Small files in the official format; torchvision is told their md5, which it checks."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written, md5 = {}, {}
    for name, n in files.items():
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [int(x) for x in rng.integers(0, 10, n)]
        content = pickle.dumps({"data": data, label_key: labels})
        (folder / name).write_bytes(content)
        written[name], md5[name] = (data, labels), hashlib.md5(content).hexdigest()
    content = pickle.dumps(meta)
    (folder / "the_meta").write_bytes(content)
    names = list(files)
    monkeypatch.setattr(dataset, "train_list", [[name, md5[name]] for name in names[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[names[-1], md5[names[-1]]]])
    key = next(iter(meta))
    monkeypatch.setattr(
        dataset,
        "meta",
        {"filename": "the_meta", "key": key, "md5": hashlib.md5(content).hexdigest()},
    )
    return written
