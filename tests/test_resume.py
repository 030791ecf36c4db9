"""Whatever happens to a run, it goes on to the same result, and what is on the disk can be read."""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest
import torch
from conftest import (
    CLASSIFY,
    PRETRAIN,
    TOLERANCE,
    classify,
    events,
    few_shapes,
    free_port,
    new_process,
    pretrain,
    read,
    same_weights,
    scalars,
    signal_at_update,
    statuses,
)

import mae_pretrain
import train_classifier
import utils

pytestmark = pytest.mark.usefixtures("empty_folder")
SCRIPTS = {
    "mae_pretrain": ("vit-t-mae", "mae-pretrain"),
    "train_classifier": ("cls", "scratch-cls"),
}
MAIN = {"mae_pretrain": pretrain, "train_classifier": classify}
PATH = {"mae_pretrain": "--model_path", "train_classifier": "--output_model_path"}
FLAGS = {"mae_pretrain": PRETRAIN, "train_classifier": CLASSIFY}


def train(script, flags, folder):
    """The body of a process: what the script does when it is run in `folder`."""
    os.chdir(folder)
    utils.read_shapes = few_shapes
    torch.set_num_threads(1)
    module = {"mae_pretrain": mae_pretrain, "train_classifier": train_classifier}[script]
    with utils.one_line_errors():
        module.main(module.get_args(flags))


def start(script, flags, folder="."):
    return new_process(train, script, flags, os.path.abspath(folder))


def finish(script, flags, folder="."):
    return statuses([start(script, flags, folder)], timeout=120)[0]


def curves(folder):
    """Everything in a run's events that does not tell the time."""
    found = {}
    for where, _, files in os.walk(folder):
        if files:
            accumulator = events(where)
            part = os.path.relpath(where, folder)
            for tag in accumulator.Tags()["scalars"]:
                if tag != "images_per_second":
                    values = [(e.step, e.value) for e in accumulator.Scalars(tag)]
                    found[part, tag] = values
            for tag in accumulator.Tags()["images"]:
                values = [(e.step, e.encoded_image_string) for e in accumulator.Images(tag)]
                found[part, tag] = values
    return found


def all_steps_once(folder, epochs):
    """Every curve and image of a run has every step once."""
    found = curves(folder)
    assert found
    for name, values in found.items():
        assert [step for step, _ in values] == list(range(epochs)), name


def next_second():
    """TensorBoard may take event files that were begun in the same second in the wrong order."""
    time.sleep(1 - time.time() % 1)


