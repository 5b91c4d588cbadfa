"""Every command on every page runs here, on small data, or is read by its own parser and has a reason why not."""

import dataclasses
import functools
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from ats.datasets.synthetic import slides
from ats.datasets.synthetic.folder import integers
from ats.datasets.synthetic.pyramid import write_pyramid
from ats.datasets.synthetic.scenes import draw_biopsy
from ats.datasets.synthetic.write import write_colon_cancer, write_german
from ats.experiments import cost
from ats.experiments.colon_cancer import ColonCancerConfig
from ats.experiments.commands import demo, synthesise
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig
from ats.experiments.gigapixel_mnist import GigapixelMNISTConfig
from ats.experiments.megapixel_mnist import MegapixelMNISTConfig
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.reproduce import costs
from ats.experiments.study.attention import AttentionOptions
from tests.page_commands import ROOT, PageCommand, commands, problem, section, shown
from tests.test_image_experiments import CPU

RUN = "run whole, on small data"
WORKFLOW = "run as they stand, by the workflow of the forge"
INSTALLS = "read: they install; `make release-check` installs what is released"
HOURS = "read: they train for hours, or report on what did"
MINUTES = "read: they time, compile, test or write large images for minutes"
GPU = "read: they need a GPU, or several devices"
WRITES = "read: they write into the repository"
YOURS = "read: they run a program of yours"

READ = {
    "ats reproduce table1 --data FOLDER": HOURS,
    "ats reproduce table1 --preset quick --seeds 3": HOURS,
    "ats reproduce table1 --precision bf16-mixed": HOURS,
    'ats reproduce table1 --seeds 1 --methods ATS-10 "Deep MIL"': HOURS,
    "ats reproduce table1 --no-train": HOURS,
    "ats reproduce figures --no-train": HOURS,
    "ats reproduce mnist --minutes 60 --seeds 1": HOURS,
    "ats train gigapixel-mnist --preset demo --data.image-size 32768 --output runs/gigapixel": HOURS,
    "ats train gigapixel-mnist --preset demo --data.image-size 32768 --optim.epochs 36 --data.clear-epochs 9 "
    "--data.rising-epochs 7 --output runs/gigapixel-36": HOURS,
    "ats reproduce table2-all --seeds 1": HOURS,
    'ats reproduce table1 --methods "CNN 0.5" "Deep MIL"': HOURS,
    "ats reproduce table1 --seeds 5 --precision bf16-mixed --methods ATS-10 ATS-50 U-10 U-50": HOURS,
    'ats reproduce table1 --seeds 1 --precision bf16-mixed --methods "CNN 1" "Gated Deep MIL"': HOURS,
    'ats reproduce table2 --seeds 1 --methods ATS-5 "CNN 0.3" "Deep MIL" U-5': HOURS,
    "ats reproduce table2 --seeds 1 --precision bf16-mixed "
    '--methods ATS-10 U-10 "CNN 0.5" "CNN 1" "Gated Deep MIL"': HOURS,
    'ats reproduce table2-all --seeds 1 --precision bf16-mixed --methods U-5 "Deep MIL" ATS-10': HOURS,
    "ats reproduce mnist --seeds 1 --precision bf16-mixed --minutes 10 "
    "--methods U-10 ATS-5 ATS-10 ATS-25 ATS-50 ATS-100": HOURS,
    "ats reproduce mnist --preset view-300 --seeds 1 --precision bf16-mixed --methods ATS-10": HOURS,
    "ats reproduce figures": HOURS,
    "python -m bench.gigapixel_mnist --methods nested flat --draws 10x3 --test-sizes 32768 "
    "--output results/gigapixel-mnist": HOURS,
    "python -m bench.gigapixel_mnist --compare --minutes 8 --output results/gigapixel-mnist-flat": HOURS,
    "ats synthesise gigapixel-mnist IMAGES --images 40": MINUTES,
    "ats predict runs/gigapixel-mnist-demo-ats-10x2-seed-0 IMAGES/test-*.tif": MINUTES,
    "ats train images --data.manifest IMAGES/labels.csv --output runs/files --data.storage disk "
    "--model.levels 128:10:4 8:2:4 --model.patch-size 50": MINUTES,
    "python -m bench.bench_small --against ../earlier": MINUTES,
    "python -m bench.recipes": MINUTES,
    "python -m bench.busy_threads": MINUTES,
    "make bench": MINUTES,
    'make bench "BENCH_ARGS=-k table1"': MINUTES,
    "make bench-compare before.json after.json": MINUTES,
    'make kernels "KERNELS_ARGS=--op sampling --target sm_90 --output kernels.json kernels.md"': MINUTES,
    "make gpu-check": GPU,
    "ats train megapixel-mnist --trainer.devices 2": GPU,
    "ats train megapixel-mnist --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp": GPU,
    "make coverage": MINUTES,
    "make format": WRITES,
    "make notebooks": WRITES,
}
"""Commands that are only read, and why: the whole line, as `PageCommand.text` has it. Any `pip install` is."""

