"""What both scripts share, in the order in which a run meets it.

torchvision and timm are imported where they are needed, so that --help does not wait for them.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
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
import subprocess
import sys
import threading
import time
import traceback
import typing
import warnings
import zipfile
import zlib

# GNU's OpenMP reads this when PyTorch loads: a waiting thread gives up a shared core sooner.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.functional import affine_grid, grid_sample
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model import MAE_Encoder, MAE_ViT, SizeError, ViT_Classifier, architecture_of, unpack_module

# -------------------------------------------------------------------------------- command line
# Flags of both scripts and errors in one line; called by get_args and at the end of each script.


class InputError(Exception):
    """An error that the user can fix. Its message is one line, whatever it quotes."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split())[:500])


def print_rank_0(text):
    """Print and flush, in process 0 only. A full log or a closed pipe must not end the run."""
    if rank() > 0:
        return
    try:
        tqdm.write(text)  # above the progress bar, if there is one
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def reason(error):
    """The line of a message that says what went wrong; PyTorch's may quote whole tracebacks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return [lines[0], *filter(re.compile(r"[\w.]*[A-Z]\w+: .").match, lines)][-1]


@contextlib.contextmanager
def memory_for(what="a micro-batch", remedy="--max_device_batch_size or the size of the model"):
    """If memory runs out, of a GPU or not, raise InputError. Works as a decorator, too."""
    try:
        yield
    except Exception as error:
        full = re.search("MemoryError|(out of|allocate|enough) memory|ALLOC_FAILED", repr(error))
        if full and not isinstance(error, InputError):
            raise InputError(f"{what} does not fit into memory: lower {remedy}") from error
        raise


@contextlib.contextmanager
def one_line_errors():
    """End the program with `error: ...` and status 1 where the user can fix the cause."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout prints every character anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with memory_for():
            yield
        return
    except Exception as error:
        if isinstance(error, (InputError, SizeError)):
            message = error
        elif isinstance(error, dist.DistError) or "/gloo/gloo/" in str(error):  # gloo's file names
            message = InputError(f"another process has failed or cannot be reached: {error}")
        elif world_size() == 1:
            raise
        else:
            message = traceback.format_exc()
    except KeyboardInterrupt:  # before training, which has a handler of its own
        sys.exit(130)
    tqdm.write(f"error: {message}", file=sys.stderr)
    if world_size() > 1:  # a normal end would wait for the others, which may never answer
        os._exit(1)
    sys.exit(1)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the script's own line breaks; help texts explain defaults of None."""

    def _get_help_string(self, action):
        if action.default is False:
            return f"{action.help} (default: off)"
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, without the usage of all flags."""

    def __init__(self, description):
        super().__init__(usage="%(prog)s [options]", description=description, allow_abbrev=False)
        self.formatter_class = HelpFormatter

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_args(self, args=None, namespace=None):
        """As argparse does, and of an unknown flag tell which one may be meant."""
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            other = "train_classifier.py" if "mae" in self.prog else "mae_pretrain.py"
            with open(os.path.join(os.path.dirname(__file__), other)) as script:
                flags = dict.fromkeys(re.findall(r'"(--\w+)"', script.read()), f" of {other}")
            flags |= dict.fromkeys(self._option_string_actions, "")
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1, 0.65)
            hint = f": did you mean {near[0]}{flags[near[0]]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return args

    def parse(self, argv, demo, output):
        """argv -> Namespace. --demo replaces defaults; --resume takes the flags of the saved run.

        demo: {flag: value}; flags in argv override it. output: the name of the flag with the model
        file's path. Raises InputError if another process was given other flags.
        """
        if self.parse_known_args(argv)[0].demo:
            self.set_defaults(**demo)
        args = self.parse_args(argv)
        if args.resume:
            args = resume_args(self, argv, args, output)
        fixed = vars(args).keys() - MAY_CHANGE_ON_RESUME
        check_same_settings(**{name: getattr(args, name) for name in sorted(fixed)})
        if args.warmup_epoch >= args.total_epoch and not args.resume:
            epochs = args.total_epoch // 10
            print_rank_0(f"warning: warm-up takes the whole run: try --warmup_epoch {epochs}")
        return args


def checked(kind, test, requirement):
    """An argparse type: int or float, or an error that states the requirement."""

    def parse(text):
        value = kind(text)
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text} is not {requirement}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


positive_int = checked(int, lambda n: 1 <= n < 2**31, "a whole number from 1 to 2**31 - 1")
unsigned_int = checked(int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2**31 - 1")
unsigned_float = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")


# fmt: off
def add_shared_flags(parser, model_flag, curves, **defaults):
    """Add the flags of both scripts; `curves` names the run's folder, defaults are the script's."""
    add = parser.add_argument_group("dataset").add_argument
    add("--dataset", choices=["cifar10", "cifar100", "folder", "shapes"], default="cifar10",
        help="cifar10, cifar100: downloaded; folder: your own images; shapes: synthetic")
    add("--data_path", default="data",
        help="download folder of cifar10 and cifar100; for folder, the folder of images: "
             "train/<class>/... and val/<class>/... or test/<class>/...; to pretrain, any images")
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
        help="largest micro-batch: images on a device in one forward and backward pass; gradients "
             "are accumulated, so the result does not depend on it (default: chosen for it)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: CUDA if a working GPU is found, else the CPU")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
        help="precision of matrix products; weights stay fp32; "
             "auto: bf16 where the hardware computes it natively, else fp16 on a GPU, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the model (default: on one GPU, from 3 million images x epochs on)")
    add = parser.add_argument_group("output").add_argument
    add(model_flag, help="the model file; other files of the run go beside it")
    add("--log_dir", default="logs", help="curves go into <log_dir>/<dataset>/<run_name>")
    add("--run_name", metavar="NAME",
        help=f"folder of the curves, with -2, -3, ... if it exists (default: {curves})")
    add("--keep_every", type=positive_int, metavar="N",
        help="every N epochs, also keep the model of that epoch, such as model-0400.pth "
             "(default: off)")
    add("--save_minutes", type=unsigned_float, default=10.0, metavar="M",
        help="save the state every M minutes, and after each epoch if that costs at most 2 %%")
    add("--resume", action="store_true",
        help="continue from the run's last saved state; flags need not be repeated, and those that "
             "would change the result must not differ")
    parser.set_defaults(**defaults)
# fmt: on


# ----------------------------------------------------------------------------------- processes
# One run on several GPUs or machines: the scripts call `processes`, this file calls the rest.


def rank():
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun has started, on all machines; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes():
    """Initialise the process group if torchrun started several processes; destroy it at the end.

    NCCL for CUDA tensors, gloo for CPU tensors. Process 0 alone prints and writes files.
    """
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not launched or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    # Harmless: for the [1,1,C] tokens both strides mean the same layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with one_line_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
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
    if world_size() == 1:
        return
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, settings)
    for number, others in enumerate(gathered):
        for name, value in gathered[0].items():
            if others.get(name) != value:
                text = f"process {number} has {name} {others.get(name)}, process 0 has {value}"
                raise InputError(f"{text}: give all machines the same flags, code and files")


# ------------------------------------------------------------------------ device and precision
# Where and how the model runs: main calls choose_devices and prepare_model, then micro_batches.


def choose_devices(name):
    """auto, cpu or cuda -> the devices to train on: one GPU under torchrun, else all, or the CPU.

    GPUs that fail are left out, with a warning. InputError if none is left for cuda or torchrun.
    """
    if name == "cpu":
        return [torch.device("cpu")]
    count, gpus, failures = torch.cuda.device_count(), [], []
    one_each = world_size() > 1 and count > 1  # Slurm may show each task its own GPU only
    for i in [int(os.environ["LOCAL_RANK"])] if one_each else range(max(count, 1)):
        if i >= count > 0:
            raise InputError(f"--nproc_per_node is above the number of GPUs here, {count}")
        try:
            torch.ones(1, device=f"cuda:{i}").add(1).item()  # a driver or GPU may be too old
            gpus.append(torch.device("cuda", i))
        except Exception as error:
            failures.append(f"GPU {i} fails ({reason(error)})")
    remedy = "install a newer NVIDIA driver, or the PyTorch for this GPU from pytorch.org"
    if not gpus and (name == "cuda" or (count and world_size() > 1)):
        raise InputError(f"{failures[0]}: use --device cpu, or {remedy}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if count or (not hidden and subprocess.getstatusoutput("nvidia-smi")[0] == 0):
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
    flags = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        flags = next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")
    native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
    return "bf16" if native else "fp32"


def choose_micro_batch_size(share, limit, precision, blocks, free_bytes=None):
    """Images of a micro-batch on each device: as few and as equal ones as memory allows.

    share: images of a batch for each device. limit: may be None on a GPU. blocks: (tokens of an
    image, their width) for each Transformer block. free_bytes: a GPU's memory; None for a CPU.
    """
    if free_bytes is None:  # in fp32 more activations are no faster there
        most = 3 * 2**20 // widest(blocks) if precision == "fp32" else limit
        largest = max(1, min(limit, most))
    else:  # a power of two divides most batches evenly, and only one size is compiled
        image_bytes = (70 if precision == "fp32" else 40) * sum(t * w for t, w in blocks)
        fitting = max(1, int(0.6 * free_bytes / image_bytes))
        largest = min(limit or 1024, 1024, 2 ** int(math.log2(fitting)))
    return math.ceil(share / math.ceil(share / largest))


def widest(blocks):
    """Patches x width of the block that has most of it."""
    return max((tokens - 1) * width for tokens, width in blocks)


def configure_process(device, threads):
    """Set what holds for the whole process: current GPU and exact fp32, or threads and malloc."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment says
        torch.backends.cudnn.allow_tf32 = False
        return
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # more would wait, not work
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    # glibc keeps the pages of freed tensors: mapping them anew costs a third of the time.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: no loss
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20):
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class Accelerated(torch.nn.Module):
    """A module under autocast, with fast attention, and compiled for inputs of `compiled_size`.

    Other sizes run uncompiled: each takes long to compile. Autocast is entered in here, as the
    threads of DataParallel do not inherit it.
    """

    def __init__(self, module, device, precision, compile=False):
        super().__init__()
        self.module, self.device_type, self.precision = module, device.type, precision
        self.compiled = torch.compile(self.run, dynamic=False, fullgraph=True) if compile else None
        self.compiled_size = None
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
        return (self.compiled if len(inputs[0]) == self.compiled_size else self.run)(*inputs)


