"""Both scripts, through their command lines: what they write, print and refuse."""

import functools
import gc
import glob
import io
import itertools
import os
import re
import resource
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import (
    CLASSIFY,
    PRETRAIN,
    REPOSITORY,
    TOLERANCE,
    GPUs,
    classify,
    each_update,
    events,
    finish,
    output,
    pretrain,
    read,
    same_weights,
    scalars,
    stopped_at_update,
    write_cifar,
)
from PIL import Image

import mae_pretrain
import train_classifier
import utils
from model import MAE_Encoder, MAE_ViT, ViT_Classifier

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_pretraining_writes_model_image_and_curves(capsys):
    pretrain("--model_path", "new/folder/mae.pth")
    folder = "logs/shapes/mae-pretrain"
    for tag in ("mae_loss", "lr", "images_per_second"):
        assert [step for step, _ in scalars(folder, tag)] == [0, 1]
    expected = [utils.learning_rate(e, 1.5e-4, 25, 2, 1) for e in (0, 1)]
    assert [value for _, value in scalars(folder, "lr")] == pytest.approx(expected)
    images = events(folder).Images("mae_image")
    assert [(i.step, i.width, i.height) for i in images] == [(e, 6 * 32, 8 * 32) for e in (0, 1)]
    with Image.open("new/folder/mae.png") as img:
        assert img.size == (4 * 6 * 32, 4 * 8 * 32)

    content = read("new/folder/mae.pth")
    assert content["kind"] == "MAE_ViT" and content["epoch"] == 2
    assert content["args"]["batch_size"] == 25 and content["args"]["mask_ratio"] == [0.75]
    model = MAE_ViT(**content["architecture"])
    model.load_state_dict(content["model"], strict=True)
    assert content["metrics"]["loss"] == pytest.approx(scalars(folder, "mae_loss")[1][1], rel=1e-6)

    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2  # they stay without a terminal


def test_same_images_and_masks_at_every_epoch(capsys):
    pretrain("--base_learning_rate", "0")
    first, second = events("logs/shapes/mae-pretrain").Images("mae_image")
    assert first.encoded_image_string == second.encoded_image_string


def test_reconstruction_shows_masked_reconstructed_and_original():
    pretrain("--total_epoch", "1")
    event = events("logs/shapes/mae-pretrain").Images("mae_image")[0]
    page = np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).astype(int)
    images = utils.read_shapes(32).val_images
    images = images[utils.evenly_spaced(len(images), 16)].permute(0, 2, 3, 1).numpy()
    panels = page.reshape(8, 32, 2, 3, 32, 3).transpose(0, 2, 3, 1, 4, 5).reshape(16, 3, 32, 32, 3)
    for (masked, reconstructed, original), img in zip(panels, images, strict=True):
        assert abs(original - img).max() <= 1  # rounded
        hidden = (abs(masked - 127.5) < 1).all(-1)
        patches = hidden.reshape(4, 8, 4, 8).all((1, 3))
        assert patches.sum() == 12
        visible = ~patches.repeat(8, 0).repeat(8, 1)
        for panel in (masked, reconstructed):
            assert abs(panel - img)[visible].max() <= 1
        assert abs(reconstructed - img)[~visible].mean() > 2


def test_result_does_not_depend_on_the_micro_batch(device):
    """12 updates in all, at a learning rate at which a weight may move by 2e-3."""
    shared = "--total_epoch 4 --base_learning_rate 3e-3 --device".split() + [device]
    tolerance = TOLERANCE[device]
    for size in (60, 7, 1):
        flags = [*shared, "--max_device_batch_size", str(size)]
        pretrain(*flags, "--model_path", f"mae-{size}.pth")
        classify(*flags, "--output_model_path", f"cls-{size}.pth")
    for size in (7, 1):
        same_weights(f"mae-{size}.pth", "mae-60.pth", tolerance)
        same_weights(f"cls-{size}.pth", "cls-60.pth", tolerance)
    losses = scalars("logs/shapes/mae-pretrain", "mae_loss")
    for n in (2, 3):
        assert scalars(f"logs/shapes/mae-pretrain-{n}", "mae_loss") == [
            (step, pytest.approx(value, rel=tolerance)) for step, value in losses
        ]


