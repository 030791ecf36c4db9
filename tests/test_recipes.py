"""What goes past the published recipe: augmentation, fine-tuning settings, evaluation, export."""

import os
import re
import shutil
import threading

import numpy as np
import pytest
import timm
import torch
from helpers import (
    REPOSITORY,
    classify,
    each_update,
    events,
    load_model,
    pretrain,
    python_of,
    read,
    scalars,
    write_cifar,
)
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

import mae_pretrain
import train_classifier
import utils
from model import MAE_Encoder, MAE_ViT, ViT_Classifier
from train_classifier import to_timm

pytestmark = pytest.mark.usefixtures("empty_folder")


def numbers(n, columns, seed=0):
    return torch.rand(n, columns, generator=torch.Generator().manual_seed(seed))


def unchanged(n):
    """Draws with which distort changes nothing: no shift, no flip, no operation, no square."""
    draw = torch.full((n, 9), 0.5)
    draw[:, 0], draw[:, 4], draw[:, 5] = 0.999, 0.0, 0.999
    return draw


def test_distort_can_leave_an_image_as_it_is_shift_and_flip_it():
    img = utils.to_float(utils.draw_shapes(range(6), 32, 0)[0])
    draw = unchanged(6)
    torch.testing.assert_close(train_classifier.distort(img, draw), img, rtol=0, atol=1e-4)
    draw[1, 4] = 0.9
    draw[2, 2] = 1.0
    draw[3, 3] = 0.0
    draw[4, 5:] = torch.tensor([0.0, 1.0, 0.5, 0.5])
    changed = train_classifier.distort(img, draw)
    torch.testing.assert_close(changed[1], img[1].flip(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(changed[2, :, :, :-4], img[2, :, :, 4:], rtol=0, atol=1e-4)
    torch.testing.assert_close(changed[3, :, 4:], img[3, :, :-4], rtol=0, atol=1e-4)
    erased = (changed[4] == 0).all(0)
    assert erased.sum() in range(18**2, 20**2 + 1) and erased[16, 16] and not erased[0, 0]
    torch.testing.assert_close(changed[5], img[5], rtol=0, atol=1e-4)  # each has its own draw


def test_every_operation_changes_images_and_stays_in_range():
    img = utils.to_float(utils.draw_shapes(range(20), 32, 0)[0])
    for operation in range(train_classifier.OPERATIONS - 1):
        for level in (0.0, 1.0):
            draw = unchanged(20)
            draw[:, 0] = (operation + 0.5) / train_classifier.OPERATIONS
            draw[:, 1] = level
            changed = train_classifier.distort(img, draw)
            assert (changed - img).abs().amax((1, 2, 3)).min() > 0.02, operation
            assert changed.abs().max() <= 1
            draw[:, 1] = 0.5  # no strength
            same = train_classifier.distort(img, draw)
            torch.testing.assert_close(same, img, rtol=0, atol=1e-4)


def test_mixing_tells_the_weight_of_each_image():
    img, other = torch.ones(400, 3, 32, 32), -torch.ones(400, 3, 32, 32)
    mixed, share = train_classifier.mix(img, other, numbers(400, 4))
    torch.testing.assert_close((mixed.mean((1, 2, 3)) + 1) / 2, share)
    alone, cut = share == 1, (mixed.abs() == 1).all(3).all(2).all(1) & (share < 1)
    assert 0.4 < alone.float().mean() < 0.6 and 0.15 < cut.float().mean() < 0.35
    assert share.min() >= 0 and share[~alone].std() > 0.2


def test_strength_scales_all_but_shift_and_flip():
    img, rand, changed = (
        utils.to_float(utils.draw_shapes(range(200), 32, 0)[0]),
        numbers(200, 13),
        [],
    )
    moved = rand[:, :9].clone()
    moved[:, 0], moved[:, 5] = 0.999, 1.0
    plain = train_classifier.distort(img, moved)  # shifted and flipped, nothing else
    for strength in (0.0, 0.5, 1.0):
        out = train_classifier.distort(img, rand[:, :9], strength)
        mixed, share = train_classifier.mix(out, out.roll(1, 0), rand[:, 9:], strength)
        changed.append(((out - plain).abs().mean().item(), (share < 1).float().mean().item()))
    assert changed[0] == (pytest.approx(0, abs=1e-5), 0.0)
    assert changed[0][0] < changed[1][0] < changed[2][0]
    assert 0.15 < changed[1][1] < 0.35 and 0.4 < changed[2][1] < 0.6
    assert train_classifier.get_args(["--augment"]).augment == 1.0
    assert train_classifier.get_args([]).augment is None


def test_augmentation_smooths_labels_by_its_strength(monkeypatch):
    """A model is sure of the only class there is: its loss is what is asked for the other nine."""

    def sure(self, img, *_):
        return img.new_tensor([20.0] + [0.0] * 9).expand(len(img), 10) + 0 * self.head.bias

    dataset = utils.read_shapes(32, 60)
    dataset = dataset._replace(train_labels=torch.zeros(60, dtype=torch.int64))
    monkeypatch.setattr(utils, "read_shapes", lambda *_: dataset)
    monkeypatch.setattr(ViT_Classifier, "forward", sure)
    for strength, smoothing in (("0", 0.0), ("0.5", 0.05), ("1", 0.1)):
        classify("--augment", strength, "--total_epoch", "1", "--run_name", strength)
        ((_, loss),) = scalars(f"logs/shapes/{strength}/cls_loss_train", "cls/loss")
        assert loss == pytest.approx(20 * smoothing * 9 / 10, abs=1e-4)


def test_random_resized_crop_shows_a_part_of_the_image():
    axis = torch.linspace(-1, 1, 32)
    img = torch.stack([axis.expand(32, 32), axis[:, None].expand(32, 32), torch.zeros(32, 32)])
    draw = numbers(300, 5)
    crop = mae_pretrain.random_resized_crop(img.expand(300, -1, -1, -1), draw)
    width, height = crop[:, 0, 16, -1] - crop[:, 0, 16, 0], crop[:, 1, -1, 16] - crop[:, 1, 0, 16]
    area = (width.abs() * height).sort().values / 4
    assert 0.15 < area[3] < 0.3 and area[-1] > 0.85
    assert 0.4 < (width < 0).float().mean() < 0.6 and (height > 0).all()
    whole = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.0]])
    same = mae_pretrain.random_resized_crop(img[None], whole)
    torch.testing.assert_close(same[0], img, rtol=0, atol=1e-3)