def prepare_model(module, devices, args, example, blocks, num_images, cpu_limit=128):
    """Make a module, and the process, ready for training or, in eval mode, for evaluation.

    Moves it in place: its own state_dict, without any prefix, is the one to save. Wraps it for
    autocast, torch.compile, DDP or DataParallel, and tries a micro-batch. example: inputs for an
    image, [1,...] each. blocks, cpu_limit: of the micro-batch. num_images: of all epochs.
    -> what to call, images of a micro-batch on all devices, {"device", "precision", ...}.
    """
    device, n, precision = devices[0], len(devices), choose_precision(args.precision, devices)
    on_gpu = device.type == "cuda"
    name = f"{n} x {torch.cuda.get_device_name(device)}" if on_gpu else "CPU"
    command = f"torchrun --standalone --nproc_per_node={n} {shlex.join(sys.argv)}"
    if n > 1 and args.compile:
        raise InputError(f"--compile takes a process for each GPU: {command}")
    pays = on_gpu and n == 1 and num_images / world_size() >= 3_000_000  # it takes minutes
    compile = pays if args.compile is None else args.compile
    check_same_settings(device=device.type, precision=precision, compile=compile)
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in devices) if on_gpu else None
    share = math.ceil(args.batch_size / (n * world_size()))
    limit = args.max_device_batch_size or (None if on_gpu else cpu_limit)
    size = choose_micro_batch_size(share, limit, precision, blocks, free)
    configure_process(device, threads=max(1, size * widest(blocks) // 2**16))
    net = accelerated = Accelerated(module.to(device), device, precision, compile)
    if n > 1:
        net = DataParallel(net, devices)
        print_rank_0(f"DataParallel on {n} GPUs, uncompiled; this is faster: {command}")
    if on_gpu or compile:
        size = try_micro_batch(net, accelerated, example, size, n, args.compile)
    if world_size() > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        name = f"{world_size()} processes, {name} each"
    facts = {"device": name, "precision": precision, "compile": bool(accelerated.compiled_size)}
    return net, size * n, facts | {"micro-batch": size}


def try_micro_batch(net, accelerated, example, size, n, must_compile):
    """-> the size, halved until a trial pass, of n * size images, fits in every process. What then
    does not compile runs uncompiled, with a warning, or is an InputError if it must.
    """

    def trial():  # changes nothing; what it has allocated is freed, even if it fails
        with memory_for(), torch.set_grad_enabled(accelerated.module.training):
            output = net(*(x.repeat(size * n, *[1] * (x.dim() - 1)) for x in example)).sum()
            if output.requires_grad:
                torch.autograd.grad(output, [*net.parameters()], allow_unused=True)

    while size > 1:
        with contextlib.suppress(InputError):
            trial()
            break
        size //= 2
        torch.cuda.empty_cache()
    size = int(reduce_over_processes(torch.tensor(size), dist.ReduceOp.MIN))
    if accelerated.compiled:
        accelerated.compiled_size = size
        try:
            trial()
        except Exception as error:  # no compiler, an old GPU, Windows, ...
            if must_compile:
                raise InputError(f"cannot --compile ({reason(error)}): leave it out") from error
            print_rank_0(f"warning: cannot compile ({reason(error)}): training uncompiled")
            accelerated.compiled_size = None
    return size


def micro_batches(net, micro_batch_size, device, *tensors):
    """Yield this process's shard of a batch in micro-batches: tuples of slices, on the device.

    Each process yields at least one, maybe empty; DDP exchanges gradients in the last only.
    """
    slices = [to_device(shard(x), device).split(micro_batch_size) for x in tensors]
    *others, last = zip(*slices, strict=True)
    for micro_batch in others:
        with net.no_sync() if world_size() > 1 else contextlib.nullcontext():
            yield micro_batch
    yield last


def to_device(tensor, device):
    """Copy to the device without making the host wait for what the device is still doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# -------------------------------------------------------------- random numbers and schedule
# All that a run draws is a function of its seed; main calls these before and at every epoch.


def setup_seed(seed=2022):
    """Seed PyTorch's global generator, which draws the initial weights, and nothing else."""
    torch.manual_seed(seed)


def generator(*key):
    """A CPU generator seeded by a hash of its key, such as ("masks", seed, epoch, update)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def learning_rate(epoch, base_learning_rate, batch_size, total_epoch, warmup_epoch):
    """Of an epoch, counted from 0: the smaller of a linear warm-up and of half a cosine.

    In the paper's code, facebookresearch/mae, the cosine begins after the warm-up.
    """
    warmup = (epoch + 1) / (warmup_epoch + 1e-8)
    cosine = 0.5 * (math.cos(epoch / total_epoch * math.pi) + 1)
    return base_learning_rate * batch_size / 256 * min(warmup, cosine)


def set_learning_rate(optim, epoch, args):
    """Give the optimizer this epoch's learning rate, and return it."""
    lr = learning_rate(
        epoch, args.base_learning_rate, args.batch_size, args.total_epoch, args.warmup_epoch
    )
    for group in optim.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# ------------------------------------------------------------------------------------- dataset
# Reads all images into one tensor on the training device; main calls load_dataset.


class Dataset(typing.NamedTuple):
    """A dataset in memory. Images are uint8 [N,3,H,W], labels int64 [N]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    classes: list


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


@memory_for("the dataset", "--train_images or --image_size")
def load_dataset(args, device, need_classes=True):
    """Read args.dataset whole into the device's memory -> Dataset. Raises InputError if it cannot.

    Each process reads for itself. need_classes: every image must lie in the folder of its class.
    """
    if args.dataset == "shapes":
        dataset = read_shapes(args.image_size)
    elif args.dataset == "folder":
        dataset = read_folder(args, need_classes)
    elif args.image_size == 32:
        dataset = read_cifar(args.dataset, args.data_path)
    else:
        raise InputError(
            f"image size {args.image_size} does not fit {args.dataset}, whose images are 32x32: "
            "for images of your own add --dataset folder --data_path FOLDER"
        )
    if args.train_images and args.dataset != "folder":  # read_folder has read no others
        keep = spread(dataset.train_labels, args.train_images, "--train_images")
        images, labels = dataset.train_images[keep], dataset.train_labels[keep]
        dataset = dataset._replace(train_images=images, train_labels=labels)
    check_same_settings(images=(len(dataset.train_images), len(dataset.val_images)))
    return Dataset(*(x.to(device) for x in dataset[:4]), dataset.classes)


def evenly_spaced(total, n):
    """The indexes of n of `total` items, or of all if there are fewer, evenly spaced."""
    n = min(n, total)
    return torch.arange(n) * total // max(n, 1)


def spread(labels, n, flag):
    """The indexes of n of the labels [N], spread evenly over the classes and over each class."""
    if n > len(labels):
        raise InputError(f"{flag} {n}: there are only {len(labels)} training images")
    return labels.argsort(stable=True)[evenly_spaced(len(labels), n)]


IMAGES = ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"


def read_cifar(name, root):
    """CIFAR-10 or CIFAR-100, downloaded and checked by torchvision.

    First process 0 reads, then one process of each machine, then the others: whether or not the
    machines share a disk, no two write the same file.
    """
    import torchvision

    dataset = getattr(torchvision.datasets, name.upper())
    there = any(os.path.exists(f"{root}/{x}") for x in (dataset.base_folder, dataset.filename))
    below = (x for depth in ("*", "*/*", "*/*/*") for x in glob.iglob(depth, root_dir=root))
    if not there and any(x.lower().endswith(IMAGES) for x in below):
        raise InputError(f"{root} has images, no {name}: add --dataset folder or a new --data_path")
    own_turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for turn in range(3):
        if turn == own_turn:
            try:
                parts = [dataset(root, train=train, download=True) for train in (True, False)]
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"cannot get {name} ({error}): put {dataset.filename} from "
                    f"{dataset.url} into {root}{os.sep}, or try --demo, which needs no network"
                ) from error
        reduce_over_processes(torch.zeros(1))  # wait for the others
    tensors = []
    for part in parts:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.tensor(part.targets)]
    return Dataset(*tensors, parts[0].classes)


def read_folder(args, need_classes):
    """Images below <root>/train and <root>/val or <root>/test, where each class is a folder.

    Without need_classes they may lie anywhere below <root>/train, or below <root> if it has none
    of these folders; and the first training images stand in for a val/ or test/ that is not there.
    """
    root = args.data_path
    if not os.path.isdir(root):
        raise InputError(f"there is no folder {root}: give that of your images with --data_path")
    found = [name for name in ("train", "val", "test") if os.path.isdir(os.path.join(root, name))]
    val = next((name for name in found if name != "train"), None)
    if (val and "train" not in found) or (need_classes and not val):
        raise InputError(
            f"--data_path {root} needs {root}/train/<class>/... and {root}/val/<class>/... or "
            f"{root}/test/<class>/..."
        )
    train_root = os.path.join(root, "train") if "train" in found else root
    train_files, classes = list_images(train_root, need_classes)
    if args.train_images:
        labels = torch.tensor([label for _, label in train_files])
        keep = spread(labels, args.train_images, "--train_images")
        train_files = [train_files[i] for i in keep]
    if val:
        val_files, val_classes = list_images(os.path.join(root, val), need_classes)
        if unknown := set(val_classes) - set(classes):
            raise InputError(
                f"{root}/train lacks classes that {root}/{val} has: {sorted(unknown)[:5]}"
            )
        if missing := sorted(set(classes) - set(val_classes)):
            print_rank_0(f"warning: {root}/{val} has no image of {', '.join(missing[:20])}")
        val_files = [(path, classes.index(val_classes[label])) for path, label in val_files]
    else:
        val_files = train_files[:16]
    check_memory(len(train_files) + len(val_files), args.image_size)
    train, val = (decode(files, args.image_size) for files in (train_files, val_files))
    return Dataset(*train, *val, classes)


def list_images(path, need_classes=False):
    """[(path, label), ...] and the names of the classes, by torchvision's reader.

    path: a folder or, without need_classes, an image.
    """
    from torchvision.datasets.folder import find_classes, make_dataset

    if os.path.isfile(path) and not need_classes:
        return [(path, 0)], [""]
    if not os.path.isdir(path):
        raise InputError(f"there is no folder or image {path}")

    def is_image(file):
        file = os.path.join(os.sep, os.path.relpath(file, path))
        return file.lower().endswith(IMAGES) and f"{os.sep}." not in file

    try:
        names = find_classes(path)[0] if need_classes else [""]
        labels = {name: i for i, name in enumerate(x for x in names if not x.startswith("."))}
        return make_dataset(path, labels, is_valid_file=is_image), list(labels)
    except (OSError, ValueError) as error:
        raise InputError(f"no images ({' '.join(IMAGES)}) in {path}: {error}") from error


def check_memory(n, image_size):
    """Raise InputError, before any is read, if n images exceed the free memory (on Linux)."""
    need = n * 3 * image_size**2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has a copy
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        free = int(re.search(r"MemAvailable: *(\d+)", file.read())[1]) * 1024
        if need > free:
            raise InputError(
                f"{n:,} images of {image_size}x{image_size} take {need / 1e9:,.1f} GB of memory, "
                f"of which {free / 1e9:,.1f} GB are free: lower --image_size or --train_images"
            )


def decode(files, image_size):
    """[(path, label), ...] -> images uint8 [N,3,S,S], labels [N].

    Each image is turned upright, laid on white if it is transparent, resized to S on its shorter
    side, cropped to its centre, RGB; of an animated one it is the first frame. Raises InputError
    naming those that cannot be read.
    """
    from torchvision.transforms import functional as TF

    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    broken = []
    bar = tqdm(files, "Reading images", disable=rank() > 0 or None, leave=False)
    for i, (path, _) in enumerate(bar):
        try:
            with Image.open(path) as file:
                img = ImageOps.exif_transpose(file)
                if img.mode.startswith("I"):  # 16 bits of grey, which convert would clip
                    img = Image.fromarray((np.asarray(img) // 257).astype(np.uint8))
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


SHAPES = "disc ring half-disc crescent square frame triangle cross star bars".split()


def draw_shapes(n, image_size, seed):
    """Draw n images of ten kinds of shape, as many of each -> uint8 [n,3,S,S], labels [n].

    One flat colour on a softly shaded background; position, size, angle, colours, shading and
    noise are random, and a function of the seed.
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
        centre, angle = uniform(-0.2, 0.2, b, 2, 1, 1), uniform(-0.3, 0.3, b, 1, 1)
        size = uniform(0.6, 0.85, b, 1, 1)
        # Coordinates in the frame of the shape, which fits the unit disc.
        y, x = (axis[:, None] - centre[:, 0]) / size, (axis - centre[:, 1]) / size
        x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        distance = shape_distance(x, y, labels[rows]) * size * image_size / 2  # in pixels
        inside = (0.5 - distance).clamp(0, 1)[:, None]  # [b,1,S,S], edges one pixel soft

        colour = uniform(0, 1, b, 3, 1, 1)
        background = (colour + 0.5 + uniform(-0.15, 0.15, b, 3, 1, 1)) % 1  # far from the colour
        wave = uniform(-6, 6, b, 3, 1, 1)  # a faint, broad ripple: its direction and phase
        ripple = (wave[:, :1] * axis[:, None] + wave[:, 1:2] * axis + wave[:, 2:]).sin()
        background = background + 0.06 * ripple
        slope = uniform(-0.1, 0.1, b, 2, 3, 1, 1)
        background = background + slope[:, 0] * axis[:, None] + slope[:, 1] * axis
        img = torch.lerp(background, colour, inside)
        img += 0.02 * torch.randn(img.shape, generator=rng)
        images[rows] = (img * 255).round().clamp(0, 255).byte()
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
    """10,000 drawn images to train on and 1,000 others to validate on; the same in every run."""
    return Dataset(*draw_shapes(10_000, image_size, 0), *draw_shapes(1_000, image_size, 1), SHAPES)


# --------------------------------------------------------------------------------- model files
# Written whole or not at all, read without running anything in them. main calls check_outputs
# first; load_model reads what the scripts, or the source, have written.


def check_outputs(*paths):
    """Raise InputError now if a file could not be written later. Makes the folders of the paths."""
    for path in paths if rank() == 0 else ():
        temporary = f"{path}.{os.getpid()}.part"
        if not os.path.basename(path) or paths.count(path) > 1:
            raise InputError(f"cannot write {path!r}: not a file name, or that of two files")
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            if os.path.exists(path):
                open(path, "r+b").close()  # fails for a folder or a read-only file
            open(temporary, "wb").close()
            os.remove(temporary)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_file(path, content):
    """Write bytes to a temporary file and rename it: `path` is never half written.

    Raises InputError, with `path` as it was, if that fails.
    """
    temporary = f"{path}.{os.getpid()}.part"  # two runs never write into one
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def free_path(path):
    """The path, or the first of name-2.png, name-3.png, ... that does not exist."""
    start, extension = os.path.splitext(path)
    others = (f"{start}-{i}{extension}" for i in itertools.count(2))
    return next(x for x in itertools.chain([path], others) if not os.path.exists(x))


def to_bytes(content):
    """What torch.save writes, in memory: a full disk then fails in write_file, not in here."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def versions():
    names = "torch", "torchvision", "timm", "numpy"
    return {name: str(importlib.import_module(name).__version__) for name in names}


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
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("it is compressed, as torch.save never does")
            if name := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"it is damaged, the checksum of {name} is wrong")
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(InertModule, name) for name in asked]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can trip its reader anywhere
        # PyTorch's message begins with the advice to run what is in the file.
        cause = re.sub("(?s).*(a trusted source.|Unpickler error:)|Check the doc.*", "", str(error))
        raise InputError(f"cannot read {path} as a PyTorch checkpoint: {cause}") from error


def build_classifier(image_size, patch_size, emb_dim, encoder_layer, encoder_head, num_classes):
    encoder = MAE_Encoder(image_size, patch_size, emb_dim, encoder_layer, encoder_head)
    return ViT_Classifier(encoder, num_classes)


def load_model(path, kind):
    """Read a model file -> model, its architecture, the file's whole content.

    kind: "MAE_ViT" or "ViT_Classifier". The file is one of our scripts', a bare state_dict, or a
    whole module as the source pickles it, maybe within DataParallel or torch.compile's. A bare
    state_dict does not tell the number of heads and the mask ratio: they are taken to be 3 and
    0.75. Raises InputError unless the file holds such a model, with tensors of the right names and
    shapes and finite values.
    """
    content = read_checkpoint(path)
    try:
        if isinstance(content, InertModule):
            content = unpack_module(content)
        elif "fingerprint" in content:
            raise ValueError(f"it is a run's state; its model is {path.replace('.state.', '.')}")
        elif "model" not in content:
            content = {"kind": kind, "model": content}
        if content.get("kind") != kind:
            raise ValueError(f"its kind is {content.get('kind')}")
        weights = {}
        for name, x in content["model"].items():  # a view of few values may claim to be many
            plain = isinstance(x, torch.Tensor) and x.is_floating_point()
            if not plain or x.nbytes > x.untyped_storage().nbytes() or not x.isfinite().all():
                raise ValueError(f"{name} is not a tensor of finite floating-point numbers")
            x = x.detach().float().clone(memory_format=torch.contiguous_format)
            weights[name.replace("_orig_mod.", "").removeprefix("module.")] = x
        # Sizes are those of the tensors, whatever the file claims.
        claimed = {"encoder_head": 3} | content.get("architecture", {})
        architecture = claimed | architecture_of(weights)
        with torch.device("meta"):  # no memory: the weights are those of the file
            model = {"MAE_ViT": MAE_ViT, "ViT_Classifier": build_classifier}[kind](**architecture)
        model.load_state_dict(weights, assign=True)
    except Exception as error:  # nothing is known of the values in the file
        raise InputError(f"{path} does not hold the weights of {kind}: {error}") from error
    return model, architecture, content


# ------------------------------------------------------------------------------------ pictures
# The scripts draw with these, and write the PNG with write_file.


def png_bytes(img):
    """An image [3,H,W] in [0, 1] as PNG, a small one enlarged so that its pixels can be seen."""
    from torchvision.utils import save_image

    scale = max(1, 768 // img.shape[-1])
    img = img.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    buffer = io.BytesIO()
    save_image(img, buffer, format="png")
    return buffer.getvalue()


@functools.cache
def load_fonts():
    """Fonts of the usual systems, if they are there; the last is Pillow's own, for English."""
    fonts = []
    for name in ("DejaVuSans", "LiberationSans-Regular", "Arial Unicode", "arial", "msyh"):
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size=12))
    return [*fonts, ImageFont.load_default(size=12)]


