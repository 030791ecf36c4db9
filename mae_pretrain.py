"""Pretrain a masked autoencoder: hide most of a picture's patches and predict their pixels.

    python mae_pretrain.py                      CIFAR-10, the published recipe of 2,000 epochs
    python mae_pretrain.py --demo               drawn shapes, no network, 3 minutes on two CPU cores
    python mae_pretrain.py --dataset folder --data_path my_pictures --image_size 64 --patch_size 8
    tensorboard --logdir logs                   the loss, and 16 reconstructions at every epoch
    python mae_pretrain.py --reconstruct PICTURES --mask_ratio 0.5 0.75 0.9

Writes the model to --model_path and its last reconstructions beside it, as a PNG. The last line
trains nothing: it shows what the trained model makes of your pictures.
"""

import os

import torch
from einops import rearrange

import utils
from model import MAE_ViT, count_visible

DEMO = {
    "dataset": "shapes",
    "patch_size": 8,
    "emb_dim": 96,
    "encoder_layer": 4,
    "decoder_layer": 2,
    "mask_ratio": 0.5,
    "batch_size": 128,
    "base_learning_rate": 2e-3,
    "total_epoch": 20,
    "warmup_epoch": 1,
    "model_path": "vit-t-mae-demo.pth",
}


def get_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    # fmt: off
    parser.add_argument("--demo", action="store_true",
        help="set defaults for a run of minutes without network: "
             + ", ".join(f"{name} {value}" for name, value in DEMO.items()))
    utils.add_data_flags(parser)
    add = parser.add_argument_group("model").add_argument
    add("--image_size", type=utils.positive_int, default=32)
    add("--patch_size", type=utils.positive_int, default=2,
        help="a picture has (image_size / patch_size)^2 patches")
    add("--emb_dim", type=utils.positive_int, default=192, help="width; a multiple of the heads")
    add("--encoder_layer", type=utils.positive_int, default=12)
    add("--encoder_head", type=utils.positive_int, default=3)
    add("--decoder_layer", type=utils.positive_int, default=4)
    add("--decoder_head", type=utils.positive_int, default=3)
    add("--mask_ratio", type=utils.open_ratio, default=0.75, nargs="+", action=utils.OneOrMore,
        help="share of the patches hidden; int(patches * (1 - mask_ratio)) stay visible; "
             "several only with --reconstruct")
    add("--norm_pix_loss", action="store_true",
        help="predict pixels normalised by the mean and deviation of their patch; "
             "the pictures shown are de-normalised with those of the true patch")
    parser.add_argument("--augment", action="store_true",
        help="train on random crops, resized, and their mirror images, as in the paper")
    parser.add_argument("--reconstruct", metavar="PATH",
        help="no training: show what the model of --model_path makes of a picture, or of the "
             "first 16 of a folder, in a PNG beside it")
    utils.add_training_flags(parser, seed=42, batch_size=4096, base_learning_rate=1.5e-4,
        weight_decay=0.05, total_epoch=2000, warmup_epoch=200)
    utils.add_device_flags(parser, max_device_batch_size=128)
    utils.add_output_flags(parser, "--model_path", "vit-t-mae.pth", "mae-pretrain")
    # fmt: on
    return parser.parse(argv, DEMO, "model_path")


class MAELoss(torch.nn.Module):
    """The loss of each picture: the mean squared error over its hidden pixels.

    With norm_pix_loss, on pixels normalised by the mean and variance of their patch (paper, section
    3, "Reconstruction target").
    """

    def __init__(self, model, patch_size, norm_pix_loss=False):
        super().__init__()
        self.model, self.patch_size, self.norm_pix_loss = model, patch_size, norm_pix_loss

    def forward(self, img, noise):
        """img uint8 [B,3,H,W], noise [B,T] -> loss [B]."""
        img = utils.to_float(img)
        predicted_img, mask = self.model(img, noise)
        if self.norm_pix_loss:
            mean, std = patch_mean_std(img, self.patch_size)
            img = (img - mean) / std
        mask = mask.float()
        squared_error = (predicted_img.float() - img) ** 2
        return (squared_error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def patch_mean_std(img, patch_size):
    """Mean and standard deviation of every patch, over its pixels and channels: [B,1,H,W] each."""
    patches = rearrange(img, "b c (h p1) (w p2) -> b 1 h w (c p1 p2)", p1=patch_size, p2=patch_size)
    statistics = patches.mean(-1), (patches.var(-1) + 1e-6).sqrt()  # [B,1,h,w] each
    return tuple(
        x.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3) for x in statistics
    )


