"""What both scripts need: command line, device, random numbers, pictures, model files, curves."""

import argparse
import contextlib
import ctypes
import errno
import hashlib
import itertools
import math
import os
import platform
import random
import sys
import tempfile
import time
import typing

import numpy as np
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

from model import MAE_ViT

# ------------------------------------------------------------------------------- command line


class InputError(Exception):
    """Something that the user can mend. Its message is one line and says how."""


@contextlib.contextmanager
def one_line_errors():
    """End the program with `error: ...` and status 1 where the user, not a developer, can help."""
    try:
        yield
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: try a smaller --max_device_batch_size")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the script's own line breaks; adds defaults where a flag has a telling one."""

    def _get_help_string(self, action):
        telling = action.default is not None and action.default is not False
        return super()._get_help_string(action) if telling else action.help


class ArgumentParser(argparse.ArgumentParser):
    """Answers a wrong flag in one line; the usage of every flag is left to --help."""

    def __init__(self, description):
        super().__init__(
            usage="%(prog)s [options]",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_with_demo(self, argv, demo):
        """Let --demo replace defaults first, so that a flag on the command line still wins."""
        if self.parse_known_args(argv)[0].demo:
            self.set_defaults(**demo)
        return self.parse_args(argv)


def checked(kind, test, wish):
    """An argparse type: int or float, refused with a wish unless it passes the test."""

    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wish}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


positive_int = checked(int, lambda n: n >= 1, "a whole number of at least 1")
unsigned_int = checked(int, lambda n: n >= 0, "a whole number of at least 0")
unsigned_float = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
open_ratio = checked(float, lambda x: 0 < x < 1, "between 0 and 1, both excluded")


# fmt: off
def add_data_flags(parser):
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["cifar10", "cifar100", "folder", "shapes"], default="cifar10",
        help="cifar10, cifar100: downloaded; folder: your pictures; shapes: drawn by the program")
    add("--data_path", default="data",
        help="where cifar10 and cifar100 lie or are put; for folder, the folder of pictures: "
             "train/<class>/... and val/<class>/... or test/<class>/...")
    add("--train_images", type=positive_int, metavar="N",
        help="train on N of the pictures, spread evenly over the classes (default: on all)")


def add_training_flags(parser, **defaults):
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=unsigned_int,
        help="of the initial weights and of everything that is drawn at random")
    add("-bs", "--batch_size", type=positive_int, metavar="N",
        help="pictures per update of the weights; the last batch of an epoch may be smaller")
    add("--base_learning_rate", type=unsigned_float, metavar="RATE",
        help="the highest learning rate is base_learning_rate * batch_size / 256")
    add("--weight_decay", type=unsigned_float, metavar="RATE")
    add("--total_epoch", type=positive_int, metavar="N")
    add("--warmup_epoch", type=unsigned_int, metavar="N",
        help="epochs in which the learning rate rises; it then follows half a cosine down to 0")
    parser.set_defaults(**defaults)


def add_device_flags(parser, **defaults):
    add = parser.add_argument_group("device").add_argument
    add("--max_device_batch_size", type=positive_int, metavar="N",
        help="pictures in one forward and backward pass; the gradients of a larger batch are "
             "accumulated over several passes: the result does not depend on it")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: cuda where there is a GPU")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of the matrix products; weights and optimizer stay fp32; "
             "auto: bf16 where the hardware computes it natively")
    parser.set_defaults(**defaults)
# fmt: on


# -------------------------------------------------------------------------- device, precision