def write_text(draw, where, text, width, colour="black", anchor="la"):
    """Write a line with an ImageDraw, cut to the width in pixels, in a font that has its letters.

    If no font has them all, without those beyond ASCII.
    """
    for font in load_fonts():
        unknown = bytes(font.getmask("\uffff"))
        if all(x == " " or bytes(font.getmask(x)) != unknown for x in text):
            break
    else:
        text = "".join(filter(str.isascii, text))
    while font.getlength(text) > width:
        text = text[:-1]
    draw.text(where, text, colour, font, anchor)


def draw_images(images, columns, titles, captions=()):
    """images uint8 [N,3,H,H] in rows -> picture [3,H',W'] in [0, 1], with titles of the columns.

    captions: for each image, lines of (text, colour) to write below it. Images are enlarged to at
    least 128 pixels.
    """
    from torchvision.transforms.functional import to_pil_image, to_tensor

    side, gap, top = images.shape[-1] * math.ceil(128 / images.shape[-1]), 8, 28
    width, height = side + gap, side + (42 if captions else gap)
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (max(440, gap + columns * width), top + rows * height), "white")
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        draw.text((gap + i * width, gap), title, "black", font_size=14)
    for i, img in enumerate(images.cpu()):
        x, y = gap + i % columns * width, top + i // columns * height
        page.paste(to_pil_image(img).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for line, (text, colour) in enumerate(captions[i] if captions else ()):
            write_text(draw, (x, y + side + 17 * line), text, side, colour)
    return to_tensor(page)


# --------------------------------------------------------------------------- curves and progress
# TensorBoard and the terminal; Run makes Curves and Progress, main writes to them.


def new_run_folder(*parts):
    """Make a folder for a run's curves: the next free one of name, name-2, name-3, ..."""
    for i in itertools.count(1):
        folder = os.path.join(*parts) + (f"-{i}" if i > 1 else "")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


class Curves:
    """A run's TensorBoard events, written by process 0.

    Every writer begins with purge_step: TensorBoard then drops what an interrupted run wrote from
    that epoch on. SummaryWriter.add_scalars would not do so: several curves in a chart have a
    writer and a folder each.
    """

    def __init__(self, folder):
        self.folder, self.writers = folder, {}
        # write() reports a writer's OSError; its thread would print a traceback as well.
        threading.excepthook = lambda args: (
            isinstance(args.exc_value, OSError) or threading.__excepthook__(args)
        )

    def write(self, epoch, scalars, images=None):
        """Write {tag: value, or {name: value} for several curves in a chart} and {tag: [3,H,W]}.

        If the disk is full, warn and lose them.
        """
        if rank() > 0:
            return
        try:
            for tag, value in scalars.items():
                curves = value if isinstance(value, dict) else {"": value}
                for name, number in curves.items():
                    part = f"{tag.replace('/', '_')}_{name}" if name else ""
                    self.writer(part, epoch).add_scalar(tag, number, epoch)
            for tag, img in (images or {}).items():
                self.writer("", epoch).add_image(tag, img, epoch)
            for writer in self.writers.values():
                writer.flush()
        except OSError as error:
            print_rank_0(f"warning: cannot write the curves of epoch {epoch + 1}: {error.strerror}")
            self.writers.clear()  # a writer that has failed stays so

    def writer(self, part, epoch):
        if part not in self.writers:
            folder = os.path.join(self.folder, part)
            self.writers[part] = SummaryWriter(folder, purge_step=epoch)
        return self.writers[part]


class Progress:
    """An epoch's progress bar, and sums over its images, kept on the device: no step waits for it.

    sums[0] counts the images, sums[1:] are in the order of names; each process has its own. The bar
    is shown on a terminal only (disable=None).
    """

    def __init__(self, device, names, sums=(), **bar):
        self.names, self.start = names, time.perf_counter()
        sums = torch.tensor(sums or [0.0] * (1 + len(names)), dtype=torch.float64)
        self.images_before = sums[0].item()
        if rank() > 0:  # what was summed before an interruption counts once
            sums.zero_()
        self.sums = to_device(sums, device)
        self.host_sums = sums.pin_memory() if device.type == "cuda" else sums.clone()
        bar |= {"unit": "img", "mininterval": 0.3, "leave": False, "disable": rank() > 0 or None}
        self.bar = tqdm(initial=int(self.images_before), **bar)

    def add(self, num_images, *sums):
        """Add a micro-batch: its size, and its summed values in the order of names."""
        self.sums[0] += num_images
        self.sums[1:] += torch.stack(sums)
        self.bar.update(min(num_images * world_size(), (self.bar.total or 0) - self.bar.n))

    def end_update(self):
        """Show the means in the bar. A GPU is not waited for: its sums may come an update late."""
        self.host_sums.copy_(self.sums, non_blocking=True)
        num_images, *sums = self.host_sums.tolist()
        means = zip(self.names, sums, strict=True)
        means = {name: f"{x / max(num_images, 1):.4f}" for name, x in means}
        self.bar.set_postfix(means, refresh=False)

    def read(self):
        """The sums over all processes."""
        return reduce_over_processes(self.sums.clone()).tolist()

    def mean(self):
        """Close the bar -> {name: mean over the images}. Also sets per_second."""
        self.bar.close()
        num_images, *sums = self.read()
        self.per_second = (num_images - self.images_before) / (time.perf_counter() - self.start)
        return {name: x / num_images for name, x in zip(self.names, sums, strict=True)}


def in_words(seconds):
    """A duration, as short as it can be told: 40 s, 5 min, 2 h 10 min or 13 days."""
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{minutes} min" if hours or minutes > 1 else f"{seconds:.0f} s"
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours} h {short}" if hours else short


