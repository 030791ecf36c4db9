"""Train a Vision Transformer classifier, from scratch or from a pretrained masked autoencoder.

    python train_classifier.py
    python train_classifier.py --pretrained_model_path vit-t-mae.pth \\
                               --output_model_path vit-t-classifier-from_pretrained.pth
    python train_classifier.py --demo [--pretrained_model_path vit-t-mae-demo.pth]
    python train_classifier.py --eval vit-t-classifier-from_scratch.pth
    tensorboard --logdir logs

Prints the accuracy on the validation pictures after every epoch, and writes the classifier of the
best epoch to --output_model_path. The demo takes 15 s on two CPU cores and reaches 38 % from
scratch, 76 % from the pretrained encoder (means of 3 seeds; see the README).
"""

import copy
import math
import os

import torch
from torch.nn.functional import avg_pool2d, cross_entropy, one_hot

import utils
from model import MAE_Encoder, ViT_Classifier

ENCODER = {
    "image_size": 32,
    "patch_size": 2,
    "emb_dim": 192,
    "encoder_layer": 12,
    "encoder_head": 3,
}
# 500 labels, where mae_pretrain.py --demo saw 30,000 pictures.
DEMO = {
    "dataset": "shapes",
    "train_images": 500,
    "batch_size": 64,
    "base_learning_rate": 4e-3,
    "total_epoch": 40,
    "warmup_epoch": 5,
    "output_model_path": "vit-t-classifier-demo.pth",
}
DEMO_ENCODER = ENCODER | {"patch_size": 8, "emb_dim": 96, "encoder_layer": 4}


def get_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    # fmt: off
    parser.add_argument("--demo", action="store_true",
        help="set defaults for a run of a minute without network: "
             + ", ".join(f"{name} {value}" for name, value in DEMO.items()))
    utils.add_data_flags(parser)
    add = parser.add_argument_group("model",
        "read from the file where --pretrained_model_path is given").add_argument
    add("--pretrained_model_path", help="a file of mae_pretrain.py (default: train from scratch)")
    add("--image_size", type=utils.positive_int, help="(default: 32)")
    add("--patch_size", type=utils.positive_int, help="(default: 2)")
    add("--emb_dim", type=utils.positive_int, help="width; a multiple of the heads (default: 192)")
    add("--encoder_layer", type=utils.positive_int, help="(default: 12)")
    add("--encoder_head", type=utils.positive_int, help="(default: 3)")
    add = parser.add_argument_group("recipe").add_argument
    add("--augment", type=utils.ratio_or_one, nargs="?", const=1.0, metavar="STRENGTH",
        help="shift, mirror and distort the pictures, erase parts, mix two, smooth the labels; a "
             "strength of 0, for short runs, only shifts and mirrors (default: no augmentation; "
             "--augment alone: 1)")
    add("--layer_decay", type=utils.positive_ratio, default=1.0, metavar="RATE",
        help="each block learns at RATE times the rate of the block above it (paper: 0.75)")
    add("--drop_path", type=utils.ratio, default=0.0, metavar="RATE",
        help="leave out the last block's branches with this probability, earlier ones' less often")
    add("--linear_probe", action="store_true",
        help="freeze the encoder and train a linear classifier on its normalised features")
    add("--holdout", type=utils.positive_int, metavar="N",
        help="choose the best epoch on N of the training pictures, which are not trained on, "
             "and report its accuracy on the test pictures (default: choose on those)")
    add("--eval", metavar="FILE",
        help="no training: accuracy by class and confusion matrix of a saved classifier")
    utils.add_training_flags(parser, seed=2022, batch_size=128, base_learning_rate=1e-3,
        weight_decay=0.05, total_epoch=100, warmup_epoch=5)
    utils.add_device_flags(parser, max_device_batch_size=256)
    utils.add_output_flags(parser, "--output_model_path", "vit-t-classifier-from_scratch.pth",
        "scratch-cls, pretrain-cls, probe-cls or eval-cls")
    # fmt: on
    return parser.parse(argv, DEMO, "output_model_path")