@torch.no_grad()
def fill_in(model, img, noise, patch_size, norm_pix_loss=False):
    """img [B,3,H,W], noise [B,T] -> masked, reconstructed: [B,3,H,W] each.

    The visible patches are as they are, the prediction elsewhere; after norm_pix_loss it is
    de-normalised with the true patch's mean and deviation.
    """
    predicted_img, mask = model(img, noise)
    if norm_pix_loss:
        mean, std = patch_mean_std(img, patch_size)
        predicted_img = predicted_img * std + mean
    return img * (1 - mask), predicted_img * mask + img * (1 - mask)


def reconstruct(model, img, noise, patch_size, norm_pix_loss=False):
    """img uint8 [B,3,H,W], noise [B,T] -> picture [3,H',W'] in [0, 1], two images to a row.

    Each is shown masked, reconstructed and as it is.
    """
    img = utils.to_float(img)
    grid = torch.cat([*fill_in(model, img, noise, patch_size, norm_pix_loss), img])
    w1 = 1 if len(img) % 2 else 2
    grid = rearrange(grid, "(v h1 w1) c h w -> c (h1 h) (w1 v w)", w1=w1, v=3)
    return ((grid + 1) / 2).clamp(0, 1)


def show(args):
    """--reconstruct: pictures through a trained model, masked and reconstructed at each ratio."""
    model, architecture, norm_pix_loss = utils.load_mae(args.model_path)
    path = os.path.splitext(args.model_path)[0] + "-reconstructed.png"
    utils.check_outputs(path)
    files = utils.find_pictures(args.reconstruct)
    img = utils.to_float(utils.decode(files[:16], architecture["image_size"])[0])
    noise = torch.rand(len(img), len(model.encoder.pos_embedding),
        generator=utils.generator("shown", args.seed))  # fmt: skip
    columns = []
    for ratio in args.mask_ratio if isinstance(args.mask_ratio, list) else [args.mask_ratio]:
        if count_visible(noise.shape[1], ratio) == 0:
            raise utils.InputError(f"--mask_ratio {ratio} leaves no patch visible")
        model.encoder.shuffle.ratio = ratio
        columns += fill_in(model, img, noise, architecture["patch_size"], norm_pix_loss)
    grid = torch.stack([*columns, img])  # [2 * ratios + 1,B,3,H,W]
    grid = (rearrange(grid, "v b c h w -> c (b h) (v w)") + 1) / 2
    utils.write_picture(path, grid.clamp(0, 1))
    utils.say(f"{len(img)} of {len(files)} pictures, masked and reconstructed: {path}")


def random_resized_crop(img, draw):
    """Crop a fifth to all of each picture, back to its size, and mirror half of them.

    img [b,3,H,W] in [-1, 1], draw [b,5] in [0, 1) -> [b,3,H,W]. Paper, appendix A.1; the ranges are
    those of torchvision's RandomResizedCrop, which draws one crop for a whole batch.
    """
    area, stretch = 0.2 + 0.8 * draw[:, 0], (4 / 3) ** (2 * draw[:, 1] - 1)
    width, height = ((area * x).sqrt().clamp(max=1) for x in (stretch, 1 / stretch))
    x, y = (2 * draw[:, 2] - 1) * (1 - width), (2 * draw[:, 3] - 1) * (1 - height)
    mirror, zero = (draw[:, 4] < 0.5) * 2 - 1, torch.zeros_like(x)
    rows = torch.stack([mirror * width, zero, x]), torch.stack([zero, height, y])
    return utils.warp(img, torch.stack(rows).permute(2, 0, 1), "bicubic", "border").clamp(-1, 1)