def print_facts(title, facts):
    print_rank_0(f"{title + ':':11}{', '.join(f'{name} {x}' for name, x in facts.items())}")


def describe_run(args, chosen, model, dataset, folder):
    """Print once what this run is, beside its arguments."""
    parameters = sum(p.numel() for p in model.parameters())
    n, num_val = len(dataset.train_images), len(dataset.val_images)
    if args.batch_size > n and not args.resume:
        size = 2 ** int(math.log2(max(8, n / 10)))
        rate = args.base_learning_rate * args.batch_size / size
        values = f"--batch_size {size} --base_learning_rate {rate:.1g}"
        print_rank_0(f"warning: --batch_size exceeds the {n:,} training images: try {values}")
    print_facts("libraries", versions())
    print_facts("chosen", chosen)
    print_rank_0(f"model:     {type(model).__name__}, {parameters:,} parameters")
    print_rank_0(f"dataset:   {args.dataset}, {n:,} training, {num_val:,} validation images")
    print_rank_0(f"curves:    {folder}")


# ---------------------------------------------------------------------------- stop and resume
# A run can be interrupted anywhere and goes on to the same result; main makes a Run and calls it
# at every update and epoch, --resume reads the state that it saves.

# Arguments that may change when a run is resumed: they do not change its result.
MAY_CHANGE_ON_RESUME = {
    "compile", "data_path", "demo", "device", "keep_every", "log_dir", "max_device_batch_size",
    "model_path", "output_model_path", "precision", "resume", "save_minutes",
}  # fmt: skip


