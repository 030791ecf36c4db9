"""Time the training steps of both scripts, on this machine, beside the original's if it is given.

    python tests/benchmark.py
    python tests/benchmark.py --precision fp16 --micro_batch 128 512 --json speed.json
    python tests/benchmark.py --source PATH_TO_A_CHECKOUT --json speed.json

A step is a whole update of the weights: images, masks, forward, backward, optimizer, sums. The
original's is its own: masks drawn image by image, fp32, `.item()` behind every micro-batch. Eager,
compiled and the original's alternate, so that what else the machine does falls on all of them, and
share the memory. Preparation, with compilation, and warm-up are not in the clock. Three numbers are
the median, the lowest and the highest. Of several GPUs the first is measured, or the first that
CUDA_VISIBLE_DEVICES names.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPOSITORY)

import mae_pretrain  # noqa: E402
import train_classifier  # noqa: E402
import utils  # noqa: E402
from model import MAE_ViT, ViT_Classifier  # noqa: E402

JOBS = ("pretrain", "finetune")
NUM_PATCHES = 256


def flops_per_image(job):
    """3 * (12 * block(65) + 4 * block(257) + 2 * 256 * 12 * C + 2 * 256 * C * 12) in pretraining,
    3 * (12 * block(257) + 2 * 256 * 12 * C + 2 * C * 10) in fine-tuning, both at the defaults:
    block(n) = 24 * n * C^2 + 4 * n^2 * C for n tokens of width C = 192. The backward pass is
    counted as twice the forward pass; norms, softmax and GELU are not counted.
    """
    C, num_pixels = 192, 12

    def block(n):
        linear = 2 * n * (3 + 1 + 4 + 4) * C**2  # q, k and v; projection; the two of the MLP
        return linear + 2 * (2 * n**2 * C)  # q times k, and that times v

    embedding = 2 * NUM_PATCHES * num_pixels * C
    if job == "finetune":
        return 3 * (12 * block(257) + embedding + 2 * C * 10)
    return 3 * (12 * block(65) + 4 * block(257) + embedding + 2 * NUM_PATCHES * C * num_pixels)


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", help="a checkout of the original, whose model.py is imported from there")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="ours")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="ours compiled, too (default: on a GPU)")  # fmt: skip
    add("--micro_batch", type=int, nargs="+", metavar="N",
        help="images per pass, one or several to try "
             "(default: as the scripts choose it, and on a GPU also 128)")  # fmt: skip
    add("--source_micro_batch", type=int, help="the original's, if another (default: 128)")
    add("--batch", type=int, help="images per update (default: 512 on a CPU, 4096 on a GPU)")
    add("--repeats", type=int, default=5, help="updates timed of each (default: 5)")
    add("--json", help="write the figures to this file, anew after each")
    return parser.parse_args()


def our_step(job, args, device, images, labels):
    """-> step(update, size): one update by that many images; and the micro-batch it takes."""
    torch.manual_seed(0)
    mae, images, labels = MAE_ViT(), images.to(device), labels.to(device)
    if job == "pretrain":
        module, names = mae_pretrain.MAELoss(mae, patch_size=2), ["loss"]
        example = [images[:1], torch.zeros(1, NUM_PATCHES, device=device)]
    else:
        module, names = ViT_Classifier(mae.encoder), ["loss", "acc"]
        example = [utils.to_float(images[:1])]
    args.batch_size, args.max_device_batch_size = args.batch, args.micro_batch
    net = utils.Net(module, [device], args, example)
    optim = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    training = utils.Training(module, net, optim, names)
    training.begin(total=0)
    training.bar.disable = True

    def losses(rows):
        if job == "pretrain":
            return [mae_pretrain.losses(net, images, rows)]
        return train_classifier.losses(net, images, labels, rows, strength=None)

    def step(update, size):
        rng = utils.generator("benchmark", update)
        rows = {"index": torch.randperm(len(images), generator=rng)[:size]}
        if job == "pretrain":
            rows["noise"] = torch.rand(size, NUM_PATCHES, generator=rng)
        for micro_batch in net.micro_batches(rows):
            loss, *others = losses(micro_batch)
            training.backward(loss, size, *others)
        training.step()

    return step, net.size


def source_step(job, args, device, images, labels):
    """The same with the original's model.py, and its loop as it stands there."""
    path = os.path.join(args.source, "model.py")
    spec = importlib.util.spec_from_file_location("source_model", path)
    source = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(source)
    torch.manual_seed(0)
    model = source.MAE_ViT()
    if job == "finetune":
        model = source.ViT_Classifier(model.encoder)
    model = model.to(device)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    dataset = [(image.float() / 127.5 - 1, int(label)) for image, label in zip(images, labels)]  # noqa: B905
    micro_batch = min(args.source_micro_batch or args.micro_batch or 128, args.batch)
    losses = []

    def step(update, size):
        rows = torch.randperm(len(dataset))[:size].tolist()
        for start in range(0, len(rows), micro_batch):
            chosen = [dataset[i] for i in rows[start : start + micro_batch]]
            img = torch.stack([x for x, _ in chosen]).to(device)
            if job == "pretrain":
                predicted_img, mask = model(img)
                loss = torch.mean((predicted_img - img) ** 2 * mask) / 0.75
            else:
                label = torch.tensor([y for _, y in chosen]).to(device)
                logits = model(img)
                loss = torch.nn.functional.cross_entropy(logits, label)
                (logits.argmax(dim=-1) == label).float().mean().item()
            loss.backward()
            losses.append(loss.item())
        optim.step()
        optim.zero_grad()

    return step, micro_batch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step, device, *args):
    synchronize(device)
    begin = time.perf_counter()
    step(*args)
    synchronize(device)
    return time.perf_counter() - begin


