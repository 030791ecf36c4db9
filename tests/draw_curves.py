"""Draw the validation accuracy of classifiers by epoch, mean and range over the runs of a folder.

    pip install matplotlib
    python tests/draw_curves.py curves.png logs-scratch logs-pretrained

Each folder is the --log_dir of runs that differ in their seed; its name is the curve's label.
"""

import argparse
import os

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_accuracies(folder):
    """-> one list of accuracies in percent, by epoch, for each run below the folder."""
    parts = [path for path, _, _ in os.walk(folder) if os.path.basename(path) == "cls_acc_val"]
    if not parts:
        raise SystemExit(f"error: no run of train_classifier.py below {folder}")
    runs = [EventAccumulator(path, {"scalars": 0}).Reload().Scalars("cls/acc") for path in parts]
    return [[100 * event.value for event in run] for run in runs]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the picture to write, such as curves.png")
    parser.add_argument("folders", nargs="+", help="each the --log_dir of the runs of one curve")
    args = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7.7, 4.6), layout="constrained")
    for folder in args.folders:
        epochs = list(zip(*read_accuracies(folder), strict=False))  # [(run 1, run 2, ...), ...]
        x = range(1, len(epochs) + 1)
        label = os.path.basename(os.path.normpath(folder))
        (line,) = axes.plot(x, [sum(epoch) / len(epoch) for epoch in epochs], label=label)
        low, high = map(min, epochs), map(max, epochs)
        axes.fill_between(x, list(low), list(high), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel="accuracy on the validation images, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
