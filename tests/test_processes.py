"""One run, any layout: several processes, on one machine or two, give the result of one."""

import functools
import glob
import hashlib
import http.server
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
import torchvision
from helpers import (
    CLASSIFY,
    PRETRAIN,
    REPOSITORY,
    at_update,
    classify,
    curves,
    finish,
    free_port,
    on_update,
    output,
    pretrain,
    read,
    same_weights,
    start,
    statuses,
    stop,
    wait_for,
    write_cifar,
)
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import model

pytestmark = pytest.mark.usefixtures("empty_folder")
# 17 images an update, of 52: batches of 17, 17, 17 and 1, of which two of three processes get none.
LAYOUT = "--train_images 52 --batch_size 17 --total_epoch 3 --base_learning_rate 3e-3".split()
RECIPE = "--augment --drop_path 0.2 --layer_decay 0.8 --train_images 55 --holdout 3".split()
SCRIPTS = {
    "mae_pretrain": [*PRETRAIN, *LAYOUT, "--augment", "--model_path", "model.pth"],
    "train_classifier": [*CLASSIFY, *LAYOUT, *RECIPE, "--output_model_path", "model.pth"],
}


def count_bytes():
    """Note the bytes of gradients that are exchanged in every update."""
    create, found = DistributedDataParallel.__init__, []

    def created(self, *args, **more):
        create(self, *args, **more)
        self.register_comm_hook(None, counting)

    def counting(_, bucket):
        found.append(bucket.buffer().nbytes)
        with open(f"bytes-{os.environ['RANK']}", "w") as file:
            json.dump(found, file)
        return allreduce_hook(None, bucket)

    DistributedDataParallel.__init__ = created


def little_memory(room):
    """More images at once than there is room for are too many; and nothing is compiled."""
    forward = model.MAE_ViT.forward

    def with_little_memory(self, img, noise):
        if self.training and len(img) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, img, noise)

    model.MAE_ViT.forward = with_little_memory
    torch.compile = lambda function, **_: function


def spoil(number):
    """After that update, the process predicts what is not finite."""
    forward = model.MAE_ViT.forward

    def spoiled(self, *inputs):
        predicted_img, mask = forward(self, *inputs)
        return predicted_img * float("inf"), mask

    on_update(number, functools.partial(setattr, model.MAE_ViT, "forward", spoiled))


def fail(number):
    """A bug; and what NCCL does at the end where the others do not answer."""

    def bug():
        raise KeyError("a bug")

    on_update(number, bug)
    torch.distributed.destroy_process_group = functools.partial(time.sleep, 1000)