def state_path(model_path):
    """vit-t-mae.pth -> vit-t-mae.state.pth"""
    return "{}.state{}".format(*os.path.splitext(model_path))


def kept_paths(model_path, epoch, keep_every):
    """After an epoch that --keep_every names, ["vit-t-mae-0400.pth"], else []."""
    start, extension = os.path.splitext(model_path)
    return [f"{start}-{epoch:04}{extension}"] if keep_every and epoch % keep_every == 0 else []


def read_state(path):
    """The content of a state file. Raises InputError if there is none or it cannot be resumed."""
    if not os.path.isfile(path):
        raise InputError(f"nothing to resume: there is no {path}; start the run without --resume")
    state = read_checkpoint(path)
    if not isinstance(state, dict) or "fingerprint" not in state:  # older states lack it
        raise InputError(f"{path} is not a state of this version: start without --resume")
    return state


def resume_args(parser, argv, args, output):
    """The arguments of the run whose state lies beside the model file, changed as argv asks.

    Raises InputError if there is no such run, or naming what in argv would change its result.
    """
    path = state_path(getattr(args, output))
    saved, defaults = read_state(path)["args"], vars(parser.parse_args([]))
    if saved.keys() - defaults.keys():
        raise InputError(f"{path} is of another version of this script, or of another script")
    # There may be flags that are newer than the state, and it may have been renamed.
    saved = defaults | saved | {output: getattr(args, output)}
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    differences = [
        f"--{name} {value} (it has {saved[name]})"
        for name, value in vars(args).items()
        if value != saved[name] and name not in MAY_CHANGE_ON_RESUME
    ]
    if differences:
        raise InputError(f"the run of {path} cannot go on with {', '.join(differences)}")
    return args


