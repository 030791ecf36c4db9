"""Train a Vision Transformer classifier, from scratch or from a pretrained masked autoencoder.

    python train_classifier.py
    python train_classifier.py --pretrained_model_path vit-t-mae.pth \\
                               --output_model_path vit-t-classifier-from_pretrained.pth
    python train_classifier.py --demo
    python train_classifier.py --eval vit-t-classifier-from_scratch.pth
    python train_classifier.py --eval vit-t-classifier-from_scratch.pth --predict IMAGE_OR_FOLDER
    tensorboard --logdir logs

Prints the accuracy on the validation images after every epoch, and writes the classifier of the
best epoch to --output_model_path. The demo takes half a minute on two CPU cores and reaches 39 %
from scratch, 63 % from the pretrained encoder (see tests/RESULTS.md).
"""

import argparse
import contextlib
import copy
import math
import os

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import avg_pool2d, cross_entropy, one_hot
from torchvision.transforms.functional import to_tensor

import utils
from model import ViT_Classifier

load_model, predict, to_timm = utils.load_model, utils.predict, utils.to_timm  # as notebooks ask
ENCODER = dict(image_size=32, patch_size=2, emb_dim=192, encoder_layer=12, encoder_head=3)
# 500 labels, where mae_pretrain.py --demo saw 10,000 images.
DEMO = dict(
    dataset="shapes", train_images=500, batch_size=32, base_learning_rate=8e-3, total_epoch=20,
    warmup_epoch=2, output_model_path="vit-t-classifier-demo.pth",
)  # fmt: skip
DEMO_ENCODER = ENCODER | {"patch_size": 8, "emb_dim": 64, "encoder_layer": 4, "encoder_head": 4}


