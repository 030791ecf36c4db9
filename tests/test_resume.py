"""Whatever happens to a run, it goes on to the same result, and what is on the disk can be read."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time

import pytest
import torch
from conftest import (
    CLASSIFY,
    PRETRAIN,
    classify,
    events,
    few_shapes,
    new_process,
    pretrain,
    read,
    same_weights,
    scalars,
)
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import mae_pretrain
import train_classifier
import utils

pytestmark = pytest.mark.usefixtures("empty_folder")
SCRIPTS = {
    "mae_pretrain": ("vit-t-mae", "mae-pretrain"),
    "train_classifier": ("cls", "scratch-cls"),
}


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
    process = start(script, flags, folder)
    process.join(timeout=120)
    return process.exitcode


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
                pictures = [(e.step, e.encoded_image_string) for e in accumulator.Images(tag)]
                found[part, tag] = pictures
    return found


def all_steps_once(folder, epochs):
    """No step doubled, none missing, read from the files without TensorBoard's own clean-up."""
    for where, _, files in os.walk(folder):
        steps = {}
        for file in files:
            for event in EventFileLoader(os.path.join(where, file)).Load():
                for value in event.summary.value:
                    steps.setdefault(value.tag, []).append(event.step)
        for tag, found in steps.items():
            assert sorted(found) == list(range(epochs)), (where, tag)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_ten_times_ends_as_if_undisturbed(script):
    name, log = SCRIPTS[script]
    flags = PRETRAIN if script == "mae_pretrain" else CLASSIFY
    flags = [*flags, *"--total_epoch 30 --batch_size 4 --save_minutes 0.0005".split()]
    for folder in ("undisturbed", "killed"):
        os.mkdir(folder)
    assert finish(script, flags, "undisturbed") == 0

    rng, state = random.Random(script), f"killed/{name}.state.pth"
    for kill in range(10):
        before = os.path.exists(state) and os.stat(state).st_mtime_ns
        process = start(script, [*flags, *["--resume"] * bool(before)], "killed")
        if kill % 3 < 2:  # most while it trains, some while it starts
            while (os.path.exists(state) and os.stat(state).st_mtime_ns) == before:
                assert process.exitcode is None
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run is too short for this test"
        for file in os.listdir("killed"):
            if file.endswith(".pth"):
                utils.read_checkpoint(f"killed/{file}")
    assert finish(script, [*flags, "--resume"], "killed") == 0

    same_weights(f"killed/{name}.pth", f"undisturbed/{name}.pth")
    folders = [f"{folder}/logs/shapes/{log}" for folder in ("killed", "undisturbed")]
    assert curves(folders[0]) == curves(folders[1])
    all_steps_once(folders[0], 30)
    results = [read(f"{f}/{name}.state.pth")["results"] for f in ("killed", "undisturbed")]
    assert results[0] == results[1] and (script == "mae_pretrain" or results[0]["best"])
    leftover = {"vit-t-mae.png"} if script == "mae_pretrain" else set()
    expected = {"logs", f"{name}.pth", f"{name}.state.pth"} | leftover
    assert {f for f in os.listdir("killed") if not f.endswith(".part")} == expected


@contextlib.contextmanager
def signal_at_update(number, at):
    """Send the process a signal while its update `at` is under way."""
    end_update, seen = utils.Progress.end_update, []

    def counting(self, parameters):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        end_update(self, parameters)

    utils.Progress.end_update = counting
    try:
        yield
    finally:
        utils.Progress.end_update = end_update


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("script", SCRIPTS)
def test_signal_finishes_the_update_saves_and_tells_how_to_go_on(
    script, at, number, status, capsys
):
    name, log = SCRIPTS[script]
    train_, path = (pretrain, "--model_path") if script == "mae_pretrain" else (
        classify, "--output_model_path"
    )  # fmt: skip
    train_(path, "whole.pth", "--log_dir", "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop, signal_at_update(number, at):
        train_()
    assert stop.value.code == status and signal.getsignal(signal.SIGINT) is before
    assert "--resume" in capsys.readouterr().out.splitlines()[-1]
    state = read(f"{name}.state.pth")
    assert 3 * state["epoch"] + state["update"] == at
    train_("--resume", "--max_device_batch_size", "9" if at == 5 else "16")
    tolerance = 1e-5 if at == 5 else 0.0
    same_weights(f"{name}.pth", "whole.pth", tolerance)
    all_steps_once(f"logs/shapes/{log}", 2)
    if not tolerance:
        assert curves(f"logs/shapes/{log}") == curves(f"whole/shapes/{log}")


def test_second_signal_stops_at_once():
    with utils.StopSignal() as _:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


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


def test_resume_needs_the_same_pictures(monkeypatch):
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain()
    other = few_shapes()
    other.train_images[3, 0, 5, 5] ^= 1
    monkeypatch.setattr(utils, "read_shapes", lambda image_size: other)
    with pytest.raises(utils.InputError, match="not the pictures"):
        pretrain("--resume")


def test_finished_run_is_not_trained_again(capsys):
    classify()
    first = capsys.readouterr().out.splitlines()[-1]
    weights = read("cls.pth")["model"]["head.weight"]
    classify("--resume")
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert torch.equal(read("cls.pth")["model"]["head.weight"], weights)


def test_new_run_does_not_overwrite_the_state_of_an_unfinished_one(capsys):
    with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 2):
        pretrain()
    pretrain("--seed", "1")
    assert "vit-t-mae.state.pth-2" in capsys.readouterr().out
    assert read("vit-t-mae.state.pth-2")["args"]["seed"] == 42
    pretrain()  # the run before this one is complete: its state is of no more use
    assert not os.path.exists("vit-t-mae.state.pth-3")