def set_aside(path):
    """Rename the state of an unfinished run, which a new one would overwrite."""
    with contextlib.suppress(InputError, KeyError, TypeError):  # there is none, or it is damaged
        state = read_checkpoint(path)
        if (0, 0) < (state["epoch"], state["update"]) < (state["args"]["total_epoch"], 0):
            names = (f"{path}-{i}" for i in itertools.count(2))
            other = next(name for name in names if not os.path.exists(name))
            os.rename(path, other)
            print_rank_0(f"warning: {path} held an unfinished run: renamed to {other}")


class Run:
    """Where a run stands, and what it keeps on disk: curves, model files and a state to resume.

    The state is small because all that a run draws at random is a function of its seed, epoch and
    update (see `generator`): weights, optimizer, two counters, the sums of the current epoch.
    """

    def __init__(self, args, name, model_path, model, optim, scaler, fingerprint):
        self.args, self.fingerprint, self.path = args, fingerprint, state_path(model_path)
        self.model, self.optim, self.scaler, folder = model, optim, scaler, None
        self.epoch, self.update, self.resumed_sums, self.results = 0, 0, [], {}
        self.files = {}  # path -> bytes of model files to write with the next state
        self.signal = self.stop_signal = 0  # of this process; of any process
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0
        if args.resume:
            folder = self.restore(read_state(self.path))
        elif rank() == 0:
            set_aside(self.path)
            folder = new_run_folder(args.log_dir, args.dataset, args.run_name or name)
        self.curves = Curves(folder)
        weights = checksum(*model.parameters())
        check_same_settings(epoch=self.epoch, update=self.update, weights=weights)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note_signal)
        if not args.resume:
            self.save()

    def restore(self, state):
        """Take up the saved run -> its curves' folder. Raises InputError if it does not fit."""
        if rank() == 0 and state["fingerprint"] != self.fingerprint:
            raise InputError(f"these are not the images with which the run of {self.path} began")
        try:
            self.model.load_state_dict(state["model"])
            self.optim.load_state_dict(state["optim"])
            self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
            for parameter, values in self.optim.state.items():
                for x in (values["exp_avg"], values["exp_avg_sq"]):
                    if x.shape != parameter.shape or not x.is_contiguous():
                        raise ValueError("its optimizer belongs to another model")
        except Exception as error:  # nothing is known of the values in the file
            raise InputError(f"{self.path} does not fit this model: {error!r}") from error
        self.epoch, self.update, self.resumed_sums = state["epoch"], state["update"], state["sums"]
        self.results = state["results"]
        print_rank_0(f"resumed:   after {self.epoch} epochs, {self.update} updates")
        return state["folder"]

    def note_signal(self, number, _):
        """Let the current update finish, then save and stop. A second signal stops at once, but not
        under torchrun, which passes on signals that its processes may already have got."""
        self.signal = number
        if world_size() == 1:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # not print: the signal may have come in one
                os.write(2, b"\nstopping after this update; once more to stop at once\n")

    def start_epoch(self, device, names, num_images):
        """The bar and the sums of this epoch, those before an interruption included."""
        text = f"Epoch {self.epoch + 1}/{self.args.total_epoch}"
        self.progress = Progress(device, names, self.resumed_sums, desc=text, total=num_images)
        return self.progress

    def updates(self, batches):
        """Yield (update, batch) for what is left of the epoch; save between two when it is due."""
        for update, batch in enumerate(batches):
            if update < self.update:
                continue
            yield update, batch
            self.update = update + 1
            self.progress.end_update()
            self.check_finite(self.progress.host_sums)
            if self.save_is_due(60 * self.args.save_minutes):
                self.save()
        self.check_finite(self.progress.sums, scale=self.scaler.get_scale())  # of the last, too

    def time_left(self):
        """What the rest of the run takes at the pace of this epoch: ", 2 h 10 min left"."""
        progress, seconds = self.progress, time.perf_counter() - self.progress.start
        share = 1 - progress.images_before / progress.bar.total  # of the epoch, if it was resumed
        epochs = self.args.total_epoch - self.epoch - 1
        return f", {in_words(seconds / share * epochs)} left" if share else ""

    def end_epoch(self):
        """Note that an epoch is done. True if the caller is to save its results now.

        Always after the last epoch, else if saving is cheap (2 % of the time since) or due.
        """
        self.epoch, self.update, self.resumed_sums = self.epoch + 1, 0, []
        due = self.save_is_due(min(50 * self.save_seconds, 60 * self.args.save_minutes))
        return due or self.epoch == self.args.total_epoch

    def save_is_due(self, seconds):
        """Whether process 0 last saved that many seconds ago, or any process was told to stop."""
        overdue = rank() == 0 and time.perf_counter() - self.saved_at > seconds
        largest = reduce_over_processes(torch.tensor([self.signal, overdue]), dist.ReduceOp.MAX)
        self.stop_signal, overdue = largest.tolist()
        return bool(self.stop_signal or overdue)

    def save(self):
        """Write model files and state; leave if told to stop. Raises InputError on divergence."""
        begin = time.perf_counter()
        sums = self.progress.read() if self.update else []
        self.check_finite(torch.tensor(sums), *self.model.parameters())
        if rank() == 0:
            self.files.pop(self.path, None)
            self.files[self.path] = to_bytes(self.state(sums))
            self.write_files()
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - begin
        if self.stop_signal:
            self.leave()

    def state(self, sums):
        return {
            "args": vars(self.args),
            "epoch": self.epoch,
            "update": self.update,
            "sums": sums,
            "results": self.results,
            "model": self.model.state_dict(),
            "optim": self.optim.state_dict(),
            "scaler": self.scaler.state_dict(),
            "fingerprint": self.fingerprint,
            "folder": self.curves.folder,
        }

    def write_files(self):
        """Write the model files, and last the state: it never names results without their file.

        What cannot be written is kept for the next save; after the last epoch it is an InputError.
        """
        for path in list(self.files):
            try:
                write_file(path, self.files[path])
            except InputError as error:
                if self.epoch == self.args.total_epoch:
                    raise
                print_rank_0(f"warning: {error}; will try again")
                break
            del self.files[path]

    def check_finite(self, *tensors, scale=1.0):
        """Raise InputError on divergence. fp16's scale falls while gradients are not finite."""
        if scale < 1 or not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(
                f"loss, weights or gradients are not finite after {self.epoch} epochs, "
                f"{self.update} updates, at learning rate {self.optim.param_groups[-1]['lr']:.2e}; "
                "the files are those of the last good state. Try --resume with --precision fp32, "
                "or a new run with a lower --base_learning_rate or more --warmup_epoch"
            )

    def leave(self):
        """After SIGINT or SIGTERM: say how to go on, end with status 130 or 143."""
        command = shlex.join([*(x for x in sys.argv if x != "--resume"), "--resume"])
        start = "python" if world_size() == 1 else "torchrun ..."
        lost = f", but could not save {', '.join(self.files)}" if self.files else ""
        print_rank_0(f"stopped after {self.epoch} epochs, {self.update} updates{lost}; to go on:")
        print_rank_0(f"    {start} {command}")
        sys.exit(128 + self.stop_signal)
