"""Whatever happens to a run, it goes on to the same result, and what is on the disk can be read."""

import contextlib
import errno
import fcntl
import functools
import glob
import itertools
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
import types
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from helpers import (
    CLASSIFY,
    PRETRAIN,
    TOLERANCE,
    at_update,
    classify,
    curves,
    each_update,
    finish,
    free_port,
    on_update,
    output,
    pretrain,
    read,
    same_weights,
    scalars,
    signal_at_update,
    start,
    statuses,
    stop,
    stopped_at_update,
    wait_for,
)
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import mae_pretrain
import model
import utils

pytestmark = pytest.mark.usefixtures("empty_folder")
SCRIPTS = {
    "mae_pretrain": ("vit-t-mae", "mae-pretrain"),
    "train_classifier": ("cls", "scratch-cls"),
}
MAIN = {"mae_pretrain": pretrain, "train_classifier": classify}
STATE = "vit-t-mae.state.pth"
PATH = {"mae_pretrain": "--model_path", "train_classifier": "--output_model_path"}
FLAGS = {"mae_pretrain": PRETRAIN, "train_classifier": CLASSIFY}


def all_steps_once(folder, epochs):
    """Every curve and image of a run has every step once."""
    found = curves(folder)
    assert found
    for name, values in found.items():
        assert [step for step, _ in values] == list(range(epochs)), name


def next_second():
    """TensorBoard may take event files that were begun in the same second in the wrong order."""
    files = glob.glob("**/events.out.tfevents.*", recursive=True)
    newest = max((int(os.path.basename(file).split(".")[3]) for file in files), default=0)
    wait_for(lambda: time.time() >= newest + 1)


