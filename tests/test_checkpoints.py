"""Checkpoints are data: whatever is in the file, it is read right or refused in one line."""

import collections
import contextlib
import itertools
import os
import pickle
import random

import pytest
import torch
from helpers import classify, pretrain, read

import train_classifier
import utils
from model import MAE_Encoder, MAE_ViT, ViT_Classifier

pytestmark = pytest.mark.usefixtures("empty_folder")


def tiny():
    torch.manual_seed(0)
    return MAE_ViT(32, 8, 24, 2, 3, 1, 2, mask_ratio=0.6)


def load_mae(path):
    return train_classifier.load_model(path, "MAE_ViT")


def same_output(model, other):
    img, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(img, noise), other.eval()(img, noise))


class Hostile:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class AlsoHostile:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


WRAPPERS = {
    "plain": lambda model: model,
    "DataParallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "compiled in DataParallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "DataParallel compiled": lambda model: torch.compile(torch.nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_whole_module_pickles_of_the_source(wrap):
    model = tiny()  # the original's classes have the same names, in a module of the same name
    torch.save(wrap(model), "vit-t-mae.pt")
    loaded, architecture, _ = load_mae("vit-t-mae.pt")
    same_output(loaded, model)
    assert all(p.is_leaf and p.requires_grad for p in loaded.parameters())
    assert (architecture["encoder_head"], architecture["decoder_head"]) == (3, 2)
    assert architecture["mask_ratio"] == 0.6


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("decoder_dim", [None, 12])
def test_state_dicts(wrap, decoder_dim):
    """Names tell what has wrapped a model, shapes its sizes; a decoder of its own width, too."""
    model = MAE_ViT(32, 8, 24, 2, 3, 1, 3, decoder_dim=decoder_dim)
    torch.save(wrap(model).state_dict(), "plain.pth")
    loaded, architecture, _ = load_mae("plain.pth")
    same_output(loaded, model)
    assert architecture["decoder_dim"] == (decoder_dim or 24)


def test_classifier_that_was_compiled_in_the_middle_of_training():
    model = ViT_Classifier(MAE_Encoder(32, 8, 24, 1))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.zeros(2, 3, 32, 32)).sum().backward()
    torch.save(compiled, "compiled.pt")
    loaded = train_classifier.load_model("compiled.pt", "ViT_Classifier")[0]
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pickled_classifier_is_no_pretrained_model():
    torch.save(ViT_Classifier(MAE_Encoder(32, 8, 24, 1)), "classifier.pth")
    with pytest.raises(
        utils.InputError, match="not hold the weights of MAE_ViT: its kind is ViT_Classifier"
    ):
        load_mae("classifier.pth")


def test_hostile_pickles_are_not_run():
    model, other = tiny(), tiny()
    model.payload, other.payload = Hostile(), AlsoHostile()
    for name, content, message in [
        ("a", Hostile(), "cannot read a.pth .*checkpoint: Trying to load .*posix.system"),
        ("b", {"model": tiny().state_dict(), "x": AlsoHostile()}, "b.pth does not hold the"),
        ("c", model, "cannot read c.pth .*checkpoint: Trying to load .*posix.system"),
        ("f", AlsoHostile(), "f.pth does not hold the weights of MAE_ViT"),
    ]:
        torch.save(content, f"{name}.pth")
        with pytest.raises(utils.InputError, match=message) as error:
            load_mae(f"{name}.pth")
        assert "weights_only" not in str(error.value)  # PyTorch's advice is to run it
    other.odd = collections.defaultdict(list, a=[1])
    torch.save(other, "odd.pth")
    with pytest.raises(utils.InputError, match="odd.pth as a PyTorch checkpoint:") as error:
        load_mae("odd.pth")
    assert "weights_only" not in str(error.value) and "issue" not in str(error.value)
    del other.odd
    torch.save(other, "other.pth")
    same_output(load_mae("other.pth")[0], other)  # its payload becomes an InertModule
    for name, content in (("d", Hostile()), ("e", {"x": AlsoHostile()})):
        with open(f"{name}.pth", "wb") as file:
            pickle.dump(content, file)
        with pytest.raises(utils.InputError):
            load_mae(f"{name}.pth")
    assert not os.path.exists("executed")


def test_wrong_tensors_are_named():
    good = tiny().state_dict()
    name = "encoder.transformer.1.mlp.fc2.weight"
    wrong_shape = good[name].T.contiguous()
    nan = good[name].clone()
    nan[3, 4] = float("nan")
    for weights, message in [
        ({k: v for k, v in good.items() if k != name}, f"Missing key.*{name}"),
        (good | {"decoder.extra": torch.zeros(1)}, "Unexpected key.*decoder.extra"),
        (good | {name: wrong_shape}, f"size mismatch for {name}.*96, 24.*24, 96"),
        (good | {name: nan}, f"{name} is not a tensor of finite floating-point numbers"),
        (good | {name: good[name].long()}, f"{name} is not a tensor of finite floating"),
        (good | {name: "text"}, f"{name} is not a tensor"),
        (good | {"encoder.patchify.weight": torch.zeros(1).expand(24, 3, 8, 2**31)}, "MAE_ViT"),
        (good | {"encoder.pos_embedding": torch.zeros(1).expand(16, 1, 2**40)}, "MAE_ViT"),
        (good | {"encoder.pos_embedding": None}, "encoder.pos_embedding is not a tensor"),
        ({}, "wrong.pth does not hold the weights of MAE_ViT.*pos_embedding"),
    ]:
        torch.save(weights, "wrong.pth")
        with pytest.raises(utils.InputError, match=message) as error:
            load_mae("wrong.pth")
        assert "\n" not in str(error.value)


def test_tensors_are_believed_and_not_what_a_file_says_of_their_sizes():
    pretrain()
    content = read("vit-t-mae.pth")
    good = load_mae("vit-t-mae.pth")
    for change in (
        {"emb_dim": 10**9}, {"encoder_layer": 10**9}, {"patch_size": 0}, {"image_size": [32]},
        {"image_size": torch.zeros(3)},
    ):  # fmt: skip
        torch.save(content | {"architecture": content["architecture"] | change}, "odd.pth")
        model, architecture, _ = load_mae("odd.pth")
        assert architecture == good[1]
        same_output(model, good[0])


def test_what_only_the_file_says_must_fit():
    pretrain()
    content = read("vit-t-mae.pth")
    for change in (
        {"encoder_head": 5}, {"encoder_head": 0}, {"encoder_head": "3"}, {"mask_ratio": 7.0},
        {"mask_ratio": float("nan")}, {"decoder_head": None}, {"encoder_head": torch.zeros(3, 3)},
        {"odd": "a\nb"},
    ):  # fmt: skip
        torch.save(content | {"architecture": content["architecture"] | change}, "odd.pth")
        with pytest.raises(utils.InputError, match="odd.pth"):
            load_mae("odd.pth")
    for change in (
        {"architecture": None}, {"model": None}, {"kind": None}, {"kind": "a\nb"}, {"model": []},
    ):  # fmt: skip
        torch.save(content | change, "odd.pth")
        with pytest.raises(utils.InputError, match="odd.pth") as error:
            load_mae("odd.pth")
        assert "\n" not in str(error.value)


def test_tensors_that_share_memory_are_loaded_apart():
    model = tiny()
    weights = model.state_dict()
    weights["decoder.transformer.0.norm1.bias"] = weights["decoder.transformer.0.norm2.bias"]
    torch.save(weights, "tied.pth")
    block = load_mae("tied.pth")[0].decoder.transformer[0]
    assert block.norm1.bias.data_ptr() != block.norm2.bias.data_ptr()


def test_weights_of_another_precision_are_loaded_as_fp32():
    model = MAE_ViT(32, 8, 24, 2, 3, 1, 3).bfloat16()
    torch.save(model.state_dict(), "half.pth")
    same_output(load_mae("half.pth")[0], model.float())


def test_modules_that_contain_each_other_do_not_hang():
    inner = torch.nn.Module()
    for _ in range(40):
        outer = torch.nn.Module()
        outer.a, outer.b = inner, inner
        inner = outer
    model = tiny()
    model.encoder.extra = inner
    torch.save(model, "nested.pth")
    same_output(load_mae("nested.pth")[0], model)


def test_states_of_another_run_or_version_are_refused():
    pretrain()
    content = read("vit-t-mae.state.pth")
    optim = content["optim"]
    needed = content.keys() - {"scaler", "ended", "written"}  # which earlier versions lack
    lacking = ({k: v for k, v in content.items() if k != key} for key in needed)
    for state, message in [
        *((state, "vit-t-mae.state.pth") for state in lacking),
        (read("vit-t-mae.pth"), "not a state of this version"),
        ([1, 2], "not a state of this version"),
        (content | {"args": content["args"] | {"drop_path": 0}}, "version of this script, or of"),
        (content | {"fingerprint": 0}, "not the images"),
        (content | {"model": {}}, "does not fit this model.*Missing key"),
        (content | {"optim": {}}, "does not fit this model"),
        (content | {"optim": {**optim, "param_groups": []}}, "does not fit this model"),
    ]:
        torch.save(state, "vit-t-mae.state.pth")
        with pytest.raises(utils.InputError, match=message):
            pretrain("--resume")
    for key, value in itertools.product(("args", "sums", "results", "epoch"), (None, "text", 7)):
        torch.save(content | {key: value}, "vit-t-mae.state.pth")
        with contextlib.suppress(utils.InputError):  # whatever it is, in one line
            pretrain("--resume")


def damaged_files(good, n, seed=0):
    """n ways to damage the bytes of a good file, by name."""
    rng = random.Random(seed)
    for i in range(n):
        kind = ["cut", "flip", "flips", "zeros", "random", "grown", "hole", "text"][i % 8]
        content = bytearray(good)
        if kind == "cut":
            content = content[: rng.randrange(len(content))]
        elif kind in ("flip", "flips"):
            for _ in range(1 if kind == "flip" else 50):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "zeros":
            start = rng.randrange(len(content))
            content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        elif kind == "random":
            content = bytearray(rng.randbytes(rng.randrange(2000)))
        elif kind == "grown":
            content += rng.randbytes(rng.randrange(1, 5000))
        elif kind == "hole":
            start = rng.randrange(len(content))
            del content[start : start + rng.randrange(1, 5000)]
        elif kind == "text":
            content = bytearray(b"not a checkpoint\n" * rng.randrange(100))
        yield kind, bytes(content)


def offer(content, path, load, weights):
    """A damaged file is refused in one line, or gives just what the good one held."""
    with open(path, "wb") as file:
        file.write(content)
    try:
        found = load(path)
    except utils.InputError as error:
        assert "\n" not in str(error) and path in str(error)
        return "refused"
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    return "loaded"


def test_damaged_files():
    classify("--total_epoch", "1")
    pretrain("--total_epoch", "1")
    for path, load in (
        ("vit-t-mae.pth", lambda path: load_mae(path)[0].state_dict()),
        ("vit-t-mae.state.pth", lambda path: utils.read_checkpoint(path)["model"]),
    ):
        with open(path, "rb") as file:
            good = file.read()
        weights, outcomes = read(path)["model"], []
        for _, content in damaged_files(good, 80):
            outcomes.append(offer(content, f"damaged-{path}", load, weights))
        assert outcomes.count("refused") >= 60


def test_model_files_are_no_larger_than_their_weights_need():
    pretrain()
    weights = read("vit-t-mae.pth")["model"]
    bytes_of_weights = sum(tensor.nbytes for tensor in weights.values())
    assert os.path.getsize("vit-t-mae.pth") < bytes_of_weights + 500 * len(weights) + 5000
