"""Time the training steps of both scripts, on this machine, beside the source's if it is given.

    python tests/benchmark.py
    python tests/benchmark.py --source PATH_TO_A_CHECKOUT --json speed.json

A step is a whole update of the weights: images, masks, forward, backward, optimizer, sums. The
source's is its own: masks drawn image by image, fp32, `.item()` behind every micro-batch. The
two alternate, so that what else the machine does falls on both. Warm-up is not in the clock.
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

import torch
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPOSITORY)

import mae_pretrain  # noqa: E402
import train_classifier  # noqa: E402
import utils  # noqa: E402
from model import MAE_ViT, ViT_Classifier  # noqa: E402

JOBS = ("pretrain", "finetune")
NUM_PATCHES = 256


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", help="a checkout of the source, whose model.py is imported from there")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="ours")
    add("--compile", action="store_true", help="ours")
    add("--micro_batch", type=int, default=128, help="images per pass (default: 128)")
    add("--source_micro_batch", type=int, help="the source's, if another")
    add("--batch", type=int, help="images per update (default: 512 on a CPU, 4096 on a GPU)")
    add("--repeats", type=int, default=5, help="updates timed of each (default: 5)")
    add("--json", help="write the figures to this file")
    return parser.parse_args()


def our_step(job, args, device, images, labels):
    """A function that makes one update, and the FLOPs of an image in it."""
    torch.manual_seed(0)
    mae = MAE_ViT()
    if job == "pretrain":
        module = mae_pretrain.MAELoss(mae, patch_size=2)
        example = images[:2], torch.rand(2, NUM_PATCHES)
        names = ["loss"]
    else:
        module = ViT_Classifier(mae.encoder)
        example = (utils.to_float(images[:2]),)
        names = ["loss", "acc"]
    with FlopCounterMode(display=False) as counter:
        module(*example).sum().backward()
    args.batch_size, args.max_device_batch_size = args.batch, args.micro_batch
    micro_batch = utils.choose_micro_batch_size(args, device)
    net, _ = utils.wrap_model(module, device, args, micro_batch, num_images=0)
    optim = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    images, labels = images.to(device), labels.to(device)
    progress = utils.Progress(device, names)
    progress.bar.disable = True

    def step(update):
        rng = utils.generator("benchmark", update)
        batch = torch.randperm(len(images), generator=rng)[: args.batch]
        if job == "pretrain":
            noise = torch.rand(len(batch), NUM_PATCHES, generator=rng)
            mae_pretrain.train_batch(net, optim, images, batch, noise, micro_batch, progress)
        else:
            train_classifier.train_batch(net, optim, images, labels, batch, micro_batch, progress)
        progress.end_update()

    return step, counter.get_total_flops() / 2


def source_step(job, args, device, images, labels):
    """The same with the source's model.py, and its loop as it stands there."""
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
    micro_batch = min(args.source_micro_batch or args.micro_batch, args.batch)
    losses = []

    def step(update):
        rows = torch.randperm(len(dataset))[: args.batch].tolist()
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

    return step


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step, update, device):
    synchronize(device)
    begin = time.perf_counter()
    step(update)
    synchronize(device)
    return time.perf_counter() - begin


def summary(rates):
    rates = list(rates)
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
    }