def wait_for_tensorboard(folder, load_fast, expected):
    """Until a TensorBoard server shows of a folder of runs: {(run, tag): steps}."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    command += [f"--load_fast={load_fast}", "--reload_interval=1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(what, **query):
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    def shown():  # it reads one run after the other
        with contextlib.suppress(OSError):
            return expected == {
                (run, tag): [step for _, step, _ in ask("scalars", run=run, tag=tag)]
                for run, tags in ask("tags").items()
                for tag in tags
                if tag != "images_per_second"
            }

    try:
        wait_for(shown)
    finally:
        server.kill()
        server.wait()


def slow():
    """So that a run lasts longer than ten kills, on a fast machine, too."""
    register_optimizer_step_post_hook(lambda *_: time.sleep(0.003))


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_ten_times_ends_as_if_undisturbed(script):
    name, log = SCRIPTS[script]
    flags = [*FLAGS[script], *"--total_epoch 20 --batch_size 6 --save_minutes 0.0005".split()]
    flags += ["--keep_every", "8"]
    assert finish(script, flags, "undisturbed") == 0

    rng, state = random.Random(script), f"killed/{name}.state.pth"
    for kill in range(10):
        before = os.path.exists(state) and os.stat(state).st_mtime_ns
        next_second()
        process = start(script, [*flags, "--resume", "auto"], "killed", before=slow)
        if kill % 3 < 2:  # most while it trains, some while it starts
            wait_for(
                lambda old=before: old != (os.path.exists(state) and os.stat(state).st_mtime_ns)
            )
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run is too short for this test"
        for file in os.listdir("killed"):
            if file.endswith(".pth"):
                utils.read_checkpoint(f"killed/{file}")
    next_second()
    assert finish(script, [*flags, "--resume"], "killed") == 0

    kept = {f"{name}-0008.pth", f"{name}-0016.pth"}
    for file in (f"{name}.pth", *kept):
        same_weights(f"killed/{file}", f"undisturbed/{file}")
    folders = [f"{folder}/logs/shapes/{log}" for folder in ("killed", "undisturbed")]
    assert curves(folders[0]) == curves(folders[1])
    all_steps_once(folders[0], 20)
    load_fast = "true" if script == "mae_pretrain" else "false"  # TensorBoard has two readers
    names = {(os.path.normpath(f"{log}/{part}"), tag) for part, tag in curves(folders[0])}
    expected = dict.fromkeys(names - {(log, "mae_image")}, list(range(20)))
    wait_for_tensorboard("killed/logs/shapes", load_fast, expected)
    results = [read(f"{f}/{name}.state.pth")["results"] for f in ("killed", "undisturbed")]
    assert results[0] == results[1] and (script == "mae_pretrain" or results[0]["best"])
    expected = {"logs", f"{name}.pth", f"{name}.state.pth", "out-0", "err-0"} | kept
    expected |= {"vit-t-mae.png"} if script == "mae_pretrain" else set()
    assert {f for f in os.listdir("killed") if not f.endswith((".part", ".lock"))} == expected


@pytest.mark.parametrize(
    "at, number, status",
    [
        (2, signal.SIGTERM, 143),
        (3, signal.SIGINT, 130),
        (4, signal.SIGUSR1, 138),
        (5, signal.SIGHUP, 129),
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
    assert os.listdir("logs/shapes") == [log]
    if not tolerance:
        assert curves(f"logs/shapes/{log}") == curves(f"whole/shapes/{log}")


def hang_in_an_update():
    """An update that does not end, as on a GPU that does not answer."""
    on_update(2, functools.partial(time.sleep, 1000))


def hang_up_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop(2, signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(number):
    process = start("mae_pretrain", [*PRETRAIN, "--save_minutes", "0"], before=hang_in_an_update)
    wait_for(lambda: os.path.exists(STATE) and read(STATE)["update"] == 1)
    for _ in range(20):  # the first is noted, the second ends it
        os.kill(process.pid, number)
        process.join(0.5)
        if process.exitcode is not None:
            break
    assert process.exitcode == -number
    assert "once more to stop at once" in output(names=["err"])


@pytest.mark.parametrize("script", [pretrain, classify])
def test_a_notebook_gets_its_process_back(script, monkeypatch):
    """After a run, one that was stopped, one that failed: its signals, threads and hooks."""

    def process():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)]
        return *handlers, torch.get_num_threads(), threading.excepthook

    monkeypatch.setattr(utils, "THREADS", 2)  # as it is outside of the tests
    torch.set_num_threads(2)
    before = process()
    script()
    with pytest.raises(SystemExit), signal_at_update(signal.SIGINT, 2):
        script()
    after = process()
    with pytest.raises(utils.InputError, match="cannot go on") as error:  # keeps its frames
        script("--resume", "--seed", "7")
    with pytest.raises(utils.InputError, match="not finite") as error:
        script("--base_learning_rate", "1e38", "--total_epoch", "3")
    script()
    assert error and before == after == process()


def test_resume_where_there_is_nothing(capsys):
    for script in (pretrain, classify):
        with pytest.raises(utils.InputError, match="nothing to resume.*state.pth"):
            script("--resume")
    assert os.listdir() == []


def test_resume_names_every_argument_that_would_change_the_run():
    with stopped_at_update(2):
        pretrain()
    flags = "--resume --seed 7 --batch_size 30 --total_epoch 9 --emb_dim 48 --norm_pix_loss"
    with pytest.raises(utils.InputError) as error:
        pretrain(*flags.split())
    for part in ("--seed 7 (it has 42)", "--batch_size 30", "--total_epoch 9", "--emb_dim 48"):
        assert part in str(error.value)
    assert "--norm_pix_loss True" in str(error.value) and "weight_decay" not in str(error.value)
    assert str(error.value).endswith("for another length start a new run")
    with pytest.raises(utils.InputError, match="--dataset cifar10"):
        pretrain("--resume", "--dataset", "cifar10")
    mae_pretrain.main(mae_pretrain.get_args(["--resume"]))  # flags need not be repeated
    assert read("vit-t-mae.pth")["epoch"] == 2


def test_resume_needs_the_same_images():
    os.mkdir("images")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"images/{i:02}.png")
    flags = "--dataset", "folder", "--data_path", "images"
    with stopped_at_update(2):
        pretrain(*flags)
    pixels[3, 5, 5, 0] ^= 1
    Image.fromarray(pixels[3]).save("images/03.png")
    with pytest.raises(utils.InputError, match="not the images"):
        pretrain(*flags, "--resume")


def test_finished_run_is_not_trained_again(capsys):
    classify()
    first = capsys.readouterr().out.splitlines()[-1]
    weights = read("cls.pth")["model"]["head.weight"]
    classify("--resume")
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert torch.equal(read("cls.pth")["model"]["head.weight"], weights)


def stored(name):
    """Path -> bytes of the files of a run and of its earlier runs."""
    files = (file for file in os.listdir() if file.startswith(name) and not file.endswith(".lock"))
    return {file: open(file, "rb").read() for file in files}


def renamed(files, name):
    return {file.replace(name, f"{name}-old-1", 1): content for file, content in files.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_renames_what_an_earlier_one_left(script, capsys):
    name, _ = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    train_("--keep_every", "1")
    first = stored(name)
    for other in ("-7.pth", "-00001.pth", "-0003.png"):  # no names of ours
        shutil.copy(f"{name}.pth", name + other)
    train_(path, f"{name}-0009.pth")  # another run, which has a state
    others = {file: x for file, x in stored(name).items() if file not in first}
    for _ in range(3):
        with pytest.raises(SystemExit), signal_at_update(signal.SIGTERM, 1):
            train_("--seed", "1", "--log_dir", "aborted")
        assert stored(name) == renamed(first, name) | others
        assert os.listdir("aborted/shapes") == []
    out = capsys.readouterr().out
    assert out.count(f"an earlier run is kept as {name}-old-1.pth") == 1
    assert "nothing was saved" in out and "--resume" not in out

    with stopped_at_update(4):
        train_("--seed", "1", "--keep_every", "1")
    second = {file: x for file, x in stored(name).items() if file in first}
    # Killed after the first of its renames, a third run leaves the state alone; a fourth the rest.
    os.rename(f"{name}.state.pth", f"{name}-old-2.state.pth")
    train_("--seed", "3")
    moved = {f"{name}-old-{2 if 'state' in x else 3}{x[len(name) :]}": y for x, y in second.items()}
    assert (moved | renamed(first, name) | others).items() <= stored(name).items()
    assert not os.path.exists(f"{name}-0001.pth")

    train_("--resume")
    assert read(f"{name}.state.pth")["args"]["seed"] == 3
    for file in moved:
        os.rename(file, file.replace("old-3", "old-2"))
    train_("--resume", path, f"{name}-old-2.pth")
    train_("--seed", "1", path, "whole.pth")
    same_weights(f"{name}-old-2.pth", "whole.pth")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_in_the_way_of_a_resumed_run_is_renamed(script):
    name, _ = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    for other in (name, f"{name}-0002"):
        with stopped_at_update(2):
            train_(path, f"{other}.pth")
    train_(path, f"{name}-0001.pth", "--seed", "1")
    first, second = stored(f"{name}-0001"), stored(f"{name}-0002")
    shutil.copy(f"{name}-0001.pth", f"{name}.pth")
    train_("--resume", "--keep_every", "1")
    for files, other in ((first, f"{name}-0001"), (second, f"{name}-0002")):
        moved = {file for file in stored(other) if "old" in file}
        assert {file: stored(other)[file] for file in moved} == renamed(files, other)
        assert stored(other).keys() - moved == {f"{other}.pth"}
    assert stored(f"{name}-old-1") == {f"{name}-old-1.pth": first[f"{name}-0001.pth"]}
    train_(path, "whole.pth")
    same_weights(f"{name}.pth", "whole.pth")
    # With the state of another run: not that run's model.
    shutil.copy(f"{name}-0002-old-1.state.pth", "whole.state.pth")
    whole = stored("whole")["whole.pth"]
    train_("--resume", path, "whole.pth")
    assert stored("whole-old-1")["whole-old-1.pth"] == whole


@pytest.mark.parametrize("path", ["q//c.pth", "q/c", "./q/[c].x.pth", "link/../c.pth"])
def test_earlier_runs_are_kept_under_any_name(path):
    os.makedirs("q/r")
    os.symlink("q/r", "link")
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
    name, _ = SCRIPTS[script]
    flags = [*FLAGS[script], "--total_epoch", "100000", "--save_minutes", "0"]
    process = start(script, flags, number=1)
    try:
        wait_for(lambda: os.path.exists(f"{name}.pth"))
        os.kill(process.pid, signal.SIGSTOP)  # so that it writes nothing meanwhile
        before = stored(name)
        with pytest.raises(utils.InputError, match=f"another run is writing {name}.pth"):
            MAIN[script]()
        assert stored(name) == before
    finally:
        process.kill()
        process.join()
    # A lock on the file that the first run has used is a lock for all.
    with open(f"{name}.state.pth.lock") as file:
        MAIN[script]()  # nothing is left of the first one's
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(utils.InputError, match=f"another run is writing {name}.pth"):
            MAIN[script]()
    assert os.path.exists(f"{name}-old-1.state.pth")


def test_two_identical_starts_over_an_unfinished_run():
    with stopped_at_update(4):
        pretrain()
    old = stored("vit-t-mae")["vit-t-mae.state.pth"]
    for _ in range(3):
        ended = statuses([start("mae_pretrain", PRETRAIN, number=i) for i in range(2)])
        assert ended in ([0, 0], [0, 1], [1, 0])
        for i in range(2):
            error = "error: another run is writing vit-t-mae.pth" if ended[i] else ""
            assert output(number=i, names=["err"]).startswith(error)
    assert old in stored("vit-t-mae").values() and read("vit-t-mae.pth")["epoch"] == 2


@pytest.mark.parametrize("script", [pretrain, classify])
def test_divergence_stops_the_run_and_keeps_the_files(script, device):
    name = "vit-t-mae" if script is pretrain else "cls"
    script("--device", device)
    before = stored(name)
    with pytest.raises(utils.InputError) as error:
        script("--base_learning_rate", "1e38", "--total_epoch", "3", "--device", device)
    message = str(error.value)
    for part in ("not finite after", "epochs, ", "learning rate", "--warmup_epoch"):
        assert part in message
    assert stored(name) == renamed(before, name)


def small_files(size):
    """The operating system itself refuses to let a file grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("script", "size"),  # of the first curves, of those in the middle of the run, of the state
    [("mae_pretrain", 5_000), ("mae_pretrain", 350_000), ("train_classifier", 100_000)],
)
def test_full_disk(script, size):
    """In a process of its own: TensorBoard's threads and open files have a say at its end."""
    name, log = SCRIPTS[script]
    flags, full = [*FLAGS[script], "--total_epoch", "12"], functools.partial(small_files, size)
    assert finish(script, flags, "whole") == 0
    assert finish(script, flags, "full", before=functools.partial(stop, 4)) == 143
    before = read(f"full/{name}.state.pth")
    for more in (["--resume"], []):  # one that goes on, and a new one
        next_second()
        assert finish(script, [*flags, *more], "full", before=full) == 1
        error = output("full", names=["err"])
        assert error.startswith("error: cannot write") and error.endswith(": File too large\n")
        for file in glob.glob("full/*.pth"):
            utils.read_checkpoint(file)
        assert glob.glob("full/*.state.pth") and not glob.glob("full/*.part")
    next_second()
    path, old = PATH[script], f"{name}-old-1.pth"
    assert finish(script, [*flags, "--resume", path, old], "full") == 0
    same_weights(f"full/{old}", f"whole/{name}.pth")
    assert curves(before["folder"]) == curves(f"whole/logs/shapes/{log}")