def steps_in_tensorboard(folder, load_fast):
    """What a TensorBoard server shows of a folder of runs: {(run, tag): steps}."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    command += [f"--load_fast={load_fast}", "--samples_per_plugin=scalars=1000,images=1000"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(what, **query):
        url = f"http://127.0.0.1:{port}/data/plugin/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    try:
        end, found = time.monotonic() + 60, {}
        while not found:  # until it is up and has read the files
            assert time.monotonic() < end and server.poll() is None
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                found = {
                    (run, tag): [step for _, step, _ in ask("scalars/scalars", run=run, tag=tag)]
                    for run, tags in ask("scalars/tags").items()
                    for tag in tags
                }
        for run, tags in ask("images/tags").items():
            for tag in tags:
                images = ask("images/images", run=run, tag=tag, sample=0)
                found[run, tag] = [image["step"] for image in images]
        return found
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_ten_times_ends_as_if_undisturbed(script):
    name, log = SCRIPTS[script]
    flags = [*FLAGS[script], *"--total_epoch 60 --batch_size 4 --save_minutes 0.0005".split()]
    flags += ["--keep_every", "25"]
    for folder in ("undisturbed", "killed"):
        os.mkdir(folder)
    assert finish(script, flags, "undisturbed") == 0

    rng, state = random.Random(script), f"killed/{name}.state.pth"
    for kill in range(10):
        before = os.path.exists(state) and os.stat(state).st_mtime_ns
        next_second()
        process = start(script, [*flags, *["--resume"] * bool(before)], "killed")
        if kill % 3 < 2:  # most while it trains, some while it starts
            while (os.path.exists(state) and os.stat(state).st_mtime_ns) == before:
                assert process.exitcode is None
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run is too short for this test"
        for file in os.listdir("killed"):
            if file.endswith(".pth"):
                utils.read_checkpoint(f"killed/{file}")
    next_second()
    assert finish(script, [*flags, "--resume"], "killed") == 0

    kept = {f"{name}-0025.pth", f"{name}-0050.pth"}
    for file in (f"{name}.pth", *kept):
        same_weights(f"killed/{file}", f"undisturbed/{file}")
    folders = [f"{folder}/logs/shapes/{log}" for folder in ("killed", "undisturbed")]
    assert curves(folders[0]) == curves(folders[1])
    all_steps_once(folders[0], 60)
    load_fast = "true" if script == "mae_pretrain" else "false"  # TensorBoard has two readers
    shown = steps_in_tensorboard("killed/logs/shapes", load_fast)
    parts = {os.path.normpath(os.path.join(log, part)) for part, _ in curves(folders[0])}
    assert {run for run, _ in shown} == parts
    for curve, steps in shown.items():
        assert steps == list(range(60)), curve
    results = [read(f"{f}/{name}.state.pth")["results"] for f in ("killed", "undisturbed")]
    assert results[0] == results[1] and (script == "mae_pretrain" or results[0]["best"])
    leftover = {"vit-t-mae.png"} if script == "mae_pretrain" else set()
    expected = {"logs", f"{name}.pth", f"{name}.state.pth"} | leftover | kept
    assert {f for f in os.listdir("killed") if not f.endswith(".part")} == expected


@pytest.mark.parametrize(
    "at, number, status",
    [
        (1, signal.SIGINT, 130),
        (2, signal.SIGTERM, 143),
        (3, signal.SIGINT, 130),
        (5, signal.SIGTERM, 143),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_signal_finishes_the_update_saves_and_tells_how_to_go_on(
    script, at, number, status, device, capsys
):
    """Also from the CPU to a GPU (at 2) and back (at 3), and with another micro-batch (at 5)."""
    name, log = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    rate = ["--base_learning_rate", "1e-2"]  # a weight may move by 4e-3
    train_(path, "whole.pth", "--log_dir", "whole", "--device", device, *rate)
    with pytest.raises(SystemExit) as stop, signal_at_update(number, at):
        train_("--device", "cpu" if at == 2 else device, *rate)
    assert stop.value.code == status
    assert "--resume" in capsys.readouterr().out.splitlines()[-1]
    state = read(f"{name}.state.pth")
    assert 3 * state["epoch"] + state["update"] == at
    next_second()
    other = ["--device", "cpu" if at == 3 else device]
    train_("--resume", "--max_device_batch_size", "9" if at == 5 else "16", *other)
    tolerance = TOLERANCE[device] if at == 5 or device == "cuda" else 0.0
    same_weights(f"{name}.pth", "whole.pth", tolerance)
    all_steps_once(f"logs/shapes/{log}", 2)
    if not tolerance:
        assert curves(f"logs/shapes/{log}") == curves(f"whole/shapes/{log}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(number, monkeypatch):
    found, stop = [], utils.Run.stop_if_told

    def noting(self):
        found.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        stop(self)

    monkeypatch.setattr(utils.Run, "stop_if_told", noting)
    with pytest.raises(SystemExit), signal_at_update(number, 1):
        pretrain()
    assert found == [[signal.SIG_DFL] * 2]


@pytest.mark.parametrize("script", [pretrain, classify])
def test_a_notebook_gets_its_process_back(script):
    """After a run, one that was stopped, one that failed: its signals, threads and hooks."""

    def process():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return *handlers, torch.get_num_threads(), threading.excepthook, os.listdir()

    *before, _ = process()
    script()
    with pytest.raises(SystemExit), signal_at_update(signal.SIGINT, 2):
        script()
    *after, files = process()
    with pytest.raises(utils.InputError, match="cannot go on") as error:  # keeps its frames
        script("--resume", "--seed", "7")
    with pytest.raises(utils.InputError, match="not finite") as error:
        script("--base_learning_rate", "1e38", "--total_epoch", "3")
    script()
    assert error and before == after == [*process()][:-1]
    assert not any("lock" in name for name in files)


def test_resume_where_there_is_nothing(capsys):
    for script in (pretrain, classify):
        with pytest.raises(utils.InputError, match="nothing to resume.*state.pth"):
            script("--resume")
    assert os.listdir() == []


def test_resume_names_every_argument_that_would_change_the_run():
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain()
    flags = "--resume --seed 7 --batch_size 30 --total_epoch 9 --emb_dim 48 --norm_pix_loss"
    with pytest.raises(utils.InputError) as error:
        pretrain(*flags.split())
    for part in ("--seed 7 (it has 42)", "--batch_size 30", "--total_epoch 9", "--emb_dim 48"):
        assert part in str(error.value)
    assert "--norm_pix_loss True" in str(error.value) and "weight_decay" not in str(error.value)
    with pytest.raises(utils.InputError, match="--dataset cifar10"):
        pretrain("--resume", "--dataset", "cifar10")
    mae_pretrain.main(mae_pretrain.get_args(["--resume"]))  # flags need not be repeated
    assert read("vit-t-mae.pth")["epoch"] == 2


def test_resume_needs_the_same_images(monkeypatch):
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain()
    other = few_shapes(32, 60)
    other.train_images[3, 0, 5, 5] ^= 1
    monkeypatch.setattr(utils, "read_shapes", lambda *_: other)
    with pytest.raises(utils.InputError, match="not the images"):
        pretrain("--resume")


def test_finished_run_is_not_trained_again(capsys):
    classify()
    first = capsys.readouterr().out.splitlines()[-1]
    weights = read("cls.pth")["model"]["head.weight"]
    classify("--resume")
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert torch.equal(read("cls.pth")["model"]["head.weight"], weights)


def stored(name):
    """Path -> bytes of the files of a run and of its earlier runs."""
    files = (file for file in os.listdir() if file.startswith(name) and os.path.isfile(file))
    return {file: open(file, "rb").read() for file in files}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_overwrites_nothing(script, capsys):
    name, _ = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    os.makedirs(f"{name}-3.png")  # not a file of ours
    train_("--keep_every", "1")
    first = stored(name)
    kept = {
        file.replace(name, f"{name}-old-1"): x for file, x in first.items() if "state" not in file
    }
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        train_("--seed", "1", "--keep_every", "1")
    assert f"an earlier run is kept as {name}-old-1.pth" in capsys.readouterr().out
    second = stored(name)
    assert kept.items() <= second.items()  # of a finished run, the state is of no more use
    train_("--seed", "2", "--keep_every", "1")
    assert second.items() >= {k: v for k, v in stored(name).items() if "old-1" in k}.items()
    pair = f"{name}-old-2.pth", f"{name}-old-2.state.pth"
    assert [stored(name)[file] for file in pair] == [
        second[file.replace("-old-2", "")] for file in pair
    ]
    # The newest goes on, and so does the one in between.
    train_("--resume")
    assert read(f"{name}.state.pth")["args"]["seed"] == 2
    train_("--resume", path, f"{name}-old-2.pth", "--keep_every", "1")
    train_("--seed", "1", path, "whole.pth")
    same_weights(f"{name}-old-2.pth", "whole.pth")
    assert os.path.exists(f"{name}-old-2-0002.pth") and kept.items() <= stored(name).items()


@pytest.mark.parametrize("path", ["q//c.pth", "q/c", "./q/c.x.pth"])
def test_earlier_runs_are_kept_under_any_name(path):
    for seed in ("1", "2", "3"):
        classify("--output_model_path", path, "--seed", seed, "--total_epoch", "1")
    start, extension = os.path.splitext(path)
    names = [f"{start}-old-{i}{extension}" for i in (1, 2)] + [path]
    assert [read(name)["args"]["seed"] for name in names] == [1, 2, 3]


def test_a_classifier_in_the_place_of_its_pretrained_model():
    pretrain("--model_path", "p.pth")
    first = stored("p")
    classify("--pretrained_model_path", "p.pth", "--output_model_path", "p.pth")
    assert stored("p")["p-old-1.pth"] == first["p.pth"]
    assert read("p.pth")["kind"] == "ViT_Classifier"


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_at_once_on_one_model_file(script):
    flags = [*FLAGS[script], "--total_epoch", "100000"]
    name, _ = SCRIPTS[script]
    process = start(script, flags)
    try:
        model, state = f"{name}.pth", f"{name}.state.pth"  # the state is written last
        while not os.path.exists(model) or os.path.getmtime(state) < os.path.getmtime(model):
            time.sleep(0.01)

        def files():  # but for what the first run is just writing
            return {x for x in os.listdir() if not x.endswith(f".{process.pid}.part")}

        before = files()
        with pytest.raises(utils.InputError, match=f"another run is writing {name}.pth"):
            MAIN[script]()
        assert files() == before
    finally:
        process.kill()
        process.join()
    MAIN[script]()  # nothing is left of its lock
    assert os.path.exists(f"{name}-old-1.state.pth")


def test_two_identical_starts_over_an_unfinished_run():
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        pretrain()
    old = stored("vit-t-mae")["vit-t-mae.state.pth"]
    for _ in range(3):
        ended = statuses([start("mae_pretrain", PRETRAIN) for _ in range(2)], timeout=60)
        assert ended in ([0, 0], [0, 1], [1, 0])
    assert old in stored("vit-t-mae").values() and read("vit-t-mae.pth")["epoch"] == 2


@pytest.mark.parametrize("script", [pretrain, classify])
def test_divergence_stops_the_run_and_keeps_the_files(script, device):
    script("--device", device)
    before = {file: open(file, "rb").read() for file in os.listdir() if file.endswith(".pth")}
    with pytest.raises(utils.InputError) as error:
        script("--base_learning_rate", "1e38", "--total_epoch", "3", "--device", device)
    message = str(error.value)
    for part in ("not finite after", "epochs, ", "learning rate", "--warmup_epoch"):
        assert part in message
    state = read(next(file for file in before if "state" in file))
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    model = next(file for file in before if "state" not in file)
    assert open(model, "rb").read() == before[model]


@contextlib.contextmanager
def files_no_larger_than(size):
    """The operating system itself refuses to let a file grow: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_writes_cost_nothing():
    pretrain("--model_path", "whole.pth", "--log_dir", "whole")
    pretrain("--seed", "1")
    before = stored("vit-t-mae")
    with (
        files_no_larger_than(5000),
        pytest.raises(utils.InputError, match="cannot write vit-t-mae"),
    ):
        pretrain("--save_minutes", "0")
    assert before.items() <= stored("vit-t-mae").items()
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        pretrain()
    before = stored("vit-t-mae")
    with files_no_larger_than(5000), pytest.raises(utils.InputError, match="cannot write"):
        pretrain("--resume")
    assert stored("vit-t-mae") == before  # no .part either
    next_second()
    pretrain("--resume")
    same_weights("vit-t-mae.pth", "whole.pth")
    folder = read("vit-t-mae.state.pth")["folder"]
    assert curves(folder) == curves("whole/shapes/mae-pretrain")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where the machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_disk(script, small_disk):
    """In a process of its own: TensorBoard's threads and open files have a say at its end."""
    name, log = SCRIPTS[script]
    flags = [*FLAGS[script], "--total_epoch", "12"]
    assert finish(script, flags) == 0
    flags += ["--log_dir", f"{small_disk}/logs"]
    room = small_disk / "room"
    flags += [PATH[script], f"{small_disk}/{name}.pth"]
    for attempt in range(3):
        room.write_bytes(bytes(2_880_000 - 120_000 * attempt))
        next_second()
        errors = f"errors-{attempt}"
        resume = ["--resume"] * os.path.exists(f"{small_disk}/{name}.state.pth")
        process = new_process(told, script, [*flags, *resume], errors)
        assert statuses([process], timeout=120) == [1]
        with open(errors) as file:
            lines = file.read().splitlines()
        assert len(lines) == 1 and "error: cannot write" in lines[0], lines
        assert "No space left on device" in lines[0]
        for file in small_disk.glob("*.pth"):
            utils.read_checkpoint(str(file))
        assert not list(small_disk.glob("*.part"))
        room.unlink()
    next_second()
    assert finish(script, [*flags, "--resume"]) == 0
    same_weights(f"{small_disk}/{name}.pth", f"{name}.pth")
    assert curves(f"{small_disk}/logs/shapes/{log}") == curves(f"logs/shapes/{log}")