def test_drop_path_leaves_branches_out_and_keeps_the_mean():
    scale = train_classifier.drop_path_scale(4000, 5, 0.4, torch.Generator().manual_seed(0))
    assert (scale[:, 0] == 1).all()
    torch.testing.assert_close((scale == 0).float().mean((0, 2)), torch.linspace(0, 0.4, 5),
        rtol=0, atol=0.02)  # fmt: skip
    torch.testing.assert_close(scale.mean((0, 2)), torch.ones(5), rtol=0, atol=0.02)

    torch.manual_seed(0)
    model = ViT_Classifier(MAE_Encoder(32, 8, 24, 3, 3), 10)
    img = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(img, torch.ones(4, 3, 2)), model(img))
    scale = torch.ones(4, 3, 2)
    scale[1] = 0  # only this image loses its branches
    scaled = model(img, scale)
    torch.testing.assert_close(scaled[[0, 2, 3]], model(img)[[0, 2, 3]])
    tokens = model.layer_norm(model.cls_token[0, 0])
    torch.testing.assert_close(scaled[1], model.head(tokens))


def test_layer_decay_by_depth():
    """The head and the norm below it learn at the whole rate, each block at half that above it."""
    found = []

    def note(optim):
        found[:] = [(group["lr"], len(group["params"])) for group in optim.param_groups]

    flags = "--layer_decay 0.5 --encoder_layer 3 --warmup_epoch 0 --total_epoch 1".split()
    with each_update(note):
        classify(*flags)
    rate = 1e-3 * 25 / 256
    expected = [(rate / 16, 4), (rate / 8, 11), (rate / 4, 11), (rate / 2, 11), (rate, 4)]
    assert sorted(found) == [(pytest.approx(lr), n) for lr, n in expected]