def train_batch(net, optim, images, batch, noise, part_size, progress, crop=()):
    """One update of the weights, by the mean loss of images[batch] under the masks of the noise.

    net is a MAELoss; batch holds indexes [N] and noise is [N,T], on the host; with --augment, crop
    holds [N,5] for random_resized_crop.
    """
    optim.zero_grad(set_to_none=True)
    weight = utils.world_size() / len(batch)  # of several processes, the mean gradient is taken
    parts = utils.micro_batches(net, part_size, images.device, batch, noise, *crop)
    for index, part_noise, *draw in parts:
        img = images[index]
        if draw:
            img = random_resized_crop(utils.to_float(img), *draw)
        loss = net(img, part_noise)  # [b]
        (loss.sum() * weight).backward()
        progress.add(len(index), loss.detach().sum())
    optim.step()


def main(args):
    if args.reconstruct:
        return show(args)
    if isinstance(args.mask_ratio, list):
        raise utils.InputError("several values of --mask_ratio need --reconstruct")
    utils.setup_seed(args.seed)
    device = utils.choose_device(args.device)
    png_path = os.path.splitext(args.model_path)[0] + ".png"
    utils.check_outputs(args.model_path, png_path, utils.state_path(args.model_path))
    utils.warn_of_long_warmup(args)

    architecture = {
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "emb_dim": args.emb_dim,
        "encoder_layer": args.encoder_layer,
        "encoder_head": args.encoder_head,
        "decoder_layer": args.decoder_layer,
        "decoder_head": args.decoder_head,
        "mask_ratio": args.mask_ratio,
    }
    model = utils.build(MAE_ViT, **architecture)
    pictures = utils.load_pictures(args, device, need_classes=False)
    images = pictures.train_images
    part_size = utils.choose_part_size(args, device)
    loss = MAELoss(model, args.patch_size, args.norm_pix_loss)
    net, chosen = utils.place(loss, device, args, part_size, args.total_epoch * len(images))
    optim = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )

    num_patches = len(model.encoder.pos_embedding)
    if count_visible(num_patches, args.mask_ratio) == num_patches:
        raise utils.InputError(f"--mask_ratio {args.mask_ratio} hides no patch of {num_patches}")
    # The same pictures and masks at every epoch; spread, as a folder is sorted by class.
    n = min(16, len(pictures.val_images))
    shown = pictures.val_images[torch.arange(n) * len(pictures.val_images) // n]
    shown_noise = torch.rand(n, num_patches, generator=utils.generator("shown", args.seed))
    shown_noise = shown_noise.to(device)

    run = utils.Run(args, "mae-pretrain", args.model_path, model, optim, pictures.fingerprint())
    utils.describe_run(args, chosen, model, pictures, run.curves.folder)

    for epoch in run.epochs():
        lr = utils.set_learning_rate(optim, epoch, args)
        model.train()
        order = torch.randperm(len(images), generator=utils.generator("order", args.seed, epoch))
        with run.progress(device, ["loss"], lr, len(images)) as progress:
            for update, batch in run.updates(order.split(args.batch_size)):
                # The masks, like the order, are a function of the seed, the epoch and the update.
                rng = utils.generator("masks", args.seed, epoch, update)
                noise = torch.rand(len(batch), num_patches, generator=rng)
                crop = [torch.rand(len(batch), 5, generator=rng)] if args.augment else []
                train_batch(net, optim, images, batch, noise, part_size, progress, crop)
        results = progress.mean()

        model.eval()
        grid = reconstruct(model, shown, shown_noise, args.patch_size, args.norm_pix_loss)
        run.curves.add_scalar("mae_loss", results["loss"], epoch)
        run.curves.add_scalar("lr", lr, epoch)
        run.curves.add_scalar("images_per_second", progress.per_second, epoch)
        run.curves.add_image("mae_image", grid, epoch)
        utils.say(
            f"epoch {epoch + 1}/{args.total_epoch}: loss {results['loss']:.4f}, lr {lr:.2e}, "
            f"{progress.per_second:,.0f} images/s"
        )
        if run.end_epoch():
            facts = {"epoch": epoch + 1, "metrics": results, "chosen": chosen}
            content = utils.model_bytes(model, architecture, args, **facts)
            run.files.hold(args.model_path, content)
            run.files.hold(png_path, utils.png_bytes(grid))
            run.save()
    run.close()
    utils.say(f"model: {args.model_path}, reconstructions: {png_path}")


if __name__ == "__main__":
    with utils.one_line_errors(), utils.processes():
        main(get_args())
