"""The generated tasks in lm-eval: an oracle that reads the prompt scores 1, random guesses score chance."""

import random
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybridattn.evals.lm_eval.tasks import TASKS, filler, kv, niah, phonebook, records
from hybridattn.evals.lm_eval.tasks.prompt import FORMS

LENGTHS = [900, 1700]
GENERATORS: dict[str, Callable[..., dict[str, Any]]] = {
    "kv": kv.dataset,
    "phonebook": phonebook.dataset,
    **{f"niah_{kind}": lambda kind=kind, **options: niah.dataset(kind, **options) for kind in niah.KINDS},
    "records": records.dataset,
}


def look_up(prompt: str) -> str:
    """Return the answer to the prompt's last line, extracted from the prompt."""
    context, _, cloze = prompt.rpartition("\n")
    if needles := re.fullmatch(r"The magic numbers? of (.*) (?:is|are)", cloze):
        keys = re.split(", | and ", needles[1])
        return " ".join(re.findall(rf"^The magic number of (?:{'|'.join(keys)}) is (\d+)\.$", context, re.MULTILINE))
    if attribute := re.fullmatch(r"The (.*) of (\w+ \w+) is", cloze):
        lines = context.partition(f"## {attribute[2]}\n")[2].splitlines()[: len(records.ATTRIBUTES)]
        label = attribute[1].capitalize()
        forms = rf"{label}: (.*)|\| {label} \| (.*) \||{re.escape(cloze)} (.*)\."
        (found,) = [match for line in lines if (match := re.fullmatch(forms, line))]
        return found[found.lastindex]
    found = set(re.findall(rf"^{re.escape(cloze)} (\d+)$", context, re.MULTILINE))
    assert len(found) == 1
    return found.pop()


def values_of(prompt: str) -> list[str]:
    """Return all values in the prompt."""
    context, _, cloze = prompt.rpartition("\n")
    if cloze.startswith("The magic"):
        return re.findall(r"^The magic number of \w+ is (\d{7})\.$", context, re.MULTILINE)
    if cloze.startswith("The "):
        sections = re.findall(r"^## [A-Z][a-z]+ [A-Z][a-z]+\n((?:.+\n){6})", context + "\n", re.MULTILINE)
        styles = r"[A-Z][a-z ]+: (.*)|\| [A-Z][a-z ]+ \| (.*) \||The [a-z ]+ of \w+ \w+ is (.*)\."
        matches = [re.fullmatch(styles, line) for section in sections for line in section.splitlines()]
        return [match[match.lastindex] for match in matches]
    pattern = r"^[a-z]{6}: (\d{4})$" if cloze.islower() else r"^[A-Z][a-z]{3} [A-Z][a-z]{5}: (\d{7})$"
    return re.findall(pattern, context, re.MULTILINE)


OPTIONS = {"max_seq_lengths": LENGTHS, "rows_per_cell": 3, "loads": [1, 4, 9]}


@pytest.mark.slow
def test_an_oracle_answers_every_row_of_every_task(evaluate: Callable[..., dict[str, Any]], tokenizer: str):
    results = evaluate(look_up, ["recall_offline"], tokenizer=tokenizer, **OPTIONS)
    metrics = {task: found.get("contains,none") for task, found in results["results"].items()}
    assert metrics.pop("recall_offline", None) is None  # a group has no mean score
    assert metrics == {
        f"hybridattn_{name}{suffix}": 1.0 for name in GENERATORS for suffix in ("", "_twice", "_question_first")
    }


@pytest.mark.slow
def test_guessers_score_at_chance(evaluate: Callable[..., dict[str, Any]], tokenizer: str):
    rng = random.Random(0)

    def scored(guess: Callable[[str], str]) -> dict[str, list[dict[str, Any]]]:
        return evaluate(guess, ["recall_offline"], tokenizer=tokenizer, **OPTIONS)["samples"]

    samples = scored(lambda prompt: rng.choice(values_of(prompt)))
    blind = scored(lambda prompt: str(rng.randrange(10**6, 10**7)))
    for task, rows in samples.items():
        chances = [row["doc"]["chance"] for row in rows]
        expected, spread = sum(chances), sum(chance * (1 - chance) for chance in chances) ** 0.5
        got = sum(row["contains"] for row in rows)
        assert abs(got - expected) <= 3.5 * spread, f"{task}: {got} of {len(rows)}, expected {expected} +- {spread}"
        assert sum(row["contains"] for row in blind[task]) <= 1