@pytest.mark.parametrize("pretrained", [False, True])
def test_classifier_writes_its_best_epoch_and_curves(pretrained, capsys):
    flags, name = [], "scratch-cls"
    if pretrained:
        pretrain()
        flags, name = ["--pretrained_model_path", "vit-t-mae.pth"], "pretrain-cls"
    classify("--output_model_path", "cls.pth", *flags)
    folder = f"logs/shapes/{name}"
    curves = {}
    for tag in ("loss", "acc"):
        for part in ("train", "val"):
            curves[tag, part] = scalars(f"{folder}/cls_{tag}_{part}", f"cls/{tag}")
            assert [step for step, _ in curves[tag, part]] == [0, 1]
    assert [step for step, _ in scalars(folder, "lr")] == [0, 1]
    assert [step for step, _ in scalars(folder, "images_per_second")] == [0, 1]

    content = read("cls.pth")
    assert content["kind"] == "ViT_Classifier" and content["classes"] == list(utils.SHAPES)
    best = max(value for _, value in curves["acc", "val"])
    assert content["metrics"]["val"]["acc"] == pytest.approx(best)
    *sizes, num_classes = content["architecture"].values()
    model = ViT_Classifier(MAE_Encoder(*sizes), num_classes).eval()
    model.load_state_dict(content["model"], strict=True)

    # The accuracy again, image by image: 37 of them, no multiple of 16.
    dataset = utils.read_shapes(32)
    with torch.no_grad():
        correct = sum(
            int(model(utils.to_float(img[None])).argmax()) == int(label)
            for img, label in zip(dataset.val_images, dataset.val_labels, strict=True)
        )
    assert content["metrics"]["val"]["acc"] == correct / 37
    last = curves["acc", "val"][-1][1]
    out = capsys.readouterr().out.splitlines()[-1]
    assert f"best {best:.2%}" in out and f"last {last:.2%}" in out


def test_fine_tuning_starts_from_the_pretrained_weights():
    pretrain()
    flags = ["--pretrained_model_path", "vit-t-mae.pth", "--output_model_path", "cls.pth"]
    classify(*flags, "--base_learning_rate", "0", "--total_epoch", "1")
    pretrained, fine_tuned = read("vit-t-mae.pth")["model"], read("cls.pth")["model"]
    for name, tensor in fine_tuned.items():
        if not name.startswith("head."):
            assert torch.equal(tensor, pretrained[f"encoder.{name}"])


def test_architecture_comes_from_the_checkpoint():
    torch.save(MAE_ViT(32, 16, 36, 3, 3, 2, 3).state_dict(), "bare.pth")
    pretrain("--model_path", "own.pth")
    for path, sizes in (("bare.pth", (16, 36, 3)), ("own.pth", (8, 24, 1))):
        flags = "--dataset shapes --train_images 20 --total_epoch 1 --device cpu".split()
        flags += ["--pretrained_model_path", path, "--output_model_path", "cls.pth"]
        train_classifier.main(train_classifier.get_args(flags))
        architecture = read("cls.pth")["architecture"]
        keys = ("patch_size", "emb_dim", "encoder_layer")
        assert tuple(architecture[key] for key in keys) == sizes


def test_from_scratch_with_the_sizes_of_a_pretrained_model():
    sizes = "--patch_size 16 --emb_dim 36 --encoder_layer 2".split()
    pretrain(*sizes)
    flags = (
        "--dataset shapes --train_images 60 --total_epoch 1 --device cpu --precision fp32".split()
    )
    pretrained = ["--pretrained_model_path", "vit-t-mae.pth"]
    for path, more in (("a.pth", sizes + ["--encoder_head", "3"]), ("b.pth", ["--from_scratch"])):
        more = more + pretrained if path == "b.pth" else more
        more += ["--output_model_path", path]
        train_classifier.main(train_classifier.get_args([*flags, *more]))
    same_weights("a.pth", "b.pth")
    assert os.path.isdir("logs/shapes/scratch-cls-2")  # not among the pretrained


def test_the_folder_of_the_curves_has_the_name_of_the_run(capsys):
    pretrain("--run_name", "my masks")
    pretrain("--run_name", "my masks", "--total_epoch", "1")
    assert f"curves:    {os.path.abspath('logs/shapes/my masks-2')}" in capsys.readouterr().out
    pretrain("--resume", "--total_epoch", "1")
    assert len(scalars("logs/shapes/my masks", "mae_loss")) == 2
    assert len(scalars("logs/shapes/my masks-2", "mae_loss")) == 1
    classify("--run_name", "plain")
    assert sorted(os.listdir("logs/shapes")) == ["my masks", "my masks-2", "plain"]


