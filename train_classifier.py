"""Train a Vision Transformer classifier, from scratch or from a pretrained masked autoencoder.

    python train_classifier.py
    python train_classifier.py --pretrained_model_path vit-t-mae.pth \\
                               --output_model_path vit-t-classifier-from_pretrained.pth
    python train_classifier.py --demo [--pretrained_model_path vit-t-mae-demo.pth]
    tensorboard --logdir logs

Prints the accuracy on the validation pictures after every epoch, and writes the classifier of the
best epoch to --output_model_path. The demo takes 15 s on two CPU cores and reaches 38 % from
scratch, 76 % from the pretrained encoder (means of 3 seeds; see the README).
"""

import torch
from torch.nn.functional import cross_entropy

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
    utils.add_training_flags(parser, seed=2022, batch_size=128, base_learning_rate=1e-3,
        weight_decay=0.05, total_epoch=100, warmup_epoch=5)
    utils.add_device_flags(parser, max_device_batch_size=256)
    utils.add_output_flags(parser, "--output_model_path", "vit-t-classifier-from_scratch.pth",
        "scratch-cls or pretrain-cls")
    # fmt: on
    return parser.parse(argv, DEMO, "output_model_path")


def get_encoder(args):
    """The encoder to train, new or from --pretrained_model_path -> MAE_Encoder, architecture.

    Raises InputError, naming both values, if a flag does not fit the pretrained file.
    """
    path = None if args.resume else args.pretrained_model_path  # a state has the weights itself
    if path:
        mae, architecture = utils.load_mae(path)
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


@torch.no_grad()
def evaluate(net, images, labels, part_size):
    """Mean loss and accuracy over all images, exact however they are split into parts."""
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)
    parts = (utils.share(x).split(part_size) for x in (images, labels))
    for img, label in zip(*parts, strict=True):
        logits = net(utils.to_float(img)).float()  # [b,num_classes]
        loss, correct = cross_entropy(logits, label, reduction="sum"), logits.argmax(-1) == label
        sums += torch.stack([loss, correct.sum()])
    loss, acc = (utils.sum_over_processes(sums) / len(images)).tolist()
    return {"loss": loss, "acc": acc}


def train_batch(net, optim, images, labels, batch, part_size, progress):
    """One update of the weights, by the mean loss of images[batch]; batch [N] is on the host."""
    optim.zero_grad(set_to_none=True)
    weight = utils.world_size() / len(batch)  # of several processes, the mean gradient is taken
    for (index,) in utils.micro_batches(net, part_size, images.device, batch):
        label = labels[index]
        logits = net(utils.to_float(images[index])).float()  # [b,num_classes]
        loss = cross_entropy(logits, label, reduction="sum")
        (loss * weight).backward()
        progress.add(len(index), loss.detach(), (logits.argmax(-1) == label).sum())
    optim.step()


def main(args):
    utils.setup_seed(args.seed)
    device = utils.choose_device(args.device)
    utils.check_outputs(args.output_model_path, utils.state_path(args.output_model_path))
    utils.warn_of_long_warmup(args)

    encoder, architecture = get_encoder(args)
    pictures = utils.load_pictures(args, device)
    architecture["num_classes"] = len(pictures.classes)
    model = ViT_Classifier(encoder, len(pictures.classes))
    images, labels = pictures.train_images, pictures.train_labels
    part_size = utils.choose_part_size(args, device)
    net, chosen = utils.place(model, device, args, part_size, args.total_epoch * len(images))
    optim = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )

    name = "pretrain-cls" if args.pretrained_model_path else "scratch-cls"
    run = utils.Run(args, name, args.output_model_path, model, optim, pictures)
    utils.describe_run(args, chosen, model, pictures, run.curves.folder)

    for epoch in run.epochs():
        lr = utils.set_learning_rate(optim, epoch, args)
        model.train()
        order = torch.randperm(len(images), generator=utils.generator("order", args.seed, epoch))
        with run.progress(device, ["loss", "acc"], lr, len(images)) as progress:
            for _, batch in run.updates(order.split(args.batch_size)):
                train_batch(net, optim, images, labels, batch, part_size, progress)
        train = progress.mean()

        model.eval()
        val = evaluate(net, pictures.val_images, pictures.val_labels, part_size)
        run.curves.add_scalars("cls/loss", {"train": train["loss"], "val": val["loss"]}, epoch)
        run.curves.add_scalars("cls/acc", {"train": train["acc"], "val": val["acc"]}, epoch)
        run.curves.add_scalar("lr", lr, epoch)
        run.curves.add_scalar("images_per_second", progress.per_second, epoch)
        utils.say(
            f"epoch {epoch + 1}/{args.total_epoch}: train loss {train['loss']:.4f} "
            f"acc {train['acc']:.2%}, val loss {val['loss']:.4f} acc {val['acc']:.2%}, "
            f"lr {lr:.2e}, {progress.per_second:,.0f} images/s"
        )
        run.results["last"] = val
        if val["acc"] > run.results.get("best", {"acc": -1})["acc"]:
            run.results["best"] = {"epoch": epoch + 1, **val}
            facts = {"epoch": epoch + 1, "metrics": {"train": train, "val": val}}
            facts |= {"chosen": chosen, "classes": pictures.classes}
            content = utils.model_bytes(model, architecture, args, **facts)
            run.files.hold(args.output_model_path, content)
        if run.end_epoch():
            run.save()
    run.close()
    best, last = run.results["best"], run.results["last"]
    utils.say(
        f"accuracy on {len(pictures.val_images):,} validation pictures: best {best['acc']:.2%} "
        f"(epoch {best['epoch']}, chosen on these pictures), last {last['acc']:.2%}; "
        f"model of the best epoch: {args.output_model_path}"
    )


if __name__ == "__main__":
    with utils.one_line_errors(), utils.processes():
        main(get_args())