def choose_device(name):
    """auto, cpu or cuda -> torch.device. Raises InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory():
    """Have glibc keep the pages of freed tensors: mapping them anew costs a third of the time."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: no loss
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_precision(name, device):
    """auto, fp32 or bf16 -> fp32 or bf16: bf16 where the hardware multiplies in it natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = ""
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
            flags = next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")
        native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
    return "bf16" if native else "fp32"


class Autocast(torch.nn.Module):
    """Runs a module in the chosen precision; inside DataParallel, whose threads would forget it."""

    def __init__(self, module, device, precision):
        super().__init__()
        self.module, self.device_type, self.bf16 = module, device.type, precision == "bf16"

    def forward(self, *inputs):
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            return self.module(*inputs)


def place(module, device, precision):
    """Move the module to the device, in place, and return what to call in its stead for training.

    The module itself is kept to be saved: its state_dict has no prefix.
    """
    module.to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    for part in module.modules():
        if hasattr(part, "fused_attn"):  # timm's Attention; on a CPU plain products are faster
            part.fused_attn = device.type == "cuda"
    net = Autocast(module, device, precision)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        net = torch.nn.DataParallel(net)
    return net


def to_device(tensor, device):
    """Copy to the device without making the host wait for what the device is still doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ----------------------------------------------------------------- random numbers and schedule


def setup_seed(seed=2022):
    """Seed what draws the initial weights: all else is drawn from `generator`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator(*key):
    """A CPU generator that is a function of its key, such as ("masks", seed, epoch, update)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def learning_rate(epoch, base_learning_rate, batch_size, total_epoch, warmup_epoch):
    """Linear warm-up, then half a cosine, by epochs counted from 0 (paper, appendix A.1)."""
    warmup = (epoch + 1) / (warmup_epoch + 1e-8)
    cosine = 0.5 * (math.cos(epoch / total_epoch * math.pi) + 1)
    return base_learning_rate * batch_size / 256 * min(warmup, cosine)


def warn_of_long_warmup(args):
    if args.warmup_epoch >= args.total_epoch:
        print(
            f"warning: --warmup_epoch {args.warmup_epoch} is not below --total_epoch "
            f"{args.total_epoch}: the learning rate falls before it has risen to its highest value"
        )


def set_learning_rate(optim, epoch, args):
    """Give the optimizer this epoch's learning rate, and return it."""
    lr = learning_rate(
        epoch, args.base_learning_rate, args.batch_size, args.total_epoch, args.warmup_epoch
    )
    for group in optim.param_groups:
        group["lr"] = lr
    return lr


# ------------------------------------------------------------------------------------ pictures


class Pictures(typing.NamedTuple):
    """A data set in memory. Images are uint8 [N,3,H,W], labels int64 [N]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    classes: list


def to_float(images):
    """uint8 pixels -> [-1, 1], as mean 0.5 and std 0.5 do."""
    return images.float() / 127.5 - 1


def load_pictures(args, device, need_classes=True):
    """Read args.dataset whole into the device's memory. Raises InputError if it cannot."""
    if args.dataset == "shapes":
        pictures = read_shapes(args.image_size)
    elif args.dataset == "folder":
        pictures = read_folder(args.data_path, args.image_size, need_classes)
    elif args.image_size == 32:
        pictures = read_cifar(args.dataset, args.data_path)
    else:
        raise InputError(
            f"image size {args.image_size} does not fit {args.dataset}, whose pictures are 32x32"
        )
    if args.train_images:
        pictures = take_train_images(pictures, args.train_images)
    tensors = (x.to(device) if isinstance(x, torch.Tensor) else x for x in pictures)
    return Pictures(*tensors)


