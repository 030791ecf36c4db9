"""What both scripts share. It reads downwards: what is used stands above.

A run meets these classes in this order:

    ImageSet    the images, all of them, in the memory of the training device
    Net         a module on its devices, in its precision, compiled or not; it makes micro-batches
    Training    what an update changes: weights, optimizer, scale of the loss, sums of the epoch
    Run         where a run stands and what it keeps on disk: it can be stopped anywhere
    Curves      TensorBoard's files

A script makes a model, reads its images, makes the Net, the optimizer and the Training, and starts
a Run. That yields the epochs and, of each, the batches. The script draws what an update needs, and
for every micro-batch of the Net computes the losses and hands them to `Training.backward`; then
`Training.step` changes the weights. After the epoch `Run.report` writes curves and a line, and
`Run.end_epoch` the files, if they are due.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import errno
import glob
import hashlib
import importlib
import io
import itertools
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.nn.functional import affine_grid, grid_sample
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.transforms import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from model import MAE_Encoder, MAE_ViT, SizeError, ViT_Classifier

with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

# ------------------------------------------------------------------------ errors and processes
# Errors end a script in one line; one run may have several processes, on several GPUs or machines.


class InputError(Exception):
    """An error that the user can fix. Its message is one line, whatever it quotes."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split())[:500])


@contextlib.contextmanager
def as_input_error(message, *kinds):
    """Raise InputError, beginning with the message, for errors of these kinds."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{message}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def memory_for(what="a micro-batch", remedy="--max_device_batch_size or the size of the model"):
    """If memory runs out, of a GPU or not, raise InputError. Works as a decorator, too."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if re.search("MemoryError|DefaultCPUAllocator|out of memory", repr(error)):
            raise InputError(f"{what} does not fit into memory: lower {remedy}") from error
        raise


def rank():
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun has started, on all machines; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank_0(text):
    """Print and flush, in process 0 only. A full log or a closed pipe must not end the run."""
    if rank() > 0:
        return
    try:
        tqdm.write(text)  # above the progress bar, if there is one
        sys.stdout.flush()
    except (OSError, AttributeError):  # of a standard output that was closed before the start
        sys.stdout = open(os.devnull, "w")


def end_with(message, status=1):
    """Print an error and end this process. Of several, the first of a machine prints at once."""
    if world_size() > 1 and os.environ["LOCAL_RANK"] != "0":
        time.sleep(3)  # torchrun ends this process meanwhile if the first has failed, too
    tqdm.write(message, file=sys.stderr)
    if world_size() > 1:  # a normal end would wait for the others, which may never answer
        os._exit(status)
    sys.exit(status)


def reason(error):
    """The line of a message that says what went wrong; PyTorch's may quote whole tracebacks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]*[A-Z]\w+: .", line)]  # "ValueError: ..."
    return named[-1] if named else lines[0]


@contextlib.contextmanager
def one_line_errors():
    """End the program with `error: ...` and status 1 where the user can fix the cause.

    `python -X dev` shows the traceback instead.
    """
    with contextlib.suppress(AttributeError):  # a notebook's prints every character anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with memory_for():
            yield
    except Exception as error:
        if isinstance(error, dist.DistError) or "/gloo/gloo/" in str(error):  # gloo's file names
            error = InputError(f"another process has failed or cannot be reached: {error}")
        if isinstance(error, (InputError, SizeError)) and not sys.flags.dev_mode:
            end_with(f"error: {error}")
        if world_size() > 1:
            end_with(traceback.format_exc())
        raise


@contextlib.contextmanager
def processes():
    """Initialise the process group if torchrun started several processes; destroy it at the end.

    NCCL for CUDA tensors, gloo for CPU tensors. Process 0 alone prints and writes files.
    """
    if "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        # Harmless: for the [1,1,C] tokens both strides mean the same layout.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with one_line_errors():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            # PyTorch 2.6 may wait for ever for a thread of gloo that still lets go of tensors.
            time.sleep(0.1)
            dist.destroy_process_group()


def shard(tensor):
    """This process's slice of dim 0; sizes differ by at most one and may be 0."""
    return tensor.tensor_split(world_size())[rank()]


def reduce_over_processes(tensor, op=dist.ReduceOp.SUM):
    """All-reduce in place, element by element, and return the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def check_same_settings(**settings):
    """Raise InputError unless every process, on whatever machine, has the same settings."""
    gathered = [settings] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, settings)
    for number, others in enumerate(gathered):
        for name, value in gathered[0].items():
            if others.get(name) != value:
                text = f"process {number} has {name} {others.get(name)}, process 0 has {value}"
                raise InputError(f"{text}: give all the same flags, code and files")


# -------------------------------------------------------------------------------- command line
# Called by get_args, as is run_args in the last part of this file.


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the script's own line breaks, and adds the defaults that help texts do not tell."""

    def _get_help_string(self, action):
        return action.help if "default:" in action.help else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A script's parser, with --demo, which replaces defaults by those of demo: {flag: value}.

    A wrong flag is an error in one line, which tells the flag that may be meant.
    """

    def __init__(self, description, demo, duration):
        super().__init__(usage="%(prog)s [options]", description=description, allow_abbrev=False)
        self.formatter_class, self.demo = HelpFormatter, demo
        text = f"defaults for a small offline run that takes {duration} (default: off)"
        self.add_argument("--demo", action="store_true", help=text)

    def parse_args(self, args=None, namespace=None):
        if namespace is None and self.parse_known_args(args)[0].demo:
            namespace = argparse.Namespace(**self.demo)
        return super().parse_args(args, namespace)

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            flags = list(self._option_string_actions)
            longer = [flag for flag in flags if flag.startswith(unknown[1])]
            for flag in (longer or difflib.get_close_matches(unknown[1], flags))[:1]:
                message += f": did you mean {flag}?"
        end_with(f"{self.prog}: error: {message} (--help lists the flags)", status=2)


def checked(kind, test, requirement):
    """An argparse type: int or float, or an error that states the requirement."""

    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {requirement}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


positive_int = checked(int, lambda n: 1 <= n < 2**31, "a whole number from 1 to 2**31 - 1")
unsigned_int = checked(int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2**31 - 1")
unsigned_float = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
model_file = checked(
    str, lambda path: os.path.basename(path) and not os.path.isdir(path) and path[-4:] != ".png",
    "the name of a model file, such as vit-t-mae.pth",
)  # fmt: skip


# fmt: off
def add_shared_flags(parser, model_flag, curves, **defaults):
    """Add the flags of both scripts; `curves` names the run's folder, defaults are the script's."""
    add = parser.add_argument_group("dataset").add_argument
    add("--dataset", choices=["cifar10", "cifar100", "folder", "shapes"], default="cifar10",
        help="cifar10, cifar100: downloaded; folder: your own images; shapes: synthetic")
    add("--data_path", default="data",
        help="folder of the download, or of train/<class>/... and val/<class>/...; see the readme")
    add("--train_images", type=positive_int, metavar="N",
        help="use N of the training images, spread evenly over the classes (default: all)")
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=unsigned_int, help="random seed: weights, order, masks, augmentation")
    add("-bs", "--batch_size", type=positive_int, metavar="N",
        help="images per update of the weights; the last batch of an epoch may be smaller")
    add("--base_learning_rate", type=unsigned_float, metavar="RATE",
        help="the learning rate is base_learning_rate * batch_size / 256 * factor (--warmup_epoch)")
    add("--weight_decay", type=unsigned_float, metavar="RATE", help="weight decay of AdamW")
    add("--total_epoch", type=positive_int, metavar="N", help="number of epochs")
    add("--warmup_epoch", type=unsigned_int, metavar="N",
        help="factor: the smaller of a linear warm-up over N epochs and a cosine over all epochs")
    add = parser.add_argument_group("device").add_argument
    add("--max_device_batch_size", type=positive_int, metavar="N",
        help="largest micro-batch; the result does not depend on it (default: chosen)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU that works")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="of matrix products; auto: bf16 where native, else fp16 on a GPU, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the training (default: on one GPU, from 3 million images x epochs on)")
    add = parser.add_argument_group("output").add_argument
    add(model_flag, type=model_file, help="the model file; other files of the run go beside it")
    add("--log_dir", default="logs", help="curves go into <log_dir>/<dataset>/<run_name>")
    add("--run_name", metavar="NAME",
        help=f"folder of the curves, with -2, -3, ... if it exists (default: {curves})")
    add("--keep_every", type=positive_int, metavar="N",
        help="every N epochs, also keep the model, such as model-0400.pth (default: off)")
    add("--save_minutes", type=unsigned_float, default=10.0, metavar="M",
        help="save every M minutes at the latest, and after an epoch if a tenth of that has passed")
    add("--resume", nargs="?", const=True, default=False, choices=["auto"],
        help="go on; other flags need not be given; auto: or start, without a state (default: off)")
    parser.set_defaults(**defaults)
# fmt: on

# These do not change a result, or by rounding only: they may differ between processes, and when a
# run is resumed.
MAY_CHANGE = {
    "compile", "data_path", "demo", "device", "keep_every", "log_dir", "max_device_batch_size",
    "model_path", "output_model_path", "precision", "resume", "save_minutes",
}  # fmt: skip


# -------------------------------------------------------------- random numbers and schedule
# All that a run draws is a function of its seed; main calls these before and at every epoch.


def setup_seed(seed=2022):
    """Seed PyTorch's global generator, which draws the initial weights, and nothing else."""
    torch.manual_seed(seed)