def get_encoder(args):
    """The encoder to train, new or from --pretrained_model_path -> MAE_Encoder, architecture.

    Raises InputError, naming both values, if a flag does not fit the pretrained file.
    """
    path = None if args.resume else args.pretrained_model_path  # a state has the weights itself
    if path:
        mae, architecture, _ = utils.load_mae(path)
    else:
        architecture = DEMO_ENCODER if args.demo else ENCODER
    for name in ENCODER:
        value = getattr(args, name)
        if path and value not in (None, architecture[name]):
            raise utils.InputError(
                f"--{name} {value} does not fit {path}, whose {name} is {architecture[name]}"
            )
        setattr(args, name, value or architecture[name])
    architecture = {name: getattr(args, name) for name in ENCODER}
    return mae.encoder if path else utils.build(MAE_Encoder, *architecture.values()), architecture


def parameter_groups(model, layer_decay):
    """The parameters, for AdamW, in groups by depth with the factor on their learning rate.

    1 for the head and the norm before it, layer_decay for the last block, its square for the one
    below, and so on down to the embeddings (paper, appendix A.1).
    """
    if layer_decay == 1:
        return [{"params": list(model.parameters())}]
    top = len(model.transformer) + 1
    groups = [{"params": [], "lr_scale": layer_decay ** (top - i)} for i in range(top + 1)]
    for name, parameter in model.named_parameters():
        part, index = [*name.split("."), ""][:2]
        if part == "transformer":
            depth = int(index) + 1
        else:
            depth = top if part in ("layer_norm", "head") else 0
        groups[depth]["params"].append(parameter)
    return groups


# --augment draws for each picture 9 numbers to distort it, as many to distort the one that it may
# be mixed with, and 4 to mix them; among them levels and, to be below ERASE and MIX, chances.
OPERATIONS, ERASE, MIX, SMOOTHING = 9, 0.25, 0.5, 0.1
DISTORT_DRAWS, MIX_DRAWS = 9, 4
LEVELS, CHANCES = [1, 10], [5, 14, 18]