def launch(script, flags, folder, n=1, last=count_bytes, others=count_bytes, flags_of_last=()):
    """Start a script in n processes, the last with flags and something to do first of its own."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for i in range(n):
        own = [*flags, *(flags_of_last if i == n - 1 else ())]
        before = last if i == n - 1 else others
        place = {"RANK": str(i), "LOCAL_RANK": str(i)}
        started.append(start(script, own, folder, number=i, before=before, **shared, **place))
    return started


def train(*args, **more):
    """-> the exit statuses of the processes."""
    return statuses(launch(*args, **more))


def refused(script, flags, folder, n, flags_of_last=()):
    """-> the error of the first process. As torchrun does, end the others when it has failed."""
    started = launch(script, flags, folder, n, flags_of_last=flags_of_last)
    assert statuses(started[:1]) == [1]
    statuses(started[1:], timeout=0)
    return output(folder, names=["err"])


def same_run(script, folder, other, tolerance=1e-5):
    a, b = (curves(f"{f}/logs/shapes") for f in (folder, other))
    assert a.keys() == b.keys()
    for name in a.keys() - {("mae-pretrain", "mae_image")}:
        assert len(b[name]) == 3
        assert a[name] == [(step, pytest.approx(x, rel=tolerance)) for step, x in b[name]], name
    same_weights(f"{folder}/model.pth", f"{other}/model.pth", tolerance)
    metrics = [read(f"{f}/model.pth")["metrics"] for f in (folder, other)]
    if script == "train_classifier":  # every validation image is counted once
        assert metrics[0]["val"]["acc"] == metrics[1]["val"]["acc"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_run_in_any_layout(script):
    flags = SCRIPTS[script]
    assert train(script, flags, "one") == [0]
    for size in ("1", "7"):
        assert train(script, [*flags, "--max_device_batch_size", size], size) == [0]
        same_run(script, size, "one")
    for n in (2, 3):
        several = [*flags, "--max_device_batch_size", "4"]
        assert train(script, several, str(n), n) == [0] * n, output(str(n))
        same_run(script, str(n), "one")
        # Gradients are exchanged once an update, and only the first process writes.
        parameters = 4 * sum(p.numel() for p in read("one/model.pth")["model"].values())
        for i in range(n):
            with open(f"{n}/bytes-{i}") as file:
                assert sum(json.load(file)) == 3 * 4 * parameters
        extra = {f"{kind}-{i}" for kind in ("bytes", "out", "err") for i in range(n)}
        assert set(os.listdir(str(n))) - extra == set(os.listdir("one")) - {"out-0", "err-0"}
        for where, _, names in os.walk(f"{n}/logs"):
            assert len(names) <= 1, where
        assert output(str(n)).count("epoch 3/3") == 1 and output(str(n), n - 1) == ""


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("mae_pretrain", "--model_path vit-t-mae.pth --reconstruct new"),
        ("train_classifier", "--eval cls.pth --predict new --precision fp32"),
        ("train_classifier", "--eval cls.pth --dataset shapes --precision fp32"),
    ],
)
def test_several_processes_draw_the_pictures_of_one(script, flags):
    pretrain("--total_epoch", "1") if script == "mae_pretrain" else classify("--total_epoch", "1")
    drawn = []
    for n in (1, 3):
        os.makedirs(f"{n}/new")
        for i in range(5):
            Image.new("RGB", (32, 32), (50 * i, 0, 0)).save(f"{n}/new/{i}.png")
        for path in glob.glob("*.pth"):
            shutil.copy(path, str(n))
        assert train(script, [*flags.split(), "--device", "cpu"], str(n), n) == [0] * n
        pictures = glob.glob("*.png", root_dir=str(n))
        drawn.append({path: open(f"{n}/{path}", "rb").read() for path in pictures})
    assert drawn[0] and drawn[0] == drawn[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_saved_by_two_processes_and_resumed_by_three_and_by_one(script):
    flags = SCRIPTS[script]
    assert train(script, flags, "whole") == [0]
    for n in (3, 1):
        folder = f"resumed-{n}"
        stopping = functools.partial(stop, 7)
        assert train(script, flags, folder, 2, stopping) == [143, 143], output(folder)
        assert "torchrun ..." in output(folder) and "--resume" in output(folder)
        time.sleep(1)  # TensorBoard may take files of the same second in the wrong order
        state = read(f"{folder}/model.state.pth")
        assert (state["epoch"], state["update"]) == (1, 3)
        assert train(script, [*flags, "--resume"], folder, n) == [0] * n, output(folder)
        same_run(script, folder, "whole")


def test_all_processes_take_the_micro_batch_of_the_one_with_the_least_memory():
    flags = [*SCRIPTS["mae_pretrain"], "--max_device_batch_size", "8", "--compile"]
    little, enough = (functools.partial(little_memory, room) for room in (3, 99))
    assert train("mae_pretrain", flags, "one", 1, enough) == [0], output("one")
    assert train("mae_pretrain", flags, "two", 2, little, enough) == [0, 0], output("two", 1)
    assert "micro-batch 6\n" in output("one") and "micro-batch 2\n" in output("two")
    same_run("mae_pretrain", "two", "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "7"], "process 1 has seed 7, process 0 has 42"),
        (["--compile"], "process 1 has compile True, process 0 has False"),
    ],
)
def test_processes_with_other_flags_are_refused(flags, message):
    assert message in refused("mae_pretrain", SCRIPTS["mae_pretrain"], "a", 2, flags)


def test_processes_with_other_states_are_refused():
    flags = SCRIPTS["mae_pretrain"]
    for folder, update in (("a", 2), ("b", 7)):
        stopping = functools.partial(stop, update)
        assert train("mae_pretrain", flags, folder, 2, stopping) == [143, 143]
    os.rename("b/model.state.pth", "a/other.state.pth")
    resume = [*flags, "--resume"]
    last = ["--model_path", "other.pth"]
    error = refused("mae_pretrain", resume, "a", 2, last)
    assert "process 1 has epoch 1, process 0 has 0" in error


def test_a_loss_that_is_not_finite_in_one_process_ends_all():
    flags = [*SCRIPTS["mae_pretrain"], "--save_minutes", "0"]
    assert train("mae_pretrain", flags, "a", 2, functools.partial(spoil, 6)) == [1, 1]
    message = "error: loss, weights or gradients are not finite after 1 epochs, 3 updates"
    assert message in output("a", 1)
    assert "error: another process has failed" in output("a")
    state = read("a/model.state.pth")
    assert (state["epoch"], state["update"]) == (1, 2)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_killed_process_ends_the_others_and_the_run_goes_on():
    flags = [*SCRIPTS["mae_pretrain"], "--save_minutes", "0"]
    dying = functools.partial(stop, 7, signal.SIGKILL)
    assert train("mae_pretrain", flags, "a", 2, dying) == [1, -9]
    assert "error: another process has failed" in output("a")
    assert read("a/model.state.pth")["epoch"] == 1
    assert finish("mae_pretrain", [*flags, "--resume"], "a") == finish("mae_pretrain", flags) == 0
    same_weights("a/model.pth", "model.pth", 1e-5)


def test_a_bug_in_one_process_shows_its_traceback_and_ends_all():
    """Even if destroying the process group hangs, as NCCL's does where the others do not answer."""
    flags, failing = SCRIPTS["mae_pretrain"], functools.partial(fail, 3)
    assert train("mae_pretrain", flags, "a", 2, failing) == [1, 1]
    assert "KeyError: 'a bug'" in output("a", 1) and "Traceback" in output("a", 1)


