"""What the tests of the scripts share: a tiny run, and reading back what it left on the disk."""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.run
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

import mae_pretrain
import train_classifier
import utils

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


class GPUs(TorchFunctionMode):
    """The CPU computes what is asked of a GPU; those of failing, {index: message}, raise that."""

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


STARTED = []  # the processes of a test


def script_process(script, flags, folder, environment, number, before):
    """The body of a process: what `python SCRIPT FLAGS` does, after before()."""
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        flag = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(f"{name}-{number}", flag), descriptor)
    utils.read_shapes = few_shapes
    sys.argv = [os.path.join(REPOSITORY, f"{script}.py"), *flags]
    if before:
        before()
    if script == "torchrun":
        torch.distributed.run.main(flags)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def start(script, flags, folder=".", number=0, before=None, **environment):
    """Run a script or torchrun, in a process that is forked after the imports, which take seconds.

    Its output goes into the files out-0 and err-0, or of another number.
    """
    os.makedirs(folder, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers"])
    args = script, flags, os.path.abspath(folder), environment, number, before
    process = context.Process(target=script_process, args=args)
    process.start()
    STARTED.append(process)
    return process


def statuses(processes, timeout=120):
    """Wait that many seconds for each, and end what still runs -> their exit statuses."""
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def finish(script, flags, folder=".", **more):
    """Run a script to its end -> its exit status."""
    return statuses([start(script, flags, folder, **more)])[0]


def output(folder=".", number=0, names=("out", "err")):
    """What a process has printed, on standard output first."""
    text = ""
    for name in names:
        with open(f"{folder}/{name}-{number}") as file:
            text += file.read()
    return text


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


PORTS = itertools.count(10_000 + os.getpid() % 200 * 100)


def free_port():
    """A port that no other process of the tests takes, below those that the system gives out."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def pretrain(*flags):
    mae_pretrain.main(mae_pretrain.get_args([*PRETRAIN, *flags]))


def classify(*flags):
    train_classifier.main(train_classifier.get_args([*CLASSIFY, *flags]))


def read(path):
    return torch.load(path, weights_only=True)


def load_model(path):
    """The model of a file, by its architecture."""
    content = read(path)
    return train_classifier.load_model(path, content["kind"])[0].eval()


def python_of(readme):
    """The only Python snippet of a readme."""
    with open(os.path.join(REPOSITORY, readme)) as file:
        (snippet,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    return snippet


def events(folder):
    return EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(folder, tag):
    return [(e.step, e.value) for e in events(folder).Scalars(tag)]


def curves(folder):
    """Everything in a run's events that does not tell the time."""
    found = {}
    for where, _, files in os.walk(folder):
        if not files:
            continue
        accumulator, part = events(where), os.path.relpath(where, folder)
        for tag in set(accumulator.Tags()["scalars"]) - {"images_per_second"}:
            found[part, tag] = [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["images"]:
            images = [(e.step, e.encoded_image_string) for e in accumulator.Images(tag)]
            found[part, tag] = images
    return found


def same_weights(path, other, tolerance=0.0):
    a, b = read(path)["model"], read(other)["model"]
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def each_update(action):
    """Call action(optimizer) when an update of the weights is done, each time."""
    handle = register_optimizer_step_post_hook(lambda optim, *_: action(optim))
    try:
        yield
    finally:
        handle.remove()


def only_in(number, action):
    """A function that calls action() when it is called for that time."""
    seen = itertools.count(1)
    return lambda *_: action() if next(seen) == number else None


def at_update(number, action):
    """Call action() in that update only, counted from here."""
    return each_update(only_in(number, action))


def on_update(number, action):
    """The same in a process that ends with the run: for good."""
    register_optimizer_step_post_hook(only_in(number, action))


def stop(number, signal_number=signal.SIGTERM):
    """The process gets a signal in that update."""
    on_update(number, functools.partial(os.kill, os.getpid(), signal_number))


def signal_at_update(signal_number, number):
    """Send this process a signal while an update is under way."""
    return at_update(number, functools.partial(os.kill, os.getpid(), signal_number))


@contextlib.contextmanager
def stopped_at_update(number):
    """Expect the run to be stopped by SIGTERM in that update."""
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, number):
        yield


CIFAR = {
    "CIFAR10": ("labels", "label_names", 10, ["data_batch_1", "data_batch_2", "test_batch"]),
    "CIFAR100": ("fine_labels", "fine_label_names", 100, ["train", "test"]),
}


def write_cifar(monkeypatch, name, root="data"):
    """Write 7 images a file in the official format, of which torchvision is told the md5.

    -> {file: (rows of pixels, labels)}
    """
    dataset, (labels_key, names_key, k, files) = getattr(torchvision.datasets, name), CIFAR[name]
    folder, rng, written, md5 = f"{root}/{dataset.base_folder}", np.random.default_rng(0), {}, {}
    os.makedirs(folder)
    for file in [*files, "meta"]:
        data, labels = rng.integers(0, 256, (7, 3072), dtype=np.uint8), rng.integers(0, k, 7)
        written[file] = data, labels.tolist()
        content = {"data": data, labels_key: labels.tolist()}
        content = pickle.dumps(content | {names_key: [f"class {i}" for i in range(k)]})
        md5[file] = hashlib.md5(content).hexdigest()
        with open(f"{folder}/{file}", "wb") as out:
            out.write(content)
    meta = {"filename": "meta", "key": names_key, "md5": md5.pop("meta")}
    *train, test = map(list, md5.items())
    for attribute, value in (("train_list", train), ("test_list", [test]), ("meta", meta)):
        monkeypatch.setattr(dataset, attribute, value)
    return written