def test_vanished_folder_is_an_error():
    with pytest.raises(utils.InputError, match="cannot write out/mae.state.pth: No such file"):
        with at_update(4, functools.partial(shutil.rmtree, "out")):
            pretrain("--model_path", "out/mae.pth", "--save_minutes", "0")


@pytest.mark.parametrize("script", SCRIPTS)
def test_state_never_speaks_of_a_file_that_is_not_there(script):
    name, _ = SCRIPTS[script]
    train_, path = MAIN[script], PATH[script]
    train_(path, "whole.pth")
    with stopped_at_update(4):
        train_()
    os.remove(f"{name}.pth")
    if script == "train_classifier":
        with pytest.raises(utils.InputError, match=f"{name}.pth is gone.*{name}.state.pth"):
            train_("--resume")
        shutil.copy("whole.pth", f"{name}.pth")
    train_("--resume")
    same_weights(f"{name}.pth", "whole.pth")
    states = [read(f"{stem}.state.pth") for stem in (name, "whole")]
    assert states[0]["results"] == states[1]["results"] and states[0]["epoch"] == 2
    os.remove(f"{name}.pth")
    with pytest.raises(utils.InputError, match=f"{name}.pth is gone.*{name}.state.pth"):
        train_("--resume")


def changed(*changes):
    """mae_pretrain.py with lines that somebody has added after others."""
    with open(mae_pretrain.__file__) as file:
        source = file.read()
    for line, more in changes:
        assert source.count(line) == 1
        source = source.replace(line, line + more)
    script = types.ModuleType("changed")
    exec(source, vars(script))
    return lambda *flags: script.main(script.get_args([*PRETRAIN, *flags]))