def generator(*key):
    """A CPU generator seeded by a hash of its key, such as ("masks", seed, epoch, update)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it takes 32 bits


def learning_rate(epoch, base_learning_rate, batch_size, total_epoch, warmup_epoch):
    """Of an epoch, counted from 0: the smaller of a linear warm-up and of half a cosine.

    In the paper's code, facebookresearch/mae, the cosine begins after the warm-up.
    """
    warmup = (epoch + 1) / (warmup_epoch + 1e-8)
    cosine = 0.5 * (math.cos(epoch / total_epoch * math.pi) + 1)
    return base_learning_rate * batch_size / 256 * min(warmup, cosine)


def set_learning_rate(optim, epoch, args):
    """Give the optimizer this epoch's learning rate."""
    recipe = args.base_learning_rate, args.batch_size, args.total_epoch, args.warmup_epoch
    lr = learning_rate(epoch, *recipe)
    for group in optim.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# -------------------------------------------------------------------------------------- images
# main downloads what is missing, and reads all images into the memory of the training device.


# Images in memory, uint8 [N,3,H,W], with labels int64 [N], and the names of the classes.
ImageSet = namedtuple("ImageSet", "train_images train_labels val_images val_labels classes")


def checksum(*tensors):
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), crc)
    return crc


def to_float(images):
    """uint8 pixels -> [-1, 1], as mean 0.5 and std 0.5 do; what is float already, unchanged."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def warp(img, matrix, mode="bilinear", padding_mode="zeros"):
    """Resample img [b,3,H,W]; matrix [b,2,3] maps output to input coordinates, both in [-1, 1].

    By default pixels from outside of the image are 0, the middle of their range.
    """
    if len(img) == 0:  # an empty shard, which grid_sample refuses
        return img
    grid = affine_grid(matrix, img.shape, align_corners=False)  # [b,H,W,2]
    return grid_sample(img, grid, mode, padding_mode, align_corners=False)


def evenly_spaced(total, n):
    """The indexes of n of `total` items, or of all if there are fewer, evenly spaced."""
    n = min(n, total)
    return torch.arange(n) * total // max(n, 1)


def stratified_subset(labels, n, flag="--train_images"):
    """The indexes of n of the labels [N], evenly from the classes and within each; None: of all."""
    if n is None:
        return torch.arange(len(labels))
    if n > len(labels):
        raise InputError(f"{flag} {n}: there are only {len(labels)} training images")
    return labels.argsort(stable=True)[evenly_spaced(len(labels), n)]


IMAGES = ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"


def download(args):
    """Let torchvision download CIFAR-10 or CIFAR-100 in process 0; the others wait.

    Raises InputError if that fails, or if the images are not those of CIFAR.
    """
    name, root = args.dataset, args.data_path
    own = "for images of your own add --dataset folder --data_path FOLDER"
    if args.image_size != 32:
        raise InputError(f"image size {args.image_size} does not fit {name}'s 32x32: {own}")
    dataset = getattr(datasets, name.upper())
    there = any(os.path.exists(f"{root}/{x}") for x in (dataset.base_folder, dataset.filename))
    # Not deeper: it may be a folder of several datasets.
    below = itertools.chain(*(glob.iglob(x, root_dir=root) for x in ("*", "*/*", "*/*/*")))
    if not there and any(path.lower().endswith(IMAGES) for path in below):
        raise InputError(f"{root} has images, no {name}: add --dataset folder or a new --data_path")
    if rank() == 0:
        place = f"put {dataset.filename} from {dataset.url} into {root}{os.sep}, or try --demo"
        with as_input_error(f"cannot get {name}: {place}", OSError, RuntimeError):
            dataset(root, train=False, download=True)
    reduce_over_processes(torch.zeros(1))  # the others wait here


def read_cifar(name, root, num_train=None):
    """CIFAR-10 or CIFAR-100 as torchvision has put it into the folder `root` -> ImageSet."""
    with as_input_error(f"cannot read {name}", OSError, RuntimeError):
        parts = [getattr(datasets, name.upper())(root, train) for train in (True, False)]
    images = [torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous() for x in parts]
    labels = [torch.tensor(x.targets) for x in parts]
    keep = stratified_subset(labels[0], num_train)
    return ImageSet(images[0][keep], labels[0][keep], images[1], labels[1], parts[0].classes)


def list_images(path, need_classes=False):
    """[(path, label), ...] and the names of the classes, by torchvision's reader.

    path: a folder or, without need_classes, an image.
    """
    if os.path.isfile(path) and not need_classes:
        return [(path, 0)], [""]
    if not os.path.isdir(path):
        raise InputError(f"there is no folder or image {path}")

    def is_image(file):
        file = os.path.join(os.sep, os.path.relpath(file, path))
        return file.lower().endswith(IMAGES) and f"{os.sep}." not in file

    with as_input_error(f"no images ({' '.join(IMAGES)}) in {path}", OSError, ValueError):
        names = datasets.folder.find_classes(path)[0] if need_classes else [""]
        labels = {name: i for i, name in enumerate(x for x in names if not x.startswith("."))}
        return datasets.folder.make_dataset(path, labels, is_valid_file=is_image), list(labels)


def decode(files, image_size):
    """[(path, label), ...] -> images uint8 [N,3,S,S], labels [N].

    Each image is turned upright, laid on white if it is transparent, resized to S on its shorter
    side, cropped to its centre, RGB; of an animated one it is the first frame. Raises InputError
    naming those that cannot be read.
    """
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    broken, bar = [], tqdm(files, "Reading images", disable=rank() > 0 or None, leave=False)
    for i, (path, _) in enumerate(bar):
        try:
            with Image.open(path) as file:
                img = ImageOps.exif_transpose(file)
                if img.mode.startswith("I"):  # 16 or 32 bits of grey, which convert would clip
                    grey = np.asarray(img).clip(0)
                    img = Image.fromarray((grey / max(257, grey.max() / 255)).astype(np.uint8))
                if img.has_transparency_data:
                    white = Image.new("RGBA", img.size, "white")
                    img = Image.alpha_composite(white, img.convert("RGBA"))
                img = img.convert("RGB")
        except Exception:  # each of PIL's decoders has errors of its own
            broken.append(path)
            continue
        images[i] = TF.pil_to_tensor(TF.center_crop(TF.resize(img, image_size), image_size))
    if broken:
        n, names = len(broken), ", ".join(broken)  # InputError cuts them if they are long
        raise InputError(f"cannot read {n} of {len(files)} images: no image or damaged: {names}")
    return images, torch.tensor([label for _, label in files])


def read_folder(root, image_size, num_train, need_classes):
    """Images below <root>/train and <root>/val or <root>/test, where each class is a folder.

    Without need_classes they may lie anywhere below <root>/train, or below <root> if it has none
    of these folders; and the first training images stand in for a val/ or test/ that is not there.
    For a num_train of 0 there need not be a train/.
    """
    if not os.path.isdir(root):
        raise InputError(f"there is no folder {root}: give that of your images with --data_path")
    found = [name for name in ("train", "val", "test") if os.path.isdir(os.path.join(root, name))]
    val = next((name for name in found if name != "train"), None)
    if (val and "train" not in found and num_train != 0) or (need_classes and not val):
        raise InputError(f"--data_path needs {root}/train/<class>/... and {root}/val/<class>/...")
    train_files, classes = [], None
    if num_train != 0:
        train_root = os.path.join(root, "train") if "train" in found else root
        train_files, classes = list_images(train_root, need_classes)
        labels = torch.tensor([label for _, label in train_files])
        train_files = [train_files[i] for i in stratified_subset(labels, num_train)]
    val_files = train_files[:16]
    if val:
        val_files, val_classes = list_images(os.path.join(root, val), need_classes)
        classes = classes or val_classes
        if unknown := set(val_classes) - set(classes):
            raise InputError(f"{root}/train lacks classes of {root}/{val}: {sorted(unknown)[:5]}")
        if missing := sorted(set(classes) - set(val_classes)):
            print_rank_0(f"warning: {root}/{val} has no image of {', '.join(missing[:20])}")
        val_files = [(path, classes.index(val_classes[label])) for path, label in val_files]
    train, val = (decode(files, image_size) for files in (train_files, val_files))
    return ImageSet(*train, *val, classes)


# Corners are complex numbers, x + iy: a sum moves them, a product scales and turns them.


def circle(radius, x=0.0, corners=48):
    """A regular polygon around x."""
    return x + radius * np.exp(2j * np.pi * np.arange(corners) / corners)


def box(width, height, x=0.0):
    return x + np.array([-width, width, width, -width]) + 1j * height * np.array([-1, -1, 1, 1])


# Of each shape, which fits the unit disc, the polygons to fill and those to cut out of them.
SHAPES = {
    "disc": ([circle(0.9)], []),
    "ring": ([circle(0.9)], [circle(0.46)]),
    "half-disc": ([0.95 * np.exp(1j * np.linspace(0, np.pi, 25)) - 0.4j], []),
    "crescent": ([circle(0.9)], [circle(0.7, 0.45)]),
    "square": ([box(0.75, 0.75)], []),
    "frame": ([box(0.78, 0.78)], [box(0.42, 0.42)]),
    "triangle": ([circle(0.9, corners=3)], []),
    "cross": ([box(0.27, 0.9), box(0.9, 0.27)], []),
    "star": ([circle(1, corners=10) * np.tile([1, 0.42], 5)], []),
    "bars": ([box(0.15, 0.8, x) for x in (-0.6, 0, 0.6)], []),
}


def draw_shapes(numbers, image_size, seed):
    """Draw the images of these numbers, of ten shapes in turn -> uint8 [N,3,S,S], labels [N].

    One flat colour on a softly shaded background; position, size, angle, colours, shading and
    noise are random, and a function of the seed and the number.
    """
    labels = torch.as_tensor(numbers) % len(SHAPES)
    images = torch.empty(len(labels), 3, image_size, image_size, dtype=torch.uint8)
    outlines, axis = list(SHAPES.values()), np.linspace(-1, 1, image_size)
    for i, number in enumerate(numbers):
        rng = np.random.default_rng([seed, int(number)])
        centre = 1 + 1j + complex(*rng.uniform(-0.2, 0.2, 2))
        turn = rng.uniform(0.6, 0.85) * np.exp(1j * rng.uniform(-0.3, 0.3))
        mask = Image.new("L", (4 * image_size, 4 * image_size))  # to be reduced, for soft edges
        for polygons, fill in zip(outlines[labels[i]], (255, 0), strict=True):
            for polygon in polygons:
                points = (centre + turn * polygon) * 2 * image_size
                ImageDraw.Draw(mask).polygon([(p.real, p.imag) for p in points], fill)
        inside = np.asarray(mask.reduce(4)) / 255  # [S,S]

        colour = rng.uniform(0, 1, (3, 1, 1))
        background = (colour + 0.5 + rng.uniform(-0.15, 0.15, (3, 1, 1))) % 1  # far from the colour
        slope_y, slope_x = rng.uniform(-0.1, 0.1, (2, 3, 1, 1))
        background = background + slope_y * axis[:, None] + slope_x * axis
        img = background + (colour - background) * inside + rng.normal(0, 0.02, images[i].shape)
        images[i] = torch.from_numpy(img * 255).round().clamp(0, 255)
    return images, labels


def read_shapes(image_size, num_train=None):
    """10,000 drawn images to train on, or num_train of these, and 1,000 others -> ImageSet."""
    keep = stratified_subset(torch.arange(10_000) % len(SHAPES), num_train)
    others = torch.randperm(1_000, generator=generator("shapes"))  # so that 16 show many kinds
    train, val = draw_shapes(keep, image_size, 0), draw_shapes(others, image_size, 1)
    return ImageSet(*train, *val, list(SHAPES))


@memory_for("the dataset", "--train_images or --image_size")
def load_dataset(args, device, need_classes=True):
    """Read args.dataset, downloaded if need be, into the device's memory -> ImageSet.

    Raises InputError if it cannot. args.train_images: None for all, 0 for none. need_classes: every
    image must lie in the folder of its class.
    """
    if args.dataset == "shapes":
        images = read_shapes(args.image_size, args.train_images)
    elif args.dataset == "folder":
        images = read_folder(args.data_path, args.image_size, args.train_images, need_classes)
    else:
        download(args)
        images = read_cifar(args.dataset, args.data_path, args.train_images)
    return ImageSet(*(x.to(device) for x in images[:4]), images.classes)


# ------------------------------------------------------------------------ device and precision
# Where and how a model runs: main calls choose_devices, and makes a Net.


def choose_devices(name):
    """auto, cpu or cuda -> the devices to train on: one GPU under torchrun, else all, or the CPU.

    GPUs that fail are left out, with a warning. InputError if none is left for cuda or torchrun.
    """
    if name == "cpu":
        return [torch.device("cpu")]
    count, gpus, failures = torch.cuda.device_count(), [], []
    one_each = world_size() > 1 and count > 1  # Slurm may show each task its own GPU only
    for i in [int(os.environ["LOCAL_RANK"])] if one_each else range(max(count, 1)):
        if count > 0 and i >= count:
            raise InputError(f"--nproc_per_node is above the number of GPUs here, {count}")
        try:
            torch.ones(1, device=f"cuda:{i}").add(1).item()  # a driver or GPU may be too old
            gpus.append(torch.device("cuda", i))
        except Exception as error:
            failures.append(f"GPU {i} fails ({reason(error)})")
    remedy = "install a newer NVIDIA driver, or the PyTorch for this GPU from pytorch.org"
    if not gpus and (name == "cuda" or (count and world_size() > 1)):
        raise InputError(f"{failures[0]}: use --device cpu, or {remedy}")
    if count:
        rest = "left out" if gpus else f"using the CPU; to use the GPU, {remedy}"
        print("".join(f"warning: {x}: {rest}\n" for x in failures), end="", file=sys.stderr)
    return gpus or [torch.device("cpu")]


def choose_precision(name, devices):
    """auto, fp32, fp16 or bf16 -> not auto, but what all of the devices multiply in natively."""
    if name != "auto":
        return name
    if devices[0].type == "cuda":
        oldest = min(torch.cuda.get_device_capability(device) for device in devices)
        return "bf16" if oldest >= (8, 0) else "fp16" if oldest >= (7, 0) else "fp32"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read()):
            return "bf16"
    return "fp32"


@memory_for()
def attention_sizes(module, example):
    """(tokens of an image, their width) in each Transformer block of the module.

    example: what the module is called with, for one image.
    """
    sizes, hooks = [], []
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):  # timm's Attention, called with [1,tokens,width]
            note = lambda _, inputs: sizes.append(inputs[0].shape[1:])  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        module(*example)
    for hook in hooks:
        hook.remove()
    return sizes


def widest(blocks):
    """Patches x width of the block that has most of it; 1 without blocks."""
    return max([1, *((tokens - 1) * width for tokens, width in blocks)])


def choose_micro_batch_size(share, limit, precision, blocks, free_bytes=None):
    """Images of a micro-batch on each device: as few and equal ones as speed and memory allow.

    share: images of a batch for each device. limit: may be None on a GPU. blocks: (tokens of an
    image, their width) for each Transformer block. free_bytes: a GPU's memory; None for a CPU.
    """
    if free_bytes is None:  # in fp32 more activations are no faster there
        most = 3 * 2**20 // widest(blocks) if precision == "fp32" else limit
        largest = max(1, min(limit, most))
    else:  # a power of two leaves most batches no rest, which would not be compiled
        image_bytes = (70 if precision == "fp32" else 40) * sum(t * w for t, w in blocks)
        fitting = max(1, int(0.6 * free_bytes / max(1, image_bytes)))
        largest = min(limit or 1024, 1024, 2 ** int(math.log2(fitting)))
    return math.ceil(share / math.ceil(share / largest))


THREADS = torch.get_num_threads()


def configure_process(device, threads):
    """Set what holds for the whole process: current GPU and exact fp32, or threads and malloc."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment says
        torch.backends.cudnn.allow_tf32 = False
        return
    torch.set_num_threads(min(threads, THREADS))  # more would wait, not work
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    # glibc keeps the pages of freed tensors: mapping them anew costs a third of the time.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: no loss
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20):
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class Accelerated(torch.nn.Module):
    """A module under autocast, with fast attention; compiled, to train with `compiled_size` inputs.

    All else runs uncompiled: other sizes, as each takes long to compile, and evaluation. Autocast
    is entered in here, as the threads of DataParallel do not inherit it.
    """

    def __init__(self, module, device, precision):
        super().__init__()
        self.module, self.device_type, self.precision = module, device.type, precision
        self.compiled = self.compiled_size = None
        for layer in module.modules():
            if hasattr(layer, "fused_attn"):  # timm's: PyTorch's is slow in 16 bits on a CPU
                layer.fused_attn = device.type == "cuda" or precision == "fp32"

    def run(self, *inputs):
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device_type, dtype, enabled=self.precision != "fp32"):
            return self.module(*inputs)

    def forward(self, *inputs):
        if len(inputs[0]) == 0:  # an empty shard, for which some attention kernels fail
            return self.run(*(x.new_zeros(1, *x.shape[1:]) for x in inputs))[:0]
        if len(inputs[0]) != self.compiled_size or not torch.is_grad_enabled():
            return self.run(*inputs)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(*inputs).clone()  # the next pass of a graph overwrites its output


