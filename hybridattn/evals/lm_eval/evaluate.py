"""`hybridattn eval`: lm-eval with our tasks, checks before the first score, and results by length, depth and load.

lm-eval has to be installed.
"""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from hybridattn.evals.lm_eval import heatmap, positions, scores
from hybridattn.evals.lm_eval.harness import UnsoundError, truncated
from hybridattn.evals.lm_eval.tasks import TASKS, filler
from hybridattn.evals.lm_eval.tasks.grid import counter
from hybridattn.measure.output_folder import RESULTS, check_output, written_aside
from hybridattn.measure.provenance import commit, installed_version, json_sha256, provenance
from lm_eval._cli import HarnessCLI
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import setup_logging


def evaluate(
    model: str,
    flags: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    out: Path = Path("reports/eval"),
    allow_truncation: bool = False,
    trained_length: int | None = None,
) -> bool:
    """Score a checkpoint with lm-eval; write ``results.json``, ``report.md``, a heat map per task and lm-eval's files.

    Answers are kept beside ``out`` until the run is through, so that the same command goes on where it was interrupted.

    Args:
        model: folder of any Hugging Face checkpoint of a causal language model, or its name on the Hub.
        flags: flags of ``lm_eval run``, ``--tasks`` among them.
        lengths: tokens of prompt and answer; by default `grid.LENGTHS`, up to the longest input of the model.
        out: the folder to write, whole or not at all; an earlier report there is replaced.
        allow_truncation: whether to go on when prompts are longer than the model's input.
        trained_length: tokens that the model was trained on; bits per token by position are then measured as well, at
            that length and up to 16 times it.

    Returns:
        Whether the model was scored; if not, the reason was printed.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what was given.
    """
    check_output(out)
    setup_logging()
    args = parse(flags)
    if not (args.tasks or args.config):
        raise ValueError("tasks: expected names of tasks or groups such as recall_offline, got none")
    args.model_args = {"pretrained": model, "allow_truncation": allow_truncation, **(args.model_args or {})}
    if "max_length" not in args.model_args:
        args.model_args["max_length"] = max(longest_input(args.model_args), *(lengths or [0]))
    if args.model_args["max_length"] < 1:
        raise ValueError(
            "lengths: expected --lengths, or max_length in --model_args, where neither configuration nor tokenizer "
            f"names the longest input, got neither for {model}"
        )
    if trained_length is not None and trained_length < 1:
        raise ValueError(f"trained_length: expected a positive number of tokens, got {trained_length}")
    if lengths:
        args.metadata = {"max_seq_lengths": list(lengths), **(args.metadata or {})}
    args.include_path = [TASKS, *([args.include_path] if args.include_path else [])]
    args.log_samples = True
    kept = Path(f"{os.path.abspath(out)}.answers_{fingerprint(args.model_args)}")
    args.use_cache = f"{args.use_cache}_{kept.name.rpartition('_')[2]}" if args.use_cache else str(kept / "answers")
    try:
        with written_aside(out) as folder:
            args.output_path = str(folder / "lm_eval")
            args.func(args)
            report(folder, args, trained_length)
    except UnsoundError as error:
        print(f"hybridattn: {error}", file=sys.stderr)
        return False
    shutil.rmtree(kept, ignore_errors=True)
    print(f"\n{(out / 'report.md').read_text(encoding='utf-8')}\nIn {out}: {', '.join(sorted(os.listdir(out)))}")
    return True


def parse(flags: Sequence[str]) -> Namespace:
    """What lm-eval's own command line makes of the flags; it reads them from ``sys.argv`` alone."""
    before, sys.argv = sys.argv, ["lm_eval", "run", "--model", "hybridattn", *flags]
    try:
        return HarnessCLI().parse_args()
    finally:
        sys.argv = before


def longest_input(model_args: dict[str, Any]) -> int:
    """The longest input that a checkpoint or its tokenizer names, in tokens; 0 if none, where lm-eval takes 2048."""
    trust = {"trust_remote_code": bool(model_args.get("trust_remote_code"))}
    config = AutoConfig.from_pretrained(model_args["pretrained"], **trust)
    tokenizer = AutoTokenizer.from_pretrained(model_args.get("tokenizer", model_args["pretrained"]), **trust)
    return resolve_max_length(config, tokenizer, default=0)


def fingerprint(model_args: dict[str, Any]) -> str:
    """A name for the answers of one model: its arguments, its files, and the code that runs it."""
    folder = Path(model_args["pretrained"])
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = {name: installed_version(name) for name in ("hybridattn", "torch", "transformers")}
    return json_sha256([model_args, stats, versions, commit(Path(__file__))])[:16]


def report(folder: Path, args: Namespace, trained_length: int | None = None) -> None:
    """Write our files from those of lm-eval, which lie in ``folder / "lm_eval"``."""
    (written,) = (folder / "lm_eval").rglob("results_*.json")
    aggregated = json.loads(written.read_text(encoding="utf-8"))
    samples = dict(scores.read_samples(folder / "lm_eval"))
    tasks = {task: scores.summary(rows) for task, rows in samples.items() if "contains" in rows[0]}
    config = {
        name: getattr(args, name, None)
        for name in ("model_args", "metadata", "tasks", "limit", "num_fewshot", "batch_size", "gen_kwargs", "seed")
    }
    config["trained_length"] = trained_length
    config["lm_eval"] = installed_version("lm-eval")
    config["filler_sha256"] = filler.sha256() if any("cells" in found for found in tasks.values()) else None
    results = {
        "provenance": provenance(config),
        "model": args.model_args["pretrained"],
        "device": aggregated["config"]["device_name"],
        "parity": aggregated["config"]["parity"],
        "truncated": count_truncated(samples, args.model_args),
        "tasks": tasks,
        "positions": None if trained_length is None else positions_of(args.model_args, trained_length),
        "metrics": aggregated["results"],
    }
    for task, found in tasks.items():
        if panels := scores.panels(found):
            heatmap.draw(panels, folder / f"{task}.png", title=f"{task}: {found['contains']:.3f}")
    (folder / "report.md").write_text(scores.report(results), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def positions_of(model_args: dict[str, Any], trained_length: int) -> dict[str, Any]:
    """Bits per token by position of the model that lm-eval was given."""
    options = {name: model_args[name] for name in ("trust_remote_code", "dtype") if name in model_args}
    return positions.extrapolation_of(model_args["pretrained"], trained_length, **options)


def count_truncated(samples: dict[str, list[dict[str, Any]]], model_args: dict[str, Any]) -> int:
    """Prompts that lost tokens; those of an interrupted run, which the model was not asked again, included."""
    if not model_args["allow_truncation"]:
        return 0  # else there would be no results
    count = counter(
        model_args.get("tokenizer", model_args["pretrained"]),
        bool(model_args.get("trust_remote_code")),
        model_args.get("add_bos_token"),
    )
    asked = [list(each.values()) for rows in samples.values() for row in rows for each in row["arguments"].values()]
    return truncated([request for request in asked if len(request) == 2], count, model_args["max_length"])