def test_same_arguments_give_the_same_bits():
    for name in ("a", "b"):
        pretrain("--model_path", f"{name}.pth")
        classify("--output_model_path", f"cls-{name}.pth", "--precision", "bf16")
    same_weights("a.pth", "b.pth")
    same_weights("cls-a.pth", "cls-b.pth")


def test_other_masks_in_the_pictures():
    pretrain()
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save("white.png")
    pictures = set()
    for masking in ("random", "block", "grid"):
        show = ["--reconstruct", "white.png", "--masking", masking, "--mask_ratio", "0.5"]
        mae_pretrain.main(mae_pretrain.get_args(show))
    for name in glob.glob("vit-t-mae-reconstructed*.png"):
        with open(name, "rb") as file:
            pictures.add(file.read())
    assert len(pictures) == 3


def test_norm_pix_loss_and_one_image(tmp_path):
    """The reconstruction is told each patch's mean: a patch of one grey comes back as it was."""
    greys = np.random.default_rng(0).integers(150, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(greys.repeat(8, 0).repeat(8, 1)).save(tmp_path / "only.png")
    flags = ["--dataset", "folder", "--data_path", str(tmp_path), "--train_images", "1"]
    pretrain(*flags, "--norm_pix_loss")
    image = events("logs/folder/mae-pretrain").Images("mae_image")[0]
    page = np.asarray(Image.open(io.BytesIO(image.encoded_image_string))).astype(int)
    masked, reconstructed, original = page.reshape(32, 3, 32, 3).swapaxes(0, 1)
    assert abs(reconstructed - original).max() <= 2 < 20 < abs(masked - original).max()


def test_demo_sets_defaults_and_flags_win():
    args = mae_pretrain.get_args(["--demo", "--total_epoch", "3"])
    assert args.dataset == "shapes" and args.total_epoch == 3
    assert args.batch_size == mae_pretrain.DEMO["batch_size"]
    args = mae_pretrain.get_args([])
    assert (args.seed, args.batch_size, args.max_device_batch_size) == (42, 4096, None)
    assert (args.base_learning_rate, args.weight_decay, args.mask_ratio) == (1.5e-4, 0.05, [0.75])
    assert (args.total_epoch, args.warmup_epoch) == (2000, 200)
    assert (args.model_path, args.dataset) == ("vit-t-mae.pth", "cifar10")
    args = train_classifier.get_args([])
    assert (args.seed, args.batch_size, args.max_device_batch_size) == (2022, 128, None)
    assert (args.base_learning_rate, args.weight_decay) == (1e-3, 0.05)
    assert (args.total_epoch, args.warmup_epoch, args.pretrained_model_path) == (100, 5, None)
    assert args.output_model_path == "vit-t-classifier-from_scratch.pth"
    assert train_classifier.get_args(["--demo"]).train_images == 500


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_through_both_scripts(name, monkeypatch):
    write_cifar(monkeypatch, name)
    flags = ["--dataset", name.lower(), "--train_images", "7", "--total_epoch", "1"]
    pretrain(*flags)
    classify(*flags, "--pretrained_model_path", "vit-t-mae.pth")
    assert set(os.listdir(f"logs/{name.lower()}")) == {"mae-pretrain", "pretrain-cls"}
    assert read("cls.pth")["classes"] == [f"class {i}" for i in range(int(name[5:]))]


@pytest.mark.parametrize("script", [mae_pretrain, train_classifier])
def test_help_tells_the_rule_and_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.get_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "base_learning_rate * batch_size / 256" in " ".join(text.split())
    _, *flags = text.split("\n  -")
    assert len(flags) > 20
    for flag in flags[1:]:  # the first is --help
        assert re.search(r"\((.+; )?default: (?!None)", " ".join(flag.split())), flag


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_does_not_fit_into_memory_is_halved_until_it_does(where, monkeypatch, capsys):
    """On a GPU the first update is tried before it is made; with --compile on a CPU, too."""
    pretrain("--model_path", "whole.pth")
    forward, room, tried = MAE_ViT.forward, 5, []

    def full(batch):
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def with_little_memory(self, img, noise):
        if self.training:
            tried.append(len(img))
            if where == "forward":
                full(img)
        predicted_img, mask = forward(self, img, noise)
        if predicted_img.requires_grad:
            predicted_img.register_hook(full)
        return predicted_img, mask

    monkeypatch.setattr(MAE_ViT, "forward", with_little_memory)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    pretrain("--compile")
    tried = [n for n in tried if n > 1]  # one passes at first, to be measured
    assert tried[:2] == [13, 6] and set(tried[2:]) == {3}
    assert "micro-batch 3\n" in capsys.readouterr().out
    same_weights("vit-t-mae.pth", "whole.pth", 1e-5)
    room = 0
    with pytest.raises(utils.InputError, match="a micro-batch does not fit into memory"):
        pretrain("--compile")


BAD_FLAGS = [
    ("--mask_ratio 0", "--mask_ratio"),
    ("--mask_ratio nan", "--mask_ratio"),
    ("--mask_ratio 0.99", "leaves no patch"),
    ("--batch_size 0", "--batch_size"),
    ("--max_device_batch_size -1", "--max_device_batch_size"),
    ("--total_epoch 0", "--total_epoch"),
    ("--patch_size 5", "image size 32 is no multiple of patch size 5"),
    ("--masking blocks", "--masking"),
    ("--dataset imagenet", "--dataset"),
    ("--dataset folder", "there is no folder data: give that of your images with --data_path"),
    ("--dataset cifar10 --image_size 64", "32x32: for images of your own add --dataset folder"),
    ("--train_images 91", "only 90"),
    ("--model_path .", "not the name of a model file"),
    ("--model_path file/mae.pth", "cannot write"),
    ("--log_dir file", "file"),
    ("--seed 99999999999999999999", "--seed"),
    ("--mask_ratio 1e-9", "hides no patch"),
    ("--model_path=", "not the name of a model file"),
    ("--model_path a.png", "not the name of a model file"),
    (f"--model_path {'x' * 300}", "cannot write"),
    ("--total_epochs 3", "unrecognized arguments: --total_epochs 3: did you mean --total_epoch?"),
    ("--epochs=3", "did you mean --total_epoch?"),
    ("my_images", "unrecognized arguments: my_images (--help"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_input_is_one_line_and_leaves_no_trace(flags, message, capsys):
    with open("file", "w") as file:
        file.write("not a folder")
    with pytest.raises(SystemExit) as stop, utils.one_line_errors():
        pretrain(*flags.split())
    text = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert message in text and len(text.strip().splitlines()) == 1
    assert {file for file in os.listdir() if not file.endswith(".lock")} == {"file"}


def test_bad_pretrained_files(tmp_path):
    torch.save(MAE_ViT(64, 16, 24, 1, 3, 1, 3).state_dict(), "large.pth")
    torch.save({"some": torch.zeros(3)}, "other.pth")
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    (tmp_path / "empty.pth").write_bytes(b"")
    pretrain()
    for flags, messages in [
        ("missing.pth", ["there is no file missing.pth"]),
        ("text.pth", ["cannot read text.pth as a PyTorch checkpoint"]),
        ("empty.pth", ["cannot read empty.pth as a PyTorch checkpoint"]),
        ("other.pth", ["other.pth", "MAE_ViT"]),
        ("vit-t-mae.state.pth", ["it is a run's state; its model is vit-t-mae.pth"]),
        ("large.pth --dataset cifar10", ["64", "32x32"]),
        ("large.pth --image_size 32", ["large.pth", "64", "32"]),
    ]:
        flags = f"--dataset shapes --pretrained_model_path {flags}".split()
        with pytest.raises(utils.InputError) as error:
            train_classifier.main(train_classifier.get_args(flags))
        assert all(message in str(error.value) for message in messages)
        assert "\n" not in str(error.value)


def test_error_ends_the_process_without_traceback():
    assert finish("train_classifier", ["--pretrained_model_path", "missing.pth"]) == 1
    assert output() == "error: there is no file missing.pth\n"


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        (mae_pretrain, "--mask-ratio=0.5", "--mask_ratio"),
        (mae_pretrain, "--base_lr", "--base_learning_rate"),
        (train_classifier, "--output", "--output_model_path"),
        (train_classifier, "--epochs", "--total_epoch"),
        (train_classifier, "--xyz", None),
    ],
)
def test_the_flag_that_may_be_meant_is_named(script, flag, meant, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", flag])
    with pytest.raises(SystemExit) as stop:
        script.get_args()
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.splitlines()) == 1
    hint = f": did you mean {meant}?" if meant else ""
    assert f"unrecognized arguments: {flag}{hint} (--help" in text


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_in_all_its_words(error, capsys):
    with pytest.raises(SystemExit) as stop, utils.one_line_errors():
        raise error
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "error: a micro-batch does not fit into memory: lower --max_device_batch"
    )
    assert len(line.splitlines()) == 1