def matrix_rate(device, dtype):
    """FLOP/s of one large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(timed(lambda _: a @ b, 0, device) for _ in range(10))


def worker(side, job, args, connection):
    """A process for one side of one job: nothing set for ours, such as malloc's, helps the source.

    Sends the FLOPs of an image, then the seconds of each update it is asked for; told to end, its
    peak memory in bytes: of the GPU, or on a CPU of the process, libraries included.
    """
    device = utils.choose_device(args.device) if side == "ours" else torch.device(args.device)
    images, labels = draw_images(args)
    step, flops = our_step(job, args, device, images, labels) if side == "ours" else (
        source_step(job, args, device, images, labels), 0
    )  # fmt: skip
    connection.send(flops)
    while (update := connection.recv()) is not None:
        connection.send(timed(step, update, device))
    if device.type == "cuda":
        connection.send(torch.cuda.max_memory_allocated())
    else:
        connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def draw_images(args):
    return utils.draw_shapes(max(2 * args.batch, 2000), 32, 0)


def start_up():
    """Seconds from the command to the end of a run of one update of the demo, files written."""
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(REPOSITORY, "mae_pretrain.py")
        flags = "--demo --total_epoch 1 --train_images 128".split()
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, script, *flags], cwd=folder, check=True, capture_output=True
        )
        return time.perf_counter() - begin


def data_rate(device, images, size):
    """Images per second of drawing an order, indexing and scaling, and nothing else."""
    images = images.to(device)

    def epoch(update):
        order = torch.randperm(len(images), generator=utils.generator("order", update))
        for index in utils.to_device(order, device).split(size):
            utils.to_float(images[index])

    return len(images) / statistics.median(timed(epoch, i, device) for i in range(5))


def measure(job, args, matrix):
    """Figures of a job: both sides in turn, an update each."""
    context = multiprocessing.get_context("spawn")
    sides, processes = {}, []
    for side in ("ours", "source") if args.source else ("ours",):
        sides[side], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, job, args, theirs)))
        processes[-1].start()
        theirs.close()  # the worker's end: should it die, recv ends
    flops = {side: connection.recv() for side, connection in sides.items()}["ours"]

    seconds = {side: [] for side in sides}
    for update in range(args.repeats + 1):
        for side, connection in sides.items():
            connection.send(update)
            seconds[side].append(connection.recv())
    peak = {}
    for side, connection in sides.items():
        connection.send(None)
        peak[side] = connection.recv()
    for process in processes:
        process.join()

    warm_up, *ours = seconds["ours"]
    result = summary(args.batch / s for s in ours)
    result["warm_up_seconds"] = round(warm_up, 2)
    result["gflop_per_image"] = round(flops / 1e9, 2)
    result["gflops"] = round(flops * result["images_per_second"] / 1e9, 1)
    result["share_of_matrix_product"] = round(result["gflops"] * 1e9 / matrix, 3)
    result["peak_memory_bytes"] = peak["ours"]
    if args.source:
        theirs = seconds["source"][1:]
        result |= {f"source_{k}": v for k, v in summary(args.batch / s for s in theirs).items()}
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        result["lowest_ratio"], result["highest_ratio"] = (
            round(min(ratios), 2),
            round(max(ratios), 2),
        )
        result["source_peak_memory_bytes"] = peak["source"]
    return result


def main(args):
    device = utils.choose_device(args.device)
    args.device = device.type
    if args.source and not os.path.isfile(os.path.join(args.source, "model.py")):
        raise utils.InputError(f"--source {args.source} has no model.py")
    args.batch = args.batch or (4096 if device.type == "cuda" else 512)
    precision = utils.choose_precision(args.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    matrix = matrix_rate(device, dtype)
    figures = {
        "device": f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": precision,
        "compile": args.compile,
        "micro_batch": args.micro_batch,
        "source_micro_batch": args.source_micro_batch or args.micro_batch,
        "batch": args.batch,
        "repeats": args.repeats,
        "matrix_product_gflops": round(matrix / 1e9, 1),
        "start_up_seconds": round(start_up(), 1),
        "data_images_per_second": round(data_rate(device, draw_images(args)[0], args.micro_batch)),
    }
    for job in JOBS:
        figures[job] = measure(job, args, matrix)
    for key, value in figures.items():
        print(f"{key}: {value}" if key not in JOBS else f"\n{key}")
        for name, number in value.items() if key in JOBS else ():
            print(f"    {name}: {number:,}")
    if args.json:
        utils.write_file(args.json, json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    with utils.one_line_errors():
        main(get_args())