def to_device(tensor, device):
    """Copy to the device without making the host wait for what the device is still doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Net:
    """A module on its devices, called like the module; the state_dict to save is the module's own.

    Precision, micro-batch size, autocast, torch.compile, DataParallel and DistributedDataParallel
    are chosen and set up here, from args. size: images of a micro-batch, on all devices together.
    settings: what was chosen, to be printed. Training and evaluation mode as the module has it now.
    """

    def __init__(self, module, devices, args, example, total=0, cpu_limit=128):
        """example: what the module is called with, for one image. total: the images of all epochs,
        which decide whether compiling pays. cpu_limit: of the micro-batch on a CPU.
        """
        n, on_gpu = len(devices), devices[0].type == "cuda"
        self.device, self.training = devices[0], module.training
        self.precision = choose_precision(args.precision, devices)
        pays = on_gpu and n == 1 and total / world_size() >= 3_000_000  # it takes minutes
        to_compile = self.training and (pays if args.compile is None else args.compile)
        command = f"torchrun --standalone --nproc_per_node={n} {shlex.join(sys.argv)}"
        if n > 1 and to_compile:
            raise InputError(f"--compile takes a process for each GPU: {command}")
        check_same_settings(device=devices[0].type, precision=self.precision, compile=to_compile)
        # It is moved in place: an optimizer that is made afterwards has the right parameters.
        blocks = attention_sizes(module.to(self.device), example)
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in devices) if on_gpu else None
        share = math.ceil(args.batch_size / (n * world_size()))
        limit = args.max_device_batch_size or (None if on_gpu else cpu_limit)
        device_size = choose_micro_batch_size(share, limit, self.precision, blocks, free)
        configure_process(self.device, threads=max(1, device_size * widest(blocks) // 2**16))

        self.call = self.accelerated = Accelerated(module, self.device, self.precision)
        if n > 1:
            self.call = DataParallel(self.accelerated, devices)
            print_rank_0(f"DataParallel on {n} GPUs, uncompiled; this is faster: {command}")
        if on_gpu or to_compile:
            device_size = self.halve_until_it_fits(example, device_size, n)
        if to_compile:
            self.try_to_compile(example, device_size, args)
        name = f"{n} x {torch.cuda.get_device_name(self.device)}" if on_gpu else "CPU"
        if world_size() > 1:
            self.call = DistributedDataParallel(self.accelerated, gradient_as_bucket_view=True)
            name = f"{world_size()} processes, {name} each"
        self.size, compiled = device_size * n, bool(self.accelerated.compiled_size)
        self.settings = {"device": name, "precision": self.precision}
        self.settings |= {"compile": compiled, "micro-batch": device_size}

    def __call__(self, *inputs):
        return self.call(*inputs)

    def trial(self, example, num_images):
        """A pass of so many copies of the example, which changes nothing; what it has allocated is
        freed, even if it fails. -> numbers to compare: the sum of the outputs' squares, and the
        norm of its gradient for each parameter, divided by the number of images.
        """
        with memory_for(), torch.set_grad_enabled(self.training):
            output = self(*(x.repeat(num_images, *[1] * (x.dim() - 1)) for x in example))
            output, gradients = output.float().square().sum(), []
            if output.requires_grad:
                parameters = [*self.call.parameters()]
                gradients = torch.autograd.grad(output, parameters, allow_unused=True)
            norms = [x.float().norm() for x in gradients if x is not None]
            return torch.stack([output.detach(), *norms]) / num_images

    def halve_until_it_fits(self, example, size, num_devices):
        """-> the size of a device's micro-batch, halved until a trial fits everywhere, or 1."""
        while size > 1:
            with contextlib.suppress(InputError):
                self.trial(example, size * num_devices)
                break
            size //= 2
            torch.cuda.empty_cache()
        return int(reduce_over_processes(torch.tensor(size), dist.ReduceOp.MIN))

    def try_to_compile(self, example, size, args):
        """Compile for micro-batches of this size.

        What does not compile, or then computes something else, stays uncompiled, with a warning, or
        is an InputError if args.compile asks for it.
        """
        net = self.accelerated
        # CUDA graphs launch the kernels of a pass all at once, as a GPU outruns its host. Not for
        # several micro-batches: a graph's gradients replace those before (pytorch/pytorch#96693).
        graphs = self.device.type == "cuda" and not torch.version.hip
        graphs = graphs and world_size() == 1 and size >= args.batch_size
        mode = "reduce-overhead" if graphs else None
        try:
            expected = self.trial(example, size)
            net.compiled = torch.compile(net.run, dynamic=False, fullgraph=True, mode=mode)
            net.compiled_size = size
            for _ in range(3 if graphs else 1):  # graphs are recorded in the second, then replayed
                values = self.trial(example, size)
            known = expected.isfinite()  # in fp16 a gradient may overflow
            error = (values - expected)[known].norm() / expected[known].norm()
            if not error < 0.1:
                raise RuntimeError(f"its outputs and gradients are then wrong by {error:.0%}")
        except Exception as error:  # no compiler, an old GPU, Windows, ...
            if args.compile:
                raise InputError(f"cannot --compile ({reason(error)}): leave it out") from error
            print_rank_0(f"warning: cannot compile ({reason(error)}): training uncompiled")
            net.compiled_size = None

    def micro_batches(self, rows):
        """Yield this process's shard of a batch in micro-batches, on the device.

        rows: {name: tensor [N,...]} on the host, all of the same N; each micro-batch is such a
        dictionary. Each process yields at least one, maybe empty; DDP exchanges gradients in the
        last only.
        """
        own = {name: to_device(shard(x), self.device).split(self.size) for name, x in rows.items()}
        micro_batches = list(zip(*own.values(), strict=True))
        for i, micro_batch in enumerate(micro_batches, 1):
            # DistributedDataParallel reads this in its forward pass; nothing else does.
            self.call.require_backward_grad_sync = i == len(micro_batches)
            yield dict(zip(own, micro_batch, strict=True))


