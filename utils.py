"""What both scripts need: command line, device, random numbers, pictures, model files, curves."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import glob
import hashlib
import io
import itertools
import math
import os
import platform
import random
import re
import shlex
import signal
import sys
import time
import typing
import warnings
import zipfile
import zlib

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.nn.functional import grid_sample
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.tensorboard import summary
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

from model import MAE_Encoder, MAE_ViT, ViT_Classifier

# ------------------------------------------------------------------------------- command line


class InputError(Exception):
    """Something that the user can mend. Its message is one line, whatever is quoted in it."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text):
    return " ".join(str(text).split())[:500]


def say(text):
    """Print, at once, once. A log that is full or a pipe that is closed must not end the run."""
    if rank() > 0:
        return
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a file's name, on a terminal that cannot show it
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def one_line_errors():
    """End the program with `error: ...` and status 1 where the user, not a developer, can help."""
    try:
        yield
    except InputError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full: try a smaller --max_device_batch_size")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            fail("there is not enough memory for this model or these pictures")
        if several_processes() and LOST.search(f"{type(error).__name__} {error}"):
            fail(f"another process has failed or cannot be reached: {one_line(error)}")
        raise
    except KeyboardInterrupt:  # before training, which has a handler of its own
        sys.exit(130)


# How gloo and NCCL say that a process on the other side is gone.
LOST = re.compile(
    "DistBackendError|DistNetworkError|DistStoreError|gloo|NCCL|Connection (closed|reset)"
)


def fail(message):
    """End with one line and status 1.

    Of several processes that end for the same reason the first is to say so: torchrun ends the
    others while they wait here. They end hard, as PyTorch's clean-up could wait for a lost one.
    """
    if world_size() == 1:
        sys.exit(f"error: {message}")
    if rank() > 0 or message.startswith("another process"):
        time.sleep(3)
    with contextlib.suppress(OSError):
        print(f"error in process {rank()}: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the script's own line breaks; adds defaults where a flag has a telling one."""

    def _get_help_string(self, action):
        telling = action.default is not None and action.default is not False
        return super()._get_help_string(action) if telling else action.help


class OneOrMore(argparse.Action):
    """For nargs="+": a single value is stored by itself, several as a list."""

    def __call__(self, parser, namespace, values, _):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


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
        if rank() > 0:
            time.sleep(3)  # see fail
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse(self, argv, demo, output):
        """Let --demo replace defaults and --resume go on with those of the saved run.

        Flags on the command line win over --demo. `output` names the flag of the model file.
        """
        if self.parse_known_args(argv)[0].demo:
            self.set_defaults(**demo)
        args = self.parse_args(argv)
        return resume_args(self, argv, args, output) if args.resume else args


def checked(kind, test, wish):
    """An argparse type: int or float, refused with a wish unless it passes the test."""

    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wish}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


positive_int = checked(int, lambda n: 1 <= n < 2**31, "a whole number from 1 to 2**31 - 1")
unsigned_int = checked(int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2**31 - 1")
unsigned_float = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
ratio = checked(float, lambda x: 0 <= x < 1, "from 0 to below 1")
ratio_or_one = checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
positive_ratio = checked(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
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
        help="use N of the training pictures, spread evenly over the classes (default: all)")


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


def add_output_flags(parser, model_flag, default, name):
    add = parser.add_argument_group("output").add_argument
    add(model_flag, default=default, help="the model file; other files of the run go beside it")
    add("--log_dir", default="logs", help=f"curves go into <log_dir>/<dataset>/{name}; "
        "a later run takes the next free name, with -2, -3, ... behind it")
    add("--save_minutes", type=unsigned_float, default=10.0, metavar="M",
        help="save the state at least every M minutes, and at the end of an epoch if that is cheap")
    add("--resume", action="store_true",
        help="go on where the run's last saved state stands; flags need not be repeated, but "
             "those that would change the result must not differ")


def add_device_flags(parser, **defaults):
    add = parser.add_argument_group("device").add_argument
    add("--max_device_batch_size", type=positive_int, metavar="N",
        help="pictures on one device in one forward and backward pass; the gradients of a larger "
             "batch are accumulated over several passes: the result does not depend on it")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: cuda where there is a GPU")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of the matrix products; weights and optimizer stay fp32; "
             "auto: bf16 where the hardware computes it natively")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the model (default: on one GPU, for runs of 3 million pictures or "
             "more; not on a CPU, where it needs a C++ compiler and about a minute)")
    parser.set_defaults(**defaults)
# fmt: on


# ---------------------------------------------------------------------------- several processes


def rank():
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun has started, on all machines; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def several_processes():
    """Whether torchrun, by the environment, has started several processes."""
    told = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return told <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


@contextlib.contextmanager
def processes():
    """Join the other processes of the run, if torchrun has started several.

    What is on a GPU travels by NCCL, all else by gloo. Process 0 reads the pictures, and alone
    writes: model, state, curves, messages.
    """
    if not several_processes():
        yield
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux: if torchrun dies, SIGTERM for us
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The gradients of our [1,1,C] tokens have strides of another, equal, meaning.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
    yield
    dist.destroy_process_group()


def share(tensor):
    """The part of a batch that is this process's: all but equal parts of dim 0, maybe none."""
    return tensor.tensor_split(world_size())[rank()]


def sum_over_processes(tensor):
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(*numbers):
    """The largest of each number over the processes, for what only one of them may know."""
    if world_size() == 1:
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def check_alike(**facts):
    """Raise InputError if the processes, on several machines maybe, are not up to the same."""
    if world_size() == 1:
        return
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, facts, dist.new_group(backend="gloo"))
    for number, theirs in enumerate(gathered):
        for name, value in gathered[0].items():
            if theirs[name] != value:
                raise InputError(
                    f"process {number} has {name} {theirs[name]}, process 0 has {value}: give all "
                    "machines the same flags, code and files"
                )


def send_pictures(pictures):
    """Give the Pictures of process 0 to all; the others pass None."""
    if world_size() == 1:
        return pictures
    # Process 0 may be downloading for long. Should it fail, the others learn of it at once.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    facts = [pictures and (pictures.classes, [(x.shape, x.dtype) for x in pictures[:4]])]
    dist.broadcast_object_list(facts, 0, group)
    classes, kinds = facts[0]
    tensors = pictures[:4] if pictures else [torch.empty(s, dtype=dtype) for s, dtype in kinds]
    for tensor in tensors:
        dist.broadcast(tensor, 0, group)
    return Pictures(*tensors, classes)