ELSEWHERE = {
    ("docs/images.md", "## Train on your own images"): "tests/test_images_docs.py",
    ("docs/images.md", "## Networks of timm's"): "tests/test_timm.py",
}
"""Sections whose commands other tests take from the page and run."""


class Scenario(NamedTuple):
    """How a page's commands are run: what there is before, and words that stand for less, or for what a reader has."""

    before: Callable[[pytest.MonkeyPatch], None]
    words: Mapping[str, str] = {}


def small(config: ExperimentConfig) -> ExperimentConfig:
    """A preset with images, epochs and patches for a test."""
    model, data = config.model, config.data
    optim = dataclasses.replace(config.optim, epochs=1, updates=0, batch_size=4)
    if config.experiment == "megapixel-mnist":
        data = MegapixelMNISTConfig(digits="bundled", image_size=450, n_noise=5, train_images=8, test_images=4)
    elif config.experiment == "gigapixel-mnist":
        sizes: dict[str, Any] = {"image_size": 2048, "place_size": 256, "place_noise": 1, "n_noise": 10}
        data = GigapixelMNISTConfig(digits="bundled", train_images=4, test_images=2, **sizes)
    elif config.experiment == "colon-cancer":
        data, model = ColonCancerConfig(folds=3), dataclasses.replace(model, grid_step=50)
    return dataclasses.replace(config, data=data, model=model, optim=optim, trainer=CPU)