@pytest.mark.parametrize("script", [pretrain, classify])
def test_divergence_stops_the_run_and_keeps_the_files(script):
    script()
    before = {file: open(file, "rb").read() for file in os.listdir() if file.endswith(".pth")}
    with pytest.raises(utils.InputError) as error:
        script("--base_learning_rate", "1e38", "--total_epoch", "3")
    message = str(error.value)
    for part in ("not finite in epoch", "update", "learning rate", "--warmup_epoch"):
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


def test_failed_writes_cost_nothing_and_are_tried_again(capsys):
    pretrain()
    before = {file: open(file, "rb").read() for file in os.listdir() if file.endswith(".pth")}
    with files_no_larger_than(5000), pytest.raises(utils.InputError) as error:
        pretrain("--seed", "1")
    assert "vit-t-mae.pth" in str(error.value) and "vit-t-mae.state.pth" in str(error.value)
    assert "warning: cannot write vit-t-mae.pth" in capsys.readouterr().out
    assert before == {f: open(f, "rb").read() for f in os.listdir() if f.endswith(".pth")}
    assert not [file for file in os.listdir() if file.endswith(".part")]

    # Room again before the last save: the run ends well, with all its curves.
    flush, calls = utils.Curves.flush, []

    def flush_with_little_room_at_first(self):
        calls.append(1)
        with files_no_larger_than(5000) if len(calls) == 1 else contextlib.nullcontext():
            flush(self)

    utils.Curves.flush = flush_with_little_room_at_first
    try:
        pretrain("--seed", "1")
    finally:
        utils.Curves.flush = flush
    assert "warning: cannot write curves" in capsys.readouterr().out
    all_steps_once("logs/shapes/mae-pretrain-3", 2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where the machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk, capsys):
    flags = ["--model_path", f"{small_disk}/mae.pth", "--log_dir", f"{small_disk}/logs"]
    room = small_disk / "room"
    room.write_bytes(bytes(200_000))
    with pytest.raises(utils.InputError, match="mae.*state.pth"):
        pretrain(*flags)
    assert "No space left" in capsys.readouterr().out
    room.unlink()
    with contextlib.suppress(utils.InputError):
        pretrain(*flags, "--resume")
    pretrain("--model_path", "elsewhere.pth")
    for file in small_disk.glob("*.pth"):
        utils.read_checkpoint(str(file))


def test_vanished_folder_is_a_warning_and_then_an_error(capsys):
    def vanish(self, save=utils.Run.save):
        if self.epoch:
            for file in os.listdir("out"):
                os.remove(f"out/{file}")
            os.rmdir("out")
        save(self)

    save, utils.Run.save = utils.Run.save, vanish
    try:
        with pytest.raises(utils.InputError, match="out/mae.pth"):
            pretrain("--model_path", "out/mae.pth", "--total_epoch", "1")
    finally:
        utils.Run.save = save
    assert "warning: cannot write out/mae.pth" in capsys.readouterr().out


def test_what_could_not_be_written_is_written_by_the_resumed_run(monkeypatch):
    """The state must not say that all is done while the model file is that of another time."""
    write_file = utils.write_file

    def only_states(path, content):
        if "state" not in path:
            raise PermissionError(13, "Permission denied")
        write_file(path, content)

    for script, path in ((pretrain, "vit-t-mae.pth"), (classify, "cls.pth")):
        with monkeypatch.context() as patch, pytest.raises(utils.InputError, match=path):
            patch.setattr(utils, "write_file", only_states)
            script()
        assert not os.path.exists(path)
        script("--resume")
        utils.read_checkpoint(path)


def test_restored_optimizer_may_be_on_another_device():
    """As on a GPU, where load_state_dict moves what it loads to the parameters' device."""
    expected = {"exp_avg": torch.zeros(3)}
    utils.check_weights({"exp_avg": torch.ones(3)}, expected, "path")
    moved = type("Tensor", (torch.Tensor,), {"device": property(lambda _: torch.device("cuda"))})
    utils.check_weights({"exp_avg": torch.ones(3).as_subclass(moved)}, expected, "path")


def test_a_full_log_or_closed_pipe_does_not_end_a_run(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", full)
    pretrain()
    with contextlib.suppress(OSError):
        full.close()
    assert read("vit-t-mae.pth")["epoch"] == 2


def test_weights_that_are_not_finite_are_not_saved(monkeypatch):
    pretrain()
    before = open("vit-t-mae.pth", "rb").read()
    end_epoch = utils.Run.end_epoch

    def spoil(self):
        next(self.model.parameters()).data[0] = float("inf")
        return end_epoch(self)

    monkeypatch.setattr(utils.Run, "end_epoch", spoil)
    with pytest.raises(utils.InputError, match="not finite"):
        pretrain("--seed", "1")
    assert open("vit-t-mae.pth", "rb").read() == before


def test_a_state_touches_no_other_files():
    for name in ("thesis.txt", "events.out.tfevents.1"):
        with open(name, "w") as file:
            file.write("x" * 1000)
    utils.Curves(".", {"thesis.txt": 1, "events.out.tfevents.1": 10}, 0)
    assert os.path.getsize("thesis.txt") == 1000
    assert os.path.getsize("events.out.tfevents.1") == 10


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
        lambda self, *o: (saved.append((self.epoch, self.update)), save(self, *o)),
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
    time.sleep(0.01)
    classify("--resume", "--log_dir", "logs")
    assert os.listdir("logs/shapes") == ["scratch-cls"]
    assert [step for step, _ in scalars("logs/shapes/scratch-cls", "lr")] == [0, 1]
