"""Every command and option, in one place; nothing heavy is imported to show them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from hf_datavec import __version__
from hf_datavec.cli import commands

EPILOG = """references: an existing folder or ./path, or a Hub repo as owner/name, owner/name@revision or
hf://owner/name@revision. results go to stdout, progress and messages to stderr.
exit codes: 0 done, 1 the run failed, 2 the input is wrong."""

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """The parser of `hf-datavec`."""
    top = argparse.ArgumentParser(
        prog="hf-datavec",
        description="Fuse what sites learned from images they may not share: task vectors, merged by recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"hf-datavec {__version__}")
    actions = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _demo(actions)
    _init(actions)
    _finetune(actions)
    _diff_and_push(actions)
    _coordinator(actions)
    _study(actions)
    _discovery(actions)
    _reference(actions)
    return top


def _command(actions: Commands, name: str, help: str) -> argparse.ArgumentParser:
    found = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
    found.set_defaults(run=commands.BY_NAME[name], command=name)
    return found


def _demo(actions: Commands) -> None:
    demo = _command(actions, "demo", "the whole loop on a real network and real images, offline")
    demo.add_argument(
        "--out",
        type=_path,
        default=Path("hf-datavec-demo"),
        metavar="DIR",
        help="folder to make (default: %(default)s)",
    )
    demo.add_argument("--seed", type=_from_zero, default=0, help="seed of images and training (default: %(default)s)")


def _init(actions: Commands) -> None:
    init = _command(actions, "init", "start a study: a pretrained model with agreed labels and a zero head")
    init.add_argument("base", metavar="BASE", help="pretrained model")
    init.add_argument("--labels", required=True, metavar="A,B,C", help="the labels that all sites agree on")
    init.add_argument(
        "--image-size",
        type=_positive,
        metavar="PIXELS",
        help="side of the pictures, for all sites (default: as pretrained)",
    )
    _output(init)


def _finetune(actions: Commands) -> None:
    train = _command(actions, "finetune", "train the study base on a site's images; an interrupted run goes on")
    train.add_argument("base", metavar="BASE", help="study base")
    train.add_argument("images", metavar="IMAGES", help="folder with a sub-folder per class, or a data set")
    train.add_argument("--split", help="split of the data set")
    train.add_argument(
        "--epochs",
        type=_not_negative,
        default=10.0,
        help="passes over the images; 0 with --probe-steps trains the head alone (default: %(default)g)",
    )
    train.add_argument("--batch-size", type=_positive, default=32, help="images per step (default: %(default)s)")
    train.add_argument(
        "--learning-rate", "--lr", type=_above_zero, default=3e-4, help="AdamW's peak rate (default: %(default)g)"
    )
    train.add_argument(
        "--weight-decay", type=_not_negative, default=0.01, help="AdamW's weight decay (default: %(default)g)"
    )
    train.add_argument(
        "--warmup", type=_share, default=0.1, help="share of the steps until the peak rate (default: %(default)g)"
    )
    train.add_argument(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default="cosine",
        help="of the rate (default: %(default)s)",
    )
    train.add_argument(
        "--augment",
        choices=("none", "turns", "crops"),
        default="none",
        help="show each picture, in each epoch anew, in one of the eight positions of flips and quarter turns, or an "
        "enlarged part of it in such a position; for things without an upright position (default: %(default)s)",
    )
    train.add_argument("--class-balanced", action="store_true", help="weigh classes alike in the loss")
    train.add_argument(
        "--probe-steps",
        type=_from_zero,
        default=0,
        help="steps of the head alone before everything is trained; 400 end a linear probe (default: %(default)s)",
    )
    train.add_argument(
        "--least-squares",
        action="store_true",
        help="the head in closed form instead; with --epochs 0, `regmean` by examples of such heads, each with the "
        "Gram matrix of all its site's images, is the head of all images together (docs/evidence.md)",
    )
    train.add_argument(
        "--target",
        type=_above_zero,
        help="output that --least-squares aims at for an image's label; larger, as 7.5 where nearly every image can be "
        "told, makes answers surer; the same at all sites (default: 3)",
    )
    train.add_argument(
        "--hold-out",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of each class that is not trained on; accuracy and the temperature that fits its labels are "
        "measured on it, and the vector declares the temperature (docs/restoration.md) (default: %(default)g)",
    )
    train.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="WHAT",
        help="'backbone' (train the head only), 'statistics' (BatchNorm keeps the base's), or a regular expression "
        "over tensor names; may be repeated",
    )
    train.add_argument("--seed", type=_from_zero, default=0, help="(default: %(default)s)")
    _device(train)
    _output(train)


def _diff_and_push(actions: Commands) -> None:
    diff = _command(actions, "diff", "compute a site's vector: tuned minus base")
    diff.add_argument("base", metavar="BASE", help="study base")
    diff.add_argument(
        "tuned", metavar="TUNED", help="tuned model folder, .safetensors, or a local .pth/.pt/.bin state dict"
    )
    diff.add_argument(
        "--labels", metavar="A,B,C", help="labels of the rows of the tuned head, if the file does not say"
    )
    diff.add_argument(
        "--with-statistics", action="store_true", help="include BatchNorm statistics, a summary of the private images"
    )
    diff.add_argument(
        "--noise",
        type=_above_zero,
        metavar="EPSILON",
        help="with --with-statistics: Gaussian noise on the statistics, for this epsilon against the change of one "
        "image; a small one drowns them (docs/restoration.md)",
    )
    diff.add_argument("--share-counts", action="store_true", help="include the number of images per class")
    diff.add_argument(
        "--with",
        dest="second_moments",
        type=_kinds,
        default=(),
        metavar="KINDS",
        help="write second moments of the site's images beside the vector: some of fisher, gram, features, for the "
        "methods fisher, regmean and ridge_head. features are sums of the untouched base's features over all images; "
        "they show class counts, the mean feature of each class and, of few images, the features themselves",
    )
    diff.add_argument(
        "--images", metavar="IMAGES", help="the site's images for --with; labels count for features alone"
    )
    diff.add_argument("--split", help="split of the data set")
    diff.add_argument(
        "--count",
        type=_positive,
        default=256,
        help="images for fisher and gram at most; features take all (default: %(default)s)",
    )
    _device(diff)
    _output(diff)

    push = _command(actions, "push", "push a vector or model folder; private unless said otherwise")
    push.add_argument("folder", metavar="DIR")
    push.add_argument("repo", metavar="REPO", help="Hub repo, or a local folder to make")
    push.add_argument("--public", action="store_true", help="make a new Hub repo public")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main); made if missing")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")


def _coordinator(actions: Commands) -> None:
    inspect = _command(actions, "inspect", "norms of vectors and cosines between them; of Hub repos the headers alone")
    inspect.add_argument("vectors", metavar="REF", nargs="+")
    inspect.add_argument("--plot", type=_picture, metavar="FILE.png", help="write the cosines as a heat map")
    inspect.add_argument(
        "--download", action="store_true", help="fetch Hub vectors whole, for cosines; --plot does too"
    )
    _json(inspect)

    plan = _command(actions, "plan", "what merge would do, or every reason why it cannot")
    plan.add_argument("recipe", metavar="RECIPE", type=_path)
    plan.add_argument("--lock", action="store_true", help="write RECIPE.lock.yaml with every input pinned")
    _json(plan)

    merge = _command(actions, "merge", "do what a recipe says; pushes when it has `push:`")
    merge.add_argument("recipe", metavar="RECIPE", type=_path)
    merge.add_argument("-o", "--output", type=_path, metavar="DIR", help="folder to make (default: as in the recipe)")
    merge.add_argument("--no-push", action="store_true", help="do not push, whatever the recipe says")
    _device(merge)
    _json(merge)

    evaluate = _command(
        actions, "evaluate", "accuracy, balanced accuracy, macro F1, AUROC, ECE, Brier score with intervals"
    )
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("images", metavar="IMAGES")
    evaluate.add_argument("--split", help="split of the data set")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="(default: %(default)s)")
    _device(evaluate)
    _json(evaluate)


def _study(actions: Commands) -> None:
    study = _command(actions, "study", "the paper's experiment on your images: sites, every merge, a table")
    study.add_argument("study", metavar="STUDY", type=_path, help="study file, see recipes/study-*.yaml")
    study.add_argument("-o", "--output", type=_path, metavar="DIR", help="folder to keep (default: as in the study)")
    _device(study)
    _json(study)


def _discovery(actions: Commands) -> None:
    listing = _command(actions, "list", "the vectors of a Hub org, or of a local folder, and which fit together")
    listing.add_argument("owner", metavar="ORG", help="name of the org, or a folder as ./folder")
    _json(listing)

    recipe = _command(actions, "recipe", "write a pinned recipe over all vectors of an org that fit together")
    recipe.add_argument("owner", metavar="ORG", help="name of the org, or a folder as ./folder")
    recipe.add_argument("--base", metavar="BASE", help="the base, if it is a local folder")
    recipe.add_argument("-o", "--output", type=_path, required=True, metavar="RECIPE", help="file to make")

    convert = _command(actions, "convert", "write a mergekit configuration for a plain merge of models as a recipe")
    convert.add_argument("configuration", metavar="MERGEKIT_YAML", type=_path)
    convert.add_argument(
        "--base", metavar="BASE", help="what the models were fine-tuned from, if the file does not say"
    )
    convert.add_argument("-o", "--output", type=_path, required=True, metavar="RECIPE", help="file to make")


def _reference(actions: Commands) -> None:
    methods = _command(actions, "methods", "the merge methods: formula, options, source")
    _json(methods)
    schema = _command(actions, "schema", "JSON Schema of the recipe, for editors")
    schema.add_argument("--study", action="store_true", help="of the study file instead")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="folder to make")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no such home folder: {text}") from None


def _picture(text: str) -> Path:
    if not text.endswith(".png") or not _path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a .png file in a folder that exists, got {text}")
    return _path(text)


def _kinds(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not set(found) <= {"fisher", "gram", "features"} or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected some of fisher, gram, features, each once, got {text}")
    return found


def _from_zero(text: str) -> int:
    return _whole(text, least=0)


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, *, least: int) -> int:
    value = _number(text)
    if value < least or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
    return int(value)


def _number(text: str) -> float:
    # What is no number fails every range, so that the message says what was expected.
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    return value if abs(value) < float("inf") else -1.0


def _above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, got {text}")
    return value