def test_linear_probe_trains_only_the_head_and_saves_a_plain_classifier():
    pretrain()
    flags = ["--pretrained_model_path", "vit-t-mae.pth", "--linear_probe", "--total_epoch", "20"]
    classify(*flags, "--base_learning_rate", "0.1")
    pretrained, content = read("vit-t-mae.pth")["model"], read("cls.pth")
    for name, tensor in content["model"].items():
        if not name.startswith("head."):
            assert torch.equal(tensor, pretrained[f"encoder.{name}"]), name

    # By hand: the norm's statistics are in the head of the file.
    model, dataset = load_model("cls.pth"), utils.read_shapes(32)
    with torch.no_grad():
        val = model(utils.to_float(dataset.val_images))
    loss = cross_entropy(val, dataset.val_labels).item()
    assert content["metrics"]["val"]["loss"] == pytest.approx(loss, rel=1e-4)
    acc = (val.argmax(-1) == dataset.val_labels).float().mean().item()
    assert content["metrics"]["val"]["acc"] == pytest.approx(acc)
    assert os.path.isdir("logs/shapes/probe-cls")

    for other in (["--augment"], ["--drop_path", "0.1"], ["--layer_decay", "0.5"]):
        with pytest.raises(utils.InputError, match="--linear_probe"):
            classify(*flags, *other)


