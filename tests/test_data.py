"""Every data set, read from files that the tests write, and what is wrong with them named."""

import argparse
import os

import numpy as np
import pytest
import torch
import torchvision
from helpers import write_cifar
from PIL import Image

import utils

CPU = torch.device("cpu")


def load(dataset, path="data", image_size=32, train_images=None, need_classes=True):
    args = argparse.Namespace(
        dataset=dataset, data_path=str(path), image_size=image_size, train_images=train_images
    )
    return utils.load_dataset(args, CPU, need_classes)


def save_image(path, colour=(200, 100, 50), size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_cifar10_in_the_official_format(tmp_path, monkeypatch):
    files = write_cifar(monkeypatch, "CIFAR10", tmp_path)
    dataset = load("cifar10", tmp_path)
    assert dataset.classes == [f"class {i}" for i in range(10)]
    assert dataset.train_images.shape == (14, 3, 32, 32)
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_images.is_contiguous()
    data, labels = files["data_batch_2"]  # rows are 1,024 red, 1,024 green, 1,024 blue pixels
    assert dataset.train_images[7 + 3, 1, 7, 9] == data[3, 1024 + 7 * 32 + 9]
    assert dataset.train_labels[7:].tolist() == labels
    assert dataset.val_labels.tolist() == files["test_batch"][1]


def test_damaged_cifar10_is_refused_by_its_md5(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    test_cifar10_in_the_official_format(tmp_path, monkeypatch)
    (folder / "data_batch_1").write_bytes(b"damaged")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://localhost:9/cifar.tar.gz")
    with pytest.raises(utils.InputError, match="cannot get cifar10"):
        load("cifar10", tmp_path)


def test_no_network_for_cifar10_says_where_the_archive_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://localhost:9/cifar.tar.gz")
    with pytest.raises(utils.InputError) as error:
        load("cifar10", tmp_path)
    message = str(error.value)
    assert "cifar-10-python.tar.gz" in message and str(tmp_path) in message
    assert "--demo" in message and "\n" not in message


def test_pixels_are_scaled_to_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8)
    ours = utils.to_float(pixels)
    assert ours[0] == -1 and ours[-1] == 1
    torch.testing.assert_close(ours, (pixels.float() / 255 - 0.5) / 0.5)


def test_folder_with_classes(tmp_path):
    for i, name in enumerate(["b é", "a"]):
        for part, n in (("train", 3), ("val", 2)):
            for k in range(n):
                save_image(tmp_path / part / name / f"{k}.png", (i * 200, 10, 10 * k))
    dataset = load("folder", tmp_path, image_size=16)
    assert dataset.classes == ["a", "b é"]
    assert dataset.train_images.shape == (6, 3, 16, 16)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, :, 8, 8].tolist() == [
        [i * 200, 10, 10 * k] for i in (1, 0) for k in range(3)
    ]
    assert dataset.val_labels.tolist() == [0, 0, 1, 1]