def test_a_changed_script_keeps_results_before_there_is_a_model():
    script = changed(("for epoch in run.epochs():", "\n            run.results['loss'] = 7.0"))
    with stopped_at_update(2):
        script()
    assert not os.path.exists("vit-t-mae.pth") and read(STATE)["results"] == {"loss": 7.0}
    script("--resume")
    assert read("vit-t-mae.pth")["epoch"] == 2


def test_a_changed_script_ends_early():
    flags = ["--total_epoch", "9"]
    script = changed(("kept=content", ", last=epoch == 3"))
    script(*flags)
    assert read("vit-t-mae.pth")["epoch"] == read(STATE)["epoch"] == 4
    before = stored("vit-t-mae")
    pretrain("--resume", *flags)  # it is finished
    assert stored("vit-t-mae") == before


def test_a_full_log_or_closed_pipe_does_not_end_a_run(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", full)
    pretrain()
    with contextlib.suppress(OSError):
        full.close()
    assert read("vit-t-mae.pth")["epoch"] == 2


def spoil_update(number):
    """A weight becomes infinite in that update, after its loss."""
    seen = itertools.count(1)

    def spoil(optim):
        if next(seen) == number:
            optim.param_groups[0]["params"][0].data[0] = float("inf")

    return each_update(spoil)


def test_weights_that_are_not_finite_are_not_saved():
    pretrain()
    before = stored("vit-t-mae")
    flags = ["--seed", "1", "--total_epoch", "1"]
    # The last of all: no loss tells it.
    with pytest.raises(utils.InputError, match="not finite after 0 epochs, 3 up"), spoil_update(3):
        pretrain(*flags)
    assert stored("vit-t-mae") == renamed(before, "vit-t-mae")


def test_loss_that_is_not_finite_stops_the_run_at_once(device):
    flags = ["--total_epoch", "9", "--save_minutes", "1000", "--device", device]
    # Of 3 in the epoch. The loss of a GPU may come an update late.
    late = "[23]" if device == "cuda" else "2"
    with pytest.raises(utils.InputError, match=f"0 epochs, {late} up"), spoil_update(1):
        pretrain(*flags)


@pytest.mark.parametrize("script", [pretrain, classify])
def test_results_that_are_not_finite_are_not_saved(script, monkeypatch):
    """The loss of the training images is finite; of the others neither loss nor picture are."""
    kind, name = model.MAE_ViT, "vit-t-mae"
    if script is classify:
        kind, name = model.ViT_Classifier, "cls"
    forward = kind.forward

    def spoiled(self, img, *more):
        return forward(self, img if self.training else img * float("nan"), *more)

    monkeypatch.setattr(kind, "forward", spoiled)
    with pytest.raises(utils.InputError, match="not finite after 0 epochs, 3 updates"):
        script()
    assert stored(name) == {}


@pytest.mark.parametrize(
    ("script", "flags", "flag"),
    [
        (pretrain, "--mask_ratio 0.5", "--masking block"),
        (pretrain, "--norm_pix_loss", "--masking grid"),
        (pretrain, "--decoder_dim 8 --decoder_head 2", "--augment"),
        (classify, "--holdout 5", "--augment"),
        (classify, "--encoder_layer 2", "--drop_path 0.3"),
        (classify, "", "--layer_decay 0.7"),
        (classify, "--pretrained_model_path p.pth", "--linear_probe"),
    ],
)
def test_each_recipe_stopped_goes_on_with_another_micro_batch_and_name(script, flags, flag):
    """And the last flag changes what is learnt."""
    pretrain("--model_path", "p.pth", "--base_learning_rate", "1e-2")
    path, name = ("--model_path", "vit-t-mae")
    if script is classify:
        path, name = ("--output_model_path", "cls")
    flags = [*flags.split(), "--base_learning_rate", "1e-2", "--total_epoch", "3"]
    script(*flags, path, "plain.pth")
    script(*flags, *flag.split(), path, "whole.pth")
    with stopped_at_update(4):
        script(*flags, *flag.split())
    os.rename(f"{name}.state.pth", "b.state.pth")
    if script is classify:
        os.rename(f"{name}.pth", "b.pth")  # the best so far
    more = [path, "b.pth", "--max_device_batch_size", "7"]
    script("--resume", *flags, *flag.split(), *more)
    same_weights("b.pth", "whole.pth", 1e-5)
    a, b = (read(x)["model"] for x in ("whole.pth", "plain.pth"))
    name = next(name for name in a if name.endswith("head.bias"))
    assert not torch.allclose(a[name], b[name], atol=1e-4)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_while_the_validation_images_are_looked_at(epoch, monkeypatch, capsys):
    """In the last epoch the run has all that it needs to end as usual."""
    forward, told = model.ViT_Classifier.forward, []

    def signalling(self, *inputs):
        if not self.training:
            told.append(len(told))
            if len(told) == 3 * epoch - 1:  # of three micro-batches in each epoch
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *inputs)

    monkeypatch.setattr(model.ViT_Classifier, "forward", signalling)
    with pytest.raises(SystemExit) if epoch == 1 else contextlib.nullcontext():
        classify()
    assert (read("cls.state.pth")["epoch"], read("cls.state.pth")["update"]) == (epoch, 0)
    assert ("to go on" in capsys.readouterr().out) == (epoch == 1)