def told(script, flags, errors):
    """The body of a process whose errors go into a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    train(script, flags, ".")


def test_vanished_folder_is_an_error():
    def vanish(self, *files, save=utils.Run.save):
        if self.epoch:
            shutil.rmtree("out", ignore_errors=True)
        save(self, *files)

    save, utils.Run.save = utils.Run.save, vanish
    try:
        with pytest.raises(utils.InputError, match="cannot write out/mae.pth"):
            pretrain("--model_path", "out/mae.pth", "--save_minutes", "0")
    finally:
        utils.Run.save = save


def refusing(refused):
    """A write_file that fails for the paths that refused(path) is true of."""
    write_file = utils.write_file

    def write(path, content):
        if refused(path):
            raise utils.InputError(f"cannot write {path}: Permission denied")
        write_file(path, content)

    return write


def not_a_state(path):
    return "state" not in path


@pytest.mark.parametrize("script", SCRIPTS)
def test_state_never_speaks_of_a_file_that_is_not_there(script, monkeypatch):
    name, _ = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    train_(path, "whole.pth")
    with monkeypatch.context() as patch, pytest.raises(utils.InputError, match=f"{name}.pth"):
        patch.setattr(utils, "write_file", refusing(not_a_state))
        train_("--save_minutes", "0")
    assert not os.path.exists(f"{name}.pth")
    state = read(f"{name}.state.pth")  # of the last update before there was a model to write
    assert (state["epoch"], state["update"], state["results"]) == (0, 3, {})
    train_("--resume")
    same_weights(f"{name}.pth", "whole.pth")
    states = [read(f"{stem}.state.pth") for stem in (name, "whole")]
    assert states[0]["results"] == states[1]["results"] and states[0]["epoch"] == 2
    os.remove(f"{name}.pth")
    with pytest.raises(utils.InputError, match=f"{name}.pth is gone.*{name}.state.pth"):
        train_("--resume")


def test_a_full_log_or_closed_pipe_does_not_end_a_run(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", full)
    pretrain()
    with contextlib.suppress(OSError):
        full.close()
    assert read("vit-t-mae.pth")["epoch"] == 2


def spoil_update(monkeypatch, at):
    """A weight becomes infinite in the update `at`, after its loss. -> a list, longer by each."""
    step, seen = torch.optim.AdamW.step, []

    def spoiling(self, *args):
        step(self, *args)
        seen.append(1)
        if len(seen) == at:
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    return seen


def test_weights_that_are_not_finite_are_not_saved(monkeypatch):
    pretrain()
    before = {file: open(file, "rb").read() for file in os.listdir() if file.endswith(".pth")}
    flags = ["--seed", "1", "--total_epoch", "1", "--save_minutes", "1000"]
    spoil_update(monkeypatch, 3)  # the last of all: no loss tells it
    with pytest.raises(utils.InputError, match="not finite after 0 epochs, 3 up"):
        pretrain(*flags)
    assert open("vit-t-mae.pth", "rb").read() == before["vit-t-mae.pth"]
    state = read("vit-t-mae.state.pth")
    assert state["epoch"] == 0 and all(x.isfinite().all() for x in state["model"].values())


def test_loss_that_is_not_finite_stops_the_run_at_once(device, monkeypatch):
    flags = ["--total_epoch", "9", "--save_minutes", "1000", "--device", device]
    seen = spoil_update(monkeypatch, 1)
    with pytest.raises(utils.InputError, match="0 epochs, [23] up"):
        pretrain(*flags)
    # Of 3 in the epoch. The loss of a GPU may come an update late.
    assert len(seen) == 2 or (device == "cuda" and len(seen) == 3)


@pytest.mark.parametrize("script", [pretrain, classify])
def test_results_that_are_not_finite_are_not_saved(script, monkeypatch):
    """The loss of the training images is finite, that of the others is not, nor a picture."""
    name = "vit-t-mae" if script is pretrain else "cls"
    nan = {"loss": float("nan"), "acc": 0.5}
    monkeypatch.setattr(train_classifier, "evaluate", lambda *_: nan)
    picture = torch.full((3, 64, 96), float("nan"))
    monkeypatch.setattr(mae_pretrain, "reconstruction_grid", lambda *_: picture)
    with pytest.raises(utils.InputError, match="not finite after 0 epochs, 3 updates"):
        script()
    assert not os.path.exists(f"{name}.pth") and read(f"{name}.state.pth")["epoch"] == 0


@pytest.mark.parametrize("script", [pretrain, classify])
def test_states_that_lack_something_or_hold_something_else_are_refused(script):
    name = "vit-t-mae" if script is pretrain else "cls"
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        script()
    good = read(f"{name}.state.pth")
    for key in good:
        changes = [{k: x for k, x in good.items() if k != key}]
        changes += [good | {key: x} for x in (None, "text", 7, [good], {"a": 1})]
        for state in changes:
            torch.save(state, f"{name}.state.pth")
            try:  # some are as good, such as another folder
                script("--resume")
            except utils.InputError as error:
                assert f"{name}.state.pth" in str(error)


def test_state_under_another_name_is_the_one_that_goes_on():
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain("--model_path", "a.pth")
    os.rename("a.state.pth", "b.state.pth")
    pretrain("--model_path", "b.pth", "--resume")
    assert read("b.pth")["epoch"] == 2 and not os.path.exists("a.pth")


def test_state_is_saved_by_the_clock_within_an_epoch(monkeypatch):
    saved = []
    save = utils.Run.save
    monkeypatch.setattr(
        utils.Run,
        "save",
        lambda self, *files: (saved.append((self.epoch, self.update)), save(self, *files)),
    )
    pretrain("--save_minutes", "0")
    assert saved == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    saved.clear()
    pretrain("--save_minutes", "1000")
    assert saved[0] == (0, 0) and saved[-1] == (2, 0)
    assert all(update == 0 for _, update in saved)


def test_curves_go_on_in_their_folder(capsys):
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        classify()
    next_second()
    classify("--resume", "--log_dir", "logs")
    assert os.listdir("logs/shapes") == ["scratch-cls"]
    assert [step for step, _ in scalars("logs/shapes/scratch-cls", "lr")] == [0, 1]


FP16 = ["--precision", "fp16", "--total_epoch", "3"]


def scales(monkeypatch, start):
    """fp16 begins with this scale -> a list of its later values, one for each update."""
    found, update = [], torch.amp.GradScaler.update
    scaler = functools.partial(torch.amp.GradScaler, init_scale=start, growth_interval=2)

    def noting(self):
        update(self)
        found.append(self.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", noting)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return found


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("script", [pretrain, classify])
def test_stopped_in_fp16_goes_on_with_the_scale(script, at, monkeypatch):
    """From a scale at which gradients overflow: those updates are left out, and it is halved."""
    found = scales(monkeypatch, 2.0**24)
    name = "vit-t-mae" if script is pretrain else "cls"
    script(*FP16)
    os.rename(f"{name}.pth", "whole.pth")
    whole, results = list(found), read(f"{name}.state.pth")["results"]
    assert whole[0] == 2.0**23 and max(whole) > min(whole) and len(whole) == 9
    found.clear()
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, at):
        script(*FP16)
    assert read(f"{name}.state.pth")["scaler"]["scale"] == whole[at - 1]
    script("--resume", *FP16)
    assert found == whole
    same_weights(f"{name}.pth", "whole.pth")
    assert read(f"{name}.state.pth")["results"] == results


@pytest.mark.parametrize("script", [pretrain, classify])
def test_keep_every_keeps_the_model_of_that_epoch(script):
    """Also where nothing else would be saved; and a resumed run may begin to keep."""
    name = "vit-t-mae" if script is pretrain else "cls"
    found = []
    save = utils.Run.save

    def noting(self, *files):
        found.append((self.epoch, {k: v.clone() for k, v in self.model.state_dict().items()}))
        save(self, *files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.Run, "save", noting)
        patch.setattr(utils.Run, "agree_to_save", lambda *_: False)
        script("--total_epoch", "5", "--keep_every", "2")
    found = dict(found)
    assert {0, 2, 4, 5} == found.keys() - ({1} if script is classify else set())  # 1 is its best
    for epoch, weights in ((epoch, found[epoch]) for epoch in (2, 4)):
        file = read(f"{name}-000{epoch}.pth")
        assert file["epoch"] == epoch and file["kind"] == read(f"{name}.pth")["kind"]
        assert all(torch.equal(file["model"][key], weights[key]) for key in weights)
    assert not os.path.exists(f"{name}-0005.pth")
    script("--keep_every", "1")
    assert read(f"{name}-0001.pth")["epoch"] == 1  # also where it is the best so far

    flags = ["--total_epoch", "5", "--seed", "1"]
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        script(*flags)
    script("--resume", "--keep_every", "3", *flags)
    assert read(f"{name}-0003.pth")["epoch"] == 3


@pytest.mark.parametrize("script", [pretrain, classify])
def test_a_state_from_before_a_flag_goes_on_with_its_default(script):
    name = "vit-t-mae" if script is pretrain else "cls"
    script()
    os.rename(f"{name}.pth", "whole.pth")
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 4):
        script()
    state = read(f"{name}.state.pth")
    for flag in ("masking", "decoder_dim", "keep_every"):
        state["args"].pop(flag, None)
    torch.save(state, f"{name}.state.pth")
    script("--resume")
    same_weights(f"{name}.pth", "whole.pth")
    assert read(f"{name}.state.pth")["args"]["keep_every"] is None


def test_precision_may_change_to_and_from_fp16():
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain(*FP16)
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain("--resume", *FP16, "--precision", "fp32")
    assert read("vit-t-mae.state.pth")["scaler"] == {}
    pretrain("--resume", *FP16)
    assert read("vit-t-mae.state.pth")["scaler"]["scale"] > 1


def test_a_scale_that_keeps_falling_is_a_loss_that_is_not_finite(monkeypatch):
    found = scales(monkeypatch, 2.0**10)
    check = torch._amp_foreach_non_finite_check_and_unscale_

    def overflow(gradients, found_inf, inv_scale):
        check(gradients, found_inf, inv_scale)
        found_inf.fill_(1.0)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", overflow)
    with pytest.raises(utils.InputError, match="not finite after 3 epochs, 3 .*--precision fp32"):
        pretrain("--precision", "fp16", "--total_epoch", "9")
    assert found == [2.0 ** (9 - i) for i in range(12)]
    assert all(tensor.isfinite().all() for tensor in read("vit-t-mae.state.pth")["model"].values())