def blank_images(image_size, _):
    images = torch.zeros(60, 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.zeros(60, dtype=torch.int64)
    return utils.ImageSet(images, labels, images[:5], labels[:5], ["blank"])


def little_memory():
    """A process with 0.7 GB more than its libraries need."""
    utils.read_shapes = blank_images
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="sets Linux's limit on memory")
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image_size 2400 --patch_size 100 --emb_dim 24", "dataset does not fit into memory: l"),
        ("-bs 60 --max_device_batch_size 60", "a micro-batch does not fit into memory"),
    ],
)
def test_too_little_memory_is_one_line(flags, message, device, monkeypatch, capsys):
    flags = [*flags.split(), "--dataset", "shapes", "--precision", "fp32", "--device", device]
    if device == "cpu":
        assert finish("mae_pretrain", flags, before=little_memory) == 1
        line = output(names=["err"])
    else:  # of this width not even the weights would fit
        monkeypatch.setattr(utils, "read_shapes", blank_images)
        flags += ["--emb_dim", "1536"] if "-bs" in flags else []
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(0.7e9 / total)
        try:
            with pytest.raises(SystemExit), utils.one_line_errors():
                mae_pretrain.main(mae_pretrain.get_args(flags))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        line = capsys.readouterr().err
    assert message in line and len(line.splitlines()) == 1, line