def matrix_rate(device, dtype):
    """FLOP/s of one large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def copy_rate(device):
    """Bytes read and written per second by a large copy on the device: the best of ten."""
    a = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * a.numel() / min(timed(lambda: b.copy_(a), device) for _ in range(10))


def attention_times(device, dtype):
    """Microseconds an image, forward and backward, of PyTorch's kernels for attention.

    At the tokens of the encoder in pretraining and of all patches, three heads, as timm calls it.
    """
    # On a GPU so much that launching it takes less time than computing it.
    images, repeats = (1024, 20) if device.type == "cuda" else (128, 1)
    times = {}
    for tokens in (65, 257):
        qkv = torch.randn(images, tokens, 3, 3, 64, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(images, tokens, 3, 64, device=device, dtype=dtype).transpose(1, 2)

        def step(qkv=qkv, gradient=gradient):
            for _ in range(repeats):
                q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [images,3,tokens,64] each
                scaled_dot_product_attention(q, k, v).backward(gradient)

        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why a kernel cannot be used here
                    step()
                    seconds = statistics.median(timed(step, device) for _ in range(5))
                microseconds = round(seconds / repeats / images * 1e6, 2)
            except RuntimeError:
                microseconds = "not available"
            times[f"{name.lower()}, {tokens} tokens"] = microseconds
    return times


def count_kernels(step, micro_batch):
    """Kernels that a micro-batch launches: what an update by two has more than one by one."""
    launches = []
    for size in (micro_batch, 2 * micro_batch):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(0, size)
            torch.cuda.synchronize()
        on_gpu = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
        launches.append(sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu))
    return launches[1] - launches[0]


def worker(side, job, args, connection):
    """One side of one job in a process: nothing set for ours, such as malloc's, helps the original.

    Sends its micro-batch, then the seconds of each update it is asked for; told to end, its memory
    in bytes, and on a GPU the kernels it launches.
    """
    args.compile = side == "compiled"
    with utils.one_line_errors():
        ours = side != "source"
        device = utils.choose_devices(args.device)[0] if ours else torch.device(args.device)
        images, begin = draw_images(args), time.perf_counter()
        step, micro_batch = (our_step if ours else source_step)(job, args, device, *images)
        preparation = time.perf_counter() - begin
        connection.send(micro_batch)
        while (update := connection.recv()) is not None:
            connection.send(timed(step, device, update, args.batch))
        if device.type == "cpu":  # of the process, libraries included
            facts = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(0, args.batch)
            peak = torch.cuda.max_memory_allocated()
            facts = {
                "peak_memory_bytes": peak,
                "memory_per_image_bytes": (peak - before) // micro_batch,
                "kernels_per_micro_batch": count_kernels(step, micro_batch) or "not available",
            }
        connection.send({"preparation_seconds": round(preparation, 1), **facts})


def draw_images(args):
    return utils.draw_shapes(range(max(2 * args.batch, 2000)), 32, 0)


def start_up(args):
    """Seconds from the command to the end of a run of one update of the demo, files written."""
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(REPOSITORY, "mae_pretrain.py")
        flags = "--demo --total_epoch 1 --train_images 128 --device".split()
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, script, *flags, args.device],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - begin


def data_rate(device, images, size):
    """Images per second of drawing an order, indexing and scaling, and nothing else."""
    images = images.to(device)

    def epoch(update):
        order = torch.randperm(len(images), generator=utils.generator("order", update))
        for index in utils.to_device(order, device).split(size):
            utils.to_float(images[index])

    return len(images) / statistics.median(timed(epoch, device, i) for i in range(5))


def middle(values, digits):
    """The median of the values, with the lowest and the highest."""
    values = sorted(values)
    return [round(x, digits) for x in (statistics.median(values), values[0], values[-1])]


def measure(job, args, sides):
    """Figures of a job at one micro-batch: an update of each side in turn. -> {side: figures}."""
    context = multiprocessing.get_context("spawn")
    connections, micro_batch, seconds, facts = {}, {}, {side: [] for side in sides}, {}
    for side in sides:
        connections[side], theirs = context.Pipe()
        context.Process(target=worker, args=(side, job, args, theirs), daemon=True).start()
        theirs.close()  # the worker's end: should it fail, recv ends

    def ask(side, *question):
        """What the side answers; None from then on if it has failed, as it has printed why."""
        try:
            for update in question:
                connections[side].send(update)
            return connections[side].recv()
        except (EOFError, OSError):
            sides.remove(side)

    for side in list(sides):
        micro_batch[side] = ask(side)
    for update in range(args.repeats + 1):
        for side in list(sides):
            seconds[side].append(ask(side, update))
    for side in list(sides):
        facts[side] = ask(side, None)

    figures = {}
    for side in sides:
        warm_up, *timed_seconds = seconds[side]
        speed = middle([args.batch / s for s in timed_seconds], 1)
        flops = flops_per_image(job) * speed[0]
        figures[side] = {
            "micro_batch": micro_batch[side],
            "images_per_second": speed,
            "warm_up_seconds": round(warm_up, 2),
            "gflops": round(flops / 1e9, 1),
            "share_of_matrix_product": round(flops / args.matrix_rate, 3),
            **facts[side],
        }
        for other in ("eager", "source"):
            if other in sides and other != side != "source":
                ratios = zip(seconds[other][1:], timed_seconds, strict=True)
                figures[side][f"times_as_fast_as_{other}"] = middle([a / b for a, b in ratios], 2)
    return figures


def main(args):
    device = utils.choose_devices(args.device)[0]
    args.device = device.type
    on_gpu = device.type == "cuda"
    if args.source and not os.path.isfile(os.path.join(args.source, "model.py")):
        raise utils.InputError(f"--source {args.source} has no model.py")
    args.batch = args.batch or (4096 if on_gpu else 512)
    precision = utils.choose_precision(args.precision, [device])
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    name = "CPU"
    if on_gpu:
        name = f"GPU {os.environ['CUDA_VISIBLE_DEVICES']}, {torch.cuda.get_device_name()}"
    args.matrix_rate = matrix_rate(device, dtype)
    figures = {}

    def add(name, value):
        """Print a figure, and write all that there are."""
        figures[name] = value
        print(f"{name}: {value}" if not isinstance(value, dict) else f"\n{name}", flush=True)
        for key, number in value.items() if isinstance(value, dict) else ():
            print(f"    {key}: {number}", flush=True)
        if args.json:
            utils.write_files({args.json: json.dumps(figures, indent=2).encode()})

    add("device", f"{name}, {torch.get_num_threads()} threads")
    add("versions", ", ".join(f"{name} {version}" for name, version in utils.versions().items()))
    add("precision", precision)
    add("batch", args.batch)
    add("repeats", args.repeats)
    add("matrix_product_gflops", round(args.matrix_rate / 1e9, 1))
    add("copy_gb_per_second", round(copy_rate(device) / 1e9, 1))
    flops = {job: f"{flops_per_image(job) / 1e9:.2f}" for job in JOBS}
    add("gflop_per_image", flops | {"formula": " ".join(flops_per_image.__doc__.split())})
    add("attention_microseconds_per_image", attention_times(device, dtype))
    add("start_up_seconds", round(start_up(args), 1))
    torch.cuda.empty_cache()
    sizes = args.micro_batch or ([None, 128] if on_gpu else [None])  # None: as it is chosen
    data = data_rate(device, draw_images(args)[0], sizes[0] or 128)
    add("data_images_per_second", round(data))
    compiled = on_gpu if args.compile is None else args.compile
    for job in JOBS:
        for args.micro_batch in sizes:  # each worker is given args
            sides = ["eager"] + ["compiled"] * compiled + ["source"] * bool(args.source)
            for side, result in measure(job, args, sides).items():
                add(f"{job}, micro-batch {args.micro_batch or 'chosen'}, {side}", result)


if __name__ == "__main__":
    with utils.one_line_errors():
        main(get_args())