def take_train_images(pictures, n):
    """Keep n training pictures, spread evenly over the classes and over each class."""
    labels = pictures.train_labels
    if n > len(labels):
        raise InputError(f"--train_images {n}: there are only {len(labels)} training pictures")
    keep = labels.argsort(stable=True)[torch.arange(n) * len(labels) // n]
    return pictures._replace(train_images=pictures.train_images[keep], train_labels=labels[keep])


def read_cifar(name, root):
    """CIFAR-10 or CIFAR-100, downloaded and checked by torchvision."""
    dataset = {
        "cifar10": torchvision.datasets.CIFAR10,
        "cifar100": torchvision.datasets.CIFAR100,
    }[name]
    try:
        train, val = (dataset(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot get {name} ({' '.join(str(error).split())}): put {dataset.filename} from "
            f"{dataset.url} into {root}{os.sep}, or try --demo, which needs no network"
        ) from error
    images = (torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous() for x in (train, val))
    labels = (torch.tensor(x.targets) for x in (train, val))
    train_images, val_images = images
    train_labels, val_labels = labels
    return Pictures(train_images, train_labels, val_images, val_labels, train.classes)


def read_folder(root, image_size, need_classes):
    """Pictures below <root>/train and <root>/val or <root>/test, where each class is a folder.

    Without need_classes they may lie anywhere below <root>/train, or below <root> if it has no
    train/; and the first training pictures stand in for a val/ or test/ that is not there.
    """
    here = [name for name in ("train", "val", "test") if os.path.isdir(os.path.join(root, name))]
    val = next((name for name in here if name != "train"), None)
    if need_classes and not ("train" in here and val):
        raise InputError(
            f"--data_path {root} needs {root}/train/<class>/... and {root}/val/<class>/... or "
            f"{root}/test/<class>/..."
        )
    train_files, classes = list_pictures(root, "train" if "train" in here else "", need_classes)
    train_images, train_labels = decode(train_files, image_size)
    if val is None:
        return Pictures(train_images, train_labels, train_images[:16], train_labels[:16], classes)

    val_files, val_classes = list_pictures(root, val, need_classes)
    if unknown := set(val_classes) - set(classes):
        raise InputError(f"{root}/train lacks classes that {root}/{val} has: {sorted(unknown)[:5]}")
    val_files = [(path, classes.index(val_classes[label])) for path, label in val_files]
    return Pictures(train_images, train_labels, *decode(val_files, image_size), classes)


def list_pictures(root, part, need_classes):
    """[(path, label), ...] and the names of the classes, by torchvision's reader."""
    folder = os.path.join(root, part)
    try:
        if need_classes:
            dataset = torchvision.datasets.ImageFolder(folder)
            return dataset.samples, dataset.classes
        return make_dataset(folder, {"": 0}, IMG_EXTENSIONS), [""]
    except OSError as error:
        raise InputError(f"--data_path {root}: {' '.join(str(error).split())}") from error


def decode(files, image_size):
    """[(path, label), ...] -> images uint8 [N,3,S,S], labels [N].

    Each picture is turned upright, resized to S on its shorter side, cropped to its centre, RGB.
    """
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(files, "Reading pictures", disable=None, leave=False)):
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except Exception as error:  # each of PIL's decoders has errors of its own
            raise InputError(f"cannot read the picture {path}: {error}") from error
        picture = TF.center_crop(TF.resize(picture, image_size), image_size)
        images[i] = TF.pil_to_tensor(picture)
    return images, torch.tensor([label for _, label in files])


SHAPES = [
    "disc", "ring", "half-disc", "crescent", "square", "frame", "triangle", "cross", "star", "bars"
]  # fmt: skip


def draw_shapes(n, image_size, seed):
    """n pictures of ten kinds of shape, as many of each. Returns uint8 [n,3,S,S], labels [n].

    One flat colour on a softly shaded background; place, size, turn, colours, shading and noise are
    random, and a function of the seed.
    """
    rng = generator("shapes", seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=rng)

    labels = torch.arange(n) % len(SHAPES)
    labels = labels[torch.randperm(n, generator=rng)]
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1
    images = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8)
    for rows in torch.arange(n).split(1000):
        b = len(rows)
        place, turn = uniform(-0.2, 0.2, b, 2, 1, 1), uniform(-0.3, 0.3, b, 1, 1)
        size = uniform(0.6, 0.85, b, 1, 1)
        # Coordinates in the frame of the shape, which fits the unit disc.
        y, x = (axis[:, None] - place[:, 0]) / size, (axis - place[:, 1]) / size
        x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
        distance = shape_distance(x, y, labels[rows]) * size * image_size / 2  # in pixels
        inside = (0.5 - distance).clamp(0, 1)[:, None]  # [b,1,S,S], edges one pixel soft

        colour = uniform(0, 1, b, 3, 1, 1)
        ground = (colour + 0.5 + uniform(-0.15, 0.15, b, 3, 1, 1)) % 1  # far from the colour
        wave = uniform(-6, 6, b, 3, 1, 1)  # a faint, broad ripple: its direction and phase
        ground = (
            ground + 0.06 * (wave[:, :1] * axis[:, None] + wave[:, 1:2] * axis + wave[:, 2:]).sin()
        )
        slope = uniform(-0.1, 0.1, b, 2, 3, 1, 1)
        ground = ground + slope[:, 0] * axis[:, None] + slope[:, 1] * axis
        picture = torch.lerp(ground, colour, inside)
        picture += 0.02 * torch.randn(picture.shape, generator=rng)
        images[rows] = (picture * 255).round().clamp(0, 255).byte()
    return images, labels


