"""Pretrain a masked autoencoder: hide most of an image's patches and predict their pixels.

    python mae_pretrain.py                      CIFAR-10, the published recipe of 2,000 epochs
    python mae_pretrain.py --demo               synthetic shapes, offline, minutes on two CPU cores
    python mae_pretrain.py --dataset folder --data_path my_images --image_size 64 --patch_size 8
    tensorboard --logdir logs                   the loss, and 16 reconstructions at every epoch
    python mae_pretrain.py --reconstruct IMAGE_OR_FOLDER --mask_ratio 0.5 0.75 0.9
    python mae_pretrain.py --reconstruct pic/samples --model_path weights/vit-t-mae-pictures.pth

Writes the model to --model_path and, beside it, the reconstructions of the last saved epoch as a
PNG. The last two do not train: they show how a trained model, or the one that comes with this
repository, reconstructs your images.
"""

import inspect
import math
import os
import shlex

import numpy as np
import torch
from einops import rearrange
from torchvision.transforms.functional import to_tensor

import utils
from model import MAE_ViT, count_visible

DEMO = dict(
    dataset="shapes", patch_size=8, emb_dim=64, encoder_layer=4, encoder_head=4, decoder_layer=1,
    decoder_head=4, mask_ratio=[0.5], batch_size=64, base_learning_rate=8e-3, total_epoch=16,
    warmup_epoch=1, model_path="vit-t-mae-demo.pth",
)  # fmt: skip
AFTER_DEMO = """
Look at {png_path}: 16 images, each masked, reconstructed and as drawn. Next, with 500 labels:
    python train_classifier.py --demo
    python train_classifier.py --demo --pretrained_model_path {model_path} --output_model_path \
vit-t-classifier-demo-pretrained.pth"""


def get_args(argv=None):
    parser = utils.ArgumentParser(__doc__, DEMO, "minutes")
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--image_size", type=utils.positive_int, default=32, help="side of the images in pixels")
    add("--patch_size", type=utils.positive_int, default=2,
        help="side of a patch in pixels; an image has (image_size / patch_size)^2 patches")
    add("--emb_dim", type=utils.positive_int, default=192, help="width; a multiple of the heads")
    add("--encoder_layer", type=utils.positive_int, default=12, help="blocks of the encoder")
    add("--encoder_head", type=utils.positive_int, default=3, help="attention heads per block")
    add("--decoder_layer", type=utils.positive_int, default=4, help="blocks of the decoder")
    add("--decoder_head", type=utils.positive_int, default=3, help="attention heads per block")
    add("--decoder_dim", type=utils.positive_int, metavar="N",
        help="width of the decoder; a multiple of its heads (default: emb_dim)")
    open_ratio = utils.checked(float, lambda x: 0 < x < 1, "between 0 and 1, both excluded")
    add("--mask_ratio", type=open_ratio, nargs="+", metavar="RATIO",
        help="fraction of the patches that is masked; several with --reconstruct (default: 0.75)")
    add("--masking", choices=["random", "block", "grid"], default="random",
        help="random patches; rectangles; at 0.75, all but one of each 2x2 (paper, Table 1f)")
    add("--norm_pix_loss", action="store_true",
        help="predict pixels normalised by their patch's mean and deviation (default: off)")
    parser.add_argument("--augment", action="store_true",
        help="train on random resized crops, half of them flipped (default: off)")
    parser.add_argument("--reconstruct", metavar="PATH",
        help="no training: --model_path reconstructs an image or 16 of a folder (default: train)")
    utils.add_shared_flags(parser, "--model_path", "mae-pretrain", seed=42, batch_size=4096,
        base_learning_rate=1.5e-4, weight_decay=0.05, total_epoch=2000,
        warmup_epoch=200, mask_ratio=[0.75], model_path="vit-t-mae.pth")
    # fmt: on
    return utils.run_args(parser, argv, "model_path")


