"""The original's own scripts beside ours: the same weights, images, order and masks, the same run.

    MAE_SOURCE=CHECKOUT python -m pytest tests/test_source.py -s

CHECKOUT is one of github.com/IcarusWizard/MAE, whose mask covers all hidden patches. Its scripts
run as they stand, but for what PyTorch no longer takes, with a small model as their default.
"""

import functools
import importlib
import io
import os
import runpy
import sys

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
import torchvision
from conftest import events, scalars
from PIL import Image

import mae_pretrain
import train_classifier
import utils
from model import MAE_Encoder, MAE_ViT, ViT_Classifier

SOURCE = os.environ.get("MAE_SOURCE")
pytestmark = pytest.mark.skipif(not SOURCE, reason="MAE_SOURCE names no checkout of the original")

SEED, BATCH, EPOCHS, PATCHES = 7, 25, 3, 64
MODEL = {"image_size": 32, "patch_size": 4, "emb_dim": 48, "encoder_layer": 3, "encoder_head": 3}
MAE = MODEL | {"decoder_layer": 2, "decoder_head": 3, "mask_ratio": 0.75}
RECIPE = {"seed": SEED, "batch_size": BATCH, "total_epoch": EPOCHS, "warmup_epoch": 1}
RECIPE["base_learning_rate"] = 1e-2
OURS = {"dataset": "shapes", "device": "cpu", "precision": "fp32", "max_device_batch_size": 10}
TRAIN, VAL = utils.draw_shapes(range(400), 32, 0), utils.draw_shapes(range(16), 32, 1)


def flags(**values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def order(epoch):
    rng = utils.generator("order", SEED, epoch)
    return torch.randperm(len(TRAIN[0]), generator=rng).split(BATCH)


def our_masks():
    """The noise of every image of our run, in turn: each epoch's batches, then the images shown."""
    shown = torch.rand(len(VAL[0]), PATCHES, generator=utils.generator("shown", SEED))
    for epoch in range(EPOCHS):
        for update in range(len(order(epoch))):
            rng = utils.generator("masks", SEED, epoch, update)
            yield from torch.rand(BATCH, PATCHES, generator=rng)
        yield from shown


class CIFAR10(list):
    """The shapes, as torchvision would read CIFAR-10."""

    def __init__(self, root, train, download, transform):
        images, labels = TRAIN if train else VAL
        pixels = images.permute(0, 2, 3, 1).numpy()
        pairs = zip(pixels, labels.tolist(), strict=True)
        super().__init__((transform(Image.fromarray(img)), label) for img, label in pairs)


class DataLoader:
    """Our order in the place of the original's, which it draws with its global generator."""

    def __init__(self, dataset, batch_size, shuffle, num_workers):
        self.dataset, self.shuffle, self.epoch = dataset, shuffle, 0

    def __iter__(self):
        rows = order(self.epoch) if self.shuffle else [torch.arange(len(self.dataset))]
        self.epoch += 1
        for batch in rows:
            img, label = zip(*(self.dataset[i] for i in batch), strict=True)
            yield torch.stack(img), torch.tensor(label)


@pytest.fixture
def source(monkeypatch, tmp_path):
    """-> run(script, initial, **flags): the model trained from those weights by the script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        utils, "read_shapes", lambda *_: utils.ImageSet(*TRAIN, *VAL, list(utils.SHAPES))
    )
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    monkeypatch.setattr(torch.utils.data, "DataLoader", DataLoader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    schedule = torch.optim.lr_scheduler.LambdaLR
    without = lambda optim, lr_lambda, verbose: schedule(optim, lr_lambda)  # noqa: E731
    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", without)

    monkeypatch.delitem(sys.modules, "model")
    monkeypatch.delitem(sys.modules, "utils")
    monkeypatch.syspath_prepend(SOURCE)
    model = importlib.import_module("model")
    assert os.path.samefile(os.path.dirname(model.__file__), SOURCE)
    # The eps of the timm with which the original was made.
    block = functools.partial(timm.models.vision_transformer.Block, norm_layer=torch.nn.LayerNorm)
    monkeypatch.setattr(model, "Block", block)
    monkeypatch.setattr(model.MAE_ViT.__init__, "__defaults__", tuple(MAE.values()))
    masks = our_masks()

    def random_indexes(size):
        forward = next(masks).argsort(stable=True).numpy()
        return forward, np.argsort(forward)

    monkeypatch.setattr(model, "random_indexes", random_indexes)

    def run(script, initial, **values):
        kind = getattr(model, type(initial).__name__)
        create = kind.__init__

        def created(self, *args, **more):
            create(self, *args, **more)
            self.load_state_dict(initial.state_dict())

        monkeypatch.setattr(kind, "__init__", created)
        monkeypatch.setattr(sys, "argv", [script, *flags(**values)])
        return runpy.run_path(os.path.join(SOURCE, script), run_name="__main__")["model"]

    return run


def same_run(theirs, state_path, curves):
    """Compare all weights, by tensor, and the curves: {folder of ours: (folder of theirs, tag)}."""
    state = torch.load(state_path, weights_only=True)
    assert state["epoch"] == EPOCHS
    ours, theirs = state["model"], theirs.state_dict()
    assert ours.keys() == theirs.keys()
    worst = max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in ours)
    curve = 0.0
    for folder, (other, tag) in curves.items():
        (steps, a), (other_steps, b) = (
            zip(*scalars(f"logs/{x}", tag), strict=True) for x in (folder, other)
        )
        assert steps == other_steps == tuple(range(EPOCHS))
        curve = max(curve, *(abs(x - y) / (abs(y) or 1.0) for x, y in zip(a, b, strict=True)))
    print(f"\n{EPOCHS * len(order(0))} updates: weights {worst:.1e}, curves {curve:.1e}, relative")
    assert worst < 1e-5
    assert curve < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_pretraining_is_the_sources(source):
    utils.setup_seed(SEED)
    theirs = source("mae_pretrain.py", MAE_ViT(**MAE), **RECIPE, max_device_batch_size=BATCH)
    mae_pretrain.main(mae_pretrain.get_args(flags(**MAE, **RECIPE, **OURS)))
    curves = {"shapes/mae-pretrain": ("cifar10/mae-pretrain", "mae_loss")}
    same_run(theirs, "vit-t-mae.state.pth", curves)
    for epoch in range(EPOCHS):
        ours, theirs = (
            np.asarray(Image.open(io.BytesIO(image.encoded_image_string)), dtype=float)
            for image in (
                events(f"logs/{folder}/mae-pretrain").Images("mae_image")[epoch]
                for folder in ("shapes", "cifar10")
            )
        )
        assert abs(ours - theirs).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_is_the_sources(source):
    utils.setup_seed(SEED)
    initial = ViT_Classifier(MAE_Encoder(*MODEL.values()), len(utils.SHAPES))
    theirs = source("train_classifier.py", initial, **RECIPE, max_device_batch_size=BATCH)
    train_classifier.main(train_classifier.get_args(flags(**MODEL, **RECIPE, **OURS)))
    curves = {
        f"shapes/scratch-cls/cls_{key}_{part}": (f"cifar10/scratch-cls/cls_{key}_{part}", tag)
        for key, tag in (("loss", "cls/loss"), ("acc", "cls/acc"))
        for part in ("train", "val")
    }
    same_run(theirs, "vit-t-classifier-from_scratch.state.pth", curves)
