"""Every kernel, compiled for GPUs that are not there: no spills, wide loads where designed, few instructions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED
from tools.offline import compile as offline
from tools.offline.compile import TARGETS, Compiled, OfflineCase, compile_case

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).parent.parent
CUDA_TARGETS = [name for name, (backend, *_) in TARGETS.items() if backend == "cuda"]
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are interpreted here, not compiled")


@triton.jit
def _scale_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):  # noqa: N803
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + cells, factor * tl.load(x_ptr + cells, mask=cells < count), mask=cells < count)


@triton.jit
def _wide_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    cells = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cells).to(tl.float64)
    tl.store(out_ptr + cells, (x * x + 1.0).to(tl.float32))


@triton.jit
def _running_total_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    cells = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cells)
    total = tl.sum(x)  # keeps all of x alive
    tl.store(out_ptr + cells, x * total)


def scale_case(**changed: object) -> OfflineCase:
    options: dict = {
        "name": "scale",
        "kernel": _scale_kernel,
        "signature": {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32", "factor": "fp32"},
        "constexprs": {"BLOCK": 1024},
        "divisible_by_16": ("x_ptr", "out_ptr", "count"),
        "num_warps": 4,
        "elements": 1024,
        "bytes_per_element": 8.0,
        "budget": 20.0,
        "needs": (r"ld\.global\S*\.v4", r"st\.global\S*\.v4"),
    }
    return OfflineCase(**(options | changed))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Compiled]]:
    """All cases of all ops, compiled in one process without the interpreter, by op and target."""
    path = tmp_path_factory.mktemp("offline") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.offline.compile", "--output", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), f"{command} failed:\n{run.stdout}{run.stderr}"
    results: dict[tuple[str, str], list[Compiled]] = {}
    for result in json.loads(path.read_text())["results"]:
        results.setdefault((result["op"], result["target"]), []).append(Compiled(**result))
    return results


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", offline.ops())
def test_kernels_compile_within_their_budgets(
    op: str, target: str, compiled: dict[tuple[str, str], list[Compiled]]
) -> None:
    problems = [f"{result.case}: {what}" for result in compiled[op, target] for what in result.problems()]
    assert not problems, "\n".join(problems)


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_measures_a_kernel(target: str) -> None:
    result = compile_case(scale_case(), target, "scale")
    assert result.problems() == []
    assert 4 <= result.registers <= 64
    assert result.shared == 0
    # 1,024 elements on 4 warps are 8 a thread (4 on a warp of 64): a load, a product and a store for each four.
    threads = 4 * TARGETS[target][2]
    assert 12 <= result.instructions <= 100
    assert result.instructions_per_element == result.instructions * threads / 1024
    assert result.floor_us == pytest.approx(2**24 * 8 / 3.0e12 * 1e6)


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_finds_spills(target: str) -> None:
    # 512 values a thread: CUDA has 255 registers, an MI300 512, and some hold addresses.
    block = 512 * TARGETS[target][2]
    case = scale_case(
        name="spills",
        kernel=_running_total_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
        constexprs={"BLOCK": block},
        divisible_by_16=("x_ptr", "out_ptr"),
        num_warps=1,
        elements=block,
        budget=1e9,
        needs=(),
    )
    result = compile_case(case, target)
    assert result.spills > 0
    assert [what.split(":")[0] for what in result.problems()] == ["spills"]


@compiles
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_finds_missing_vector_loads(target: str) -> None:
    (problem,) = compile_case(scale_case(divisible_by_16=("out_ptr", "count")), target).problems()
    assert problem == r"no 'ld\\.global\\S*\\.v4' in the PTX"


@compiles
def test_finds_too_many_instructions() -> None:
    (problem,) = compile_case(scale_case(budget=0.5), "sm_90").problems()
    assert problem.endswith("instructions an element, budget 0.5")


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_finds_float64(target: str) -> None:
    case = scale_case(
        name="wide",
        kernel=_wide_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
        divisible_by_16=("x_ptr", "out_ptr"),
        needs=(),
    )
    result = compile_case(case, target)
    elements = 1024 // (4 * TARGETS[target][2])  # of a thread: two conversions and a product with a sum for each
    assert 3 * elements <= result.fp64 <= 4 * elements
    (problem,) = result.problems()
    assert problem.endswith("% of the instructions are float64's, budget 10%")
    assert compile_case(scale_case(), target).fp64 == 0


def test_float64_decides_no_draw_on_the_main_path() -> None:
    """No kernel of the draw at the MNIST size has a budget beyond a tenth but with its rare branch."""
    exempt = {name for name, case in offline.find_cases("sampling").items() if case.fp64_budget > offline.FP64_BUDGET}
    small = {name for name in exempt if "507 blocks" in name}
    assert small == {
        name
        for name in offline.find_cases("sampling")
        if "507 blocks" in name and ("topk" not in name and "main path" not in name)
    }
    for name in small:
        assert offline.find_cases("sampling")[f"{name}, main path"].fp64_budget == offline.FP64_BUDGET


@pytest.mark.parametrize("op", ["patches", "pooling", "views"])
def test_float64_has_no_budget_of_its_own_in_other_ops(op: str) -> None:
    """But where the images are float64 themselves."""
    cases = {name: case for name, case in offline.find_cases(op).items() if not name.startswith("fwd fp64")}
    assert {case.fp64_budget for case in cases.values()} == {offline.FP64_BUDGET}


@compiles
@pytest.mark.parametrize("signature", [{"x_ptr": "*fp32"}, {**scale_case().signature, "y_ptr": "*fp32"}])
def test_refuses_a_signature_that_is_not_the_kernels(signature: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"case 'scale' names .*arguments are \['x_ptr', 'out_ptr', 'count'"):
        compile_case(scale_case(signature=signature), "sm_90")


@compiles
@pytest.mark.parametrize("name", ["fwd uint8 1500 -> 180", "fwd fp32 1280 -> 384", "bwd fp32 1280 -> 384"])
def test_a_view_compiles_with_numbers_in_float64(name: str) -> None:
    """As which a compiler of whole models passes Python's floats to a kernel."""
    case = offline.find_cases("views")[name]
    signature = {arg: "fp64" if arg.startswith(("mean", "std")) else kind for arg, kind in case.signature.items()}
    assert "fp64" in signature.values()
    assert not compile_case(replace(case, signature=signature, budget=1e9), "sm_90").problems()


def test_the_table_shows_what_failed() -> None:
    failed = Compiled("gather", "bad", "sm_90", error="CompilationError: no")
    good = Compiled("gather", "good", "sm_90", 32, 1024, 0, 50, 6.25, 8.0, 44.7, "2^24 elements", 20.0)
    lines = offline.table([good, failed]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "gather", "good", "sm_90", "32", "1024", "0", "6.2", "20", "0%", "8", "44.7 (2^24 elements)",
    ]  # fmt: skip
    assert lines[3].count("failed") == 8
    assert failed.problems() == ["does not compile: CompilationError: no"]