@torch.no_grad()
def predict(net, images, size):
    """What net, or any function, computes of images uint8 [N,3,H,W], size at a time: [N,K].

    Each process computes its share and gets all.
    """
    own = torch.cat([net(to_float(img)).float() for img in shard(images).split(size)])
    outputs = own.new_zeros(len(images), own.shape[1])
    shard(outputs).copy_(own)
    return reduce_over_processes(outputs)


# --------------------------------------------------------------------------------- model files
# Written whole or not at all, read without running anything in them: those of the scripts and of
# the original. main makes the model_content; Run writes it.


def rename(path, new):
    """Rename a file, which replaces another of that name."""
    for _ in range(30):  # on Windows while a scanner or a client that synchronises holds it
        with contextlib.suppress(PermissionError):
            return os.replace(path, new)
        time.sleep(0.1)
    os.replace(path, new)


def write_files(contents):
    """Write {path: bytes} to temporary files, then rename these: none is ever half written.

    Raises InputError if one cannot be written: before all are, none is renamed.
    """
    temporary = {path: f"{path}.{os.getpid()}.part" for path in contents}  # each run has its own
    try:
        for path, part in temporary.items():
            with as_input_error(f"cannot write {path}", OSError), open(part, "wb") as file:
                file.write(contents[path])
                file.flush()
                try:
                    os.fsync(file.fileno())
                except OSError as error:  # some file systems do not know it
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                        raise
        for path, part in temporary.items():
            with as_input_error(f"cannot write {path}", OSError):
                rename(part, path)
    finally:
        for part in temporary.values():  # they are there only after an error
            with contextlib.suppress(OSError):
                os.remove(part)


