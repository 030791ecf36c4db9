"""One run, any layout: several processes, on one machine or two, give the result of one."""

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torchvision
from conftest import (
    CLASSIFY,
    PRETRAIN,
    REPOSITORY,
    classify,
    few_shapes,
    free_port,
    new_process,
    pretrain,
    read,
    same_weights,
    scalars,
    statuses,
    write_official_files,
)
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

import mae_pretrain
import model
import train_classifier
import utils
from model import MAE_ViT, ViT_Classifier

pytestmark = pytest.mark.usefixtures("empty_folder")
# 17 images an update, of 52: batches of 17, 17, 17 and 1, of which two of three processes get none.
LAYOUT = "--train_images 52 --batch_size 17 --total_epoch 6 --base_learning_rate 3e-3".split()
RECIPE = "--augment --drop_path 0.2 --layer_decay 0.8 --train_images 55 --holdout 3".split()
SCRIPTS = {
    "mae_pretrain": [*PRETRAIN, *LAYOUT, "--augment", "--model_path", "model.pth"],
    "train_classifier": [*CLASSIFY, *LAYOUT, *RECIPE, "--output_model_path", "model.pth"],
}
CURVES = {
    "mae_pretrain": {"mae-pretrain": "mae_loss"},
    "train_classifier": {
        f"scratch-cls/cls_{tag}_{part}": f"cls/{tag}"
        for tag in ("loss", "acc")
        for part in ("train", "val")
    },
}


def no_more_than(room):
    """An Accelerated.run that has memory for so many images only."""
    run = utils.Accelerated.run

    def with_little_memory(self, *inputs):
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, *inputs)

    return with_little_memory


class CountingDDP(DistributedDataParallel):
    """Notes the bytes of gradients that are exchanged in every update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bytes = []
        self.register_comm_hook(None, self.hook)

    def hook(self, _, bucket):
        self.bytes.append(bucket.buffer().nbytes)
        with open(f"bytes-{utils.rank()}", "w") as file:
            json.dump(self.bytes, file)
        return allreduce_hook(None, bucket)


def body(script, flags, folder, environment, stop_at, spoil_at, bug_at, hang, room):
    """What a process does. In those updates process 1 gets a SIGTERM, an infinite sum, a bug.

    A process notes that it destroys its process group, which takes process 1 `hang` seconds. More
    images at once than it has room for do not fit into the memory of process 1.
    """
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(f"output-{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    utils.read_shapes = few_shapes
    utils.DistributedDataParallel = CountingDDP
    torch.set_num_threads(1)
    torch.compile = lambda function, **_: function
    if environment["RANK"] == "1" and room:
        utils.Accelerated.run = no_more_than(room)
    end_update, seen = utils.Progress.end_update, []
    destroy = torch.distributed.destroy_process_group

    def noting():
        open(f"destroyed-{environment['RANK']}", "w").close()
        time.sleep(hang if environment["RANK"] == "1" else 0)
        destroy()

    torch.distributed.destroy_process_group = noting

    def counting(self):
        seen.append(1)
        if environment["RANK"] == "1":
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(seen) == spoil_at:
                self.sums += float("inf")
            if len(seen) == bug_at:
                raise KeyError("a bug")
        end_update(self)

    utils.Progress.end_update = counting
    module = {"mae_pretrain": mae_pretrain, "train_classifier": train_classifier}[script]
    with utils.processes(), utils.one_line_errors():
        module.main(module.get_args(flags))


def train(
    script, flags, folder, n=1, stop_at=0, spoil_at=0, bug_at=0, hang=0, room=0, flags_of_last=()
):  # fmt: skip
    """Run a script in n processes -> their exit statuses."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for i in range(n):
        own = [*flags, *(flags_of_last if i == n - 1 else ())]
        environment = shared | {"RANK": str(i), "LOCAL_RANK": str(i)}
        args = script, own, os.path.abspath(folder), environment
        started.append(new_process(body, *args, stop_at, spoil_at, bug_at, hang, room))
    ended = statuses(started, timeout=100)
    # Unless an error ended it, a process has destroyed its process group.
    assert n == 1 or all(
        s == 1 or os.path.exists(f"{folder}/destroyed-{i}") for i, s in enumerate(ended)
    )
    return ended