def test_closed_standard_output():
    """And a whole run in a process that nothing was imported into before."""
    path = os.path.join(REPOSITORY, "train_classifier.py")
    command = f"{sys.executable} {path} {' '.join(CLASSIFY)} --total_epoch 1 >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and read("cls.pth")["epoch"] == 1


def developing():
    """What `python -X dev` sets."""
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
    sys.flags = types.SimpleNamespace(**flags | {"dev_mode": True})


def test_python_shows_the_traceback_of_an_error_if_asked():
    assert finish("mae_pretrain", ["--dataset", "folder"], before=developing) == 1
    text = output(names=["err"])
    assert "Traceback" in text and "InputError: there is no folder data" in text


@pytest.mark.parametrize("script", [mae_pretrain, train_classifier])
def test_the_demo_twice(script):
    path = "model_path" if script is mae_pretrain else "output_model_path"
    flags = ["--demo", "--train_images", "60", "--total_epoch", "1", "--warmup_epoch", "0"]
    for _ in range(2):
        script.main(script.get_args(flags))
    start = os.path.splitext(script.DEMO[path])[0]
    ends = [".pth", ".png"][: 2 if script is mae_pretrain else 1]
    assert all(os.path.exists(f"{start}{old}{end}") for old in ("", "-old-1") for end in ends)
    script.main(script.get_args(["--demo", "--resume"]))
    assert not os.path.exists(f"{start}-old-2.pth")


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), utils.one_line_errors():
        raise RuntimeError("shape '[2]' is invalid")


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
OLD_GPU = "CUDA error: no kernel image is available for execution on the device"
NO_DRIVER = "Found no NVIDIA driver on your system."
NO_CUDA = "Torch not compiled with CUDA enabled"
REMEDY = "install a newer NVIDIA driver, or the PyTorch for this GPU from pytorch.org"