def test_an_error_of_all_processes_is_that_of_the_first():
    flags = [*SCRIPTS["mae_pretrain"], "--dataset", "folder", "--data_path", "nowhere"]
    message = "error: there is no folder nowhere: give that of your images with --data_path\n"
    assert refused("mae_pretrain", flags, "a", 2) == message
    assert output("a", 1) == ""


def has_cifar(url, attributes):
    """CIFAR-10 is where a test has it."""
    for name, value in (attributes | {"url": url}).items():
        setattr(torchvision.datasets.CIFAR10, name, value)


def test_several_processes_download_once(tmp_path, monkeypatch):
    """As on two machines that share a disk: two of the four are the first of theirs."""
    cifar = torchvision.datasets.CIFAR10
    write_cifar(monkeypatch, "CIFAR10", "server")
    archive = shutil.make_archive("archive", "gztar", "server", cifar.base_folder)
    attributes = {name: getattr(cifar, name) for name in ("train_list", "test_list", "meta")}
    with open(archive, "rb") as file:
        attributes["tgz_md5"] = hashlib.md5(file.read()).hexdigest()
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags, started = [*PRETRAIN, "--dataset", "cifar10", "--train_images", "14"], []
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for i in range(4):
            port = 9 if i else server.server_port  # only the first has the right address
            url = f"http://127.0.0.1:{port}/{os.path.basename(archive)}"
            before = functools.partial(has_cifar, url, attributes)
            place = {"RANK": str(i), "LOCAL_RANK": str(i % 2)}
            started.append(start("mae_pretrain", flags, "job", i, before, **shared, **place))
        assert statuses(started) == [0] * 4, output("job")
        server.shutdown()
    assert "cifar10, 14 training, 7 validation images" in output("job")


def test_processes_with_other_numbers_of_images_are_refused():
    for name, n in (("a", 20), ("b", 19)):
        os.makedirs(f"job/{name}")
        for i in range(n):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(f"job/{name}/{i}.png")
    flags = "--patch_size 8 --emb_dim 24 --encoder_layer 1 --decoder_layer 1".split()
    flags += ["--dataset", "folder", "--data_path", "a"]  # may be another on each machine
    error = refused("mae_pretrain", flags, "job", 2, ["--data_path", "b"])
    assert "process 1 has images (19, 16), process 0 has (20, 16)" in error