def test_a_linear_probe_of_one_image():
    pretrain("--total_epoch", "1")
    flags = ["--pretrained_model_path", "vit-t-mae.pth", "--linear_probe", "--train_images", "1"]
    classify(*flags)
    weights = read("cls.pth")["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_holdout_chooses_on_training_images_and_reports_on_test_images(capsys):
    classify("--holdout", "20", "--total_epoch", "3")
    out = capsys.readouterr().out
    assert "40 training, 20 validation" in out
    content, results = read("cls.pth"), read("cls.state.pth")["results"]
    model, dataset = load_model("cls.pth"), utils.read_shapes(32)
    with torch.no_grad():
        test = model(utils.to_float(dataset.val_images)).argmax(-1) == dataset.val_labels
    acc = test.float().mean().item()
    assert results["best"]["test_acc"] == pytest.approx(acc)
    assert content["metrics"]["val"]["acc"] == results["best"]["acc"] != results["best"]["test_acc"]
    last = out.splitlines()[-1]
    for part in ("37 test images", f"best {acc:.2%}", "chosen on 20 training images"):
        assert part in last
    # Those held out are not trained on: together they are all.
    classify("--holdout", "20", "--total_epoch", "1", "--base_learning_rate", "0")
    metrics, few = read("cls.pth")["metrics"], utils.read_shapes(32, 60)
    with torch.no_grad():
        loss = cross_entropy(load_model("cls.pth")(utils.to_float(few[0])), few[1]).item()
    assert (40 * metrics["train"]["loss"] + 20 * metrics["val"]["loss"]) / 60 == pytest.approx(loss)
    for n in ("60", "61"):
        with pytest.raises(utils.InputError, match=f"--holdout {n}"):
            classify("--holdout", n)


def evaluate(*flags):
    train_classifier.main(train_classifier.get_args([*flags, "--device", "cpu"]))


def test_eval_shows_accuracy_by_class_and_the_confusion_matrix(capsys):
    classify()
    acc = read("cls.pth")["metrics"]["val"]["acc"]
    capsys.readouterr()
    process = torch.get_num_threads(), threading.excepthook
    evaluate("--eval", "cls.pth", "--dataset", "shapes")
    assert process == (torch.get_num_threads(), threading.excepthook)
    lines = capsys.readouterr().out.splitlines()
    assert f"accuracy on 37 validation images: {acc:.2%}" in lines[-2]
    labels = utils.read_shapes(32).val_labels
    correct = 0
    for i, name in enumerate(utils.SHAPES):
        line = next(line for line in lines if line.startswith(f"{name}: "))
        n = (labels == i).sum().item()
        assert line.endswith(f"of {n}")
        correct += float(line.split()[-3].rstrip("%")) / 100 * n
    assert correct == pytest.approx(37 * acc, abs=0.01)
    assert scalars("logs/shapes/eval-cls", "cls/acc") == [(0, pytest.approx(acc))]
    for name in ("confusion", "predictions"):
        picture = pixels(f"cls-{name}.png")
        assert len(events("logs/shapes/eval-cls").Images(f"cls/{name}")) == 1
        assert min(picture.shape[:2]) > 400 and picture.std() > 5
    assert "pictures: cls-confusion.png, cls-predictions.png" in lines[-1]


def test_a_confusion_matrix_has_a_row_for_each_true_class():
    img = train_classifier.draw_confusion(torch.tensor([[0, 9], [0, 9]]), ["a", "b"])[0]
    assert img[:, -20:].mean() < img[-20:].mean()  # the last column is dark, the last row half
    large = train_classifier.draw_confusion(torch.eye(2000).long(), [str(i) for i in range(2000)])
    assert large.shape == (3, 2000, 2000)


def test_eval_refuses_what_does_not_fit(tmp_path):
    classify()
    pretrain()
    content = read("cls.pth")
    content["classes"] = content["classes"][::-1]
    torch.save(content, "other.pth")
    for flags, message in [
        ("vit-t-mae.pth --dataset shapes", "MAE_ViT"),
        ("nothing.pth --dataset shapes", "nothing.pth"),
        ("other.pth --dataset shapes", "classes"),
    ]:
        with pytest.raises(utils.InputError, match=message):
            evaluate("--eval", *flags.split())
    assert not os.path.exists("other-confusion.png")


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_export_to_timm(kind):
    torch.manual_seed(0)
    encoder = MAE_Encoder(32, 4, 48, 3, 4)
    model = ViT_Classifier(encoder, 7)
    for parameter in model.parameters():  # zeros and ones would hide what is lost
        parameter.data += 0.3 * torch.randn(parameter.shape)
    weights, arguments = to_timm(model if kind == "classifier" else encoder)
    vit = timm.create_model("vit_tiny_patch16_224", **arguments)
    vit.load_state_dict(weights, strict=True)
    vit.eval()
    img = torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model(img) if kind == "classifier" else model.features(img)
        torch.testing.assert_close(vit(img), expected, rtol=1e-5, atol=1e-5)


def pixels(path):
    with Image.open(path) as img:
        return np.asarray(img.convert("RGB")).astype(int)


def test_reconstruct_images_at_several_ratios(capsys):
    pretrain("--norm_pix_loss")
    os.makedirs("images/deep")
    for i, size in enumerate([(40, 30), (100, 64), (32, 32)]):
        img = np.random.default_rng(i).integers(0, 100, (*size, 3), dtype=np.uint8)
        Image.fromarray(img).save(f"images/{'deep/' * (i % 2)}{i}.png")
    show = ["--reconstruct", "images", "--mask_ratio"]
    mae_pretrain.main(mae_pretrain.get_args([*show, "0.5", "0.75", "0.9"]))
    page = pixels("vit-t-mae-reconstructed.png")
    assert "3 of 3 images" in capsys.readouterr().out
    hidden = []  # grey pixels
    for ratio in ("0.5", "0.75", "0.9"):
        mae_pretrain.main(mae_pretrain.get_args([*show, ratio]))
        name = re.search(r"\S+\.png", capsys.readouterr().out)[0]
        hidden.append((abs(pixels(name) - 127.5) < 1).all(-1).sum())
    # 8, 4 and 1 of 16 patches of 8x8 stay visible.
    assert [x / hidden[0] for x in hidden] == pytest.approx([1, 12 / 8, 15 / 8], rel=0.01)
    assert (abs(page - 127.5) < 1).all(-1).sum() == pytest.approx(sum(hidden), rel=0.01)
    mae_pretrain.main(mae_pretrain.get_args(["--reconstruct", "images/0.png"]))
    assert "1 of 1 images" in (line := capsys.readouterr().out) and "structed-5.png" in line
    assert (pixels("vit-t-mae-reconstructed.png") == page).all()
    with open("notes.txt", "w") as file:
        file.write("not an image")
    for flags, message in [
        ("--reconstruct nowhere", "there is no folder or image nowhere"),
        ("--reconstruct notes.txt", "no image.*: notes.txt"),
        ("--reconstruct images --model_path none.pth", "none.pth"),
        ("--mask_ratio 0.5 0.75", "--reconstruct"),
        ("--reconstruct images --mask_ratio 0.99", "leaves no patch"),
    ]:
        with pytest.raises(utils.InputError, match=message):
            mae_pretrain.main(mae_pretrain.get_args(flags.split()))


def test_reconstructions_are_spread_over_the_folder():
    pretrain()
    for i in range(40):
        os.makedirs(f"images/{i // 20}", exist_ok=True)
        colour = (5 * i, 255 - 5 * i, 0)
        Image.new("RGB", (32, 32), colour).save(f"images/{i // 20}/{i:02}.png")
    mae_pretrain.main(mae_pretrain.get_args(["--reconstruct", "images"]))
    found = set(map(tuple, pixels("vit-t-mae-reconstructed.png").reshape(-1, 3).tolist()))
    shown = [i for i in range(40) if (5 * i, 255 - 5 * i, 0) in found]
    assert shown == [i * 40 // 16 for i in range(16)]


def test_predict_images_without_labels(capsys):
    classify("--total_epoch", "1")
    images = utils.read_shapes(32).val_images[:37]
    os.makedirs("new/deep")
    for i, img in enumerate(images):
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(f"new/{'deep/' * (i % 2)}{i:02}.png")
    with torch.no_grad():
        probabilities = load_model("cls.pth")(utils.to_float(images)).softmax(-1)
    capsys.readouterr()
    evaluate("--eval", "cls.pth", "--predict", "new", "--precision", "fp32")
    lines = capsys.readouterr().out.splitlines()
    for i, p in enumerate(probabilities):
        name = f"new/{'deep/' * (i % 2)}{i:02}.png"
        line = next(line for line in lines if line.startswith(f"{name}: "))
        predicted, share = re.fullmatch(r".*: (.*), (.*)%", line).groups()
        assert predicted == list(utils.SHAPES)[p.argmax()]
        assert float(share) == pytest.approx(100 * p.max().item(), abs=0.06)
    every = pixels("cls-predicted.png")
    assert not os.path.exists("logs/shapes/eval-cls")
    evaluate("--eval", "cls.pth", "--predict", "new/00.png", "--device", "cpu")
    assert "cls-predicted-2.png" in capsys.readouterr().out
    assert pixels("cls-predicted-2.png").size < every.size / 8
    for flags in (["--eval", "cls.pth", "--predict", "nowhere"], ["--predict", "new"]):
        with pytest.raises(utils.InputError, match="nowhere|add --eval"):
            evaluate(*flags)


def own_images(train, val):
    """An image for each class of the two parts."""
    for name in (*(f"train/{x}" for x in train), *(f"val/{x}" for x in val)):
        os.makedirs(f"mine/{name}")
        Image.new("RGB", (32, 32), "red").save(f"mine/{name}/1.png")


def test_eval_takes_the_dataset_of_the_file(capsys):
    own_images("ab", "ab")
    flags = "--dataset folder --data_path mine --train_images 2 --total_epoch 1".split()
    classify(*flags)
    evaluate("--eval", "cls.pth")
    assert "accuracy on 2 validation images" in capsys.readouterr().out
    assert os.path.isdir("logs/folder/eval-cls")
    os.rename("mine", "yours")
    with pytest.raises(utils.InputError, match="there is no folder.*--data_path"):
        evaluate("--eval", "cls.pth")
    evaluate("--eval", "cls.pth", "--data_path", "yours", "--run_name", "again")
    assert os.path.isdir("logs/folder/again")
    with pytest.raises(utils.InputError, match="the dataset has"):
        evaluate("--eval", "cls.pth", "--dataset", "shapes")


def test_eval_needs_no_training_images(capsys):
    own_images("abc", "ac")
    classify("--dataset", "folder", "--data_path", "mine", "--train_images", "3")
    evaluate("--eval", "cls.pth")
    lines = [x for x in capsys.readouterr().out.splitlines() if re.match("[abc]: |accuracy on", x)]
    shutil.rmtree("mine/train")
    evaluate("--eval", "cls.pth")
    out = capsys.readouterr().out
    assert lines[-4:] == [x for x in out.splitlines() if re.match("[abc]: |accuracy on", x)]
    assert "cls-confusion-2.png, cls-predictions-2.png" in out  # nothing is overwritten


def test_eval_does_not_download_to_a_path_of_another_computer(monkeypatch, capsys):
    write_cifar(monkeypatch, "CIFAR10")
    classify("--data_path", "of/another/computer", "--total_epoch", "1")
    content = read("cls.pth")
    content["classes"] = [f"class {i}" for i in range(10)]
    for dataset in ("folder", "cifar10"):  # CIFAR is not in the folder of another dataset
        content["args"]["dataset"] = dataset
        torch.save(content, "cls.pth")
        evaluate("--eval", "cls.pth", "--dataset", "cifar10")
    assert capsys.readouterr().out.count("accuracy on 7 validation images") == 2
    assert not os.path.exists("of")
    os.makedirs("of/another")
    os.rename("data", "of/another/computer")
    evaluate("--eval", "cls.pth")
    assert "accuracy on 7 validation images" in capsys.readouterr().out


def strange_folder():
    """What strangers' folders hold, in two classes with names that are not ASCII."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    files = [
        ("grau.png", "L", (90, 70)), ("alpha é.png", "RGBA", (90, 70)), ("tiny.bmp", "RGB", (5, 3)),
        ("grey-alpha.png", "LA", (90, 70)), ("cmyk.jpg", "CMYK", (90, 70)),
        ("palette.png", "P", (90, 70)), ("one-bit.png", "1", (90, 70)),
        ("sixteen.png", "I;16", (90, 70)), ("deep/very wide.webp", "RGB", (900, 20)),
        ("turned.jpg", "RGB", (90, 70)),
    ]  # fmt: skip
    for folder in (
        f"strange/{x}/{y}" for x in ("train", "val") for y in ("Äpfel und Birnen", "猫")
    ):
        for name in ("deep", ".thumbnails", "../.ipynb_checkpoints"):
            os.makedirs(f"{folder}/{name}", exist_ok=True)
        for file, mode, size in files:
            img = Image.effect_noise(size, 200)
            img = img.convert("RGB").convert(mode) if mode != "I;16" else img.convert("I;16")
            img.save(f"{folder}/{file}", **{"exif": exif} if "turned" in file else {})
        frames = [Image.new("RGB", (64, 64), (i * 80, 0, 0)) for i in range(3)]
        frames[0].save(f"{folder}/moves.gif", save_all=True, append_images=frames)
        for file in ("notes.txt", "._grau.jpg", ".hidden.jpg", ".thumbnails/a.png"):
            with open(f"{folder}/{file}", "w") as text:
                text.write("not an image")


def test_a_strangers_folder(capsys):
    strange_folder()
    with (
        open("strange/train/猫/cmyk.jpg", "rb") as whole,
        open("strange/train/猫/torn.jpg", "wb") as torn,
    ):
        torn.write(whole.read()[:2000])
    folder = "--dataset folder --data_path strange --train_images 20".split()
    with pytest.raises(utils.InputError, match="1 of 23 images: .* strange/train/猫/torn.jpg"):
        pretrain("--dataset", "folder", "--data_path", "strange", "--train_images", "23")
    os.remove("strange/train/猫/torn.jpg")
    for size, patch in (("64", "8"), ("96", "16"), ("224", "16")):
        sizes = ["--image_size", size, "--patch_size", patch]
        pretrain(*folder, *sizes, "--total_epoch", "1")
        classify(*folder, "--total_epoch", "1", *sizes, "--pretrained_model_path", "vit-t-mae.pth")
    assert read("cls.pth")["classes"] == ["Äpfel und Birnen", "猫"]
    evaluate("--eval", "cls.pth")
    assert "猫: " in capsys.readouterr().out


def test_the_python_of_the_readme_runs():
    for name in ("weights", "pic"):
        os.symlink(os.path.join(REPOSITORY, name), name)
    found = {}
    exec(python_of("README.md"), found)
    assert isinstance(found["model"], MAE_ViT)  # read by plain PyTorch
    img = utils.to_float(found["images"])
    with torch.no_grad():
        logits = found["classifier"].eval()(img)
        torch.testing.assert_close(found["vit"].eval()(img), logits, rtol=1e-5, atol=1e-5)
        found["model"].encoder.shuffle.ratio = 0.0
        tokens, _ = found["model"].encoder(img)  # in another order, which makes no difference
    features = normalize(tokens[0])
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-5)
    assert (found["nearest"][:, 0] == torch.arange(16)).all()  # each is nearest to itself
    pretrain("--decoder_dim", "12")  # plain PyTorch reads a decoder of another width, too
    file = read("vit-t-mae.pth")
    MAE_ViT(**file["architecture"]).load_state_dict(file["model"])