def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    img = np.zeros((64, 128, 3), np.uint8)
    img[:, 32:96] = 255  # the middle half is white, and the crop is the middle half
    (tmp_path / "train").mkdir()
    Image.fromarray(img).save(tmp_path / "train" / "x.png")
    dataset = load("folder", tmp_path, image_size=32, need_classes=False)
    assert (dataset.train_images[0, :, :, 2:30] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.full((40, 40), 30000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    dataset = load("folder", tmp_path, need_classes=False)
    assert (dataset.train_images == 30000 // 257).all()


def test_thirty_two_bit_grey_does_not_wrap(tmp_path):
    grey = np.linspace(0, 2**24, 1600).astype(np.int32).reshape(40, 40)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    dataset = load("folder", tmp_path, need_classes=False, image_size=40)
    pixels = dataset.train_images[0, 0].flatten().int()
    assert pixels[0] == 0 and pixels[-1] >= 254 and (pixels.diff() >= 0).all()


def test_validation_images_alone_are_not_trained_on(tmp_path):
    save_image(tmp_path / "val" / "a" / "1.png")
    with pytest.raises(utils.InputError, match="needs .*/train/"):
        load("folder", tmp_path, need_classes=False)


def test_folder_of_images_without_classes(tmp_path):
    for k in range(20):
        save_image(tmp_path / "deep" / str(k % 2) / f"{k}.jpg")
    dataset = load("folder", tmp_path, need_classes=False)
    assert len(dataset.train_images) == 20
    assert torch.equal(dataset.val_images, dataset.train_images[:16])
    with pytest.raises(utils.InputError, match="train/<class>"):
        load("folder", tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(utils.InputError, match="nowhere"):
        load("folder", tmp_path / "nowhere", need_classes=False)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    with pytest.raises(utils.InputError, match=str(tmp_path)):
        load("folder", tmp_path, need_classes=False)
    with pytest.raises(utils.InputError, match=str(tmp_path)):
        load("folder", tmp_path)


def test_transparent_pixels_lie_on_white(tmp_path):
    (tmp_path / "train").mkdir()
    logo = Image.new("RGBA", (32, 32), (0, 0, 0, 0))  # black, and nothing of it can be seen
    logo.paste((0, 0, 0, 255), (0, 0, 32, 8))
    logo.paste((255, 0, 0, 127), (0, 8, 32, 16))
    logo.save(tmp_path / "train" / "a.png")
    grey = Image.merge("LA", [Image.new("L", (32, 32), 0), logo.getchannel("A")])
    grey.save(tmp_path / "train" / "b.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 32, 8))
    palette.save(tmp_path / "train" / "c.png", transparency=1)
    images = load("folder", tmp_path, need_classes=False).train_images
    assert (images[:, :, :8] == 0).all() and (images[:, :, 16:] == 255).all()
    assert images[0, :, 12, 0].tolist() == [255, 128, 128]
    assert images[1, :, 12, 0].tolist() == [128] * 3


def test_what_begins_with_a_dot_is_not_read(tmp_path):
    root = tmp_path / ".cache" / "data"  # folders above do not count
    for part in ("train", "val"):
        save_image(root / part / "a" / "1.png")
        save_image(root / part / "a" / "deep" / "2.PNG")
        for hidden in ("a/.1.png", "a/._IMG_0001.JPG", ".ipynb_checkpoints/1-checkpoint.png"):
            (root / part / hidden).parent.mkdir(exist_ok=True)
            (root / part / hidden).write_text("not an image")
        (root / part / "a" / ".git").mkdir()
        (root / part / "a" / ".git" / "3.png").write_text("not an image")
    for need_classes in (True, False):
        dataset = load("folder", root, need_classes=need_classes)
        assert len(dataset.train_images) == len(dataset.val_images) == 2
        assert dataset.classes == (["a"] if need_classes else [""])
    assert len(utils.list_images(f"{root}/train/")[0]) == 2


@pytest.mark.parametrize("path", ["1.jpg", "cats/1.JPG", "train/cats/1.png"])
def test_own_images_without_the_flag_for_them(path, tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    save_image(tmp_path / path)
    with pytest.raises(utils.InputError, match="has images, no cifar10: add --dataset folder"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_text("to be checked, and loaded again")
    with pytest.raises(utils.InputError, match="no network"):
        load("cifar10", tmp_path)
    save_image(tmp_path / "all" / "other" / "train" / "cats" / "1.png")
    with pytest.raises(utils.InputError, match="no network"):  # in a folder of several datasets
        load("cifar10", tmp_path / "all")


def test_class_that_validation_lacks(tmp_path, capsys):
    for path in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/1.png"):
        save_image(tmp_path / path)
    assert load("folder", tmp_path).val_labels.tolist() == [1]
    assert f"warning: {tmp_path}/val has no image of a, c\n" in capsys.readouterr().out


def test_class_that_training_does_not_know(tmp_path):
    for path in ("train/a/1.png", "train/b/1.png", "test/b/1.png", "test/c/1.png"):
        save_image(tmp_path / path)
    with pytest.raises(utils.InputError, match="'c'"):
        load("folder", tmp_path)
    os.remove(tmp_path / "test/c/1.png")
    os.rmdir(tmp_path / "test/c")
    assert load("folder", tmp_path).val_labels.tolist() == [1]


def test_shapes_are_a_function_of_the_seed():
    images, labels = utils.draw_shapes(range(200), 32, seed=0)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [20] * 10
    again, other = (
        utils.draw_shapes(range(200), 32, seed=0),
        utils.draw_shapes(range(200), 32, seed=1),
    )
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    rows = {image.numpy().tobytes() for image in torch.cat([images, other[0]])}
    assert len(rows) == 400  # no image twice: validation is drawn from another seed


def test_shapes_of_one_kind_differ_and_kinds_differ_in_form():
    images, labels = utils.draw_shapes(range(400), 32, seed=0)
    for kind in range(10):
        colours = images[labels == kind].float().mean((2, 3))
        assert (colours.std(0) > 10).all()
    # Averaged over colours, the outlines tell the ten kinds apart.
    outlines = []
    for kind in range(10):
        edges = images[labels == kind].float().diff(dim=-1).abs().sum(1)
        outlines.append((edges / edges.amax((1, 2), keepdim=True)).mean(0).flatten())
    distance = torch.cdist(torch.stack(outlines), torch.stack(outlines)) + torch.eye(10) * 1e9
    assert distance.min() > 0.5


def test_train_images_are_spread_over_the_classes():
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 20)
    few = utils.stratified_subset(labels, 6)
    assert labels[few].bincount().tolist() == [3, 1, 2]
    assert few.tolist() == [0, 10, 20, 30, 40, 50]
    with pytest.raises(utils.InputError, match="only 60"):
        utils.stratified_subset(labels, 61)


def test_too_many_images_are_refused_before_one_is_read(tmp_path):
    (tmp_path / "1.png").write_text("not an image")
    message = "the dataset does not fit into memory: lower --train_images or --image_size"
    with pytest.raises(utils.InputError, match=message):
        load("folder", tmp_path, image_size=10**6, need_classes=False)
    with pytest.raises(utils.InputError, match=message):
        load("shapes", image_size=99999)