def draw_noise(masking, n, num_patches, mask_ratio, rng):
    """Draw the noise [n,T] by which a model of this mask ratio hides patches of n images."""
    grid = math.isqrt(num_patches)
    if masking == "block":
        return block_noise(torch.rand(n, 10, 4, generator=rng), grid, mask_ratio)
    if masking == "grid":
        return grid_noise(torch.rand(n, 2, generator=rng), grid)
    return torch.rand(n, num_patches, generator=rng)


def block_noise(rand, grid, mask_ratio):
    """Noise that hides rectangles of random size, shape and place, one after the other.

    rand [n,K,4] in [0, 1) makes K rectangles for each of n images -> noise [n,grid**2]. After BEiT
    (arXiv:2106.08254, Algorithm 1) they cover from 8 % of the image to mask_ratio each, with sides
    in a ratio of up to 10 to 3. Of the last, the patches nearest to its centre are hidden; in BEiT
    it is drawn no larger than what is left to hide. If K rectangles do not suffice, they grow.
    """
    area, shape, top, left = rand.unbind(-1)  # [n,K] each
    smallest = min(16 / 196, mask_ratio)
    area = (smallest + (mask_ratio - smallest) * area) * grid**2  # in patches
    shape = (10 / 3) ** (2 * shape - 1)

    def distance(side, start):
        """From the rectangle's centre, in halves of its side: below 1 inside of it. [n,K,grid]"""
        side = side.sqrt().round().clamp(1, grid)
        centre = (start * (grid - side + 1)).floor() + (side - 1) / 2
        return (torch.arange(grid) - centre[..., None]).abs() / (side[..., None] / 2)

    rows, columns = distance(area * shape, top), distance(area / shape, left)
    turn = torch.full((len(rand), grid**2), math.inf)  # when a patch is hidden
    K = rand.shape[1]
    for k in range(K):  # inside of rectangle k in turn k, outside of all in turn K, from the centre
        farther = torch.maximum(rows[:, k, :, None], columns[:, k, None, :]).flatten(1)
        turn = turn.minimum(torch.where(farther < 1, float(k), float(K)) + farther)
    return -turn  # the model shows the patches of least noise


def grid_noise(rand, grid):
    """Noise that leaves a regular grid visible: at a ratio of 0.75 one patch of each 2x2.

    rand [n,2] in [0, 1) shifts it, image by image -> noise [n,grid**2]. The noise is a Bayer matrix
    (ordered dithering), which spreads any number of patches evenly.
    """
    levels = (grid - 1).bit_length()
    place = (rand * 2**levels).long()[..., None] + torch.arange(grid)  # [n,2,grid]
    y, x = place[:, 0, :, None], place[:, 1, None, :]
    noise = torch.zeros(len(rand), grid, grid)
    for level in range(levels):  # each adds two bits: where in its 2x2 a patch is
        bit_y, bit_x = y >> level & 1, x >> level & 1
        noise = 4 * noise + 2 * (bit_y ^ bit_x) + bit_y
    return noise.flatten(1)


class MAELoss(torch.nn.Module):
    """The loss of each image: the mean squared error over its hidden pixels.

    With norm_pix_loss, on pixels normalised by the mean and variance of their patch (paper, section
    3, "Reconstruction target").
    """

    def __init__(self, model, patch_size, norm_pix_loss=False):
        super().__init__()
        self.model, self.patch_size, self.norm_pix_loss = model, patch_size, norm_pix_loss

    def forward(self, img, noise):
        """img [B,3,H,W], uint8 or float, noise [B,T] -> loss [B]."""
        img = utils.to_float(img)
        predicted_img, mask = self.model(img, noise)
        if self.norm_pix_loss:
            mean, std = patch_mean_std(img, self.patch_size)
            img = (img - mean) / std
        mask = mask.float()
        squared_error = (predicted_img.float() - img) ** 2
        return (squared_error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))

    @torch.no_grad()
    def reconstruct(self, img, noise):
        """img [B,3,H,W], noise [B,T] -> masked, reconstructed: [B,3,H,W] each.

        The visible patches are as they are, the prediction elsewhere; after norm_pix_loss it is
        de-normalised with the true patch's mean and standard deviation.
        """
        predicted_img, mask = self.model(img, noise)
        if self.norm_pix_loss:
            mean, std = patch_mean_std(img, self.patch_size)
            predicted_img = predicted_img * std + mean
        return img * (1 - mask), predicted_img * mask + img * (1 - mask)