# -------------------------------------------------------------------------- device, precision


def choose_device(name):
    """auto, cpu or cuda -> torch.device. Raises InputError for cuda without a GPU."""
    gpus = torch.cuda.device_count()
    if name == "cuda" and not gpus:
        raise InputError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name == "cpu" or not gpus:
        keep_freed_memory()
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0
    if index >= gpus:
        raise InputError(f"--nproc_per_node is above the number of GPUs of this machine, {gpus}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def count_gpus(device):
    """The GPUs that this process trains on: 1 if there is a process for each, 0 on a CPU."""
    if device.type == "cpu":
        return 0
    return torch.cuda.device_count() if world_size() == 1 else 1


def keep_freed_memory():
    """Have glibc keep the pages of freed tensors: mapping them anew costs a third of the time."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: no loss
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
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


class Net(torch.nn.Module):
    """Calls a module in the chosen precision, compiled for inputs of one batch size if any.

    Others, such as the last of an epoch, run as they are: to compile for each size would take
    longer than it saves. Autocast is entered in here because DataParallel's threads forget it.
    """

    def __init__(self, module, device, precision, compiled_size=None):
        super().__init__()
        self.module, self.compiled_size = module, compiled_size
        self.device_type, self.bf16 = device.type, precision == "bf16"
        if compiled_size:
            self.compiled = torch.compile(self.run, dynamic=False, fullgraph=True)

    def run(self, *inputs):
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            return self.module(*inputs)

    def forward(self, *inputs):
        if len(inputs[0]) == 0:  # a process without a share; not every attention takes no picture
            return self.run(*(x.new_zeros(1, *x.shape[1:]) for x in inputs))[:0]
        run = self.compiled if len(inputs[0]) == self.compiled_size else self.run
        return run(*inputs)


def place(module, device, args, part_size, pictures):
    """Move a module to the device, in place -> what to call in its stead, and what was chosen.

    Decides precision and compilation by args.precision, args.compile and the number of pictures
    that the run trains on. The module itself has the state_dict to save, without any prefix.
    """
    module.to(device)
    gpus = count_gpus(device)
    precision = choose_precision(args.precision, device)
    compiled = choose_compile(args.compile, gpus, pictures / world_size())
    if gpus:
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    for part in module.modules():
        if hasattr(part, "fused_attn"):  # timm's Attention: PyTorch's is slow in bf16 on a CPU
            part.fused_attn = gpus > 0 or precision == "fp32"
    net = Net(module, device, precision, part_size if compiled else None)
    name = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    if world_size() > 1:
        check_alike(device=device.type, precision=precision)
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        name = f"{world_size()} processes, {name} each"
    elif gpus > 1:
        net = DataParallel(net)
    return net, {"device": name, "precision": precision, "compile": compiled}


def choose_compile(flag, gpus, pictures):
    """Whether to compile: as the flag says, else on one GPU for a run that is long enough."""
    if gpus > 1:
        if flag:
            say("warning: --compile has no effect on several GPUs in one process")
        return False
    return gpus == 1 and pictures >= 3_000_000 if flag is None else flag


def choose_part_size(args, device):
    """Pictures in a micro-batch: the fewest micro-batches that are not too large, all of one size.

    In fp32 a CPU is as fast with 64 pictures as with more, and needs less memory.
    """
    largest = args.max_device_batch_size * max(1, count_gpus(device))
    if device.type == "cpu" and choose_precision(args.precision, device) == "fp32":
        largest = min(largest, 64)
    size = max(1, len(share(torch.empty(args.batch_size, device="meta"))))
    return math.ceil(size / math.ceil(size / largest))


def micro_batches(net, part_size, device, *tensors):
    """Yield this process's share of a batch part by part: tuples of slices, on the device.

    Of several processes, each yields at least one, and they exchange gradients in the last.
    """
    parts = [to_device(share(x), device).split(part_size) for x in tensors]
    *others, last = zip(*parts, strict=True)
    for part in others:
        with net.no_sync() if world_size() > 1 else contextlib.nullcontext():
            yield part
    yield last


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
        say(
            f"warning: --warmup_epoch {args.warmup_epoch} is not below --total_epoch "
            f"{args.total_epoch}: the learning rate falls before it has risen to its highest value"
        )


def set_learning_rate(optim, epoch, args):
    """Give the optimizer this epoch's learning rate, and return it."""
    lr = learning_rate(
        epoch, args.base_learning_rate, args.batch_size, args.total_epoch, args.warmup_epoch
    )
    for group in optim.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# ------------------------------------------------------------------------------------ pictures


class Pictures(typing.NamedTuple):
    """A data set in memory. Images are uint8 [N,3,H,W], labels int64 [N]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    classes: list

    def fingerprint(self):
        """A number by which a resumed run knows its pictures again."""
        return checksum(*self[:4])


def checksum(*tensors):
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), crc)
    return crc


def to_float(images):
    """uint8 pixels -> [-1, 1], as mean 0.5 and std 0.5 do; what is float already, unchanged."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def warp(img, matrix, mode="bilinear", padding_mode="zeros"):
    """Resample img [b,3,H,W] where matrix [b,2,3] takes each output pixel, in units of [-1, 1].

    By default 0, the middle of the range of pixels, lies outside of the picture.
    """
    if len(img) == 0:  # grid_sample refuses it; a process may have no share in a short batch
        return img
    y, x = ((torch.arange(n, device=img.device) * 2 + 1) / n - 1 for n in img.shape[2:])
    a, b, c = matrix[:, None, None].unbind(-1)  # [b,1,1,2]; not affine_grid, whose TF32 is coarse
    grid = a * x[:, None] + b * y[:, None, None] + c  # [b,H,W,2]
    return grid_sample(img, grid, mode, padding_mode, align_corners=False)


def load_pictures(args, device, need_classes=True):
    """Read args.dataset whole into the device's memory. Raises InputError if it cannot."""
    pictures = send_pictures(read_pictures(args, device, need_classes) if rank() == 0 else None)
    tensors = (x.to(device) if isinstance(x, torch.Tensor) else x for x in pictures)
    return Pictures(*tensors)


def read_pictures(args, device, need_classes):
    if args.dataset == "shapes":
        pictures = read_shapes(args.image_size)
    elif args.dataset == "folder":
        pictures = read_folder(args, device, need_classes)
    elif args.image_size == 32:
        pictures = read_cifar(args.dataset, args.data_path)
    else:
        raise InputError(
            f"image size {args.image_size} does not fit {args.dataset}, whose pictures are 32x32"
        )
    if args.train_images:
        pictures = take_train_images(pictures, args.train_images)
    return pictures


def take_train_images(pictures, n):
    """Keep n training pictures, spread evenly over the classes and over each class."""
    keep = spread(pictures.train_labels, n, "--train_images")
    return pictures._replace(
        train_images=pictures.train_images[keep], train_labels=pictures.train_labels[keep]
    )


def spread(labels, n, flag):
    """The indexes of n of the labels [N], spread evenly over the classes and over each class."""
    if n > len(labels):
        raise InputError(f"{flag} {n}: there are only {len(labels)} training pictures")
    return labels.argsort(stable=True)[torch.arange(n) * len(labels) // n]


def hold_out(pictures, n):
    """Take n training pictures, spread over the classes, as validation pictures -> Pictures."""
    held = spread(pictures.train_labels.cpu(), n, "--holdout")
    rest = torch.ones(len(pictures.train_labels), dtype=torch.bool)
    rest[held] = False
    if not rest.any():
        raise InputError(f"--holdout {n} leaves no picture to train on")
    images, labels = pictures.train_images, pictures.train_labels
    held, rest = held.to(images.device), rest.to(images.device)
    return Pictures(images[rest], labels[rest], images[held], labels[held], pictures.classes)


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
            f"cannot get {name} ({error}): put {dataset.filename} from "
            f"{dataset.url} into {root}{os.sep}, or try --demo, which needs no network"
        ) from error
    images = (torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous() for x in (train, val))
    labels = (torch.tensor(x.targets) for x in (train, val))
    train_images, val_images = images
    train_labels, val_labels = labels
    return Pictures(train_images, train_labels, val_images, val_labels, train.classes)


def read_folder(args, device, need_classes):
    """Pictures below <root>/train and <root>/val or <root>/test, where each class is a folder.

    Without need_classes they may lie anywhere below <root>/train, or below <root> if it has no
    train/; and the first training pictures stand in for a val/ or test/ that is not there.
    """
    root, size = args.data_path, args.image_size
    here = [name for name in ("train", "val", "test") if os.path.isdir(os.path.join(root, name))]
    val = next((name for name in here if name != "train"), None)
    if val and "train" not in here:
        raise InputError(f"--data_path {root} has {val}/ but no train/")
    if need_classes and not val:
        raise InputError(
            f"--data_path {root} needs {root}/train/<class>/... and {root}/val/<class>/... or "
            f"{root}/test/<class>/..."
        )
    train_files, classes = list_pictures(root, "train" if "train" in here else "", need_classes)
    if args.train_images:
        keep = spread(
            torch.tensor([label for _, label in train_files]), args.train_images, "--train_images"
        )
        train_files = [train_files[i] for i in keep]
    if val is None:
        check_memory(len(train_files), size, device)
        train_images, train_labels = decode(train_files, size)
        return Pictures(train_images, train_labels, train_images[:16], train_labels[:16], classes)

    val_files, val_classes = list_pictures(root, val, need_classes)
    if unknown := set(val_classes) - set(classes):
        raise InputError(f"{root}/train lacks classes that {root}/{val} has: {sorted(unknown)[:5]}")
    number = {name: i for i, name in enumerate(classes)}
    val_files = [(path, number[val_classes[label]]) for path, label in val_files]
    check_memory(len(train_files) + len(val_files), size, device)
    return Pictures(*decode(train_files, size), *decode(val_files, size), classes)


def check_memory(n, image_size, device):
    """Raise InputError if n pictures do not fit into the memory, and say how much they need."""
    free = [torch.cuda.mem_get_info(device)[0]] if device.type == "cuda" else []
    with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
        free += [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, if it has one
        with (
            open("/sys/fs/cgroup/memory.max") as most,
            open("/sys/fs/cgroup/memory.current") as now,
        ):
            free.append(int(most.read()) - int(now.read()))
        with open("/sys/fs/cgroup/memory.stat") as stat:  # files kept in memory while there is room
            free[-1] += sum(int(x.split()[1]) for x in stat if x.startswith("inactive_file"))
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    need = n * 3 * image_size**2 * local  # a copy for each process
    text = f"{n:,} pictures of {image_size}x{image_size} take {need / 1e9:,.1f} GB of memory"
    if free and need > 0.9 * min(free):
        raise InputError(
            f"{text}, of which {min(free) / 1e9:,.1f} GB are free: lower --image_size or "
            "--train_images"
        )
    if need > 1e9:
        say(text)


def find_pictures(path):
    """A picture, or those of a folder and the folders in it -> [(path, 0), ...]."""
    return [(path, 0)] if os.path.isfile(path) else list_pictures(path, "", False)[0]


def list_pictures(root, part, need_classes):
    """[(path, label), ...] and the names of the classes, by torchvision's reader."""
    folder = os.path.join(root, part) if part else root
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder}")
    try:
        if need_classes:
            dataset = torchvision.datasets.DatasetFolder(folder, None, EXTENSIONS)
            return dataset.samples, dataset.classes
        return make_dataset(folder, {"": 0}, EXTENSIONS), [""]
    except OSError as error:
        raise InputError(f"no pictures in {folder}: {error}") from error


EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


def decode(files, image_size):
    """[(path, label), ...] -> images uint8 [N,3,S,S], labels [N].

    Each picture is turned upright, resized to S on its shorter side, cropped to its centre, RGB; of
    an animated one it is the first frame. Raises InputError naming those that cannot be read.
    """
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    broken = []
    for i, (path, _) in enumerate(tqdm(files, "Reading pictures", disable=None, leave=False)):
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bits of grey, which convert would clip
                    picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
                picture = picture.convert("RGB")
        except Exception:  # each of PIL's decoders has errors of its own
            broken.append(path)
            continue
        picture = TF.center_crop(TF.resize(picture, image_size), image_size)
        images[i] = TF.pil_to_tensor(picture)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise InputError(
            f"cannot read {len(broken)} of {len(files)} pictures: {', '.join(broken[:5])}{more}; "
            "mend or remove them"
        )
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


# --------------------------------------------------------------------- writing files, all or none


def check_outputs(*paths):
    """Raise InputError now if a file could not be written later. Makes the folders of the paths."""
    if rank() > 0:
        return
    if len(set(paths)) < len(paths):
        raise InputError(f"two files of the run would have the name {paths[0]}")
    for path in paths:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            if os.path.isdir(path) or not os.path.basename(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            check_replaceable(path)
            for part in glob.glob(f"{glob.escape(path)}.*.part"):  # of a run that was killed
                os.remove(part)
            with open(part_path(path), "wb"):
                os.remove(part_path(path))
        except OSError as error:
            raise InputError(
                f"cannot write {path or 'a file without a name'}: {error.strerror}"
            ) from error


def part_path(path):
    """The name of a file while it is being written: two runs do not write into one."""
    return f"{path}.{os.getpid()}.part"


def check_replaceable(path):
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def write_file(path, content):
    """Write bytes to a file beside `path`, then rename it: `path` is never half written.

    They are on the disk, not only in its cache, before the name is. Raises OSError, with `path` as
    it was, if any of this fails.
    """
    check_replaceable(path)
    part = part_path(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    with contextlib.suppress(OSError):  # the rename too; not every file system offers it
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_picture(path, picture):
    """Write a picture [3,H,W] in [0, 1] as PNG. Raises InputError if that fails."""
    try:
        write_file(path, png_bytes(picture))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


class Files:
    """Writes a run's files. What fails is warned about, held, and written with the next ones."""

    def __init__(self):
        self.unwritten = {}  # path -> bytes

    def hold(self, path, content):
        """Keep bytes to be written, in place of older ones for the same path."""
        if rank() == 0:
            self.unwritten[path] = content

    def write(self):
        """Write what is held, in the order in which it came."""
        for path, content in list(self.unwritten.items()):
            try:
                write_file(path, content)
                del self.unwritten[path]
            except OSError as error:
                say(f"warning: cannot write {path}: {error.strerror}; will try again")


def to_bytes(content):
    """What torch.save writes. In memory first: a full disk then meets plain bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def png_bytes(picture):
    """A picture [3,H,W] in [0, 1] as PNG, a small one enlarged so that its pixels can be seen."""
    scale = max(1, 768 // picture.shape[-1])
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    buffer = io.BytesIO()
    torchvision.utils.save_image(picture, buffer, format="png")
    return buffer.getvalue()


def draw_confusion(counts, classes):
    """Confusion matrix [K,K], a row for each true class -> picture [3,H,W] in [0, 1].

    A cell is the darker, the larger its share of its row; up to 30 classes have names and numbers.
    """
    k = len(classes)
    cell, margin = (44, 110) if k <= 30 else (max(1, 900 // k), 0)
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    colour = torch.tensor([[8.0, 48, 107]]) * share[..., None] + 255 * (1 - share[..., None])
    cells = colour.byte().repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    picture = Image.new("RGB", (margin + k * cell, margin + k * cell), "white")
    picture.paste(Image.fromarray(cells.numpy()), (margin, margin))
    if margin:
        draw = ImageDraw.Draw(picture)
        names = [name.encode("latin-1", "replace").decode("latin-1")[:16] for name in classes]
        draw.text((4, 4), "true (rows),\npredicted (columns)", "black")
        for i, name in enumerate(names):
            middle = margin + i * cell + cell // 2
            draw.text((margin - 6, middle), name, "black", anchor="rm")
            sideways = Image.new("L", (margin, 20))
            ImageDraw.Draw(sideways).text((6, 10), name, 255, anchor="lm")
            sideways = sideways.rotate(90, expand=True)
            picture.paste("black", (middle - 10, 0), sideways)
            for j in range(k):
                where = margin + j * cell + cell // 2, middle
                white = "white" if share[i, j] > 0.5 else "black"
                draw.text(where, f"{counts[i, j]}", white, anchor="mm")
    return TF.to_tensor(picture)


# --------------------------------------------------------------------------------- model files


def versions():
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np}
    return {"python": platform.python_version()} | {
        k: str(m.__version__) for k, m in modules.items()
    }


def model_bytes(model, architecture, args, **more):
    """A model file: tensors and plain values, which torch.load(weights_only=True) reads."""
    return to_bytes(
        {
            "kind": type(model).__name__,
            "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
            "architecture": architecture,
            "preprocessing": {"image_size": architecture["image_size"], "mean": 0.5, "std": 0.5},
            "args": vars(args),
            "versions": versions(),
            **more,
        }
    )


class InertModule:
    """Stands in for every class of a pickled module: it holds the attributes and runs nothing."""


# The classes of which the source's whole-module pickles consist.
MODULE_CLASS = re.compile(
    r"(model|__main__)\.(MAE_ViT|MAE_Encoder|MAE_Decoder|PatchShuffle|ViT_Classifier)"
    r"|torch\.nn\.modules\.\w+\.[A-Z]\w+|torch\.nn\.parallel\.data_parallel\.DataParallel"
    r"|timm\.(models|layers)\.([a-z_]+\.)*[A-Z]\w+|einops\.([a-z_]+\.)*[A-Z]\w+"
)


def read_checkpoint(path):
    """torch.load without executing anything: tensors, plain values and InertModules.

    Raises InputError for what is not there, is damaged, or asks for any other class or function.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path} is compressed, as no file of torch.save is")
            if name := archive.testzip():
                raise InputError(f"{path} is damaged: the checksum of {name} is wrong")
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in asked if not MODULE_CLASS.fullmatch(name)]
        if refused:
            raise InputError(f"{path} is refused: it would run {', '.join(sorted(refused)[:5])}")
        with torch.serialization.safe_globals([(InertModule, name) for name in asked]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can trip its reader anywhere
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{path} is no checkpoint of PyTorch, or damaged: {reason}") from error


def load_mae(path):
    """Read pretrained weights -> MAE_ViT, architecture, whether it predicts normalised pixels.

    From a file of mae_pretrain.py, a bare state_dict of MAE_ViT, or the whole module as the source
    pickles it. A bare state_dict does not tell the number of heads and the mask ratio: they are
    taken to be 3 and 0.75. Raises InputError, naming the tensor that is wrong.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; mae_pretrain.py writes one to its --model_path")
    content = read_checkpoint(path)
    try:
        return mae_from(content, path)
    except InputError:
        raise
    except Exception as error:  # nothing is known of the values in the file
        raise InputError(f"{path} does not hold an MAE_ViT: {error}") from error


def mae_from(content, path):
    weights, told = weights_from(content, "MAE_ViT", path)
    told = {"encoder_head": 3, "decoder_head": 3, "mask_ratio": 0.75} | told
    # The sizes are those of the tensors: what the file says of itself is checked, not trusted.
    architecture = infer_architecture(weights, path)
    check_told(architecture, told, path)
    args = content.get("args", {}) if isinstance(content, dict) else {}
    model = fill(MAE_ViT, architecture, weights, path)
    return model, architecture, args.get("norm_pix_loss") is True


def load_classifier(path):
    """Read a classifier -> ViT_Classifier, architecture, names of its classes or None.

    From a file of train_classifier.py or the whole module as the source pickles it. Raises
    InputError like load_mae.
    """
    content = read_checkpoint(path)
    try:
        weights, told = weights_from(content, "ViT_Classifier", path)
        told = {"encoder_head": 3} | told
        classes = content.get("classes") if isinstance(content, dict) else None
        # Its parts have the names that they have in MAE_ViT's encoder, but for the prefix.
        renamed = {f"encoder.{name}": tensor for name, tensor in weights.items()}
        architecture = infer_architecture(renamed, path, "ViT_Classifier")
        del architecture["decoder_layer"]
        architecture["num_classes"] = len(weights["head.bias"])
        check_told(architecture, told, path)
        return fill(new_classifier, architecture, weights, path), architecture, classes
    except InputError:
        raise
    except Exception as error:  # nothing is known of the values in the file
        raise InputError(f"{path} does not hold a ViT_Classifier: {error}") from error


def new_classifier(image_size, patch_size, emb_dim, encoder_layer, encoder_head, num_classes):
    encoder = MAE_Encoder(image_size, patch_size, emb_dim, encoder_layer, encoder_head)
    return ViT_Classifier(encoder, num_classes)


def weights_from(content, kind, path):
    """state_dict, what the file tells of sizes: of our files, bare state_dicts, pickled modules."""
    told = {}
    if isinstance(content, InertModule):
        weights, told = unpack_module(content, kind, path)
    elif isinstance(content, dict) and "model" in content:
        if content.get("kind") != kind:
            raise InputError(f"{path} holds no {kind} but: {str(content.get('kind'))[:40]}")
        weights, told = content["model"], content["architecture"]
    else:
        weights = content
    return {str(name).removeprefix("module."): x for name, x in weights.items()}, told


def check_told(architecture, told, path):
    """Add to the architecture what only the file tells; raise InputError where the two differ."""
    for name, value in told.items():
        if type(value) is not (float if name == "mask_ratio" else int) or value < 0:
            raise InputError(f"{path} gives a {name} that is none")
        if architecture.setdefault(name, value) != value:
            raise InputError(f"{path} gives {name} as {value}, its weights {architecture[name]}")


def fill(make, architecture, weights, path):
    """make(**architecture) with the weights, if they are the right ones."""
    with torch.device("meta"):  # shapes only
        expected = make(**architecture).state_dict()
    check_weights(weights, expected, path)
    model = make(**architecture)
    model.load_state_dict(weights)
    return model


def unpack_module(module, kind, path):
    """A pickled MAE_ViT or ViT_Classifier, or DataParallel of one -> state_dict, told sizes."""
    weights, seen = {}, set()

    def walk(module, prefix):
        if id(module) in seen:
            raise InputError(f"{path} holds a module that contains another twice")
        seen.add(id(module))
        for name, tensor in getattr(module, "_parameters", {}).items():
            if tensor is not None:
                weights[prefix + name] = tensor
        for name, child in getattr(module, "_modules", {}).items():
            walk(child, f"{prefix}{name}.")

    module = module._modules.get("module", module)
    if ("encoder" if kind == "MAE_ViT" else "head") not in module._modules:
        raise InputError(f"{path} holds a module, but not {kind}")
    walk(module, "")
    encoder = module._modules.get("encoder", module)
    block = encoder._modules["transformer"]._modules["0"]._modules
    if (eps := block["norm1"].eps) != 1e-5:
        say(f"warning: {path} has LayerNorm eps {eps}: with 1e-05, its features differ a little")
    told = {"encoder_head": block["attn"].num_heads}
    if kind == "MAE_ViT":
        decoder = module._modules["decoder"]._modules["transformer"]._modules["0"]._modules
        told["decoder_head"] = decoder["attn"].num_heads
        told["mask_ratio"] = encoder._modules["shuffle"].ratio
    return weights, told


def infer_architecture(weights, path, kind="MAE_ViT"):
    """The sizes of MAE_ViT that shapes and names tell."""

    def shape(name, dimensions):
        tensor = weights.get(name)
        if not is_plain(tensor) or tensor.dim() != dimensions:
            raise InputError(f"{path} does not hold the weights of {kind}: no fitting {name}")
        return tensor.shape

    def layers(part):
        names = (name.split(".") for name in weights if name.startswith(f"{part}.transformer."))
        return len({name[2] for name in names})

    num_patches, _, emb_dim = shape("encoder.pos_embedding", 3)
    patch_size = shape("encoder.patchify.weight", 4)[-1]
    return {
        "image_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "emb_dim": emb_dim,
        "encoder_layer": layers("encoder"),
        "decoder_layer": layers("decoder"),
    }


def is_plain(tensor):
    """A dense floating-point tensor that claims no more elements than its storage has."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def check_weights(weights, expected, path):
    """Raise InputError naming a tensor that is missing, unexpected, misshapen or not finite."""
    for name in [*expected, *weights]:
        tensor = weights.get(name)
        if name not in weights:
            raise InputError(f"{path} lacks {name}")
        if name not in expected:
            raise InputError(f"{path} has {name}, which does not belong there")
        if not is_plain(tensor):
            raise InputError(f"{path}: {name} is no tensor of floating-point numbers")
        shapes = tuple(tensor.shape), tuple(expected[name].shape)
        if shapes[0] != shapes[1]:
            raise InputError(f"{path}: {name} has shape {shapes[0]} where {shapes[1]} is expected")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")


def build(module_class, *sizes, **named_sizes):
    """module_class(...), with an InputError for sizes that do not fit together."""
    try:
        return module_class(*sizes, **named_sizes)
    except ValueError as error:
        raise InputError(str(error)) from error


def to_timm(model):
    """A ViT_Classifier or an MAE_Encoder -> state_dict, arguments for timm's Vision Transformer.

    timm.create_model("vit_tiny_patch16_224", **arguments) loads the state_dict with strict=True
    and gives the same logits, or the encoder's cls feature (timm 0.9 or newer).
    """
    names = {
        "pos_embedding": "pos_embed", "patchify": "patch_embed.proj", "transformer": "blocks",
        "layer_norm": "norm",
    }  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        first, *rest = name.split(".")
        weights[".".join([names.get(first, first), *rest])] = tensor.detach().cpu()
    weights["pos_embed"] = weights["pos_embed"].transpose(0, 1).contiguous()  # [1,T,C]
    num_patches, patch_size = weights["pos_embed"].shape[1], model.patchify.kernel_size[0]
    return weights, {
        "img_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "embed_dim": weights["pos_embed"].shape[2],
        "depth": len(model.transformer),
        "num_heads": model.transformer[0].attn.num_heads,
        "num_classes": len(weights["head.bias"]) if "head.bias" in weights else 0,
        "qkv_bias": False,
        "no_embed_class": True,
        "norm_layer": torch.nn.LayerNorm,
    }


# ----------------------------------------------------------------------- curves, sums, progress


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


class Curves:
    """A run's TensorBoard events, in files whose lengths are known: {file: bytes}.

    With the lengths in its state, a resumed run cuts off what it is about to write again. The
    thread of SummaryWriter does not tell them, and one that meets a full disk lets its run hang.
    """

    def __init__(self, folder, lengths=None, step=0):
        self.folder, self.lengths, self.pending = folder, dict(lengths or {}), []
        self.name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        if lengths is not None and rank() == 0:
            self.cut()
            # Tell a TensorBoard that is looking on to forget what it has seen from this step on.
            start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            for part in {os.path.dirname(file) for file in lengths}:
                self.pending.append((part, start))

    def cut(self):
        """Shorten every file to its known length; remove files that are not known."""
        for where, _, files in os.walk(self.folder):
            for file in files:
                path = os.path.join(where, file)
                length = self.lengths.get(os.path.relpath(path, self.folder), 0)
                with contextlib.suppress(OSError):
                    if not file.startswith("events.out.tfevents."):
                        continue
                    if length == 0:
                        os.remove(path)
                    elif os.path.getsize(path) > length:
                        os.truncate(path, length)

    def add_scalar(self, tag, value, step, part=""):
        self.add(part, summary.scalar(tag, value), step)

    def add_scalars(self, tag, values, step):
        """Several curves in one chart, each in a folder of its own, as SummaryWriter names them."""
        for name, value in values.items():
            self.add_scalar(tag, value, step, f"{tag.replace('/', '_')}_{name}")

    def add_image(self, tag, picture, step):
        self.add("", summary.image(tag, picture, dataformats="CHW"), step)

    def add(self, part, values, step):
        if rank() == 0:
            self.pending.append((part, Event(wall_time=time.time(), step=step, summary=values)))

    def flush(self):
        """Write what is pending. If that fails, warn, undo what was written of it, and keep it."""
        lengths = dict(self.lengths)
        try:
            for part in sorted({part for part, _ in self.pending}):
                os.makedirs(os.path.join(self.folder, part), exist_ok=True)
                name = os.path.join(part, self.name)
                with open(os.path.join(self.folder, name), "ab") as file:
                    writer = RecordWriter(file)
                    if file.tell() == 0:
                        version = Event(wall_time=time.time(), file_version="brain.Event:2")
                        writer.write(version.SerializeToString())
                    for event in (event for where, event in self.pending if where == part):
                        writer.write(event.SerializeToString())
                    writer.flush()
                    lengths[name] = file.tell()
        except OSError as error:
            say(f"warning: cannot write curves: {error.strerror}; will try again")
            self.cut()
        else:
            self.lengths, self.pending = lengths, []

    def sync(self):
        """Put on the disk what is in its cache, so that a power cut does not take it."""
        for name in self.lengths:
            with contextlib.suppress(OSError), open(os.path.join(self.folder, name), "ab") as file:
                os.fsync(file.fileno())


class Progress:
    """An epoch's bar, and sums over its pictures kept on the device so that no step waits for them.

    In front the number of pictures, behind the gradients' norms and the number of updates with
    finite sums. What is not finite stays in its sum, so that number tells the first bad update.
    The bar, on a terminal only, shows means by the sums that have arrived on the host by then.
    Each process sums over its own pictures.
    """

    def __init__(self, device, names, epoch=0, lr=0.0, resumed=(), **bar):
        self.names, self.epoch, self.lr = names, epoch, lr
        sums = torch.tensor(resumed or [0.0] * (len(names) + 3), dtype=torch.float64)
        if len(sums) != len(names) + 3:
            raise InputError("the state of the run does not fit this script")
        self.begun, self.start = sums[0].item(), time.perf_counter()
        if rank() > 0:  # what was summed before an interruption counts once
            sums[:-2] = 0
        self.sums = to_device(sums, device)
        self.host = sums.pin_memory() if device.type == "cuda" else sums.clone()
        hidden = True if rank() > 0 else None  # None: unless on a terminal
        style = {"unit": "img", "mininterval": 0.3, "leave": False, "disable": hidden}
        self.bar = tqdm(initial=int(self.begun), **style, **bar)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, pictures, *sums):
        """Add a micro-batch: how many pictures, and their summed values in the order of names."""
        self.sums[0] += pictures
        self.sums[1:-2] += torch.stack(sums)
        self.bar.update(min(pictures * world_size(), (self.bar.total or 0) - self.bar.n))

    def end_update(self, parameters):
        """Raises InputError once it is known that a loss or gradient was not finite."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.sums[-2] += torch.nn.utils.get_total_norm(gradients)
        self.sums[-1] += self.sums.isfinite().all()
        self.host.copy_(self.sums, non_blocking=True)  # a GPU is not waited for: it may come late
        pictures, *sums = self.check(self.host.tolist())
        means = zip(self.names, sums, strict=False)
        means = {k: f"{x / max(pictures, 1):.4f}" for k, x in means}
        self.bar.set_postfix(means, refresh=False)

    def check(self, sums):
        if not all(map(math.isfinite, sums)):
            raise InputError(
                f"the loss or its gradient is not finite in epoch {self.epoch + 1}, update "
                f"{sums[-1] + 1:.0f}, at learning rate {self.lr:.2e}; the files are those of the "
                "last good state. Try --resume with --precision fp32, or a new run with a lower "
                "--base_learning_rate or more --warmup_epoch"
            )
        return sums

    def read(self):
        """The sums over all processes, for the state. Raises InputError if they are not finite."""
        sums = self.sums.clone()
        sum_over_processes(sums[:-2])  # norms and updates are the same in all
        return self.check(sums.tolist())

    def mean(self):
        """{name: mean over the pictures}. Also sets per_second. Raises InputError like read."""
        pictures, *sums = self.read()
        self.per_second = (pictures - self.begun) / (time.perf_counter() - self.start)
        return {k: x / pictures for k, x in zip(self.names, sums, strict=False)}


def describe_run(args, chosen, model, pictures, folder):
    """Print once what this run is."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    parameters = sum(p.numel() for p in model.parameters())
    sizes = f"{len(pictures.train_images):,} training, {len(pictures.val_images):,} validation"
    say(f"arguments: {', '.join(f'{name} {value}' for name, value in vars(args).items())}")
    say(f"libraries: {libraries}")
    say(f"chosen:    {', '.join(f'{name} {value}' for name, value in chosen.items())}")
    say(f"model:     {type(model).__name__}, {parameters:,} parameters")
    say(f"pictures:  {args.dataset}, {sizes}")
    say(f"curves:    {folder}")


# ----------------------------------------------------------------------------- stop and resume

# Arguments that may change when a run is resumed: they do not change its result.
LAYOUT = {
    "compile", "data_path", "demo", "device", "log_dir", "max_device_batch_size", "model_path",
    "output_model_path", "precision", "resume", "save_minutes",
}  # fmt: skip


def state_path(model_path):
    """vit-t-mae.pth -> vit-t-mae.state.pth"""
    return "{}.state{}".format(*os.path.splitext(model_path))


def resume_args(parser, argv, args, output):
    """The arguments of the run whose state lies beside the model file, and those of argv in LAYOUT.

    Raises InputError if there is no such run, or if argv would change it, naming each difference.
    """
    model_path = getattr(args, output)
    path = state_path(model_path)
    saved = read_state(path)["args"]
    if vars(args).keys() != saved.keys():
        raise InputError(f"{path} is of another version of this script, or of another script")
    for action in parser._actions:  # what the command line would refuse is refused here too
        value = saved.get(action.dest)
        try:
            fits = type(value) in (bool, int, float, str, type(None))
            fits = fits and (value is None or not action.type or action.type(str(value)) == value)
            fits = fits and (not action.choices or value in action.choices)
        except (ValueError, argparse.ArgumentTypeError):
            fits = False
        if not fits:
            raise InputError(f"{path} has a --{action.dest} that is none")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    differences = [
        f"--{name} {value} (it has {saved[name]})"
        for name, value in vars(args).items()
        if name not in LAYOUT and value != saved[name]
    ]
    if differences:
        raise InputError(f"the run of {path} cannot go on with {', '.join(differences)}")
    setattr(args, output, model_path)
    return args


STATE = {
    "args": dict, "epoch": int, "update": int, "sums": list, "results": dict, "model": dict,
    "optim": dict, "pictures": int, "folder": str, "lengths": dict, "unwritten": dict,
}  # fmt: skip


def read_state(path):
    """The content of a state file. Raises InputError if there is none or it is none."""
    if not os.path.isfile(path):
        raise InputError(f"nothing to resume: there is no {path}; start the run without --resume")
    state = read_checkpoint(path)
    fits = isinstance(state, dict) and all(isinstance(state.get(k), STATE[k]) for k in STATE)
    if fits and state["update"]:  # within an epoch there are sums of it
        fits = len(state["sums"]) > 3 and all(type(x) is float for x in state["sums"])
    fits = fits and type(total := state["args"].get("total_epoch")) is int
    fits = (
        fits and (0, 0) <= (state["epoch"], state["update"]) <= (total, 0) and state["update"] >= 0
    )
    fits = fits and all(type(x) is int for x in state["lengths"].values())
    fits = fits and all(isinstance(x, dict) for x in state["results"].values())
    fits = fits and all(isinstance(x, torch.Tensor) for x in state["unwritten"].values())
    if not fits:
        raise InputError(f"{path} is not the state of a run")
    return state


class StopSignal:
    """Notes SIGINT or SIGTERM, so that work in hand can be finished. A second one stops at once.

    Not under torchrun, which passes signals on that its processes may have got already, and loses
    patience itself, after 30 seconds.
    """

    number = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        self.number = number
        if world_size() > 1:
            return
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not print: the signal may have come in one
            os.write(2, b"\nstopping after this update; once more to stop at once\n")


class Run:
    """Where a run stands, and what it has on the disk: curves, model file, and a state to resume.

    The state is small because all that a run draws at random is a function of its seed, epoch and
    update (see `generator`): weights, optimizer, two counters, the sums of the epoch in hand.
    """

    def __init__(self, args, name, model_path, model, optim, fingerprint):
        self.args, self.model, self.optim = args, model, optim
        self.model_path, self.path = model_path, state_path(model_path)
        self.files, self.stop, self.told = Files(), StopSignal(), 0
        self.fingerprint = fingerprint
        self.epoch, self.update, self.resumed_sums, self.results = 0, 0, [], {}
        self.saved, self.saved_at, self.cost = None, time.perf_counter(), 0.0
        if args.resume:
            self.restore(read_state(self.path))
        elif rank() == 0:
            self.set_aside()
            self.curves = Curves(new_run_folder(args.log_dir, args.dataset, name))
        else:
            self.curves = Curves(None)
        same = {f"--{k}": v for k, v in vars(args).items() if k not in LAYOUT}
        check_alike(
            **same, epoch=self.epoch, update=self.update, weights=checksum(*model.parameters())
        )

    def restore(self, state):
        if state["pictures"] != self.fingerprint:
            raise InputError(f"these are not the pictures with which the run of {self.path} began")
        check_weights(state["model"], self.model.state_dict(), self.path)
        self.model.load_state_dict(state["model"])
        try:
            self.optim.load_state_dict(state["optim"])
            trained = [p for group in self.optim.param_groups for p in group["params"]]
            for parameter in trained if state["epoch"] + state["update"] else ():
                expected = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
                check_weights(self.optim.state[parameter], expected, self.path)
        except InputError:
            raise
        except Exception as error:  # nothing is known of the values in the file
            raise InputError(f"{self.path}: not this model's optimizer: {error}") from error
        self.epoch, self.update, self.resumed_sums = state["epoch"], state["update"], state["sums"]
        self.results, self.saved = state["results"], (state["epoch"], state["update"])
        self.curves = Curves(state["folder"], state["lengths"], self.epoch)
        stem, extension = os.path.splitext(self.model_path)
        for other in {extension, ".png"} & state["unwritten"].keys():
            self.files.hold(stem + other, state["unwritten"][other].numpy().tobytes())
        say(f"resumed:   after {self.epoch} epochs and {self.update} updates")

    def set_aside(self):
        """Rename the state of an unfinished run, which this one would overwrite."""
        with contextlib.suppress(InputError):
            state = read_state(self.path)
            if (0, 0) < (state["epoch"], state["update"]) < (state["args"]["total_epoch"], 0):
                names = (f"{self.path}-{i}" for i in itertools.count(2))
                other = next(name for name in names if not os.path.exists(name))
                os.rename(self.path, other)
                say(f"warning: {self.path} held an unfinished run: renamed to {other}")

    def epochs(self):
        """Yield the epochs that are left. The caller ends each with end_epoch."""
        with self.stop:
            if self.saved is None:
                self.save()
            while self.epoch < self.args.total_epoch:
                yield self.epoch
                self.leave_if_told()

    def progress(self, device, names, lr, pictures):
        """The bar and the sums of this epoch, those before an interruption included."""
        text = f"Epoch {self.epoch + 1}/{self.args.total_epoch}"
        bar = {"desc": text, "total": pictures}
        self.sums = Progress(device, names, self.epoch, lr, self.resumed_sums, **bar)
        return self.sums

    def updates(self, batches):
        """Yield (update, batch) for what is left of the epoch; save between two when it is time."""
        for update, batch in enumerate(batches):
            if update >= self.update:
                yield update, batch
                self.sums.end_update(self.model.parameters())
                self.update = update + 1
                since = time.perf_counter() - self.saved_at
                if self.decide(since > 60 * self.args.save_minutes):
                    self.save()
                self.leave_if_told()

    def decide(self, overdue):
        """Whether to save now, by the clock of process 0; and whether any was told to stop."""
        self.told, overdue = agree(self.stop.number or 0, overdue and rank() == 0)
        return bool(overdue)

    def end_epoch(self):
        """Note that an epoch is done. True if its results are to be saved, by the caller, now.

        Always after the last epoch, else if saving is cheap (2 % of the time since) or overdue.
        """
        self.epoch, self.update, self.resumed_sums = self.epoch + 1, 0, []
        self.curves.flush()
        since = time.perf_counter() - self.saved_at
        overdue = self.decide(since > min(50 * self.cost, 60 * self.args.save_minutes))
        return overdue or self.told or self.epoch == self.args.total_epoch

    def save(self):
        """Write the files that are held, then the state. Raises InputError if the run diverged."""
        begin = time.perf_counter()
        sums = self.sums.read() if self.update else []
        self.saved = self.epoch, self.update
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise InputError(
                f"weights are not finite after epoch {self.epoch}; the files are those of the last "
                "good state. Start a new run with a lower --base_learning_rate"
            )
        if rank() > 0:
            return
        self.files.write()
        self.curves.sync()
        state = {
            "args": vars(self.args),
            "epoch": self.epoch,
            "update": self.update,
            "sums": sums,
            "results": self.results,
            "model": self.model.state_dict(),
            "optim": self.optim.state_dict(),
            "pictures": self.fingerprint,
            "folder": self.curves.folder,
            "lengths": self.curves.lengths,
            # The model and the picture, by their extensions, if they could not be written yet.
            "unwritten": {
                os.path.splitext(path)[1]: torch.frombuffer(bytearray(content), dtype=torch.uint8)
                for path, content in self.files.unwritten.items()
                if path != self.path
            },
        }
        self.files.hold(self.path, to_bytes(state))
        self.files.write()
        self.saved_at = time.perf_counter()
        self.cost = self.saved_at - begin

    def leave_if_told(self):
        """After SIGINT or SIGTERM: save, say how to go on, end with status 130 or 143."""
        if not self.told:
            return
        if self.saved != (self.epoch, self.update):
            self.save()
        command = shlex.join([*(x for x in sys.argv if x != "--resume"), "--resume"])
        start = "python" if world_size() == 1 else "torchrun ..."
        where = f"after {self.epoch} epochs and {self.update} updates"
        lost = ", ".join(self.files.unwritten)
        say(f"stopped {where}" + (f"; could not write {lost}" if lost else "") + "; to go on:")
        say(f"    {start} {command}")
        sys.exit(128 + self.told)

    def close(self):
        """Raises InputError if a file could not be written to the last."""
        self.curves.flush()
        self.files.write()
        lost = [*self.files.unwritten, *([self.curves.folder] if self.curves.pending else [])]
        if lost:
            raise InputError(f"the run is over, but could not be written to {', '.join(lost)}")