def trained(line: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A run that a page takes for granted."""

    def before(patch: pytest.MonkeyPatch) -> None:
        assert run(line.split()) == 0

    return before


def two_runs(patch: pytest.MonkeyPatch) -> None:
    trained("train megapixel-mnist --preset quick")(patch)
    for name in ("a", "b"):
        shutil.copytree("runs/megapixel-mnist-quick-ats-10-seed-0", f"runs/{name}")


def small_demo(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo.run_demo, "__defaults__", (EXPERIMENTS["megapixel-mnist"].presets["demo"],))


def few_of(write: Callable[..., None], folder: Path, train: int, test: int, **more: object) -> None:
    """Write six images of each split."""
    write(folder, 6, 6, **more)


def small_writers(patch: pytest.MonkeyPatch) -> None:
    """What is synthesised has few images and pixels; the slide that the pages name is there."""
    sizes: dict[str, dict[str, Any]] = {
        "write_german": {"size": (200, 340)},
        "write_swedish": {"size": (200, 340)},
        "write_slides": {},
    }
    for name, size in sizes.items():
        patch.setattr(synthesise, name, functools.partial(few_of, getattr(synthesise, name), **size))
    patch.setattr(synthesise, "write_colon_cancer", lambda to, _, **more: write_colon_cancer(to, 6, size=100, **more))
    patch.setattr(slides, "_SIDES", (440, 464))
    tissue = np.asarray(draw_biopsy(integers(2, "slide"), (984, 560)))
    write_pyramid(Path("CMU-1-Small-Region.svs"), tissue, 0.5)


def the_papers(patch: pytest.MonkeyPatch) -> None:
    """Synthetic stand-ins, where the pages have the data, and costs that are measured on small images."""
    patch.setenv("ATS_DATA", str(Path.cwd()))
    write_colon_cancer("colon-cancer", 12, size=100)
    write_german("FullIJCNN2013", 10, 10, size=(200, 340))
    shutil.copy("colon-cancer/Classification/img1/img1.png", "image.png")
    quick = functools.partial(cost.measure_seconds, rounds=1, image_size=(100, 100))
    patch.setattr(costs, "measure_bytes", lambda config, device: 1)
    patch.setattr(costs, "measure_seconds", quick)


def large_images(patch: pytest.MonkeyPatch) -> None:
    """Images with enough cells of 512 pixels."""
    lines = ["path,label,split"]
    for index in range(6):
        pixels = np.full((2048, 2048, 3), 220, np.uint8)
        pixels[300:400, 300 : 400 + 10 * index] = (200, 30, 30) if index % 2 else (30, 30, 200)
        write_pyramid(Path(f"{index}.tif"), pixels, 0.5)
        lines.append(f"{index}.tif,{'red' if index % 2 else 'blue'},{'train' if index < 4 else 'test'}")
    Path("labels.csv").write_text("\n".join(lines) + "\n")
    shutil.copy("5.tif", "slide.svs")


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The page needs none."""


MNIST = "runs/megapixel-mnist-quick-ats-10-seed-0"
CUT = "slides/slides"
SCENARIOS = {
    "README.md": Scenario(nothing),
    "docs/data.md": Scenario(small_writers),
    "docs/experiments.md": Scenario(the_papers),
    "docs/gigapixel-mnist.md": Scenario(nothing),
    "docs/inference.md": Scenario(trained("train megapixel-mnist --preset quick"), {"runs/…": MNIST}),
    "docs/megapixel-mnist.md": Scenario(small_demo),
    "docs/nested.md": Scenario(large_images, {"runs/…": "runs/images-modern-ats-10x2-seed-0"}),
    "docs/results.md": Scenario(the_papers),
    "docs/slides.md": Scenario(
        small_writers, {"30": "1", f"{CUT}/0161.tif": f"{CUT}/0007.tif", f"{CUT}/0162.tif": f"{CUT}/0008.tif"}
    ),
    "docs/study-attention.md": Scenario(two_runs, {"200": "4"}),
    "docs/troubleshooting.md": Scenario(nothing, {"100": "1", "200": "2"}),
}
"""By page: its commands are run one after the other, but for those in `READ`, and those that were run before."""


@functools.cache
def lines() -> tuple[PageCommand, ...]:
    """The commands of blocks; those in sentences are read alone."""
    return tuple(command for command in commands() if not command.inline)


@functools.cache
def in_workflow() -> frozenset[str]:
    """Targets that the forge makes."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    return frozenset(step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step)


@functools.cache
def run_by() -> dict[str, str]:
    """By text, the page whose scenario runs a command, or the test that runs a section: the first that does."""
    found = {each.text: test for place, test in ELSEWHERE.items() for each in shown(section(*place))}
    for page in SCENARIOS:
        for each in lines():
            if each.page == page and each.words[0] in ("ats", "python") and not reason(each):
                found.setdefault(each.text, page)
    return found


def reason(command: PageCommand) -> str:
    """Why a command is only read, or ""."""
    if command.words[0] == "pip":
        return INSTALLS
    if command.words[0] == "python" and "/" not in command.words[1] and command.words[1] != "-m":
        return YOURS
    return READ.get(command.text, "")


def how(command: PageCommand) -> str:
    """Where a command stands in the table of CONTRIBUTING.md; "" where nobody has said."""
    if command.words[0] == "make" and command.words[1] in in_workflow():
        return WORKFLOW
    return reason(command) or (RUN if command.text in run_by() else "")


def test_every_command_is_run_or_says_why_not() -> None:
    """A new one is run by its page's scenario; where it has none, or it cannot be run, this asks for a reason."""
    unheld = [command.place for command in lines() if not how(command)]
    assert not unheld, f"neither run nor read for a reason; add the page to SCENARIOS, or a line to READ: {unheld}"
    texts = {command.text for command in lines()}
    gone = set(READ) - texts
    assert not gone, f"no page has these any more; remove them from READ: {gone}"
    for (page, heading), test in ELSEWHERE.items():
        assert shown(section(page, heading)), f"{page} has no command below {heading}"
        assert all(name in (ROOT / test).read_text() for name in (Path(page).name, heading)), f"{test} does not run it"


def test_contributors_are_told_how_commands_are_held() -> None:
    """CONTRIBUTING.md's table has a line for each way, with the pages whose blocks have such commands."""
    found: dict[str, list[str]] = {}
    for command in lines():
        found.setdefault(how(command), []).append(Path(command.page).stem)
    ways = (RUN, WORKFLOW, INSTALLS, HOURS, MINUTES, GPU, WRITES, YOURS)
    expected = [f"| {way} | {', '.join(dict.fromkeys(found.get(way, [])))} |" for way in ways]
    told = section("CONTRIBUTING.md", "## Commands on the pages").splitlines()
    rows = [line for line in told if line.startswith("| r")]
    assert rows == expected, "the table should be:\n" + "\n".join(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    ats train images --data.manifst labels.csv", "Unrecognized options: --data.manifst"),
        ("    ats evaluate runs/a --method \\\n        soft  # by hand", "soft"),
        ("    ats train image", "unknown experiment 'image'"),
        ("    ats evaluate runs/a --tolerance 1", "--tolerance and --lead are for --method anytime"),
        ("```sh\n$ ats reproduce table3\n```", "table3"),
        ("Try `ats train images --data.fold`.", "there is no option --data.fold"),
        ("`ats study variances`", "ats study has no variances"),
        ("    make tests", "there is no target tests"),
        ("    make bench BENCH_ARG=-x", "the Makefile has no variable BENCH_ARG"),
        ("    python -m bench.recipe", "there is no bench/recipe.py"),
        ("    python -m bench.recipes --round 3 --fast", "its parser does not take these options"),
        ("    pip install '.[slide]'", "there is no extra slide"),
        ("    pytest tests/test_none.py", "there is no tests/test_none.py"),
        ("    ATS_BACKENDS=cpu python train.py", "nothing reads the variable ATS_BACKENDS"),
        ("    ATS_BACKEND=gpu python train.py", "ATS_BACKEND is one of"),
        ("    docker run ats", "nothing reads docker yet"),
    ],
)
def test_what_is_not_there_is_found(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = shown(text)
    assert expected in problem(command, monkeypatch)


def test_what_is_no_command_is_left_alone() -> None:
    assert not shown("    ats_kernels ← grid\n\n```python\n    make = ats.nn\n```\n`ats` and `make` in words, `pip`.")


@pytest.mark.parametrize("page", SCENARIOS)
def test_a_pages_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for experiment in EXPERIMENTS.values():
        for name, preset in experiment.presets.items():
            monkeypatch.setitem(experiment.presets, name, small(preset))  # type: ignore[arg-type]
    few = {"draws": 3, "batches": 2}
    defaults = tuple(few.get(field.name, field.default) for field in dataclasses.fields(AttentionOptions))
    monkeypatch.setattr(AttentionOptions.__init__, "__defaults__", defaults)
    scenario = SCENARIOS[page]
    scenario.before(monkeypatch)
    own = [command for command in lines() if command.page == page and run_by().get(command.text) == page]
    for number, command in enumerate(own):
        print(command.place)
        stands_for = {"FOLDER": f"FOLDER-{number}", **scenario.words}  # data of its own for each that writes some
        words = [stands_for.get(word, word) for word in command.words if word != "…"]
        words = [each for word in words for each in (sorted(glob(word)) if "*" in word else [word])]
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        else:
            assert run(words[1:]) == 0
        if "--output" in words:
            assert Path(words[words.index("--output") + 1]).exists()