def patch_mean_std(img, patch_size):
    """Mean and standard deviation of every patch, over its pixels and channels: [B,1,H,W] each."""
    patches = rearrange(img, "b c (h p1) (w p2) -> b 1 h w (c p1 p2)", p1=patch_size, p2=patch_size)
    statistics = patches.mean(-1), (patches.var(-1) + 1e-6).sqrt()  # [B,1,h,w] each
    return tuple(
        x.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3) for x in statistics
    )


def reconstruction_grid(mae_loss, img, noise):
    """img uint8 [B,3,H,W], noise [B,T] -> grid [3,H',W'] in [0, 1], two images to a row, or one if
    their number is odd.

    Each is shown masked, reconstructed and as it is.
    """
    img = utils.to_float(img)
    grid = torch.cat([*mae_loss.reconstruct(img, noise), img])
    w1 = 1 if len(img) % 2 else 2
    grid = rearrange(grid, "(v h1 w1) c h w -> c (h1 h) (w1 v w)", w1=w1, v=3)
    return ((grid + 1) / 2).clamp(0, 1)


def reconstruct_images(args):
    """--reconstruct: images through a trained model, masked and reconstructed at each ratio."""
    model, architecture, content = utils.load_model(args.model_path, "MAE_ViT")
    norm_pix_loss = content.get("args", {}).get("norm_pix_loss", False)
    mae_loss = MAELoss(model, architecture["patch_size"], norm_pix_loss)
    path = utils.free_path(os.path.splitext(args.model_path)[0] + "-reconstructed.png")
    files = utils.list_images(args.reconstruct)[0]
    shown = [files[i] for i in utils.evenly_spaced(len(files), 16)]
    img = utils.to_float(utils.decode(shown, architecture["image_size"])[0])
    num_patches, columns, names = len(model.encoder.pos_embedding), [], []
    for ratio in args.mask_ratio:
        if count_visible(num_patches, ratio) == 0:
            raise utils.InputError(f"--mask_ratio {ratio} leaves no patch visible")
        model.encoder.shuffle.ratio = ratio
        rng = utils.generator("shown", args.seed)
        noise = draw_noise(args.masking, len(img), num_patches, ratio, rng)
        columns += mae_loss.reconstruct(img, noise)
        names += [f"{ratio:.0%} masked", "reconstructed"]
    images = torch.stack([*columns, img], 1).flatten(0, 1)  # a row for each image
    images = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    picture, _ = utils.draw_images(images, len(names) + 1, [*names, "original"])
    if utils.rank() == 0:
        utils.write_files({path: utils.encode(to_tensor(picture))})
    utils.print_rank_0(f"{len(img)} of {len(files)} images, masked and reconstructed: {path}")


def random_resized_crop(img, rand):
    """Crop 20-100 % of each image, resize it to the image's size, and flip half of them.

    img [b,3,H,W] in [-1, 1], rand [b,5] in [0, 1) -> [b,3,H,W]. The areas are those of the paper's
    code, facebookresearch/mae, the shapes of 3:4 to 4:3 those of torchvision's RandomResizedCrop,
    which would draw one crop for a whole batch.
    """
    area, stretch = 0.2 + 0.8 * rand[:, 0], (4 / 3) ** (2 * rand[:, 1] - 1)
    width = (area * stretch).sqrt().clamp(max=1)
    height = (area / stretch).sqrt().clamp(max=1)
    x = (2 * rand[:, 2] - 1) * (1 - width)
    y = (2 * rand[:, 3] - 1) * (1 - height)
    flip, zero = (rand[:, 4] < 0.5) * 2 - 1, torch.zeros_like(x)
    matrix = torch.stack([flip * width, zero, x, zero, height, y], 1).view(-1, 2, 3)
    return utils.warp(img, matrix, "bicubic", "border").clamp(-1, 1)