def shape_distance(x, y, kind):
    """Signed distance to the edge of shape kind[b], negative inside. x, y [b,S,S], kind [b]."""
    radius = torch.hypot(x, y)
    # Fold the plane into one of the star's ten mirrored tips; its edge runs from tip to notch.
    angle = (torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    notch_x, notch_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    star = (radius * angle.cos() - 1) * notch_y - radius * angle.sin() * (notch_x - 1)

    def box(width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)

    def half_plane(degrees):
        return x * math.sin(math.radians(degrees)) + y * math.cos(math.radians(degrees)) - 0.45

    distance = {
        "disc": radius - 0.9,
        "ring": (radius - 0.68).abs() - 0.22,
        "half-disc": torch.maximum(torch.hypot(x, y - 0.4) - 0.95, y - 0.4),
        "crescent": torch.maximum(radius - 0.9, 0.7 - torch.hypot(x - 0.45, y)),
        "square": box(0.75, 0.75),
        "frame": box(0.6, 0.6).abs() - 0.18,
        "triangle": torch.stack([half_plane(a) for a in (0, 120, 240)]).amax(0),
        "cross": torch.minimum(box(0.27, 0.9), box(0.9, 0.27)),
        "star": star / math.hypot(notch_x - 1, notch_y),
        "bars": torch.maximum(box(0.8, 0.8), (torch.remainder(x + 0.3, 0.6) - 0.3).abs() - 0.15),
    }
    return torch.stack([distance[name] for name in SHAPES])[kind, torch.arange(len(kind))]


def read_shapes(image_size):
    """30,000 drawn pictures to train on and 2,000 others to validate on; the same in every run."""
    return Pictures(*draw_shapes(30_000, image_size, 0), *draw_shapes(2_000, image_size, 1), SHAPES)


# --------------------------------------------------------------------------------- model files


def check_output(path):
    """Raise InputError now if a file could not be written to `path` later. Makes its folder."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_file(path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` is never half written."""
    part = f"{path}.part"
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_png(path, picture):
    """Write a picture [3,H,W] in [0, 1], small ones enlarged so that their pixels can be seen."""
    scale = max(1, 768 // picture.shape[-1])
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    write_file(path, lambda file: torchvision.utils.save_image(picture, file, format="png"))


def versions():
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np}
    return {"python": platform.python_version()} | {
        k: str(m.__version__) for k, m in modules.items()
    }


def save_model(path, model, architecture, args, **more):
    """Write a model file: plain values and tensors, which torch.load(weights_only=True) reads."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = {
        "kind": type(model).__name__,
        "model": weights,
        "architecture": architecture,
        "preprocessing": {"image_size": architecture["image_size"], "mean": 0.5, "std": 0.5},
        "args": vars(args),
        "versions": versions(),
        **more,
    }
    write_file(path, lambda file: torch.save(content, file))


def load_mae(path):
    """Read a file of mae_pretrain.py, or a bare state_dict of MAE_ViT -> MAE_ViT, architecture.

    A bare state_dict does not tell the number of heads: it is taken to be 3, as in the source.
    Raises InputError, naming what is wrong with the file.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; mae_pretrain.py writes one to its --model_path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader meets in a file that is none of ours
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise InputError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if isinstance(content, dict) and "model" in content:
        if content.get("kind") != "MAE_ViT":
            raise InputError(
                f"{path} holds a {content.get('kind')}, not the MAE_ViT of mae_pretrain.py"
            )
        weights, architecture = content["model"], content["architecture"]
    else:
        weights, architecture = content, None
    try:
        architecture = architecture or infer_architecture(weights)
        model = MAE_ViT(**architecture)
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not hold the weights of an MAE_ViT: {reason}") from error
    return model, architecture


def build(module_class, *sizes, **named_sizes):
    """module_class(...), with an InputError for sizes that do not fit together."""
    try:
        return module_class(*sizes, **named_sizes)
    except ValueError as error:
        raise InputError(str(error)) from error


def infer_architecture(weights):
    patch_size = weights["encoder.patchify.weight"].shape[-1]
    num_patches, _, emb_dim = weights["encoder.pos_embedding"].shape

    def layers(part):
        return len(
            {name.split(".")[2] for name in weights if name.startswith(f"{part}.transformer.")}
        )

    return {
        "image_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "emb_dim": emb_dim,
        "encoder_layer": layers("encoder"),
        "encoder_head": 3,
        "decoder_layer": layers("decoder"),
        "decoder_head": 3,
        "mask_ratio": 0.75,
    }


# -------------------------------------------------------------------------- curves and messages


def new_run_folder(*parts):
    """Make a folder for a run's curves: the next free one of name, name-2, name-3, ..."""
    name = os.path.join(*parts)
    for i in itertools.count(1):
        folder = name if i == 1 else f"{name}-{i}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


class Totals:
    """Sums over an epoch's pictures, kept on the device so that no step waits for a number."""

    def __init__(self, device, names):
        self.names, self.pictures, self.start = names, 0, time.perf_counter()
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self.host = torch.zeros(len(names), dtype=torch.float64, pin_memory=device.type == "cuda")

    def add(self, pictures, *sums):
        self.pictures += pictures
        self.sums += torch.stack(sums)
        self.host.copy_(self.sums, non_blocking=True)

    def peek(self):
        """For the bar: means by the sums that have arrived by now, without waiting for the rest."""
        return {
            name: f"{x / self.pictures:.4f}"
            for name, x in zip(self.names, self.host.tolist(), strict=True)
        }

    def mean(self):
        """{name: mean over the pictures}, exact. Also stops the clock of per_second."""
        means = [x / self.pictures for x in self.sums.tolist()]
        self.per_second = self.pictures / (time.perf_counter() - self.start)
        return dict(zip(self.names, means, strict=True))


def progress_bar(text, pictures):
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(desc=text, total=pictures, unit="img", disable=None, leave=False, mininterval=0.3)


def describe_run(args, device, precision, model, pictures, folder):
    """Print once what this run is."""
    gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    parameters = sum(p.numel() for p in model.parameters())
    sizes = f"{len(pictures.train_images):,} training, {len(pictures.val_images):,} validation"
    print(f"arguments: {', '.join(f'{name} {value}' for name, value in vars(args).items())}")
    print(f"libraries: {libraries}")
    print(f"device:    {device} ({hardware}), {precision}")
    print(f"model:     {type(model).__name__}, {parameters:,} parameters")
    print(f"pictures:  {args.dataset}, {sizes}")
    print(f"curves:    {folder} (tensorboard --logdir {args.log_dir})", flush=True)