def torchrun(folder, *flags, number=0):
    script = os.path.join(REPOSITORY, "mae_pretrain.py")
    return start("torchrun", [*flags[0], script, *flags[1:]], folder, number)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def kill(job):
    """Kill a torchrun and its processes, which would go on without it."""
    if job.exitcode is None:
        for process in (*children(job.pid), job.pid):
            os.kill(process, signal.SIGKILL)
    job.join()


def end(job):
    """Wait for a torchrun -> its exit status."""
    job.join(120)
    kill(job)
    return job.exitcode


LONG = [*SCRIPTS["mae_pretrain"], "--total_epoch", "100000", "--save_minutes", "0.001"]
LONG += ["--dataset", "folder", "--data_path", "../images"]


def test_torchrun_prints_an_error_of_all_processes_once():
    job = torchrun("job", ["--standalone", "--nproc_per_node=2"], "--batch_size", "x")
    assert end(job) == 1
    lines = [x for x in output("job").splitlines() if x.startswith("mae_pretrain.py: error: ")]
    assert len(lines) == 1 and "invalid int value: 'x'" in lines[0]


def test_a_run_survives_the_loss_of_a_machine():
    """Two agents on the loopback, as `--nnodes=2` starts them on two machines; then one agent."""
    os.mkdir("images")
    for i in range(52):
        Image.new("RGB", (32, 32), (i, 5 * i, 0)).save(f"images/{i}.png")
    where = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()}".split()
    where += ["--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1"]
    jobs, state = [torchrun("job", where, *LONG, number=i) for i in range(2)], "job/model.state.pth"
    try:
        wait_for(lambda: os.path.exists("job/model.pth") and read(state)["epoch"] > 0)
        kill(jobs[1])
        assert end(jobs[0]) == 1
        torch.save(read(state) | {"epoch": 99_999}, state)
        one, resume = ["--standalone", "--nproc_per_node=2"], ["--model_path", "model.pth"]
        jobs.append(torchrun("job", one, *resume, "--resume"))
        assert end(jobs[2]) == 0
    finally:
        for job in jobs:
            kill(job)
    assert read("job/model.pth")["epoch"] == 100_000


@pytest.mark.skipif(len(glob.glob("/dev/nvidia[0-9]*")) < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_gpus_in_one_process(script, precision):
    """DataParallel; `-k cuda` leaves it out."""
    flags = [*SCRIPTS[script], "--precision", precision]
    assert finish(script, flags, "cpu") == 0
    cuda = [*flags, "--device", "cuda"]
    assert finish(script, cuda, "gpus", CUDA_VISIBLE_DEVICES="0,1") == 0
    lines = [line for line in output("gpus").splitlines() if "torchrun" in line]
    assert len(lines) == 1 and "DataParallel on 2 GPUs, uncompiled" in lines[0]
    assert "--nproc_per_node=2" in lines[0]
    tolerance = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}[precision]
    same_weights("gpus/model.pth", "cpu/model.pth", tolerance)
    assert finish(script, [*cuda, "--compile"], "gpus", CUDA_VISIBLE_DEVICES="0,1") == 1
    assert "--compile takes a process for each GPU: torchrun" in output("gpus", names=["err"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_waits_for_nothing(script, precision, device):
    """PyTorch raises an error where the host asks a GPU for a value, for which it has to wait."""
    if device == "cpu":
        pytest.skip("only a GPU is waited for")
    main = {"mae_pretrain": pretrain, "train_classifier": classify}[script]
    flags = [*SCRIPTS[script], "--device", device, "--precision", precision, "--total_epoch", "1"]
    flags += ["--norm_pix_loss"] if script == "mae_pretrain" else []
    default = functools.partial(torch.cuda.set_sync_debug_mode, "default")

    def error():
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()

    # From the end of the second update, as the first may wait, to the end of the epoch's last.
    try:
        with at_update(2, error), at_update(4, default):
            main(*flags)
    finally:
        default()