def test_nohup_has_a_signal_ignored():
    assert finish("mae_pretrain", PRETRAIN, before=hang_up_under_nohup) == 0


def test_state_is_saved_by_the_clock(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def saved(minutes, seconds):
        """Of which epochs and updates are there states, if an update takes so many seconds?"""
        found = []

        def note(*_):
            now[0] += seconds
            state = read(STATE) if os.path.exists(STATE) else {}
            found.append((state.get("epoch"), state.get("update")))

        with each_update(note):
            pretrain("--save_minutes", minutes, "--total_epoch", "7")
        return list(dict.fromkeys(found))[1:]

    every_update = [(epoch, update) for epoch in range(7) for update in (1, 2, 3)]
    assert saved("0", 1) == every_update[:-1]
    assert saved("10", 11) == [(2, 0), (4, 0), (6, 0)]  # after an epoch, if a minute has passed
    assert saved("100", 110) == [(2, 0), (4, 0), (6, 0)]
    assert saved("10", 61) == [(epoch, 0) for epoch in range(1, 7)]
    assert saved("1.5", 50)[:4] == [(0, 2), (1, 0), (1, 2), (2, 0)]
    assert read(STATE)["epoch"] == 7
    assert "epoch 1/7: saved after 50 of 60 images, loss=" in capsys.readouterr().out


def test_the_best_model_is_not_lost_before_it_is_saved():
    """Accuracies fall here: the first epoch is the best, and there is no save until the signal."""
    flags = ["--base_learning_rate", "1", "--total_epoch", "9"]
    classify(*flags, "--keep_every", "1")
    best = read("cls.pth")["epoch"]
    os.rename(f"cls-{best:04}.pth", "best.pth")
    with stopped_at_update(3 * best + 2):
        classify(*flags)
    assert 1 <= best < 9 and read("cls.pth")["epoch"] == best
    same_weights("cls.pth", "best.pth")


def test_resume_auto_goes_on_or_starts(capsys):
    for script, name in ((pretrain, "vit-t-mae"), (classify, "cls")):
        script("--seed", "7")
        os.rename(f"{name}.pth", "whole.pth")
        os.remove(f"{name}.state.pth")
        flags = "--seed", "7", "--resume", "auto"
        with stopped_at_update(2):
            script(*flags)
        script(*flags)
        same_weights(f"{name}.pth", "whole.pth")
        capsys.readouterr()
        script(*flags)
        assert "epoch 1/2:" not in capsys.readouterr().out
        with pytest.raises(utils.InputError, match="cannot go on with --seed 8"):
            script("--seed", "8", "--resume", "auto")


def test_curves_go_on_where_they_are_or_where_log_dir_says(monkeypatch, capsys):
    def run_on(updates, *flags):
        next_second()
        with stopped_at_update(updates) if updates else contextlib.nullcontext():
            pretrain("--total_epoch", "5", "--model_path", "../a/vit-t-mae.pth", *flags)

    def steps():
        return [step for step, _ in scalars("c/shapes/mae-pretrain", "mae_loss")]

    os.mkdir("a")
    os.mkdir("b")
    monkeypatch.chdir("a")
    run_on(4)
    monkeypatch.chdir("../b")
    pretrain()
    own = curves("logs/shapes")
    run_on(4, "--resume")
    assert curves("logs/shapes") == own
    all_steps_once("../a/logs/shapes/mae-pretrain", 2)
    for _ in range(2):  # the second time, c is not new
        run_on(3, "--resume", "--log_dir", "c")
    assert steps() == [2, 3]
    all_steps_once("../a/logs/shapes/mae-pretrain", 2)
    shutil.rmtree("c")
    capsys.readouterr()
    run_on(0, "--resume")
    assert "in a new folder" in capsys.readouterr().out and steps() == [4]


def test_files_that_another_program_holds_for_a_moment(monkeypatch):
    """As on Windows; and a file system that has no fsync."""
    replace, calls = os.replace, itertools.count()

    def held(path, new):
        if next(calls) % 3:
            raise PermissionError(errno.EACCES, "held")
        replace(path, new)

    def unknown(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(os, "fsync", unknown)
    for _ in range(2):
        pretrain()
    assert read("vit-t-mae.pth")["epoch"] == read("vit-t-mae-old-1.pth")["epoch"] == 2


FP16 = ["--precision", "fp16", "--total_epoch", "3"]


def scales(monkeypatch, start, stop_at=()):
    """fp16 begins with this scale -> a list of its later values, one for each update."""
    found, update = [], torch.amp.GradScaler.update
    scaler = functools.partial(torch.amp.GradScaler, init_scale=start, growth_interval=2)

    def noting(self):  # also of updates that are left out
        update(self)
        found.append(self.get_scale())
        if len(found) in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.amp.GradScaler, "update", noting)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return found


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("script", [pretrain, classify])
def test_stopped_in_fp16_goes_on_with_the_scale(script, at, monkeypatch):
    """From a scale at which gradients overflow: those updates are left out, and it is halved."""
    stop_at = []
    found = scales(monkeypatch, 2.0**24, stop_at)
    name = "vit-t-mae" if script is pretrain else "cls"
    script(*FP16)
    os.rename(f"{name}.pth", "whole.pth")
    whole, results = list(found), read(f"{name}.state.pth")["results"]
    assert whole[0] == 2.0**23 and max(whole) > min(whole) and len(whole) == 9
    found.clear()
    stop_at.append(at)
    with pytest.raises(SystemExit):
        script(*FP16)
    assert read(f"{name}.state.pth")["scaler"]["scale"] == whole[at - 1]
    stop_at.clear()
    script("--resume", *FP16)
    assert found == whole
    same_weights(f"{name}.pth", "whole.pth")
    assert read(f"{name}.state.pth")["results"] == results


@pytest.mark.parametrize("script", [pretrain, classify])
def test_keep_every_keeps_the_model_of_that_epoch(script):
    """Also where nothing else would be saved; and a resumed run may begin to keep."""
    name = "vit-t-mae" if script is pretrain else "cls"
    never = ["--save_minutes", "1000", "--total_epoch", "5"]
    script(*never, "--keep_every", "2")
    os.mkdir("kept")
    for epoch in (2, 4):
        os.rename(f"{name}-000{epoch}.pth", f"kept/{epoch}.pth")
    assert not os.path.exists(f"{name}-0001.pth")
    for epoch in (2, 4):  # the same run, stopped there
        with stopped_at_update(3 * epoch):
            script(*never)
        file, state = read(f"kept/{epoch}.pth"), read(f"{name}.state.pth")
        assert (state["epoch"], state["update"]) == (epoch - 1, 3)
        assert file["epoch"] == epoch and file["kind"] in ("MAE_ViT", "ViT_Classifier")
        assert all(torch.equal(file["model"][key], x) for key, x in state["model"].items())
    assert not os.path.exists(f"{name}-0005.pth")
    script("--keep_every", "1")
    assert read(f"{name}-0001.pth")["epoch"] == 1  # also where it is the best so far

    flags = ["--total_epoch", "5", "--seed", "1"]
    with stopped_at_update(4):
        script(*flags)
    script("--resume", "--keep_every", "3", *flags)
    assert read(f"{name}-0003.pth")["epoch"] == 3


@pytest.mark.parametrize("script", [pretrain, classify])
def test_a_state_from_before_a_flag_goes_on_with_its_default(script):
    name = "vit-t-mae" if script is pretrain else "cls"
    script()
    os.rename(f"{name}.pth", "whole.pth")
    with stopped_at_update(4):
        script()
    state = read(f"{name}.state.pth")
    for flag in ("masking", "decoder_dim", "keep_every"):
        state["args"].pop(flag, None)
    torch.save(state, f"{name}.state.pth")
    script("--resume")
    same_weights(f"{name}.pth", "whole.pth")
    assert read(f"{name}.state.pth")["args"]["keep_every"] is None


def test_precision_may_change_to_and_from_fp16():
    with stopped_at_update(2):
        pretrain(*FP16)
    with stopped_at_update(2):
        pretrain("--resume", *FP16, "--precision", "fp32")
    assert read("vit-t-mae.state.pth")["scaler"] == {}
    pretrain("--resume", *FP16)
    assert read("vit-t-mae.state.pth")["scaler"]["scale"] > 1


def test_a_scale_that_keeps_falling_is_a_loss_that_is_not_finite(monkeypatch):
    found, forward = scales(monkeypatch, 2.0**10), model.MAE_ViT.forward

    def overflowing(self, *inputs):
        predicted_img, mask = forward(self, *inputs)
        if predicted_img.requires_grad:
            predicted_img.register_hook(lambda gradient: gradient * float("inf"))
        return predicted_img, mask

    monkeypatch.setattr(model.MAE_ViT, "forward", overflowing)
    with pytest.raises(utils.InputError, match="not finite after 3 epochs, 3 .*--precision fp32"):
        pretrain("--precision", "fp16", "--total_epoch", "9", "--save_minutes", "0")
    assert found == [2.0 ** (9 - i) for i in range(12)]
    assert all(tensor.isfinite().all() for tensor in read(STATE)["model"].values())
