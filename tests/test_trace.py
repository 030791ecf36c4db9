"""Twenty updates of the original's two scripts, kept as numbers: ours come to the same.

    MAE_SOURCE=CHECKOUT python -m pytest tests/test_trace.py -k table -s

runs those again and prints the table at the end anew. CHECKOUT is one of
github.com/IcarusWizard/MAE, not of its translation, whose mask lacks a patch. Its scripts run as
they stand, but for what PyTorch no longer takes, with a small model as their default, and with
our order and masks in the place of what they would draw.
"""

import functools
import importlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
import zlib

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
import torchvision
from helpers import events, read, scalars
from PIL import Image

import mae_pretrain
import model
import train_classifier
import utils

SOURCE = "MAE_SOURCE" in os.environ and os.path.abspath(os.environ["MAE_SOURCE"])
SCRIPTS = {"mae_pretrain": mae_pretrain, "train_classifier": train_classifier}
KINDS = {"mae_pretrain": "MAE_ViT", "train_classifier": "ViT_Classifier"}
OUTPUT = {"mae_pretrain": "vit-t-mae", "train_classifier": "vit-t-classifier-from_scratch"}
SEED, BATCH, EPOCHS, PATCHES = 7, 20, 5, 16
MODEL = {"image_size": 32, "patch_size": 8, "emb_dim": 24, "encoder_layer": 2, "encoder_head": 3}
MAE = MODEL | {"decoder_layer": 1, "decoder_head": 3, "mask_ratio": 0.75}
# Batches of 20, 20, 20 and 10. The weight decay shows after so few updates.
RECIPE = {"seed": SEED, "batch_size": BATCH, "base_learning_rate": 0.04, "weight_decay": 0.5}
RECIPE |= {"total_epoch": EPOCHS, "warmup_epoch": 2}
OURS = {"dataset": "folder", "data_path": "images", "max_device_batch_size": 8}
OURS |= {"device": "cpu", "precision": "fp32"}


def draw_images(n, seed):
    """Coloured blocks with noise -> uint8 [n,32,32,3], and labels [n] of ten classes.

    By NumPy, like the weights: what PyTorch draws differs between kinds of CPU.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) * 10 // n
    blocks = rng.integers(0, 120, (n, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    noise = rng.integers(0, 30, (n, 32, 32, 3))
    return (blocks + noise + 11 * labels[:, None, None, None]).astype(np.uint8), labels


IMAGES = {"train": draw_images(70, 0), "val": draw_images(16, 1)}


def set_initial_weights(monkeypatch, kind):
    """From here on, a new model of this class begins with weights that are drawn by its names."""
    create = kind.__init__

    @functools.wraps(create)
    def created(self, *args, **more):
        create(self, *args, **more)
        for name, tensor in self.state_dict().items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = rng.uniform(-1, 1, tensor.shape) / max(1, tensor[0].numel()) ** 0.5
            tensor.copy_(torch.from_numpy(values + ("norm" in name and "weight" in name)))

    monkeypatch.setattr(kind, "__init__", created)


def flags(**values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def summary(weights):
    """Of some tensors the norm and three values, and the norm of all together."""
    found, squares = {}, 0
    for name, tensor in weights.items():
        flat = tensor.detach().double().flatten()
        squares += flat.square().sum().item()
        if re.search("token|en.*pos|patchify.w|^pos|1.*qkv|0.norm1.w|0.*fc2.bias|head", name):
            found[name] = [flat.norm().item(), *flat[:: len(flat) // 3][:3].tolist()]
    return found | {"all": [squares**0.5]}


def pictures(folder):
    """Standard deviation of the pixels of each epoch's picture."""
    images = (event.encoded_image_string for event in events(folder).Images("mae_image"))
    return [np.asarray(Image.open(io.BytesIO(image))).std() for image in images]


def order(epoch):
    """The batches of an epoch of ours."""
    rng = utils.generator("order", SEED, epoch)
    return torch.randperm(len(IMAGES["train"][0]), generator=rng).split(BATCH)


def masks():
    """The noise of every image of our run, in turn: each epoch's batches, then the images shown."""
    shown = torch.rand(len(IMAGES["val"][0]), PATCHES, generator=utils.generator("shown", SEED))
    for epoch in range(EPOCHS):
        for update, batch in enumerate(order(epoch)):
            rng = utils.generator("masks", SEED, epoch, update)
            yield from torch.rand(len(batch), PATCHES, generator=rng)
        yield from shown


class CIFAR10(list):
    """Our images, as torchvision would read CIFAR-10."""

    def __init__(self, root, train, download, transform):
        images, labels = IMAGES["train" if train else "val"]
        pairs = zip(images, labels.tolist(), strict=True)
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