def losses(net, images, rows):
    """The loss of each image of a micro-batch, [b]; net is the Net of a MAELoss.

    rows: "index" [b] of images, "noise" [b,T] of the masks, and with --augment "crop" [b,5], the
    random numbers of `random_resized_crop`.
    """
    img = images[rows["index"]]
    if "crop" in rows:
        img = random_resized_crop(utils.to_float(img), rows["crop"])
    return net(img, rows["noise"])


def main(args):
    if args.reconstruct:
        return reconstruct_images(args)
    ratio, *others = np.ravel(args.mask_ratio).tolist()  # earlier versions kept a number
    if others:
        raise utils.InputError("several values of --mask_ratio need --reconstruct")
    utils.print_settings("arguments", vars(args))
    utils.setup_seed(args.seed)
    devices = utils.choose_devices(args.device)
    # Every argument of MAE_ViT is a flag.
    architecture = {name: getattr(args, name) for name in inspect.signature(MAE_ViT).parameters}
    architecture["mask_ratio"] = ratio
    architecture["decoder_dim"] = args.decoder_dim or args.emb_dim
    model = MAE_ViT(**architecture)
    num_patches = len(model.encoder.pos_embedding)
    if count_visible(num_patches, ratio) == num_patches:
        raise utils.InputError(f"--mask_ratio {ratio} hides no patch of {num_patches}")
    dataset = utils.load_dataset(args, devices[0], need_classes=False)
    images, num_images = dataset.train_images, len(dataset.train_images)

    mae_loss = MAELoss(model, args.patch_size, args.norm_pix_loss)
    # As `losses` calls it: what a crop returns is float.
    example = [utils.to_float(images[:1]) if args.augment else images[:1]]
    example.append(torch.zeros(1, num_patches, device=devices[0]))
    net = utils.Net(mae_loss, devices, args, example, total=args.total_epoch * num_images)
    adam = dict(betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    optim = torch.optim.AdamW(model.parameters(), **adam)
    training = utils.Training(model, net, optim, ["loss"])

    def noise_of(n, rng):
        return draw_noise(args.masking, n, num_patches, ratio, rng)

    # The same images and masks at every epoch; spread, as a folder is sorted by class.
    shown = dataset.val_images[utils.evenly_spaced(len(dataset.val_images), 16)]
    shown_noise = noise_of(len(shown), utils.generator("shown", args.seed)).to(devices[0])
    png_path = os.path.splitext(args.model_path)[0] + ".png"

    with utils.start_run(args, "mae-pretrain", args.model_path, training, dataset) as run:
        utils.describe_run(args, training, dataset, run.curves.folder)
        for epoch in run.epochs():
            utils.set_learning_rate(optim, epoch, args)
            model.train()
            order = torch.randperm(num_images, generator=utils.generator("order", args.seed, epoch))
            for update, batch in run.updates(order.split(args.batch_size)):
                # The masks, like the order, are a function of the seed, the epoch and the update.
                rng = utils.generator("masks", args.seed, epoch, update)
                rows = {"index": batch, "noise": noise_of(len(batch), rng)}
                if args.augment:
                    rows["crop"] = torch.rand(len(batch), 5, generator=rng)
                for micro_batch in net.micro_batches(rows):
                    training.backward(losses(net, images, micro_batch), len(batch))
                training.step()
            train = training.end()

            model.eval()
            grid = reconstruction_grid(mae_loss, shown, shown_noise)
            loss = train["loss"]
            run.report(f"loss {loss:.4f}", {"mae_loss": loss}, {"mae_image": grid})
            more = {"epoch": epoch + 1, "metrics": train, "chosen": net.settings}
            content = utils.model_content(model, architecture, args, **more)
            run.end_epoch({args.model_path: content, png_path: grid}, kept=content)
    utils.print_rank_0(f"model: {args.model_path}, reconstructions: {png_path}")
    if args.demo:
        model_path = shlex.quote(args.model_path)
        utils.print_rank_0(AFTER_DEMO.format(png_path=png_path, model_path=model_path))


if __name__ == "__main__":
    with utils.processes(), utils.one_line_errors():
        main(get_args())