@pytest.mark.parametrize(
    ("count", "message"), [(1, OLD_DRIVER), (1, OLD_GPU), (0, NO_DRIVER), (0, NO_CUDA)]
)
def test_no_gpu_that_works(count, message, monkeypatch, capsys):
    pretrain("--model_path", "cpu.pth", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    capsys.readouterr()
    with GPUs({0: f"{message}\nIt goes on\nfor lines."}):
        pretrain("--device", "auto")
        out, err = capsys.readouterr()
        lines = [line for line in (out + err).splitlines() if "warning" in line]
        warning = f"warning: GPU 0 fails ({message}): using the CPU; to use the GPU, {REMEDY}"
        assert lines == [warning] * count
        same_weights("vit-t-mae.pth", "cpu.pth")
        before = sorted(os.listdir())
        with pytest.raises(SystemExit) as stop, utils.one_line_errors():
            pretrain("--device", "cuda", "--model_path", "new.pth")
    assert stop.value.code == 1 and sorted(os.listdir()) == before
    line = f"error: GPU 0 fails ({message}): use --device cpu, or {REMEDY}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_gpus_that_fail_are_left_out(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with GPUs({0: OLD_GPU, 2: OLD_GPU}):
        assert utils.choose_devices(name) == [torch.device("cuda", i) for i in (1, 3)]
    lines = [f"warning: GPU {i} fails ({OLD_GPU}): left out" for i in (0, 2)]
    assert capsys.readouterr().err.splitlines() == lines
    assert utils.choose_devices("cpu") == [torch.device("cpu")]


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_each_process_takes_one_gpu(count, local_rank, index, monkeypatch):
    """Slurm may show each task its own GPU only: then that one, whatever LOCAL_RANK says."""
    monkeypatch.setattr(utils, "world_size", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with GPUs():
        assert utils.choose_devices("auto") == [torch.device("cuda", index)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(utils.InputError, match="--nproc_per_node is above .* GPUs here, 2"):
            utils.choose_devices("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with GPUs({1: OLD_GPU}), pytest.raises(utils.InputError, match=f"GPU 1 fails .{OLD_GPU}.: use"):
        utils.choose_devices("auto")


def test_the_oldest_gpu_sets_the_precision(monkeypatch):
    capability = [(9, 0), (7, 5), (8, 0), (6, 1), (7, 0)]
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability[device.index]
    )
    for gpus, precision in (
        ([0], "bf16"), ([0, 2], "bf16"), ([0, 1], "fp16"), ([4], "fp16"), ([1, 3], "fp32"),
    ):  # fmt: skip
        devices = [torch.device("cuda", i) for i in gpus]
        assert utils.choose_precision("auto", devices) == precision
        assert utils.choose_precision("bf16", devices) == "bf16"


def test_compiled_for_one_shape_without_graph_breaks(device, monkeypatch):
    """Same result, one graph to train with; on a CPU with a backend that needs no compiler."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        if device == "cpu":
            return graph.forward
        from torch._inductor.compile_fx import compile_fx  # takes a second

        return compile_fx(graph, example)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flags = "--total_epoch 3 --base_learning_rate 3e-3 --device".split() + [device]
    pretrain(*flags, "--model_path", "eager.pth", "--no-compile")
    torch._dynamo.reset()
    pretrain(*flags, "--compile")
    assert len(graphs) == 1  # 13, 12; 13, 12; 10 images: those of 13 only, in all epochs
    same_weights("vit-t-mae.pth", "eager.pth", TOLERANCE[device])
    assert read("vit-t-mae.pth")["chosen"]["compile"] is True
    classify(*flags, "--compile")
    assert len(graphs) == 2  # evaluation is not compiled
    assert all("_orig_mod" not in name for name in read("cls.pth")["model"])


def test_cuda_graphs_train_the_same(device):
    """An update of one micro-batch launches them, if all is as usual."""
    if device == "cpu":
        pytest.skip("of a GPU")
    flags = f"-bs 12 --max_device_batch_size 12 --total_epoch 3 --device {device}".split()
    for main, name in ((pretrain, "--model_path"), (classify, "--output_model_path")):
        main(*flags, name, "eager.pth", "--no-compile")
        torch._dynamo.reset()
        main(*flags, name, "graphs.pth", "--compile")
        same_weights("graphs.pth", "eager.pth", TOLERANCE[device])


def few_words(_):
    def compiled(*_):
        raise RuntimeError("Cannot find a working triton installation.\nMore information: ...")

    return compiled


def full(_):
    def compiled(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return compiled


def wrong(function):
    return lambda *inputs: 1.1 * function(*inputs)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (few_words, "Cannot find a working triton installation."),
        (full, "a micro-batch does not f"),
        (wrong, "its outputs and gradients are then wrong by 21%"),
    ],
)
def test_what_cannot_be_compiled(compiler, message, device, monkeypatch, capsys):
    """With --compile an error; on a GPU, where a long run is compiled by default, a warning."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function))
    with pytest.raises(utils.InputError, match=f"cannot --compile .*{message}.*leave it out"):
        pretrain("--compile", "--device", device)
    if device == "cuda":
        with stopped_at_update(2):
            pretrain("--device", device, "--total_epoch", "50000")
        assert f"warning: cannot compile ({message}" in capsys.readouterr().out


def test_a_long_run_on_a_gpu_is_compiled_by_default(device, capsys):
    if device == "cpu":
        pytest.skip("a CPU's is not")
    for epochs, compiled in (("49999", False), ("50000", True)):  # 3 million images
        with stopped_at_update(2):
            pretrain("--device", device, "--total_epoch", epochs)
        assert f"compile {compiled}, micro-batch 13" in capsys.readouterr().out


def test_an_error_in_the_middle_of_training_is_what_it_is(monkeypatch):
    """It is not taken for a model that cannot be compiled."""
    calls = itertools.count(1)

    def broken(function):
        def compiled(*inputs):
            if next(calls) > 2:  # of which the first tries it
                raise KeyError("a bug")
            return function(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken(function))
    with pytest.raises(KeyError, match="a bug"), utils.one_line_errors():
        pretrain("--compile")


def test_without_a_compiler(tmp_path):
    nowhere = dict.fromkeys(["PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"], str(tmp_path))
    assert finish("mae_pretrain", [*PRETRAIN, "--compile"], **nowhere) == 1
    lines = output(names=["err"]).splitlines()
    assert lines[-1].startswith("error: cannot --compile (")


def test_long_warm_up_is_warned_about(capsys):
    pretrain("--warmup_epoch", "5")
    assert "warning: warm-up takes the whole run: try --warmup_epoch 0" in capsys.readouterr().out
    pretrain("--resume", "--warmup_epoch", "5")  # too late
    pretrain("--warmup_epoch", "1")
    assert "warning" not in capsys.readouterr().out


def test_a_batch_of_more_images_than_there_are_is_warned_about(capsys):
    pretrain("--batch_size", "61", "--base_learning_rate", "0.01")
    text = "warning: --batch_size exceeds the 60 training images: try --batch_size 8 --base_lear"
    assert text + "ning_rate 0.03\n" in capsys.readouterr().out  # a peak of 1e-3
    pretrain("--resume", "--batch_size", "61", "--base_learning_rate", "0.01")  # too late
    classify("--batch_size", "61", "--base_learning_rate", "0.001")
    assert text + "ning_rate 0.008\n" in capsys.readouterr().out  # the same peak rate
    classify("--batch_size", "60")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [pretrain, classify])
def test_every_epoch_tells_the_time_that_is_left(script, capsys, monkeypatch):
    now, updates = [1000.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for seconds, words in (
        (1800, ["4:30:00", "3:00:00", "1:30:00", "00:00"]),  # 3 updates an epoch
        (9.8, ["01:28", "00:59", "00:29", "00:00"]),
        (20_000, ["50:00:00", "33:20:00", "16:40:00", "00:00"]),
    ):
        updates.append(seconds)
        with each_update(lambda _: now.__setitem__(0, now[0] + updates[-1])):
            script("--total_epoch", "4")
        lines = [x for x in capsys.readouterr().out.splitlines() if "images/s" in x]
        assert [line.rpartition(", ")[2] for line in lines] == [f"{x} left" for x in words]


def test_a_gpu_gets_the_micro_batch_that_fits():
    blocks = [(65, 192)] * 12 + [(257, 192)] * 4  # of pretraining
    for precision, gigabytes, micro_batch in (
        ("bf16", 79, 1024), ("fp16", 14.5, 512), ("fp32", 14.5, 256), ("bf16", 5.2, 128),
    ):  # fmt: skip
        found = utils.choose_micro_batch_size(4096, None, precision, blocks, gigabytes * 1e9)
        assert found == micro_batch


def test_a_cpu_uses_the_threads_that_help(monkeypatch):
    monkeypatch.setattr(utils, "THREADS", 8)
    for flags, threads in (([], 1), (["--patch_size", "4", "--emb_dim", "192"], 2)):
        found = []
        with each_update(lambda _, found=found: found.append(torch.get_num_threads())):
            pretrain(*flags, "--total_epoch", "1")
        assert set(found) == {threads}