def trace_of_the_original(script):
    """Run a script of the original in an empty folder -> its loss of each batch, weights, ..."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
        patch.setattr(torch.utils.data, "DataLoader", DataLoader)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        schedule = torch.optim.lr_scheduler.LambdaLR
        without = lambda optim, lr_lambda, verbose: schedule(optim, lr_lambda)  # noqa: E731
        patch.setattr(torch.optim.lr_scheduler, "LambdaLR", without)
        patch.delitem(sys.modules, "model")
        patch.delitem(sys.modules, "utils")
        patch.syspath_prepend(SOURCE)
        theirs = importlib.import_module("model")
        assert os.path.samefile(os.path.dirname(theirs.__file__), SOURCE)
        # The eps of the timm with which the original was made.
        block = timm.models.vision_transformer.Block
        patch.setattr(theirs, "Block", functools.partial(block, norm_layer=torch.nn.LayerNorm))
        patch.setattr(theirs.MAE_ViT.__init__, "__defaults__", tuple(MAE.values()))
        noise, losses, accuracies = masks(), [], []

        def random_indexes(size):
            forward = next(noise).argsort(stable=True).numpy()
            return forward, np.argsort(forward)

        def noting_loss(self):
            losses.append(self.item())
            torch.autograd.backward(self)

        def noting_accuracy(self, logits, label):
            accuracies.append((logits.argmax(-1) == label).double().mean().item())
            return torch.nn.functional.cross_entropy(logits, label)

        patch.setattr(theirs, "random_indexes", random_indexes)
        patch.setattr(torch.Tensor, "backward", noting_loss)
        patch.setattr(torch.nn.CrossEntropyLoss, "forward", noting_accuracy)
        set_initial_weights(patch, getattr(theirs, KINDS[script]))
        more = flags(**RECIPE, max_device_batch_size=BATCH)
        patch.setattr(sys, "argv", [script, *more])
        done = runpy.run_path(f"{SOURCE}/{script}.py", run_name="__main__")
        done["writer"].flush()
        trace = {"loss": np.reshape(losses, (EPOCHS, -1))}
        trace["weights"] = summary(done["model"].state_dict())
        if script == "mae_pretrain":
            return trace | {"pictures": pictures("logs/cifar10/mae-pretrain")}
        accuracies = np.reshape(accuracies, (EPOCHS, -1))  # the last of a row is of validation
        logs = "logs/cifar10/scratch-cls/cls_loss_val"
        val_losses = [loss for _, loss in scalars(logs, "cls/loss")]
        val = {"val_loss": val_losses, "val_acc": accuracies[:, -1]}
        return trace | {"acc": accuracies[:, :-1]} | val


def our_trace(script, curves):
    """Run our script on the images as files -> what can be seen of the run."""
    for part, (images, labels) in IMAGES.items():
        for i, (img, label) in enumerate(zip(images, labels, strict=True)):
            os.makedirs(f"images/{part}/{label}", exist_ok=True)
            Image.fromarray(img).save(f"images/{part}/{label}/{i:02}.png")
    sizes = MAE if script == "mae_pretrain" else MODEL
    SCRIPTS[script].main(SCRIPTS[script].get_args(flags(**sizes, **RECIPE, **OURS)))
    found = {"weights": summary(read(f"{OUTPUT[script]}.state.pth")["model"])}
    for name, (folder, tag) in curves.items():
        steps, found[name] = zip(*scalars(f"logs/folder/{folder}", tag), strict=True)
        assert steps == tuple(range(EPOCHS))
    return found


def same_weights(found, expected):
    """Measured: 2.4e-7 of a tensor's norm, with PyTorch's code for AVX512, AVX2 and neither."""
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=0, abs=1e-5 * row[0]), name


def means(rows):
    """Means over the images of each epoch, from those of its batches."""
    return pytest.approx(np.average(rows, 1, [len(batch) for batch in order(0)]), rel=1e-5)


def test_pretraining_is_the_originals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_initial_weights(monkeypatch, model.MAE_ViT)
    found = our_trace("mae_pretrain", {"loss": ("mae-pretrain", "mae_loss")})
    expected = TRACE["mae_pretrain"]
    assert found["loss"] == means(expected["loss"])
    same_weights(found["weights"], expected["weights"])
    assert pictures("logs/folder/mae-pretrain") == pytest.approx(expected["pictures"], abs=0.02)


def test_training_a_classifier_is_the_originals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_initial_weights(monkeypatch, model.ViT_Classifier)
    parts = [(key, part) for key in ("loss", "acc") for part in ("train", "val")]
    curves = {x: (f"scratch-cls/cls_{x[0]}_{x[1]}", f"cls/{x[0]}") for x in parts}
    found, expected = our_trace("train_classifier", curves), TRACE["train_classifier"]
    assert found["loss", "train"] == means(expected["loss"])
    assert found["acc", "train"] == means(expected["acc"])
    assert found["loss", "val"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert found["acc", "val"] == pytest.approx(expected["val_acc"])
    same_weights(found["weights"], expected["weights"])


@pytest.mark.skipif(not SOURCE, reason="MAE_SOURCE names no checkout of the original")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_the_originals(script):
    found, expected = trace_of_the_original(script), TRACE[script]
    text = json.dumps({script: found}, indent=2, default=np.ndarray.tolist)
    text = re.sub(r"\[\s+([^][]*?)\s+]", lambda row: f"[{' '.join(row[1].split())}]", text)
    print("\n" + re.sub(r"\d+\.\d+(e-\d+)?", lambda x: f"{float(x[0]):.7g}", text))
    same_weights(found.pop("weights"), expected["weights"])
    for name, values in found.items():
        assert np.ravel(values) == pytest.approx(np.ravel(expected[name]), rel=1e-5), name


# fmt: off
TRACE = {
  "mae_pretrain": {
    "loss": [
      [0.7882332, 0.7079403, 0.600624, 0.5581],
      [0.5090076, 0.4194486, 0.4023676, 0.3417445],
      [0.335732, 0.3153962, 0.309505, 0.2731031],
      [0.269182, 0.2550889, 0.249237, 0.248068],
      [0.2266325, 0.258713, 0.2279038, 0.2108505]
    ],
    "weights": {
      "encoder.cls_token": [0.5612736, -0.1819983, 0.1585516, -0.1532645],
      "encoder.pos_embedding": [2.228365, 0.1213666, 0.0672911, -0.1892736],
      "encoder.patchify.weight": [2.931661, 0.06088164, 0.0865078, -0.08857688],
      "encoder.transformer.0.norm1.weight": [5.21315, 0.780465, 1.272306, 1.589135],
      "encoder.transformer.0.mlp.fc2.bias": [2.964305, 0.6158974, -0.3220277, 0.2356537],
      "encoder.transformer.1.attn.qkv.weight": [4.958789, 0.1714241, -0.1476373, -0.03751098],
      "decoder.mask_token": [0.5295041, 0.1811068, 0.007493639, 0.007004338],
      "decoder.transformer.0.norm1.weight": [5.211192, 0.8723736, 1.659978, 1.400408],
      "decoder.transformer.0.mlp.fc2.bias": [2.837087, 0.1279038, 0.08896589, 0.5963566],
      "decoder.head.weight": [7.938304, 0.0168364, -0.07785069, -0.1054702],
      "decoder.head.bias": [8.064283, 0.7376138, -0.5559439, -0.5984705],
      "all": [28.00212]
    },
    "pictures": [48.28766, 43.28183, 40.11821, 38.59172, 38.15521]
  },
  "train_classifier": {
    "loss": [
      [2.613463, 2.478804, 2.68663, 2.450406],
      [2.271895, 2.477984, 2.059865, 2.366391],
      [2.043435, 2.205939, 2.044454, 2.089794],
      [2.021517, 1.908622, 2.023453, 1.872914],
      [1.98044, 1.705098, 1.849378, 2.250555]
    ],
    "weights": {
      "cls_token": [0.5489024, 0.1710446, -0.0168402, -0.04833308],
      "pos_embedding": [2.323904, 0.08956928, -0.0872399, 0.1023551],
      "patchify.weight": [3.003612, -0.07178945, 0.02963276, -0.01006625],
      "transformer.0.norm1.weight": [5.287359, 0.7087257, 0.6349586, 0.2017504],
      "transformer.0.mlp.fc2.bias": [2.842809, -0.8946689, -0.7344109, 0.9527686],
      "transformer.1.attn.qkv.weight": [4.840985, 0.001497739, -0.2185119, -0.1910844],
      "head.weight": [1.759959, 0.09981497, 0.02136977, 0.005642879],
      "head.bias": [1.871386, 0.1445884, 0.9299132, 0.7661594],
      "all": [21.56707]
    },
    "acc": [
      [0.2, 0.1, 0.1, 0],
      [0.2, 0.1, 0.25, 0.2],
      [0.25, 0.2, 0.1, 0.3],
      [0.2, 0.15, 0.2, 0.3],
      [0.2, 0.3, 0.15, 0.1]
    ],
    "val_loss": [2.337559, 2.172278, 2.019936, 1.928727, 1.905429],
    "val_acc": [0.1875, 0.1875, 0.125, 0.125, 0.125]
  },
}