def output(folder, number=0):
    with open(f"{folder}/output-{number}") as file:
        return file.read()


def same_run(script, folder, other, tolerance=1e-5):
    for part, tag in CURVES[script].items():
        a, b = (scalars(f"{f}/logs/shapes/{part}", tag) for f in (folder, other))
        assert len(b) == 6 and a == [(e, pytest.approx(x, rel=tolerance)) for e, x in b], tag
    same_weights(f"{folder}/model.pth", f"{other}/model.pth", tolerance)
    metrics = [read(f"{f}/model.pth")["metrics"] for f in (folder, other)]
    if script == "train_classifier":  # every validation image is counted once
        assert metrics[0]["val"]["acc"] == metrics[1]["val"]["acc"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_run_in_any_layout(script):
    flags = SCRIPTS[script]
    assert train(script, flags, "one") == [0]
    for size in ("1", "7", "64"):
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
                assert sum(json.load(file)) == 6 * 4 * parameters
        files = [sorted(os.listdir(folder)) for folder in ("one", str(n))]
        extra = {f"{kind}-{i}" for kind in ("bytes", "output", "destroyed") for i in range(n)}
        assert set(files[1]) - extra == set(files[0]) - {"output-0"}
        for where, _, names in os.walk(f"{n}/logs"):
            assert len(names) <= 1, where
        assert output(str(n)).count("epoch 6/6") == 1 and output(str(n), n - 1) == ""


def test_reconstruct_and_predict_in_several_processes_draw_one_picture():
    pretrain("--total_epoch", "1")
    classify("--total_epoch", "1")
    os.makedirs("new")
    for i in range(5):
        Image.new("RGB", (32, 32), (50 * i, 0, 0)).save(f"new/{i}.png")
    cpu = ["--device", "cpu", "--precision", "fp32"]
    for script, model_path, flags in (
        ("mae_pretrain", "vit-t-mae.pth", ["--reconstruct", "new", "--model_path"]),
        ("train_classifier", "cls.pth", ["--predict", "new", "--eval"]),
    ):
        pictures = []
        for n in (1, 3):
            os.makedirs(f"{script}-{n}")
            for name in ("new", model_path):
                os.symlink(os.path.abspath(name), f"{script}-{n}/{name}")
            assert train(script, [*flags, model_path, *cpu], f"{script}-{n}", n) == [0] * n
            (name,) = [x for x in os.listdir(f"{script}-{n}") if x.endswith(".png")]
            with open(f"{script}-{n}/{name}", "rb") as file:
                pictures.append(file.read())
        assert pictures[0] == pictures[1]


def test_eval_in_several_processes_draws_the_same_pictures():
    classify()
    flags = ["--eval", "cls.pth", "--dataset", "shapes", "--device", "cpu", "--precision", "fp32"]
    pictures = []
    for n in (1, 3):
        os.makedirs(str(n))
        shutil.copy("cls.pth", str(n))
        assert train("train_classifier", flags, str(n), n) == [0] * n, output(str(n))
        for name in ("confusion", "predictions"):
            with open(f"{n}/cls-{name}.png", "rb") as file:
                pictures.append(file.read())
    assert pictures[:2] == pictures[2:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_saved_by_two_processes_and_resumed_by_three_and_by_one(script):
    flags = SCRIPTS[script]
    assert train(script, flags, "whole") == [0]
    for n in (3, 1):
        folder = f"resumed-{n}"
        assert train(script, flags, folder, 2, stop_at=7) == [143, 143], output(folder)
        assert "torchrun ..." in output(folder) and "--resume" in output(folder)
        time.sleep(1)  # TensorBoard may take files of the same second in the wrong order
        state = read(f"{folder}/model.state.pth")
        assert (state["epoch"], state["update"]) == (1, 3)
        assert train(script, [*flags, "--resume"], folder, n) == [0] * n, output(folder)
        same_run(script, folder, "whole")


def test_all_processes_take_the_micro_batch_of_the_one_with_the_least_memory():
    flags = [*SCRIPTS["mae_pretrain"], "--max_device_batch_size", "8", "--compile"]
    assert train("mae_pretrain", flags, "one") == [0]
    assert train("mae_pretrain", flags, "two", 2, room=3) == [0, 0], output("two", 1)
    assert "micro-batch 6\n" in output("one") and "micro-batch 2\n" in output("two")
    same_run("mae_pretrain", "two", "one")


def test_processes_with_other_flags_are_refused():
    flags = SCRIPTS["mae_pretrain"]
    status = train("mae_pretrain", flags, "a", 2, flags_of_last=["--seed", "7"])
    assert status == [1, 1]
    assert "process 1 has seed 7, process 0 has 42" in output("a")


def test_processes_of_which_one_compiles_are_refused():
    last = ["--compile"]
    status = train("mae_pretrain", SCRIPTS["mae_pretrain"], "a", 2, flags_of_last=last)
    assert status == [1, 1] and "process 1 has compile True, process 0 has False" in output("a")


def test_processes_with_other_states_are_refused():
    flags = SCRIPTS["mae_pretrain"]
    for folder, update in (("a", 2), ("b", 7)):
        assert train("mae_pretrain", flags, folder, 2, stop_at=update) == [143, 143]
    os.rename("b/model.state.pth", "a/other.state.pth")
    resume = [*flags, "--resume"]
    last = ["--model_path", "other.pth"]
    assert train("mae_pretrain", resume, "a", 2, flags_of_last=last) == [1, 1]
    assert "process 1 has epoch 1, process 0 has 0" in output("a")


def test_a_loss_that_is_not_finite_in_one_process_ends_all():
    flags = [*SCRIPTS["mae_pretrain"], "--save_minutes", "0"]
    begin = time.monotonic()
    assert train("mae_pretrain", flags, "a", 2, spoil_at=7) == [1, 1]
    assert time.monotonic() - begin < 60
    message = "error: loss, weights or gradients are not finite after 1 epochs, 3 updates"
    assert message in output("a", 1)
    assert "error: another process has failed" in output("a")
    state = read("a/model.state.pth")
    assert (state["epoch"], state["update"]) == (1, 2)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("hang", [0, 1000])
def test_a_bug_in_one_process_shows_its_traceback_and_ends_all(hang):
    """Even if destroying the process group hangs, as NCCL's does where the others do not answer."""
    assert train("mae_pretrain", SCRIPTS["mae_pretrain"], "a", 2, bug_at=3, hang=hang) == [1, 1]
    assert "KeyError: 'a bug'" in output("a", 1) and "Traceback" in output("a", 1)


def test_an_error_of_the_first_process_ends_the_others():
    begin = time.monotonic()
    flags = [*SCRIPTS["mae_pretrain"], "--dataset", "folder", "--data_path", "nowhere"]
    assert train("mae_pretrain", flags, "a", 2) == [1, 1]
    message = "error: there is no folder nowhere: give that of your images with --data_path"
    assert output("a").endswith(f"\n{message}\n")
    assert len(output("a", 1).splitlines()) == 1
    assert time.monotonic() - begin < 30


def download(attributes, folder, environment):
    """The body of a process that reads CIFAR-10 from a server that is told where it is."""
    os.chdir(folder)
    os.environ.update(environment)
    for name, value in attributes.items():
        setattr(torchvision.datasets.CIFAR10, name, value)
    with utils.processes(), utils.one_line_errors():
        args = argparse.Namespace(
            dataset="cifar10", data_path="data", image_size=32, train_images=None
        )
        utils.download(args)
        dataset = utils.load_dataset(args, torch.device("cpu"))
        torch.save(dataset.train_images, f"read-{environment['RANK']}.pth")


def test_several_processes_download_once(tmp_path, monkeypatch):
    cifar = torchvision.datasets.CIFAR10
    files = {"data_batch_1": 6, "data_batch_2": 5, "test_batch": 4}
    meta = {"label_names": [str(i) for i in range(10)]}
    folder = tmp_path / "server" / "cifar-10-batches-py"
    write_official_files(monkeypatch, cifar, folder, files, meta, "labels")
    archive = shutil.make_archive("server/archive", "gztar", "server", "cifar-10-batches-py")
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "server")

        def log_message(self, *args):
            asked.append(args)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        attributes = {name: getattr(cifar, name) for name in ("train_list", "test_list", "meta")}
        attributes["url"] = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
        attributes["filename"] = "archive.tar.gz"
        with open(archive, "rb") as file:
            attributes["tgz_md5"] = hashlib.md5(file.read()).hexdigest()
        requests = {}
        for n in (1, 4):
            os.mkdir(f"{n}")
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            # As on two machines that share a disk: two of the four are the first of theirs.
            layout = [{"RANK": str(i), "LOCAL_RANK": str(i % 2)} for i in range(n)]
            started = [
                new_process(download, attributes, os.path.abspath(f"{n}"), environment)
                for environment in (shared | {"WORLD_SIZE": str(n)} | place for place in layout)
            ]
            assert statuses(started, timeout=100) == [0] * n
            requests[n] = len(asked)
            asked.clear()
        server.shutdown()
    assert requests[1] > 0 and requests[4] == requests[1]
    images = [read("1/read-0.pth"), *(read(f"4/read-{i}.pth") for i in range(4))]
    assert images[0].shape == (11, 3, 32, 32)
    assert all(torch.equal(images[0], other) for other in images)


def test_processes_with_other_numbers_of_images_are_refused():
    for name, n in (("a", 20), ("b", 19)):
        os.makedirs(f"job/{name}")
        for i in range(n):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(f"job/{name}/{i}.png")
    flags = "--patch_size 8 --emb_dim 24 --encoder_layer 1 --decoder_layer 1".split()
    flags += ["--dataset", "folder", "--data_path", "a"]  # may be another on each machine
    assert train("mae_pretrain", flags, "job", 2, flags_of_last=["--data_path", "b"]) == [1, 1]
    assert "process 1 has images (19, 16), process 0 has (20, 16)" in output("job")


def torchrun(folder, *flags, script="mae_pretrain.py"):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(REPOSITORY, script)
    command = [sys.executable, "-m", "torch.distributed.run", *flags[0], path, *flags[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}/output", "a") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def kill(job):
    """Kill a torchrun and its processes, which would go on without it."""
    if job.poll() is None:
        for process in (*children(job.pid), job.pid):
            os.kill(process, signal.SIGKILL)


LONG = [*SCRIPTS["mae_pretrain"], "--total_epoch", "100000", "--save_minutes", "0.001"]


@pytest.mark.parametrize("flags", [["--dataset", "folder"], ["--batch_size", "x"]])
def test_torchrun_prints_an_error_of_all_processes_once(flags):
    job = torchrun("job", ["--standalone", "--nproc_per_node=3"], *flags)
    assert job.wait(timeout=100) != 0
    with open("job/output") as file:
        lines = [line for line in file if re.match(r"(mae_pretrain.py: )?error: ", line)]
    assert len(lines) == 1 and re.search("no folder data|invalid int value: 'x'", lines[0])


def test_a_killed_rank_ends_the_job_which_can_be_resumed():
    job = torchrun("job", ["--standalone", "--nproc_per_node=2"], *LONG)
    try:
        wait_for(lambda: os.path.exists("job/model.pth"))
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        assert job.wait(timeout=60) != 0
    finally:
        kill(job)
    saved = read("job/model.state.pth")["epoch"]
    assert saved > 0
    flags = ["--standalone", "--nproc_per_node=1"]
    job = torchrun("job", flags, "--model_path", "model.pth", "--resume")
    try:
        wait_for(lambda: read("job/model.state.pth")["epoch"] > saved)
        job.terminate()
        assert job.wait(timeout=60) != 0
    finally:
        kill(job)


def test_two_machines_of_which_one_is_lost():
    """Two agents on the loopback, as `--nnodes=2` starts them on two machines."""

    def start(folder, *flags):
        where = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()}".split()
        where += ["--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1"]
        return [torchrun(folder, where, *flags) for _ in range(2)]

    jobs = start("job", *LONG, "--total_epoch", "30")
    try:
        wait_for(lambda: os.path.exists("job/model.pth"))
        kill(jobs[1])
        assert jobs[0].wait(timeout=60) != 0
    finally:
        for job in jobs:
            kill(job)
    assert read("job/model.state.pth")["epoch"] < 30
    jobs = start("job", "--model_path", "model.pth", "--resume")
    assert [job.wait(timeout=100) for job in jobs] == [0, 0]
    assert read("job/model.pth")["epoch"] == 30


class OnCPU(DataParallel):
    """DataParallel with the CPU in the place of two GPUs, its replicas in threads of their own."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)  # DataParallel's looks for GPUs
        self.module = module
        self.device_ids, self.output_device, self.dim = [0, 1], 0, 0
        self.src_device_obj = torch.device("cpu")

    def scatter(self, inputs, kwargs, devices):
        parts = list(zip(*(x.tensor_split(2) for x in inputs), strict=True))
        return parts, [{}] * len(parts)

    def replicate(self, module, devices):
        """As torch.nn.parallel.replicate does it, with copies that pass gradients back."""
        replicas = []
        for _ in devices:
            copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
            for old, new in copies.items():
                for name, child in old._modules.items():
                    new._modules[name] = copies[child]
                for name, parameter in old._parameters.items():
                    setattr(new, name, None if parameter is None else parameter.clone())
            replicas.append(copies[module])
        return replicas

    def parallel_apply(self, replicas, inputs, kwargs):
        results = {}

        def work(i):  # a new thread does not have autocast's state
            results[i] = replicas[i](*inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[i] for i in range(len(replicas))]

    def gather(self, outputs, device):
        return torch.cat(outputs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_data_parallel_replicas(precision):
    """The real DataParallel.forward; what copies between GPUs is replaced by copies on the CPU."""
    torch.manual_seed(0)
    loss = mae_pretrain.MAELoss(MAE_ViT(32, 8, 24, 1, 3, 1, 3), patch_size=8)
    net = utils.Accelerated(loss, torch.device("cpu"), precision)
    images, noise = few_shapes().train_images[:9], torch.rand(9, 16)
    gradients, seen = [], []
    layer = loss.model.encoder.transformer[0].mlp.fc1
    layer.register_forward_hook(lambda *x: seen.append(x[2].dtype))  # in the replicas too
    for each, calls in ((net, 1), (OnCPU(net), 2)):
        loss.zero_grad()
        seen.clear()
        result = each(images, noise)  # [9]
        result.sum().backward()
        gradients.append([result, *(p.grad.clone() for p in loss.parameters())])
        types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        assert seen == [types[precision]] * calls
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 if precision == "fp32" else 2e-2)


@pytest.fixture
def two_gpus(monkeypatch):
    """-> a function: from its call on there are two GPUs, of which the CPU takes the place."""

    def begin():
        monkeypatch.setattr(utils, "choose_devices", lambda _: [torch.device("cpu")] * 2)
        monkeypatch.setattr(utils, "DataParallel", lambda net, devices: OnCPU(net))
        monkeypatch.setattr("sys.argv", ["mae_pretrain.py", "--batch_size", "25"])

    return begin


COMMAND = "torchrun --standalone --nproc_per_node=2 mae_pretrain.py --batch_size 25"


def test_several_gpus_in_one_process(two_gpus, capsys, monkeypatch):
    pretrain("--model_path", "cpu.pth")
    sizes, micro_batches = [], utils.micro_batches

    def noting(net, size, *args):
        sizes.append(size)
        return micro_batches(net, size, *args)

    monkeypatch.setattr(utils, "micro_batches", noting)
    two_gpus()
    pretrain()
    lines = [line for line in capsys.readouterr().out.splitlines() if "torchrun" in line]
    assert len(lines) == 1 and "DataParallel on 2 GPUs, uncompiled" in lines[0]
    assert lines[0].endswith(COMMAND)
    # 25 images are 13 for each GPU; the limit of 16 is that of a GPU.
    chosen = {"device": "CPU", "precision": "fp32", "compile": False, "micro-batch": 13}
    assert set(sizes) == {26} and read("vit-t-mae.pth")["chosen"] == chosen
    same_weights("vit-t-mae.pth", "cpu.pth", 1e-6)


def test_several_gpus_in_one_process_do_not_compile(two_gpus):
    two_gpus()
    with pytest.raises(utils.InputError, match=f"--compile takes a process for .*{COMMAND}"):
        pretrain("--compile")
    assert os.listdir() == []


def test_classifiers_on_several_gpus_in_one_process(two_gpus, capsys):
    pretrain()
    probe = ["--linear_probe", "--pretrained_model_path", "vit-t-mae.pth"]
    recipe = ["--augment", "--drop_path", "0.2", "--layer_decay", "0.8", "--holdout", "5"]
    for name in ("one", "two"):
        classify(*probe, "--output_model_path", f"probe-{name}.pth")
        classify(*recipe, "--output_model_path", f"recipe-{name}.pth")
        two_gpus()
    for kind in ("probe", "recipe"):
        same_weights(f"{kind}-two.pth", f"{kind}-one.pth", 1e-6)
    capsys.readouterr()
    evaluate = ["--eval", "probe-two.pth", "--dataset", "shapes", "--precision", "fp32"]
    train_classifier.main(train_classifier.get_args(evaluate))
    out, acc = capsys.readouterr().out, read("probe-two.pth")["metrics"]["val"]["acc"]
    assert "DataParallel on 2" in out and f"accuracy on 37 validation images: {acc:.2%}" in out


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_on_a_gpu_waits_for_nothing(script, precision, device, monkeypatch):
    """Where the host asks for a value, for which it has to wait, both of these raise an error.

    On a GPU it is PyTorch that looks for it. On a CPU, tensors that have a device and a shape, but
    no memory, stand in for those of a GPU; the backward pass, which needs memory, is left out.
    """
    stands_in = device == "cpu"
    names = ["loss"] if script == "mae_pretrain" else ["loss", "acc"]
    progress = utils.Progress(torch.device(device), names)
    if stands_in:
        monkeypatch.setattr(model, "trunc_normal_", lambda *_, **__: None)  # asks for values
        monkeypatch.setattr(utils, "to_device", lambda tensor, device: tensor.to(device))
        try:
            with FakeTensorMode(), torch.device("cuda"):
                torch.zeros(1)[torch.zeros(1, dtype=torch.int64)]
        except RuntimeError:
            pytest.skip("the stand-ins of this version of PyTorch need a driver")
    with FakeTensorMode() if stands_in else contextlib.nullcontext():
        cuda, batch = torch.device("cuda"), torch.randperm(60)[:25]
        with cuda:
            images = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
            labels = torch.zeros(60, dtype=torch.int64)
            mae = MAE_ViT(32, 8, 24, 2, 3, 1, 3)
            classifier = ViT_Classifier(mae.encoder)
            progress.sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        if script == "mae_pretrain":
            module = mae_pretrain.MAELoss(mae, 8, norm_pix_loss=True)
            inputs, more = (images, batch, torch.rand(25, 16)), (torch.rand(25, 5),)
            train_batch = mae_pretrain.train_batch
        else:
            module = classifier
            drop = train_classifier.drop_path_scale(25, 2, 0.1, None)
            inputs, more = (images, labels, batch), (batch, torch.rand(25, 22), drop)
            train_batch = train_classifier.train_batch
        net = utils.Accelerated(module, cuda, "fp32" if stands_in else precision)
        optim = torch.optim.AdamW(module.parameters(), fused=not stands_in)
        fp16 = precision == "fp16" and not stands_in
        scaler = torch.amp.GradScaler("cuda", enabled=fp16)

        def backward(loss):
            assert loss.device.type == "cuda" and loss.requires_grad
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)

        if stands_in:
            monkeypatch.setattr(torch.Tensor, "backward", backward)
        else:
            train_batch(net, optim, scaler, *inputs, 7, progress, *more)  # the first may wait
            progress.end_update()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_batch(net, optim, scaler, *inputs, 7, progress, *more)
            if not stands_in:
                progress.end_update()
            with pytest.raises(DataDependentOutputException if stands_in else RuntimeError):
                progress.sums.tolist()
        finally:
            if not stands_in:
                torch.cuda.set_sync_debug_mode("default")
        assert {p.device.type for p in module.parameters()} == {"cuda"}