def get_args(argv=None):
    parser = utils.ArgumentParser(__doc__, DEMO, "half a minute")
    # fmt: off
    add = parser.add_argument_group("model",
        "with --pretrained_model_path, read from that file").add_argument
    add("--pretrained_model_path", help="a file of mae_pretrain.py (default: train from scratch)")
    add("--from_scratch", action="store_true",
        help="take the pretrained model's sizes only, and new weights (default: its weights)")
    add("--image_size", type=utils.positive_int, help="side of the images in pixels (default: 32)")
    add("--patch_size", type=utils.positive_int, help="side of a patch in pixels (default: 2)")
    add("--emb_dim", type=utils.positive_int, help="a multiple of the heads (default: 192)")
    add("--encoder_layer", type=utils.positive_int, help="number of blocks (default: 12)")
    add("--encoder_head", type=utils.positive_int, help="attention heads per block (default: 3)")
    add = parser.add_argument_group("recipe").add_argument
    strength = utils.checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
    add("--augment", type=strength, nargs="?", const=1.0, metavar="STRENGTH",
        help="shift, flip, distort, erase and mix images, smooth labels; a strength of 0 only "
             "shifts and flips (default: no augmentation; --augment alone: 1)")
    decay = utils.checked(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    add("--layer_decay", type=decay, default=1.0, metavar="RATE",
        help="each block learns at RATE times the rate of the block above it (paper: 0.75)")
    rate = utils.checked(float, lambda x: 0 <= x < 1, "from 0 to below 1")
    add("--drop_path", type=rate, default=0.0, metavar="RATE",
        help="stochastic depth: how often to drop the last block's branches; earlier ones less")
    add("--linear_probe", action="store_true",
        help="train a linear classifier on the frozen, normalised features (default: off)")
    add("--holdout", type=utils.positive_int, metavar="N",
        help="choose the best epoch on N training images set aside (default: on the test images)")
    add("--eval", metavar="FILE",
        help="no training: what a saved classifier gets right and wrong (default: train)")
    add("--predict", metavar="PATH",
        help="with --eval: the class of an image, or of each image of a folder (default: off)")
    utils.add_shared_flags(parser, "--output_model_path",
        "scratch-cls, pretrain-cls, probe-cls or eval-cls", seed=2022, batch_size=128,
        base_learning_rate=1e-3, weight_decay=0.05, total_epoch=100,
        warmup_epoch=5, output_model_path="vit-t-classifier-from_scratch.pth")
    # fmt: on
    if parser.parse_known_args(argv)[0].eval:
        parser.set_defaults(dataset=None, data_path=None)  # evaluate_file takes those of the file
    return utils.run_args(parser, argv, "output_model_path")


def make_encoder(args):
    """The encoder to train, new or from --pretrained_model_path -> MAE_Encoder, its sizes.

    Raises InputError, naming both values, if a flag does not fit the pretrained file.
    """
    path = None if args.resume else args.pretrained_model_path  # a state has the weights itself
    sizes = DEMO_ENCODER if args.demo else ENCODER
    if path:
        mae, sizes, _ = utils.load_model(path, "MAE_ViT")
    asked = {name: getattr(args, name) for name in ENCODER if getattr(args, name)}
    for name, value in asked.items():
        if path and value != sizes[name]:
            raise utils.InputError(f"--{name} {value} does not fit {path}: it has {sizes[name]}")
    sizes = {name: sizes[name] for name in ENCODER} | asked
    new = args.from_scratch or not path
    return utils.build_encoder(**sizes) if new else mae.encoder, sizes


def parameter_groups(model, layer_decay):
    """The parameters, for AdamW, in groups by depth with the factor on their learning rate.

    1 for the head and the norm before it, layer_decay for the last block, its square for the one
    below, and so on down to the embeddings (paper, appendix A.1).
    """
    if layer_decay == 1:
        return [{"params": list(model.parameters())}]
    top = len(model.transformer) + 1
    groups = [{"params": [], "lr_scale": layer_decay ** (top - i)} for i in range(top + 1)]
    depths = {"layer_norm": top, "head": top}
    for name, parameter in model.named_parameters():
        part, index = [*name.split("."), ""][:2]
        depth = int(index) + 1 if part == "transformer" else depths.get(part, 0)
        groups[depth]["params"].append(parameter)
    return groups


# --augment takes 22 random numbers per image: 9 distort it, 9 the image it is mixed with, 4 mix.
OPERATIONS, ERASE, MIX, SMOOTHING = 9, 0.25, 0.5, 0.1


def distort(img, rand, strength=1.0):
    """Change each image in its own way: img [b,3,H,W], rand [b,9] in [0, 1) -> [b,3,H,W].

    Shift by up to an eighth, flip, one operation of random strength, and sometimes a grey square.
    The operations are most of TrivialAugment's (arXiv:2103.10158), of which torchvision applies
    one to the whole batch. strength: from 0, only shift and flip, to 1.
    """
    # Nine random numbers an image: two of an operation, three of shift and flip, four of a square.
    operation, strength_rand, *shift, flip_rand = rand[:, :5].unbind(1)
    erase, side, x, y = rand[:, 5:].unbind(1)

    # All operations run; those not drawn have level 0: no change. The last never changes anything.
    level = strength * (2 * strength_rand - 1)  # [b]
    levels = one_hot((operation * OPERATIONS).long(), OPERATIONS) * level[:, None]
    turn, shear_x, shear_y = levels[:, :3].unbind(1)
    bright, contrast, colour, sharp, solar, _ = levels[:, 3:, None, None, None].unbind(1)

    width = img.shape[-1]
    # Shifts by whole pixels, in half widths of the image.
    shift_x, shift_y = (((2 * r - 1) * (width // 8)).round() / width * 2 for r in shift)
    sign, angle = (flip_rand < 0.5) * 2 - 1, turn * math.radians(30)
    to_x = sign * angle.cos(), 0.3 * shear_x - angle.sin(), shift_x
    to_y = sign * (0.3 * shear_y + angle.sin()), angle.cos(), shift_y
    img = utils.warp(img, torch.stack([*to_x, *to_y], 1).view(-1, 2, 3))

    def blend(base, level):
        return base + (img - base) * (1 + 0.9 * level)

    img = blend(-1, bright)
    img = blend(img.mean((1, 2, 3), keepdim=True), contrast)
    img = blend(img.mean(1, keepdim=True), colour)
    img = blend(avg_pool2d(img, 3, 1, 1, count_include_pad=False), sharp).clamp(-1, 1)
    img = torch.where(img > 1 - 2 * solar.abs(), -img, img)
    erased = square_mask(img, side * 0.6, x, y) & (erase < ERASE * strength)[:, None, None, None]
    return img.masked_fill(erased, 0.0)


def square_mask(img, side, x, y):
    """True inside a square of each image, [b,1,H,W]; side and centre [b] in units of the image."""
    axis = (torch.arange(img.shape[-1], device=img.device) + 0.5) / img.shape[-1]  # [W]
    inside_x = (axis - x[:, None]).abs() < side[:, None] / 2  # [b,W]
    inside_y = (axis - y[:, None]).abs() < side[:, None] / 2
    return (inside_x[:, None, :] & inside_y[:, :, None])[:, None]


def mix(img, other, rand, strength=1.0):
    """MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of a share of the images.

    img, other [b,3,H,W], rand [b,4] in [0, 1) -> mixed [b,3,H,W], the weight of img in each, [b].
    The share is half of the strength.
    """
    kind, amount, x, y = rand.unbind(1)
    cut = square_mask(img, (1 - amount).sqrt(), x, y)
    # Of a strength of 0 no share: infinite kinds are above MIX.
    kind, amount = kind[:, None, None, None] / strength, amount[:, None, None, None]
    weight = torch.where(kind < MIX / 2, (~cut).float(), torch.where(kind < MIX, amount, 1.0))
    return weight * img + (1 - weight) * other, weight.expand_as(img).mean((1, 2, 3))


def drop_path_scale(n, num_layer, rate, rng):
    """For --drop_path, the factors of the branches: [n,num_layer,2], 0 or 1 / (1 - rate)."""
    probability = torch.linspace(0, rate, num_layer)[:, None]
    return (torch.rand(n, num_layer, 2, generator=rng) >= probability) / (1 - probability)


def draw_rows(args, batch, num_layer, epoch, update):
    """What `losses` takes, for a batch: {name: [N,...]}, batch itself as "index".

    With --augment "partner", the images to mix with, and "rand", [N,22]; with --drop_path "drop",
    [N,num_layer,2]. Like the order they are a function of the seed, the epoch and the update.
    """
    rng = utils.generator("augment", args.seed, epoch, update)
    rows, n = {"index": batch}, len(batch)
    if args.augment is not None:
        rows["partner"] = batch[torch.randperm(n, generator=rng)]
        rows["rand"] = torch.rand(n, 22, generator=rng)
    if args.drop_path:
        rows["drop"] = drop_path_scale(n, num_layer, args.drop_path, rng)
    return rows


def losses(net, images, labels, rows, strength):
    """Of each image of a micro-batch its loss, and whether its label is found: [b] each.

    rows as `draw_rows` makes them. strength: of --augment; without it, None.
    """
    img, label = utils.to_float(images[rows["index"]]), labels[rows["index"]]
    if "rand" in rows:
        img_rand, other_rand, mix_rand = rows["rand"].split([9, 9, 4], dim=1)
        other = distort(utils.to_float(images[rows["partner"]]), other_rand, strength)
        img, share = mix(distort(img, img_rand, strength), other, mix_rand, strength)
    inputs = (img, rows["drop"]) if "drop" in rows else (img,)
    logits = net(*inputs).float()  # [b,num_classes]

    def loss_of(label):
        smoothing = SMOOTHING * strength if "rand" in rows else 0.0
        return cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)

    loss = loss_of(label)
    if "rand" in rows:
        other_label = labels[rows["partner"]]
        loss = torch.lerp(loss_of(other_label), loss, share)
        label = torch.where(share < 0.5, other_label, label)  # the one that weighs more
    return loss, logits.argmax(-1) == label


def evaluate(net, images, labels):
    """Mean loss and accuracy, exact for any micro-batch size and number of processes."""
    logits = utils.predict(net, images, net.size)
    loss = cross_entropy(logits, labels, reduction="none").double().mean().item()
    return {"loss": loss, "acc": (logits.argmax(-1) == labels).double().mean().item()}


def extract_features(model, devices, args, train_images, *others):
    """Images uint8 [N,3,H,W] -> features [N,C], of mean 0 and variance 1 over the training set.

    And that mean and standard deviation: those of BatchNorm without affine parameters (paper,
    appendix A.1, "Linear probing"), over all training images rather than each batch.
    """
    encoder = copy.deepcopy(model).eval()
    encoder.head = torch.nn.Identity()
    net = utils.Net(encoder, devices, args, [utils.to_float(train_images[:1])], cpu_limit=256)
    train, *rest = (utils.predict(net, images, net.size) for images in (train_images, *others))
    variance = train.var(0, correction=min(1, len(train) - 1))  # a single image has none
    mean, std = train.mean(0), (variance + 1e-5).sqrt()
    return mean, std, [(features - mean) / std for features in (train, *rest)]


def fold_norm(model, mean, std):
    """The classifier whose head does what normalising and then the head of `model` do."""
    # At every epoch: the blocks are shared, not copied.
    model = copy.deepcopy(model, {id(model.transformer): model.transformer})
    with torch.no_grad():
        model.head.weight /= std
        model.head.bias -= model.head.weight @ mean
    return model


FONTS = "DejaVuSans", "LiberationSans-Regular", "Arial Unicode", "arial", "msyh"  # of the systems


def write_text(draw, where, text, width, colour="black", anchor="la"):
    """Write a line with an ImageDraw, cut to the width in pixels, in a font that has its letters.

    If no font has them all, without those beyond ASCII.
    """
    for name in FONTS:
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size=12)
            unknown = bytes(font.getmask("\uffff"))
            if all(x == " " or bytes(font.getmask(x)) != unknown for x in text):
                break
    else:  # Pillow's own, for English
        font, text = ImageFont.load_default(size=12), "".join(filter(str.isascii, text))
    while font.getlength(text) > width:
        text = text[:-1]
    draw.text(where, text, colour, font, anchor)


def draw_confusion(counts, classes):
    """Confusion matrix [K,K], a row for each true class -> image [3,H,W] in [0, 1].

    Darker cells hold a larger share of their row; up to 30 classes have names and numbers.
    """
    k = len(classes)
    cell, left, top = (44, 130, 30) if k <= 30 else (max(1, 900 // k), 0, 0)
    share = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    dark, white = torch.tensor([8.0, 48, 107]), torch.tensor([255.0])
    cells = torch.lerp(white, dark, share[..., None]).byte()  # [K,K,3]
    cells = cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    img = Image.new("RGB", (left + k * cell, top + k * cell), "white")
    img.paste(Image.fromarray(cells.numpy()), (left, top))
    draw = ImageDraw.Draw(img)
    draw.text((4, 2), "rows: true,\ncolumns: predicted" if left else "", "black")
    for i, name in enumerate(classes if left else []):
        middle = i * cell + cell // 2
        write_text(draw, (left - 6, top + middle), f"{i} {name}", left - 10, anchor="rm")
        draw.text((left + middle, top - 6), f"{i}", "black", anchor="mb")
        for j in range(k):
            colour = "white" if share[i, j] > 0.5 else "black"
            x = left + j * cell + cell // 2
            draw.text((x, top + middle), f"{counts[i, j]}", colour, anchor="mm")
    return to_tensor(img)


def draw_captioned(images, title, captions):
    """images uint8 [N,3,H,H], eight to a row -> picture [3,H',W'] in [0, 1], with a title.

    captions: for each image, two lines of (text, colour) to write below it.
    """
    page, places = utils.draw_images(images, min(8, len(images)), [title], space=42)
    for (x, y, width), lines in zip(places, captions, strict=True):
        for line, (text, colour) in enumerate(lines):
            write_text(ImageDraw.Draw(page), (x, y + 17 * line), text, width, colour)
    return to_tensor(page)


def draw_predictions(images, true, predicted, classes):
    """Up to 24 mistakes, then images classified right, up to 40 in all -> [3,H,W] in [0, 1].

    images uint8 [N,3,H,W], true and predicted [N]. Both kinds are spread evenly over the N images.
    """
    wrong, right = (x.nonzero()[:, 0] for x in (true != predicted, true == predicted))
    mistakes = wrong[utils.evenly_spaced(len(wrong), 24)]
    shown = torch.cat([mistakes, right[utils.evenly_spaced(len(right), 40 - len(mistakes))]])
    pairs = zip(true[shown].tolist(), predicted[shown].tolist(), strict=True)
    names = [f"{i} {name}" for i, name in enumerate(classes)]
    captions = [[(names[t], "black"), (names[p], "green" if t == p else "red")] for t, p in pairs]
    title = f"{len(mistakes)} mistakes, then images classified right: true and predicted class"
    return draw_captioned(images[shown], title, captions)


def classify(model, images, devices, args):
    """Logits of a classifier for images uint8 [N,3,H,W]: [N,num_classes], on the host."""
    images = images.to(devices[0])
    net = utils.Net(model.eval(), devices, args, example=[utils.to_float(images[:1])])
    utils.print_settings("chosen", net.settings)
    logits = utils.predict(net, images, net.size).cpu()
    torch.set_num_threads(utils.THREADS)  # a notebook goes on
    return logits


def predict_files(args):
    """--eval FILE --predict PATH: the classes of images without labels, printed and drawn."""
    devices = utils.choose_devices(args.device)
    model, architecture, content = utils.load_model(args.eval, "ViT_Classifier")
    png_path = utils.free_path(os.path.splitext(args.eval)[0] + "-predicted.png")
    files = utils.list_images(args.predict)[0]
    images = utils.decode(files, architecture["image_size"])[0]
    classes = content.get("classes") or [f"class {i}" for i in range(architecture["num_classes"])]
    captions = []
    probability, predicted = classify(model, images, devices, args).softmax(-1).max(-1)
    for (path, _), p, i in zip(files, probability.tolist(), predicted.tolist(), strict=True):
        utils.print_rank_0(f"{path}: {classes[i]}, {p:.1%}")
        text = f"{p:.0%}, {os.path.basename(path)}"
        captions.append([(f"{i} {classes[i]}", "black"), (text, "grey")])
    shown = utils.evenly_spaced(len(files), 40).tolist()
    if utils.rank() == 0:
        img = draw_captioned(images[shown], "predicted", [captions[i] for i in shown])
        utils.write_files({png_path: utils.encode(img)})
    utils.print_rank_0(f"{len(shown)} of {len(files)} images with their classes: {png_path}")


def evaluate_file(args):
    """--eval: what a saved classifier gets right and wrong, printed, drawn and in TensorBoard."""
    devices, start = utils.choose_devices(args.device), os.path.splitext(args.eval)[0]
    model, architecture, content = utils.load_model(args.eval, "ViT_Classifier")
    saved = {"dataset": "cifar10", "data_path": "data"} | content.get("args", {})
    args = copy.copy(args)
    args.image_size, args.train_images = architecture["image_size"], 0
    args.dataset = args.dataset or saved["dataset"]
    path = saved["data_path"] if args.dataset == saved["dataset"] else "data"
    args.data_path = args.data_path or (path if os.path.isdir(path) else "data")
    dataset = utils.load_dataset(args, devices[0])
    k, found = architecture["num_classes"], dataset.classes
    classes = content.get("classes") or found  # the original's files do not name them
    if [name for name in classes if name in found] != found or k != len(classes):
        raise utils.InputError(f"{args.eval} has classes {classes}, the dataset has {found}")
    images = dataset.val_images
    utils.check_same_settings(images=len(images))
    true = torch.tensor([classes.index(name) for name in found])[dataset.val_labels.cpu()]
    logits = classify(model, images, devices, args)
    loss, predicted = cross_entropy(logits.double(), true).item(), logits.argmax(-1)
    counts = (true * k + predicted).bincount(minlength=k * k).view(k, k)  # [i, j]: i taken for j
    acc = counts.trace().item() / len(images)
    for i, name in enumerate(classes):
        n = counts[i].sum().item()
        utils.print_rank_0(f"{name}: {counts[i, i] / max(n, 1):.2%} of {n:,}")
    utils.print_rank_0(f"accuracy on {len(images):,} validation images: {acc:.2%}, loss {loss:.4f}")
    if utils.rank() == 0:
        pictures = {"cls/confusion": draw_confusion(counts, classes)}
        pictures["cls/predictions"] = draw_predictions(images, true, predicted, classes)
        files = {utils.free_path(f"{start}-{x[4:]}.png"): img for x, img in pictures.items()}
        utils.write_files({path: utils.encode(img) for path, img in files.items()})
        folder = utils.new_run_folder(args.log_dir, args.dataset, args.run_name or "eval-cls")
        utils.Curves(folder).write(0, {"cls/acc": acc}, pictures)
        utils.print_rank_0(f"pictures: {', '.join(files)}, curves: {folder}")


@utils.memory_for("the dataset, twice for --holdout,", "--train_images or --image_size")
def hold_out(dataset, n):
    """Take n training images, spread over the classes, as validation images -> ImageSet."""
    held = utils.stratified_subset(dataset.train_labels.cpu(), n, "--holdout")
    rest = torch.ones(len(dataset.train_labels), dtype=torch.bool)
    rest[held] = False
    if not rest.any():
        raise utils.InputError(f"--holdout {n} leaves no image to train on")
    images, labels = dataset.train_images, dataset.train_labels
    return utils.ImageSet(images[rest], labels[rest], images[held], labels[held], dataset.classes)


def summary(args, results, num_test):
    """The accuracies of a run, each named by the images on which its epoch was chosen."""
    best, last = results["best"], results["last"]
    chosen, kind, key = "these images", "validation", "acc"
    if args.holdout:
        chosen = f"{args.holdout:,} training images held out, on those {best['acc']:.2%}"
        kind, key = "test", "test_acc"
    text = f"accuracy on {num_test:,} {kind} images: best {best[key]:.2%} (epoch {best['epoch']}, "
    return f"{text}chosen on {chosen}), last {last[key]:.2%}; model of the best epoch"


def main(args):
    if args.eval:
        return evaluate_file(args) if args.predict is None else predict_files(args)
    if args.predict is not None:
        raise utils.InputError("--predict needs the classifier: add --eval FILE")
    if args.linear_probe and (args.augment is not None or args.drop_path or args.layer_decay != 1):
        raise utils.InputError("--linear_probe takes no --augment, --drop_path or --layer_decay")
    utils.setup_seed(args.seed)
    devices = utils.choose_devices(args.device)
    encoder, sizes = make_encoder(args)
    args = argparse.Namespace(**vars(args) | sizes)  # in the state, where --resume finds them
    utils.print_settings("arguments", vars(args))
    dataset = all_images = utils.load_dataset(args, devices[0])
    if args.holdout:
        dataset = hold_out(dataset, args.holdout)
    images, labels, val_images, val_labels, classes = dataset
    test_images, test_labels = all_images.val_images, all_images.val_labels

    model = ViT_Classifier(encoder, len(classes))
    name = "pretrain-cls" if args.pretrained_model_path and not args.from_scratch else "scratch-cls"
    trained, groups = model, parameter_groups(model, args.layer_decay)
    example = [utils.to_float(images[:1])]
    if args.drop_path:
        example.append(torch.ones(1, args.encoder_layer, 2, device=devices[0]))
    if args.linear_probe:
        name, trained, groups = "probe-cls", model.head, model.head.parameters()
        example = [torch.zeros(1, args.emb_dim, device=devices[0])]
    net = utils.Net(trained, devices, args, example, args.total_epoch * len(images), cpu_limit=256)
    adam = dict(betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    optim = torch.optim.AdamW(groups, **adam)
    training = utils.Training(model, net, optim, ["loss", "acc"])

    with utils.start_run(args, name, args.output_model_path, training, all_images) as run:
        utils.describe_run(args, training, dataset, run.curves.folder)
        if args.linear_probe:  # now, as a resumed run has the encoder from its state
            mean, std, features = extract_features(
                model, devices, args, images, val_images, test_images
            )
            images, val_images, test_images = features  # [N,C], in the place of [N,3,H,W]
        for epoch in run.epochs():
            utils.set_learning_rate(optim, epoch, args)
            model.train()
            rng = utils.generator("order", args.seed, epoch)
            order = torch.randperm(len(images), generator=rng)
            for update, batch in run.updates(order.split(args.batch_size)):
                rows = draw_rows(args, batch, len(model.transformer), epoch, update)
                for micro_batch in net.micro_batches(rows):
                    loss, right = losses(net, images, labels, micro_batch, args.augment)
                    training.backward(loss, len(batch), right)
                training.step()
            train = training.end()

            model.eval()
            val = evaluate(net, val_images, val_labels)
            text = f"train loss {train['loss']:.4f} acc {train['acc']:.2%}, "
            text += f"val loss {val['loss']:.4f} acc {val['acc']:.2%}"
            both = {f"cls/{key}": {"train": train[key], "val": val[key]} for key in train}
            run.report(text, both)
            results = {"epoch": epoch + 1, **val}
            best = val["acc"] > run.results.get("best", {"acc": -1})["acc"]
            last = epoch + 1 == args.total_epoch
            if args.holdout and (best or last):
                test = evaluate(net, test_images, test_labels)
                results |= {"test_loss": test["loss"], "test_acc": test["acc"]}
            run.results["last"] = results
            if best:
                run.results["best"] = results
            saved = fold_norm(model, mean, std) if args.linear_probe else model
            more = {"epoch": epoch + 1, "metrics": {"train": train, "val": val}}
            more |= {"chosen": net.settings, "classes": classes}
            architecture = sizes | {"num_classes": len(classes)}
            content = utils.model_content(saved, architecture, args, **more)
            run.end_epoch({run.model_path: content} if best else {}, kept=content, last=last)
    utils.print_rank_0(f"{summary(args, run.results, len(test_images))}: {run.model_path}")


if __name__ == "__main__":
    with utils.processes(), utils.one_line_errors():
        main(get_args())