def free_path(path):
    """The path, or the first of name-2.png, name-3.png, ... that does not exist."""
    start, extension = os.path.splitext(path)
    others = (f"{start}-{i}{extension}" for i in itertools.count(2))
    return next(x for x in itertools.chain([path], others) if not os.path.exists(x))


def encode(content):
    """A file's bytes, in memory, where a full disk does no harm: for a picture [3,H,W] in [0, 1]
    PNG, for the dictionary of a model file or a state what torch.save writes.
    """
    buffer = io.BytesIO()
    if isinstance(content, torch.Tensor):
        scale = max(1, 768 // content.shape[-1])  # so that the pixels of a small one can be seen
        content = content.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        save_image(content, buffer, format="png")
    else:
        weights = {name: tensor.cpu() for name, tensor in content["model"].items()}
        torch.save(content | {"model": weights}, buffer)
    return buffer.getvalue()


def versions():
    names = "torch", "torchvision", "timm", "numpy"
    return {name: str(importlib.import_module(name).__version__) for name in names}


def model_content(model, architecture, args, **more):
    """A model file's: tensors and plain values, which torch.load(weights_only=True) reads."""
    preprocessing = {"image_size": architecture["image_size"], "mean": 0.5, "std": 0.5}
    content = {"kind": type(model).__name__, "model": model.state_dict()}
    content |= {"architecture": architecture, "preprocessing": preprocessing}
    return content | {"args": vars(args), "versions": versions()} | more


class InertModule(torch.nn.Module):
    """Stands in for what a pickle names and PyTorch does not allow: it runs nothing."""

    def __init__(self, module=None, *_):  # with arguments where a pickle would call something
        super().__init__()
        if isinstance(module, InertModule):  # as torch.compile's OptimizedModule is pickled
            self._orig_mod = module

    def __setstate__(self, state):
        super().__init__()
        if isinstance(state, dict):
            super().__setstate__(state)


def read_checkpoint(path):
    """torch.load without executing anything: tensors, plain values and InertModules.

    Raises InputError for what is not there, is damaged, or names what PyTorch blocks (os.system).
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"it is damaged, the checksum of {name} is wrong")
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(InertModule, name) for name in asked]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can trip its reader anywhere
        # PyTorch's message begins with the advice to run what is in the file.
        cause = re.sub("(?s).*(a trusted source.|Unpickler error:)|Check the doc.*", "", str(error))
        raise InputError(f"cannot read {path} as a PyTorch checkpoint: {cause}") from error


def unpack_module(module):
    """A pickled MAE_ViT or ViT_Classifier, maybe within others -> content of a model file."""
    architecture = {}
    for name, part in module.named_modules():
        if name.endswith("transformer.0.attn"):
            architecture["decoder_head" if "decoder." in name else "encoder_head"] = part.num_heads
        if name.endswith("shuffle"):
            architecture["mask_ratio"] = part.ratio
    kind = "MAE_ViT" if "decoder_head" in architecture else "ViT_Classifier"
    return {"kind": kind, "model": dict(module.named_parameters()), "architecture": architecture}


def architecture_of(weights):
    """Infer the sizes from the state_dict of an MAE_ViT, MAE_Encoder or ViT_Classifier.

    -> {argument: size}: all but the numbers of heads and the mask ratio, which no shape tells.
    Raises KeyError for a tensor that is not there.
    """
    prefix = "encoder." if "encoder.pos_embedding" in weights else ""
    blocks = [name for name in weights if name.endswith("norm1.weight")]
    encoder_layer = sum(name.startswith(f"{prefix}transformer.") for name in blocks)
    num_patches, _, emb_dim = weights[f"{prefix}pos_embedding"].shape
    patch_size = weights[f"{prefix}patchify.weight"].shape[-1]
    architecture = {"image_size": math.isqrt(num_patches) * patch_size, "patch_size": patch_size}
    architecture |= {"emb_dim": emb_dim, "encoder_layer": encoder_layer}
    if prefix:
        architecture["decoder_layer"] = len(blocks) - encoder_layer
        architecture["decoder_dim"] = weights["decoder.mask_token"].shape[-1]
    elif "head.bias" in weights:
        architecture["num_classes"] = len(weights["head.bias"])
    return architecture


def build_encoder(image_size, patch_size, emb_dim, encoder_layer, encoder_head):
    sizes = dict(image_size=image_size, patch_size=patch_size, emb_dim=emb_dim)
    return MAE_Encoder(**sizes, num_layer=encoder_layer, num_head=encoder_head)


def build_classifier(num_classes, **sizes):
    return ViT_Classifier(build_encoder(**sizes), num_classes)


def load_model(path, kind):
    """Read a model file -> model, its architecture, the file's whole content.

    kind: "MAE_ViT" or "ViT_Classifier". The file is one of our scripts', a bare state_dict, or a
    whole module as the original pickles it, maybe within DataParallel or torch.compile's. A bare
    state_dict does not tell the number of heads and the mask ratio: they are taken to be 3 and
    0.75. Raises InputError unless the file holds such a model, with tensors of the right names and
    shapes and finite values.
    """
    content = read_checkpoint(path)
    with as_input_error(f"{path} does not hold the weights of {kind}", Exception):
        if isinstance(content, InertModule):
            content = unpack_module(content)
        elif "fingerprint" in content:
            raise ValueError(f"it is a run's state; its model is {path.replace('.state.', '.')}")
        elif "model" not in content:
            content = {"kind": kind, "model": content}
        if content.get("kind") != kind:
            raise ValueError(f"its kind is {content.get('kind')}")
        weights = {}
        for name, x in content["model"].items():
            plain = isinstance(x, torch.Tensor) and x.is_floating_point()
            if not plain or not x.isfinite().all():
                raise ValueError(f"{name} is not a tensor of finite floating-point numbers")
            x = x.detach().float().clone(memory_format=torch.contiguous_format)
            weights[name.replace("_orig_mod.", "").removeprefix("module.")] = x
        # Sizes are those of the tensors, whatever the file claims.
        claimed = {"encoder_head": 3} | content.get("architecture", {})
        architecture = claimed | architecture_of(weights)
        with torch.device("meta"):  # no memory: the weights are those of the file
            model = {"MAE_ViT": MAE_ViT, "ViT_Classifier": build_classifier}[kind](**architecture)
        model.load_state_dict(weights, assign=True)
    return model, architecture, content


def to_timm(model):
    """A ViT_Classifier or an MAE_Encoder -> state_dict, arguments for timm's Vision Transformer.

    timm.create_model("vit_tiny_patch16_224", **arguments) loads the state_dict with strict=True
    and gives the same logits, or the encoder's cls feature (timm 0.9 or newer).
    """
    names = {"pos_embedding": "pos_embed", "patchify": "patch_embed.proj"}
    names |= {"transformer": "blocks", "layer_norm": "norm"}
    state_dict, weights = model.state_dict(), {}
    for name, tensor in state_dict.items():
        first, *rest = name.split(".")
        weights[".".join([names.get(first, first), *rest])] = tensor.detach().cpu()
    weights["pos_embed"] = weights["pos_embed"].transpose(0, 1).contiguous()  # [1,T,C]
    sizes = architecture_of(state_dict)
    arguments = {"img_size": sizes["image_size"], "patch_size": sizes["patch_size"]}
    arguments |= {"embed_dim": sizes["emb_dim"], "depth": sizes["encoder_layer"], "qkv_bias": False}
    arguments |= {"num_heads": model.transformer[0].attn.num_heads, "no_embed_class": True}
    num_classes = sizes.get("num_classes", 0)
    return weights, arguments | {"num_classes": num_classes, "norm_layer": torch.nn.LayerNorm}


# ------------------------------------------------------------------------------------ pictures
# Drawn by the scripts, written like a model file.


def draw_images(images, columns, titles, space=8):
    """images uint8 [N,3,H,H] in rows, with titles of the columns -> PIL.Image, places for captions.

    Images are enlarged to at least 128 pixels. Below each is some space, whose place is (left, top,
    width), in pixels.
    """
    side, gap, top = images.shape[-1] * math.ceil(128 / images.shape[-1]), 8, 28
    width, rows = gap + columns * (side + gap), math.ceil(len(images) / columns)
    page = Image.new("RGB", (max(440, width), top + rows * (side + space)), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(page).text((gap + i * (side + gap), gap), title, "black", font_size=14)
    places = []
    for i, img in enumerate(images.cpu()):
        x, y = gap + i % columns * (side + gap), top + i // columns * (side + space)
        page.paste(TF.to_pil_image(img).resize((side, side), Image.Resampling.NEAREST), (x, y))
        places.append((x, y + side, side))
    return page, places


# --------------------------------------------------------------------------- curves and progress
# TensorBoard and the terminal, and what an update changes: main makes a Training.


def new_run_folder(*parts):
    """Make a folder for a run's curves: the next free one of name, name-2, name-3, ..."""
    with as_input_error(f"cannot write {parts[0]}", OSError):
        for i in itertools.count(1):
            folder = os.path.abspath(os.path.join(*parts)) + (f"-{i}" if i > 1 else "")
            with contextlib.suppress(FileExistsError):
                os.makedirs(folder)
                return folder


class Curves:
    """TensorBoard events in a folder, written by process 0.

    They begin with purge_step: TensorBoard then drops what an interrupted run wrote from that epoch
    on. SummaryWriter.add_scalars, whose names of folders we take, would not do so.
    """

    def __init__(self, folder, epoch=0):
        self.folder, self.epoch, self.writers = folder, epoch, {}

    def writer(self, part):
        if part not in self.writers:
            self.writers[part] = SummaryWriter(f"{self.folder}/{part}", purge_step=self.epoch)
        return self.writers[part]

    def write(self, epoch, scalars, images=()):
        """Write {tag: value} and {tag: image [3,H,W]}. Raises InputError if that fails.

        A value may be {part: value}: curves in one chart, each with a folder of its own.
        """
        if rank() > 0:
            return
        with as_input_error(f"cannot write {self.folder}", OSError):
            for tag, value in scalars.items():
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    folder = f"{tag.replace('/', '_')}_{part}" if part else ""
                    self.writer(folder).add_scalar(tag, number, epoch)
            for tag, img in dict(images).items():
                self.writer("").add_image(tag, img, epoch)
            for writer in self.writers.values():
                writer.flush()


class Training:
    """What an update changes: the weights of model, the optimizer, in fp16 the loss's scale, and
    the sums over the epoch's images, which are kept on the device: no step waits for them.

    net: what is called to compute the losses; of the model, or its part that is trained. names: of
    the losses, and of what else `backward` sums up. sums[0] counts the images, sums[1:] are in the
    order of names; each process has its own. A progress bar shows their means on a terminal.
    """

    def __init__(self, model, net, optim, names):
        self.model, self.net, self.optim, self.names = model, net, optim, names
        self.scaler = torch.amp.GradScaler(net.device.type, enabled=net.precision == "fp16")
        self.parts = {"model": model, "optim": optim, "scaler": self.scaler}  # for a state

    def begin(self, total, sums=(), text=""):
        """Begin an epoch of so many images, with the sums before an interruption, if there was."""
        self.start, self.total = time.perf_counter(), total
        self.images_before = sums[0] if sums else 0
        values = list(sums) if rank() == 0 else []  # they count once
        values = torch.tensor(values or [0.0] * (1 + len(self.names)), dtype=torch.float64)
        self.sums = to_device(values, self.net.device)
        self.host_sums = values.pin_memory() if self.sums.is_cuda else values.clone()
        bar = {"unit": "img", "mininterval": 0.3, "leave": False, "disable": rank() > 0 or None}
        self.bar = tqdm(desc=text, total=total, initial=int(self.images_before), **bar)

    def backward(self, loss, batch_size, *others):
        """Add a micro-batch's gradient to that of its batch's mean loss, and to the epoch's sums.

        loss [b]; others [b] each, to be summed up only. batch_size: of all micro-batches and
        processes together.
        """
        weight = world_size() / batch_size  # DDP averages the gradients of the processes
        self.scaler.scale(loss.sum() * weight).backward()
        self.sums[0] += len(loss)
        self.sums[1:] += torch.stack([loss.detach().sum(), *(x.sum() for x in others)])
        self.bar.update(min(len(loss) * world_size(), self.total - self.bar.n))

    def step(self):
        """Change the weights by the gradients, and forget these. A GPU's sums may come to the host
        an update late."""
        self.scaler.step(self.optim)
        self.scaler.update()
        self.optim.zero_grad(set_to_none=True)
        self.host_sums.copy_(self.sums, non_blocking=True)
        self.bar.set_postfix(self.means(*self.host_sums.tolist()), refresh=False)

    def means(self, num_images, *sums):
        """{name: mean over the images}"""
        return {name: x / max(num_images, 1) for name, x in zip(self.names, sums, strict=True)}

    def sum_over_processes(self):
        return reduce_over_processes(self.sums.clone()).tolist()

    def end(self):
        """End the epoch -> the means over all processes. Also sets images_per_second."""
        self.bar.close()
        sums, seconds = self.sum_over_processes(), time.perf_counter() - self.start
        self.images_per_second = (sums[0] - self.images_before) / seconds
        return self.means(*sums)

    def time_left(self, images, epochs):
        """How long the rest of this epoch, of which so many images are done, and so many epochs
        more take at its pace so far: ", 2:10:33 left"."""
        seconds = (time.perf_counter() - self.start) * (self.total * (1 + epochs) - images)
        done = images - self.images_before
        return f", {tqdm.format_interval(round(seconds / done))} left" if done else ""


def print_settings(title, settings):
    print_rank_0(f"{title + ':':11}{', '.join(f'{name} {x}' for name, x in settings.items())}")


def describe_run(args, training, dataset, folder):
    """Print once what this run is, beside its arguments."""
    n, num_val = len(dataset.train_images), len(dataset.val_images)
    if args.warmup_epoch >= args.total_epoch and not args.resume:
        epochs = args.total_epoch // 10
        print_rank_0(f"warning: warm-up takes the whole run: try --warmup_epoch {epochs}")
    if args.batch_size > n and not args.resume:
        size = 2 ** int(math.log2(max(8, n / 10)))
        # The same peak, up to the 1e-3 that was measured with few images (RESULTS.md).
        rate = min(args.base_learning_rate * args.batch_size, 1e-3 * 256) / size
        values = f"--batch_size {size} --base_learning_rate {rate:.1g}"
        print_rank_0(f"warning: --batch_size exceeds the {n:,} training images: try {values}")
    parameters = sum(p.numel() for p in training.model.parameters())
    print_settings("libraries", versions())
    print_settings("chosen", training.net.settings)
    print_rank_0(f"model:     {type(training.model).__name__}, {parameters:,} parameters")
    print_rank_0(f"dataset:   {args.dataset}, {n:,} training, {num_val:,} validation images")
    print_rank_0(f"curves:    {folder}")


# ---------------------------------------------------------------------------- stop and resume
# get_args calls run_args; main calls start_run, and loops over the epochs and batches of its Run.


def state_path(model_path):
    """vit-t-mae.pth -> vit-t-mae.state.pth"""
    return "{}.state{}".format(*os.path.splitext(model_path))


def run_args(parser, argv, output):
    """The arguments of a run: those of argv or, with --resume, those in the state beside the model
    file, changed as argv asks.

    output: the name of the model file's flag. Raises InputError if --resume finds no state (auto
    starts a new run), if argv would change the result, or if another process has other flags.
    """
    args = parser.parse_args(argv)
    path = state_path(getattr(args, output))
    if args.resume is True and not os.path.isfile(path):
        remedy = "leave --resume out, or name a run that was renamed, such as ...-old-1.pth"
        raise InputError(f"nothing to resume: there is no {path}: {remedy}")
    args.resume = bool(args.resume) and os.path.isfile(path)
    if args.resume:
        state, defaults = read_checkpoint(path), vars(parser.parse_args([]))
        with as_input_error(f"{path} is not a state of this version", Exception):
            state["fingerprint"]  # a KeyError in a state of long ago, or another file
            saved = defaults | state["args"] | {output: getattr(args, output)}  # flags may be newer
        if saved.keys() - defaults.keys():
            raise InputError(f"{path} is of another version of this script, or of another script")
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        changed = {name for name, value in vars(args).items() if value != saved[name]} - MAY_CHANGE
        if changed:
            text = [f"--{x} {getattr(args, x)} (it has {saved[x]})" for x in sorted(changed)]
            remedy = ": for another length start a new run" * ("total_epoch" in changed)
            raise InputError(f"the run of {path} cannot go on with {', '.join(text)}{remedy}")
    check_same_settings(**{name: x for name, x in vars(args).items() if name not in MAY_CHANGE})
    return args


def set_aside(model_path, with_state=True):
    """Rename what an earlier run has left under this name, to vit-t-mae-old-1.pth and so on: state,
    model, picture, and models of epochs, such as vit-t-mae-0400.pth. Nothing is read.

    The state goes first, as it has the weights, too: if a kill comes in between, it stands alone.
    with_state: False for model and picture only; the others are those of this run.
    """
    # Joined as glob joins its answers: without the second / of q//x.pth.
    start, extension = os.path.splitext(os.path.join(*os.path.split(model_path)))
    epoch = rf"{re.escape(start)}-(\d{{4}}|[1-9]\d{{4,}}){re.escape(extension)}"
    kept = [path for path in glob.glob(f"{glob.escape(start)}-*") if re.fullmatch(epoch, path)]
    files = [state_path(start + extension), start + extension, f"{start}.png"]
    files += [path for path in kept if not os.path.exists(state_path(path))]  # else another run's
    found = [path for path in (files if with_state else files[1:3]) if os.path.lexists(path)]
    names = (f"{start}-old-{i}" for i in itertools.count(1))
    other = next(name for name in names if not glob.glob(f"{glob.escape(name)}*"))
    for path in found:
        with as_input_error(f"cannot rename {path}", OSError):
            rename(path, other + path.removeprefix(start))
    if found:
        print_rank_0(f"an earlier run is kept as {other}{extension}")


class StopSignal:
    """Notes a signal to stop, so that the update under way can finish and the run be saved.

    SIGINT is Ctrl-C, SIGTERM what kill sends; SIGUSR1 warns of the end of a Slurm job, SIGHUP tells
    that the connection is lost. Windows has neither of these. Who has a signal ignored, as nohup
    has SIGHUP, means it.
    """

    def __enter__(self):
        known = (getattr(signal, x, None) for x in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"))
        told = [x for x in known if x and signal.getsignal(x) != signal.SIG_IGN]
        self.number, self.before = 0, {x: signal.signal(x, self.note) for x in told}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        """A second Ctrl-C or kill stops at once, but not under torchrun, which passes on signals
        that its processes may already have got."""
        self.number = number
        if world_size() == 1 and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # not print: the signal may have come in one
                os.write(2, b"\nstopping after this update; once more to stop at once\n")


class Run:
    """Where a run stands, and what it keeps on disk: files, curves, and a state to resume from.

        with start_run(args, "mae-pretrain", args.model_path, training, dataset) as run:
            for epoch in run.epochs():
                for update, batch in run.updates(batches):
                    ...                            # training.backward, training.step
                results = training.end()
                run.report("the epoch's line", {"mae_loss": results["loss"]})
                run.end_epoch({args.model_path: content}, kept=content)

    `updates` saves between updates when it is due. Told to stop by a signal, `updates` or `epochs`
    ends the program, once the state is saved, in the first update without. The state is small
    (weights, optimizer, two counters, sums of the epoch), as all that is drawn is a function of
    seed, epoch and update (see `generator`).
    """

    SAVED = "epoch", "update", "sums", "results", "ended", "written", "fingerprint"

    def __init__(self, args, name, model_path, training, dataset, stop):
        self.args, self.model_path, self.state_file = args, model_path, state_path(model_path)
        self.training, self.fingerprint, folder = training, checksum(*dataset[:4]), None
        self.epoch, self.update, self.sums, self.results = 0, 0, [], {}
        # What to write with the next save; the name of the model file once it is this run's.
        self.unsaved, self.written, self.ended = {}, "", False
        if args.resume:
            with as_input_error(f"{self.state_file} does not fit this model", Exception):
                folder = self.restore(read_checkpoint(self.state_file))
        numbers = len(dataset.train_images), len(dataset.val_images)
        place = {"epoch": self.epoch, "update": self.update}
        check_same_settings(images=numbers, **place, weights=checksum(*training.model.parameters()))
        if rank() == 0:
            folder = folder or new_run_folder(args.log_dir, args.dataset, args.run_name or name)
            if not args.resume:
                set_aside(model_path)
        self.curves, self.signal, self.agreed_signal = Curves(folder, self.epoch), stop, 0
        self.saved_at, self.pause = time.perf_counter(), 6 * args.save_minutes

    def restore(self, state):
        """Take up the saved run -> its curves' folder, or None if they go on in a new one.

        Raises an error if it does not fit.
        """
        if rank() == 0 and state["fingerprint"] != self.fingerprint:
            raise InputError(f"these are not the images of the run of {self.state_file}")
        for name, part in self.training.parts.items():
            if name != "scaler" or state.get(name):  # there is none of fp32, nor of long ago
                part.load_state_dict(state[name])
        self.epoch, self.update = int(state["epoch"]), int(state["update"])
        self.sums, self.results = [float(x) for x in state["sums"]], dict(state["results"])
        total = self.args.total_epoch
        self.ended = state.get("ended", self.epoch == total)  # earlier versions lack these two
        self.written = state.get("written", os.path.basename(self.model_path))
        # Without results the next epoch writes it anew.
        if self.written and (self.results or self.ended) and not os.path.exists(self.model_path):
            raise InputError(f"{self.model_path} is gone: put it back beside {self.state_file}")
        print_rank_0(f"resumed:   after {self.epoch} of {total} epochs, {self.update} updates")
        folder = os.path.abspath(state["folder"])
        if os.path.isdir(folder) and self.args.log_dir == state["args"]["log_dir"]:
            return folder
        print_rank_0(f"curves:    in a new folder; up to here they were in {folder}")

    def epochs(self):
        """Yield the number of each epoch that is left."""
        while not self.ended:
            self.stop_if_told()
            yield self.epoch

    def updates(self, batches):
        """Yield (update, batch) for what is left of the epoch, of which batches are all."""
        training, total = self.training, sum(map(len, batches))
        training.begin(total, self.sums, f"Epoch {self.epoch + 1}/{self.args.total_epoch}")
        for update in range(self.update, len(batches)):
            yield update, batches[update]
            self.update = update + 1
            self.check_finite(training.host_sums)
            if self.agree_to_save(60 * self.args.save_minutes):
                self.save()
                n = self.sums[0]
                self.tell(f"saved after {n:,.0f} of {total:,} images, {training.bar.postfix}", n)
            self.stop_if_told()
        self.check_finite(training.sums, scale=training.scaler.get_scale())  # of the last, too

    def tell(self, text, images):
        """Print a line about the epoch under way, and what is left after so many of its images."""
        left = self.training.time_left(images, self.args.total_epoch - self.epoch - 1)
        print_rank_0(f"epoch {self.epoch + 1}/{self.args.total_epoch}: {text}{left}")

    def report(self, text, scalars, images=()):
        """Write an epoch's curves, as `Curves.write` takes them, and print its line."""
        values = [x.values() if isinstance(x, dict) else [x] for x in scalars.values()]
        self.check_finite(torch.tensor([*itertools.chain(*values)]), *dict(images).values())
        lr = self.training.optim.param_groups[-1]["lr"]  # of the head, which has no --layer_decay
        speed = self.training.images_per_second
        self.curves.write(self.epoch, scalars | {"lr": lr, "images_per_second": speed}, images)
        self.tell(f"{text}, lr {lr:.2e}, {speed:,.0f} images/s", self.training.total)

    def end_epoch(self, files, kept, last=False):
        """Note that an epoch is done. Save if it is the last, if --keep_every names it, or if a
        tenth of --save_minutes has passed; more where saving takes more than 2 % of the time.

        files: {path: what `encode` takes}, to be written with the next save. kept: a model_content;
        after epoch 400, if --keep_every names it, it is saved at once as vit-t-mae-0400.pth. last:
        the run ends here, whatever its --total_epoch; the same in all processes.
        """
        self.epoch, self.update, self.sums = self.epoch + 1, 0, []
        self.ended = last or self.epoch == self.args.total_epoch
        self.unsaved |= copy.deepcopy(files)  # the weights go on changing
        keep = self.args.keep_every and self.epoch % self.args.keep_every == 0
        if keep and rank() == 0:
            path = "{0}-{2:04}{1}".format(*os.path.splitext(self.model_path), self.epoch)
            set_aside(path)
            self.unsaved[path] = kept
        if self.agree_to_save(min(self.pause, 60 * self.args.save_minutes)) or keep or self.ended:
            self.save()

    def agree_to_save(self, seconds):
        """Whether process 0 saved that long ago, or any has agreed_signal, other than in the first
        update of all; all get this answer."""
        overdue = rank() == 0 and time.perf_counter() - self.saved_at > seconds
        # The one exchange of an update besides gradients, through gloo: no GPU is waited for.
        flags = torch.tensor([self.signal.number, overdue])
        self.agreed_signal, overdue = reduce_over_processes(flags, dist.ReduceOp.MAX).tolist()
        # A run that is stopped so early leaves nothing behind.
        return bool(overdue or self.agreed_signal and (self.epoch, self.update) != (0, 1))

    def save(self):
        """Write the unsaved files and the state, which thus never names results whose file is
        missing.

        Raises InputError on divergence, or if a file cannot be written: all that is there stays.
        """
        begin = time.perf_counter()
        self.sums = self.training.sum_over_processes() if self.update else []
        self.check_finite(torch.tensor(self.sums), *self.training.model.parameters())
        if rank() == 0:
            name = os.path.basename(self.model_path)
            if self.model_path in self.unsaved and self.written != name:
                set_aside(self.model_path, with_state=False)
                self.written = name
            state = {name: getattr(self, name) for name in self.SAVED}
            state |= {"args": vars(self.args), "folder": self.curves.folder}
            state |= {name: part.state_dict() for name, part in self.training.parts.items()}
            files = self.unsaved | {self.state_file: state}
            write_files({path: encode(content) for path, content in files.items()})
        self.unsaved, self.saved_at = {}, time.perf_counter()
        self.pause = max(6 * self.args.save_minutes, 50 * (self.saved_at - begin))

    def check_finite(self, *tensors, scale=1.0):
        """Raise InputError on divergence. fp16's scale is halved while gradients are not finite."""
        if scale < 1 or not all(tensor.isfinite().all() for tensor in tensors):
            place = f"{self.epoch} epochs, {self.update} updates, at learning rate "
            place += f"{self.training.optim.param_groups[-1]['lr']:.2e}"
            place += ": try --precision fp32, with --resume if it was saved"
            remedy = "or a new run with a lower --base_learning_rate or more --warmup_epoch"
            raise InputError(f"loss, weights or gradients are not finite after {place}, {remedy}")

    def stop_if_told(self):
        """After a StopSignal: say how to go on, end with status 128 + its number, such as 130."""
        if self.agreed_signal:
            command = shlex.join(sys.argv + ["--resume"] * ("--resume" not in sys.argv))
            launcher = "python" if world_size() == 1 else "torchrun ..."
            saved = os.path.exists(self.state_file)
            remedy = f"to go on:\n    {launcher} {command}" if saved else "nothing was saved"
            print_rank_0(f"stopped after {self.epoch} epochs, {self.update} updates; {remedy}")
            sys.exit(128 + self.agreed_signal)


def lock(model_path):
    """-> an open, locked file: until it is closed, no other run writes this model file.

    Raises InputError if one does already. The system gives the lock back however a process dies;
    Windows and some file systems have none. The file stays: were it removed, two runs could each
    lock one of this name.
    """
    path = f"{state_path(model_path)}.lock"
    with as_input_error(f"cannot write {path}", OSError):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(path, "w")
    with contextlib.suppress(OSError, NameError):  # Windows has no fcntl
        with as_input_error(f"another run is writing {model_path}", BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@contextlib.contextmanager
def start_run(args, name, model_path, training, dataset):
    """A Run that has its model file to itself. After it, signals, threads and hook are as before.

    name: of the folder for its curves, if --run_name gives none.
    """
    own = lock(model_path) if rank() == 0 else contextlib.nullcontext()
    hook, threading.excepthook = threading.excepthook, lambda _: None  # Curves.write raises those
    try:
        with own, StopSignal() as stop:
            run = Run(args, name, model_path, training, dataset, stop)
            yield run
    finally:
        with contextlib.suppress(OSError, TypeError, NameError):
            os.rmdir(run.curves.folder)  # if nothing came into it; only process 0 knows of it
        threading.excepthook = hook
        torch.set_num_threads(THREADS)