@pytest.fixture(scope="module")
def merging_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BPE tokenizer, trained on the filler, that adds a special token to every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([filler.excerpt(0, 300_000)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("merging")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("kind", ["tokenizer", "merging_tokenizer"])
def test_prompts_fill_their_length_and_never_exceed_it(name: str, form: str, kind: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    count = AutoTokenizer.from_pretrained(folder)
    rows = GENERATORS[name](tokenizer=folder, max_seq_lengths=LENGTHS, rows_per_cell=1, form=form)["test"]
    assert {row["length"] for row in rows} == set(LENGTHS)
    for row in rows:
        used = len(count(row["prompt"]).input_ids) + 48
        assert row["tokens"] + 48 == used
        assert 0.98 * row["length"] <= used <= row["length"]


def test_special_tokens_count_as_the_model_will_add_them(merging_tokenizer: str):
    options = {"tokenizer": merging_tokenizer, "max_seq_lengths": 900, "rows_per_cell": 1}
    count = AutoTokenizer.from_pretrained(merging_tokenizer)
    rows = niah.dataset("single", add_bos_token=False, **options)["test"]
    assert all(row["tokens"] == len(count(row["prompt"]).input_ids) - 1 for row in rows)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_follow_from_their_seed_alone(name: str, tokenizer: str):
    def cells(**options: Any) -> dict[tuple, list[str]]:
        made = GENERATORS[name](tokenizer=tokenizer, **{"rows_per_cell": 2, "loads": [1, 4], **options})["test"]
        prompts: dict[tuple, list[str]] = {}
        for row in made:
            prompts.setdefault((row["length"], row["depth"], row["load"]), []).append(row["prompt"])
        return prompts

    both, other = cells(max_seq_lengths=LENGTHS), cells(max_seq_lengths=LENGTHS, seed=1)
    assert both == cells(max_seq_lengths=LENGTHS)
    assert not set(chain(*both.values())) & set(chain(*other.values()))
    one = cells(max_seq_lengths=LENGTHS[1], depths=[0.5])  # a cell does not depend on the other cells
    assert one == {key: prompts for key, prompts in both.items() if key[:2] == (LENGTHS[1], 0.5)}
    assert all(len(set(prompts)) == len(prompts) for prompts in both.values())


@pytest.mark.parametrize("name", ["kv", "phonebook", "niah_single", "niah_multiquery", "records"])
def test_answers_are_at_the_requested_depth(name: str, tokenizer: str):
    rows = GENERATORS[name](tokenizer=tokenizer, max_seq_lengths=8000, rows_per_cell=1, loads=[9], depths=[0, 0.5, 1])[
        "test"
    ]
    for row in rows:
        answer = row["answers"][0]
        assert row["prompt"].find(answer) / len(row["prompt"]) == pytest.approx(row["depth"], abs=0.1)


def test_all_forms_of_a_task_have_the_same_facts(tokenizer: str):
    asked = [
        [
            (row["depth"], row["answers"])
            for row in kv.dataset(tokenizer=tokenizer, max_seq_lengths=900, loads=[4], form=form)["test"]
        ]
        for form in FORMS
    ]
    assert asked[0] == asked[1] == asked[2]


def test_loads_that_do_not_fit_are_left_out(tokenizer: str):
    rows = kv.dataset(tokenizer=tokenizer, max_seq_lengths=LENGTHS, loads=[4, 90], rows_per_cell=1)["test"]
    assert {(row["length"], row["load"]) for row in rows} == {(900, 4), (1700, 4), (1700, 90)}


def test_usual_lengths_are_those_the_model_can_read(tokenizer: str):
    rows = niah.dataset("single", tokenizer=tokenizer, max_length=2048, rows_per_cell=1)["test"]
    assert set(rows["length"]) == {1024}


def test_bad_options_are_named(tokenizer: str):
    with pytest.raises(ValueError, match=r"tokenizer: expected a folder or name, .* got None"):
        kv.dataset()
    with pytest.raises(ValueError, match=r"max_seq_lengths: expected integers above 48 .* max_length=500"):
        kv.dataset(tokenizer=tokenizer, max_length=500)
    with pytest.raises(ValueError, match=r"max_seq_lengths: expected .* hold the facts of kv \(once\), got 60"):
        kv.dataset(tokenizer=tokenizer, max_seq_lengths=60)
    with pytest.raises(ValueError, match=r"depths: expected numbers from 0 to 1, got \[50\]"):
        kv.dataset(tokenizer=tokenizer, depths=[50])
    with pytest.raises(ValueError, match="form: expected one of"):
        kv.dataset(tokenizer=tokenizer, form="thrice")


def test_groups_name_every_task_once():
    files = [path for path in Path(TASKS).glob("*.yaml") if not path.name.startswith(("_", "recall_"))]
    ours = {yaml.load(path.read_text().replace("!function", ""), yaml.SafeLoader)["task"] for path in files}
    groups = [yaml.safe_load((TASKS / f"recall_{name}.yaml").read_text())["task"] for name in ("offline", "hub")]
    named = [task for group in groups for task in group]
    assert len(named) == len(set(named))
    assert set(named) - ours == {"swde", "fda", "squad_completion"}  # tasks of lm-eval itself
    assert ours <= set(named)