def distort(img, draw):
    """Change each picture in ways of its own: img [b,3,H,W], draw [b,9] in [0, 1) -> [b,3,H,W].

    Shift by up to an eighth, mirror, one operation of random strength, and at times a grey square.
    The operations are most of TrivialAugment's (arXiv:2103.10158), which torchvision's does to a
    whole batch alike.
    """
    chosen, level, shift_x, shift_y, mirror, erase, side, x, y = draw.unbind(1)
    # An operation of strength 0 changes nothing: so are all but the chosen one, or all of them.
    strength = one_hot((chosen * OPERATIONS).long(), OPERATIONS) * (2 * level[:, None] - 1)
    turn, shear_x, shear_y, *strength = strength.unbind(1)
    bright, contrast, colour, sharp, solar, _ = (v[:, None, None, None] for v in strength)

    width = img.shape[-1]
    shift_x, shift_y = (
        ((2 * u - 1) * (width // 8)).round() / width * 2 for u in (shift_x, shift_y)
    )
    mirror, turn = (mirror < 0.5) * 2 - 1, turn * math.radians(30)
    rows = (
        torch.stack([mirror * turn.cos(), 0.3 * shear_x - turn.sin(), shift_x]),
        torch.stack([mirror * (0.3 * shear_y + turn.sin()), turn.cos(), shift_y]),
    )
    img = utils.warp(img, torch.stack(rows).permute(2, 0, 1))

    def away_from(base, strength):
        return base + (img - base) * (1 + 0.9 * strength)

    img = away_from(-1, bright)
    img = away_from(img.mean((1, 2, 3), keepdim=True), contrast)
    img = away_from(img.mean(1, keepdim=True), colour)
    img = away_from(avg_pool2d(img, 3, 1, 1, count_include_pad=False), sharp).clamp(-1, 1)
    img = torch.where(img > 1 - 2 * solar.abs(), -img, img)
    erased = square(img, side * 0.6, x, y) & (erase < ERASE)[:, None, None, None]
    return img.masked_fill(erased, 0.0)


def square(img, side, x, y):
    """A mask [b,1,H,W] of a square each: its side and centre [b] in parts of the picture's."""
    axis = (torch.arange(img.shape[-1], device=img.device) + 0.5) / img.shape[-1]  # [W]
    inside = [(axis - centre[:, None]).abs() < side[:, None] / 2 for centre in (x, y)]  # [b,W]
    return (inside[0][:, None, :] & inside[1][:, :, None])[:, None]


def mix(img, other, draw):
    """MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of half of the pictures.

    img, other [b,3,H,W], draw [b,4] in [0, 1) -> mixed [b,3,H,W], the share of img in each, [b].
    """
    kind, amount, x, y = draw.unbind(1)
    kind, amount = (v[:, None, None, None] for v in (kind, amount))
    cut = square(img, (1 - amount.flatten()).sqrt(), x, y)
    weight = torch.where(kind < MIX / 2, (~cut).float(), torch.where(kind < MIX, amount, 1.0))
    return weight * img + (1 - weight) * other, weight.expand_as(img).mean((1, 2, 3))


def branch_scale(n, num_layer, rate, rng):
    """For --drop_path, what the branches are multiplied with: [n,num_layer,2], 0 or 1 / keep."""
    probability = torch.linspace(0, rate, num_layer)[:, None]
    return (torch.rand(n, num_layer, 2, generator=rng) >= probability) / (1 - probability)


def draw_recipe(args, batch, num_layer, epoch, update):
    """What --augment and --drop_path draw for a batch, as train_batch takes it.

    Like the order, a function of the seed, the epoch and the update, whoever computes which part.
    """
    rng = utils.generator("augment", args.seed, epoch, update)
    n, recipe = len(batch), {}
    if args.augment is not None:
        partners = batch[torch.randperm(n, generator=rng)]
        draw = torch.rand(n, 2 * DISTORT_DRAWS + MIX_DRAWS, generator=rng)
        draw[:, LEVELS] = 0.5 + (draw[:, LEVELS] - 0.5) * args.augment  # nearer to no change
        draw[:, CHANCES] /= args.augment  # less often small enough
        recipe = {"augment": (partners, draw), "smoothing": SMOOTHING * args.augment}
    if args.drop_path:
        recipe["drop"] = (branch_scale(n, num_layer, args.drop_path, rng),)
    return recipe


def train_batch(
    net, optim, images, labels, batch, part_size, progress, augment=(), smoothing=0.0, drop=()
):
    """One update of the weights, by the mean loss of images[batch]; batch [N] is on the host.

    augment is empty or (partners [N], indexes of the pictures to mix with; random numbers
    [N,22]); drop is empty or (branch_scale [N,num_layer,2],). Both are on the host.
    """
    optim.zero_grad(set_to_none=True)
    weight = utils.world_size() / len(batch)  # of several processes, the mean gradient is taken
    parts = utils.micro_batches(net, part_size, images.device, batch, *augment, *drop)
    for index, *drawn in parts:
        img, label = utils.to_float(images[index]), labels[index]
        if augment:
            partner, draw, *drawn = drawn
            draws = draw.split([DISTORT_DRAWS, DISTORT_DRAWS, MIX_DRAWS], dim=1)
            other = distort(utils.to_float(images[partner]), draws[1])
            img, share = mix(distort(img, draws[0]), other, draws[2])
        logits = net(img, *drawn).float()  # [b,num_classes]
        loss = cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)  # [b]
        if augment:
            target = labels[partner]
            other = cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
            loss = torch.lerp(other, loss, share)
            label = torch.where(share < 0.5, target, label)
        (loss.sum() * weight).backward()
        progress.add(len(index), loss.detach().sum(), (logits.argmax(-1) == label).sum())
    optim.step()


@torch.no_grad()
def predict(net, images, labels, part_size):
    """This process's share of the images -> its summed loss, classes predicted [n], true [n]."""
    loss, predicted = torch.zeros((), dtype=torch.float64, device=images.device), []
    images, labels = utils.share(images), utils.share(labels)
    for img, label in zip(images.split(part_size), labels.split(part_size), strict=True):
        logits = net(utils.to_float(img)).float()  # [b,num_classes]
        loss += cross_entropy(logits, label, reduction="sum")
        predicted.append(logits.argmax(-1))
    return loss, torch.cat(predicted), labels


def evaluate(net, images, labels, part_size):
    """Mean loss and accuracy, exact however the images are split into parts and over processes."""
    loss, predicted, true = predict(net, images, labels, part_size)
    sums = torch.stack([loss, (predicted == true).sum()])
    loss, acc = (utils.sum_over_processes(sums) / len(images)).tolist()
    return {"loss": loss, "acc": acc}


@torch.no_grad()
def encode(model, precision, part_size, train_images, *others):
    """Images uint8 [N,3,H,W] -> features [N,C], of mean 0 and variance 1 over the training set.

    And the norm that makes them so: a BatchNorm without affine parameters (paper, appendix A.1,
    "Linear probing"), its statistics those of all training pictures rather than of each batch.
    """
    net = utils.Net(model.features, train_images.device, precision)
    part_size = math.ceil(part_size / max(1, utils.count_gpus(train_images.device)))  # on one
    train, *rest = (
        torch.cat([net(utils.to_float(part)).float() for part in images.split(part_size)])
        for images in (train_images, *others)
    )
    if len(train) < 2:
        raise utils.InputError("--linear_probe needs two pictures at least")
    norm = torch.nn.BatchNorm1d(train.shape[1], affine=False, momentum=1.0).to(train.device)
    norm(train)
    norm.eval()
    return norm, [norm(features) for features in (train, *rest)]


def with_norm(model, norm):
    """The classifier whose head does what the head of `model` does after the norm."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight /= (norm.running_var + norm.eps).sqrt()
        model.head.bias -= model.head.weight @ norm.running_mean
    return model


def show(args):
    """--eval: what a saved classifier gets right and wrong, printed, drawn and in TensorBoard."""
    device = utils.choose_device(args.device)
    png_path = os.path.splitext(args.eval)[0] + "-confusion.png"
    model, architecture, classes = utils.load_classifier(args.eval)
    utils.check_outputs(png_path)
    args.image_size, args.train_images = architecture["image_size"], 1  # those are not needed
    pictures = utils.load_pictures(args, device)
    if (classes or pictures.classes) != pictures.classes or (
        len(pictures.classes) != architecture["num_classes"]
    ):
        raise utils.InputError(
            f"{args.eval} knows the {architecture['num_classes']} classes {classes}, "
            f"the pictures have {len(pictures.classes)}: {pictures.classes}"
        )
    part_size = utils.choose_part_size(args, device)
    net, _ = utils.place(model.eval(), device, args, part_size, 0)
    images, k = pictures.val_images, len(pictures.classes)
    loss, predicted, true = predict(net, images, pictures.val_labels, part_size)
    counts = (true * k + predicted).cpu().bincount(minlength=k * k)  # [i * k + j]: i taken for j
    counts = utils.sum_over_processes(counts).view(k, k)
    loss = utils.sum_over_processes(loss).item() / len(images)
    acc = counts.trace().item() / len(images)
    picture = utils.draw_confusion(counts, pictures.classes)
    for i, name in enumerate(pictures.classes):
        n = counts[i].sum().item()
        utils.say(f"{name}: {counts[i, i] / max(n, 1):.2%} of {n:,}")
    utils.say(f"accuracy on {len(images):,} validation pictures: {acc:.2%}, loss {loss:.4f}")
    if utils.rank() == 0:
        utils.write_picture(png_path, picture)
        curves = utils.Curves(utils.new_run_folder(args.log_dir, args.dataset, "eval-cls"))
        curves.add_scalar("cls/acc", acc, 0)
        curves.add_image("cls/confusion", picture, 0)
        curves.flush()
        utils.say(f"confusion matrix: {png_path}, curves: {curves.folder}")


def main(args):
    if args.eval:
        return show(args)
    if args.linear_probe and (args.augment is not None or args.drop_path or args.layer_decay != 1):
        raise utils.InputError(
            "--linear_probe trains on features that are computed once: leave out --augment, "
            "--drop_path and --layer_decay"
        )
    utils.setup_seed(args.seed)
    device = utils.choose_device(args.device)
    utils.check_outputs(args.output_model_path, utils.state_path(args.output_model_path))
    utils.warn_of_long_warmup(args)

    encoder, architecture = get_encoder(args)
    pictures = utils.load_pictures(args, device)
    fingerprint = pictures.fingerprint()
    test_images, test_labels = pictures.val_images, pictures.val_labels
    if args.holdout:
        pictures = utils.hold_out(pictures, args.holdout)
    architecture["num_classes"] = len(pictures.classes)
    model = ViT_Classifier(encoder, len(pictures.classes))
    images, labels = pictures.train_images, pictures.train_labels
    val_images, val_labels = pictures.val_images, pictures.val_labels
    part_size = utils.choose_part_size(args, device)
    pictures_seen = args.total_epoch * len(images)
    name = "pretrain-cls" if args.pretrained_model_path else "scratch-cls"
    groups = parameter_groups(model, args.layer_decay)
    net, chosen = utils.place(model, device, args, part_size, pictures_seen)
    if args.linear_probe:
        name, groups = "probe-cls", model.head.parameters()
        net, chosen = utils.place(model.head, device, args, part_size, pictures_seen)
    optim = torch.optim.AdamW(
        groups, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )

    run = utils.Run(args, name, args.output_model_path, model, optim, fingerprint)
    utils.describe_run(args, chosen, model, pictures, run.curves.folder)
    if args.linear_probe:  # now, as a resumed run has the encoder from its state
        norm, (images, val_images, test_images) = encode(
            model, chosen["precision"], part_size, images, val_images, test_images
        )

    for epoch in run.epochs():
        lr = utils.set_learning_rate(optim, epoch, args)
        model.train()
        order = torch.randperm(len(images), generator=utils.generator("order", args.seed, epoch))
        with run.progress(device, ["loss", "acc"], lr, len(images)) as progress:
            for update, batch in run.updates(order.split(args.batch_size)):
                recipe = draw_recipe(args, batch, len(model.transformer), epoch, update)
                train_batch(net, optim, images, labels, batch, part_size, progress, **recipe)
        train = progress.mean()

        model.eval()
        val = evaluate(net, val_images, val_labels, part_size)
        run.curves.add_scalars("cls/loss", {"train": train["loss"], "val": val["loss"]}, epoch)
        run.curves.add_scalars("cls/acc", {"train": train["acc"], "val": val["acc"]}, epoch)
        run.curves.add_scalar("lr", lr, epoch)
        run.curves.add_scalar("images_per_second", progress.per_second, epoch)
        utils.say(
            f"epoch {epoch + 1}/{args.total_epoch}: train loss {train['loss']:.4f} "
            f"acc {train['acc']:.2%}, val loss {val['loss']:.4f} acc {val['acc']:.2%}, "
            f"lr {lr:.2e}, {progress.per_second:,.0f} images/s"
        )
        best = val["acc"] > run.results.get("best", {"acc": -1})["acc"]
        results = {"epoch": epoch + 1, **val}
        if args.holdout and (best or epoch + 1 == args.total_epoch):
            test = evaluate(net, test_images, test_labels, part_size)
            results |= {f"test_{k}": v for k, v in test.items()}
        run.results["last"] = results
        if best:
            run.results["best"] = results
            facts = {"epoch": epoch + 1, "metrics": {"train": train, "val": val}}
            facts |= {"chosen": chosen, "classes": pictures.classes}
            saved = with_norm(model, norm) if args.linear_probe else model
            content = utils.model_bytes(saved, architecture, args, **facts)
            run.files.hold(args.output_model_path, content)
        if run.end_epoch():
            run.save()
    run.close()
    utils.say(f"{report(args, run.results, len(test_images))}: {args.output_model_path}")


def report(args, results, num_test):
    """The accuracies of a run, each named by the pictures on which its epoch was chosen."""
    best, last = results["best"], results["last"]
    if not args.holdout:
        return (
            f"accuracy on {num_test:,} validation pictures: best {best['acc']:.2%} (epoch "
            f"{best['epoch']}, chosen on these pictures), last {last['acc']:.2%}; "
            "model of the best epoch"
        )
    return (
        f"accuracy on {num_test:,} test pictures: best epoch {best['test_acc']:.2%} (epoch "
        f"{best['epoch']}, chosen on {args.holdout:,} training pictures held out, on those "
        f"{best['acc']:.2%}), last {last['test_acc']:.2%}; model of the best epoch"
    )


if __name__ == "__main__":
    with utils.one_line_errors(), utils.processes():
        main(get_args())
