"""Compile every kernel for GPUs that are not there, and measure what comes out.

Triton needs no GPU to compile, and its package carries the tools that read the result. ``offline_cases()`` of each
op says what is compiled, as it is launched; ``python -m tools.offline.compile`` (``make kernels``) prints the table and
fails where a kernel does not compile, spills, misses an instruction that its design counts on, or needs more
instructions an element, or more of float64's among them, than its budget. docs/kernels.md explains the columns.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = {  # name: what triton's GPUTarget takes
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
H100_BYTES_PER_SECOND = 3.0e12  # one H100's measured copy rate
FP64_BUDGET = 0.1  # of a kernel's instructions: consumer GPUs do float64 at a 64th of float32's rate

# Instructions of float64's units: arithmetic, comparisons, seeds of quotients and roots, conversions from and to it.
_SASS_FP64 = r"D(?:ADD|MUL|FMA|SETP|MNMX|SET)\b|MUFU\.\w*64H|[FI]2[FI]\S*\.F64|DMMA"
_AMD_FP64 = r"v_\w*f64"


@dataclass(frozen=True)
class OfflineCase:
    """One way in which production launches a kernel.

    Attributes:
        name: says how it differs from the op's other cases, e.g. "fwd uint8 -> fp32 NCHW"; unique in its module.
        kernel: the JITFunction.
        signature: argument name -> Triton type ("*fp32", "i32", "i64"), of every argument that is not in `constexprs`.
        constexprs: argument name -> value, None for an optional pointer that is left out.
        divisible_by_16: arguments that Triton finds to be multiples of 16 at launch: aligned pointers, strides.
        num_warps: as launched.
        elements: what one program processes in one pass through its code. A loop's body is counted once, so this is
            the elements of one trip.
        bytes_per_element: that must move to and from memory, all inputs and outputs counted once.
        budget: most instructions an element: the instructions of the code, each counted once, times the program's
            threads, over `elements`. On AMD's, vector and memory instructions: the scalar unit works beside them.
        needs: regular expressions that must be found in the PTX, e.g. r"ld\\.global\\S*\\.v4".
        workload: a workload's name and its number of elements, for the floor.
        amd_budget: the budget on AMD's targets, where the same design takes more there.
        max_registers: of a thread, as launched on NVIDIA's.
        fp64_budget: the largest share of the instructions that may be float64's.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    elements: int
    bytes_per_element: float
    budget: float
    needs: tuple[str, ...] = ()
    workload: tuple[str, int] = ("2^24 elements", 2**24)
    amd_budget: float | None = None
    max_registers: int | None = None
    fp64_budget: float = FP64_BUDGET


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one case for one target; sizes in bytes."""

    op: str
    case: str
    target: str
    registers: int = 0  # a thread
    shared: int = 0  # a program
    spills: int = 0  # of local memory a thread, for spilled registers or anything else
    instructions: int = 0  # in the code, loops counted once; see OfflineCase.budget
    instructions_per_element: float = 0.0
    bytes_per_element: float = 0.0
    floor_us: float = 0.0  # of the workload on an H100
    workload: str = ""
    budget: float = 0.0
    missing: tuple[str, ...] = ()  # of the case's needs
    fp64: int = 0  # instructions of float64 among them
    fp64_budget: float = FP64_BUDGET
    error: str = ""  # of the compiler

    def problems(self, budgets: bool = True) -> list[str]:
        """What is wrong with it, in words; empty where all is well. Budgets are written for the pinned Triton."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = [f"no {pattern!r} in the PTX" for pattern in self.missing]
        if self.spills:
            found.append(f"spills: {self.spills} bytes of local memory a thread")
        if budgets and self.instructions_per_element > self.budget:
            found.append(f"{self.instructions_per_element:.1f} instructions an element, budget {self.budget:g}")
        if budgets and self.fp64 > self.fp64_budget * self.instructions:
            found.append(f"{self.fp64_share:.0%} of the instructions are float64's, budget {self.fp64_budget:.0%}")
        return found

    @property
    def fp64_share(self) -> float:
        """Of the instructions."""
        return self.fp64 / max(1, self.instructions)


def compile_case(case: OfflineCase, target: str, op: str = "") -> Compiled:
    """Compile `case` for one of `TARGETS` and measure it. Must not run in a process with TRITON_INTERPRET set.

    Raises:
        ValueError: a signature that does not name the kernel's arguments.
        Exception: whatever Triton raises where the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, _, warp_size = TARGETS[target]
    arguments = list(case.kernel.arg_names)
    named = case.signature.keys() | case.constexprs.keys() | set(case.divisible_by_16)
    if named - set(arguments) or set(arguments) - case.signature.keys() - case.constexprs.keys():
        raise ValueError(f"case {case.name!r} names {sorted(named)}, but the kernel's arguments are {arguments}")
    source = ASTSource(
        case.kernel,
        {name: "constexpr" if name in case.constexprs else case.signature[name] for name in arguments},
        constexprs=case.constexprs,
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    options = {"num_warps": case.num_warps}
    if backend == "cuda" and case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if backend == "cuda":
        registers, spills, instructions, fp64 = _inspect_cubin(compiled.asm["cubin"])
        missing = tuple(pattern for pattern in case.needs if not re.search(pattern, compiled.asm["ptx"]))
        budget = case.budget
    else:
        registers, spills, instructions, fp64 = _inspect_amdgcn(compiled.asm["amdgcn"])
        missing = ()
        budget = case.budget if case.amd_budget is None else case.amd_budget
    threads = warp_size * case.num_warps
    workload, elements = case.workload
    return Compiled(
        op=op,
        case=case.name,
        target=target,
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        instructions=instructions,
        instructions_per_element=instructions * threads / case.elements,
        bytes_per_element=case.bytes_per_element,
        floor_us=1e6 * elements * case.bytes_per_element / H100_BYTES_PER_SECOND,
        workload=workload,
        budget=budget,
        missing=missing,
        fp64=fp64,
        fp64_budget=case.fp64_budget,
    )


def _inspect_cubin(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers, bytes of local memory, instructions, those of float64."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    resources = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # NOPs and a jump to itself pad the code to a multiple of the cache line.
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S.*;", sass, re.MULTILINE)
    padding = re.findall(r"^(\.L_x_\d+):\s*/\*[0-9a-f]{4,}\*/\s+BRA `\(\1\)", sass, re.MULTILINE)
    fp64 = re.findall(rf"^\s*/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?(?:{_SASS_FP64})", sass, re.MULTILINE)
    return resources["REG"], resources["STACK"] + resources["LOCAL"], len(code) - len(padding), len(fp64)


def _inspect_amdgcn(assembly: str) -> tuple[int, int, int, int]:
    """Registers, bytes of local memory, vector and memory instructions, those of float64.

    A spilled scalar register goes to a lane of a vector register, not to memory, and is counted there.
    """
    metadata = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    code = re.findall(r"^\s+(?:v|ds|global|buffer|flat|scratch)_(?!nop)\w+", assembly, re.MULTILINE)
    fp64 = re.findall(rf"^\s+{_AMD_FP64}", assembly, re.MULTILINE)
    return metadata["vgpr_count"], metadata["private_segment_fixed_size"], len(code), len(fp64)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ops() -> list[str]:
    """The folders of the ops that have kernels, without importing them."""
    import ats_kernels

    root = Path(next(iter(ats_kernels.__path__)))
    return sorted(path.parent.name for path in root.glob("*/triton.py"))


def find_cases(op: str) -> dict[str, OfflineCase]:
    """The cases of one op by name, from the module beside this one that is named as the op's folder is."""
    module = importlib.import_module(f"tools.offline.{op}")
    cases: list[OfflineCase] = module.offline_cases()
    by_name = {case.name: case for case in cases}
    if len(by_name) < len(cases):
        raise ValueError(f"case names of {op} are not unique: {[case.name for case in cases]}")
    return by_name


def _compile_named(op: str, name: str, target: str) -> Compiled:
    """In a worker process: a JITFunction does not travel between processes, its name does."""
    try:
        return compile_case(find_cases(op)[name], target, op)
    except Exception as error:
        return Compiled(op, name, target, error=f"{type(error).__name__}: {error}")


def compile_all(only_ops: Sequence[str], targets: Sequence[str], workers: int = 2) -> list[Compiled]:
    """Compile all cases, each in a worker process; what Triton's cache holds is not compiled again."""
    os.environ.pop("TRITON_INTERPRET", None)
    jobs: list[tuple[str, str, str]] = []
    for op in only_ops:
        try:
            names = list(find_cases(op))
        except Exception:  # the workers find the same and report it; the other ops are still compiled
            names = ["offline_cases()"]
        jobs += [(op, name, target) for name in names for target in targets]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_named, *zip(*jobs, strict=True))) if jobs else []


COLUMNS = (
    "op",
    "case",
    "target",
    "registers",
    "shared B",
    "spills B",
    "instr/elem",
    "budget",
    "fp64",
    "bytes/elem",
    "floor µs",
)


def table(results: Sequence[Compiled]) -> str:
    """All results as a Markdown table, readable as text."""
    rows = [list(COLUMNS)]
    for result in results:
        numbers = [f"{result.registers}", f"{result.shared}", f"{result.spills}"]
        numbers += [f"{result.instructions_per_element:.1f}", f"{result.budget:g}"]
        numbers += [f"{result.fp64_share:.0%}", f"{result.bytes_per_element:.3g}"]
        numbers += [f"{result.floor_us:.3g} ({result.workload})"]
        rows.append([result.op, result.case, result.target, *(["failed"] * 8 if result.error else numbers)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.offline.compile", description="Compile all kernels offline.")
    parser.add_argument("--op", nargs="*", default=None, help="ops to compile; all by default")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--ignore-budgets", action="store_true", help="for another Triton than the pinned one")
    parser.add_argument("--output", type=Path, nargs="*", default=[], help="files to write as well, .json or .md")
    options = parser.parse_args(arguments)
    import triton

    results = compile_all(ops() if options.op is None else options.op, options.target, options.workers)
    heading = f"{len(results)} kernels compiled by Triton {triton.__version__}; not run on a GPU"
    print(f"{heading}\n\n{table(results)}")
    for path in options.output:
        record = {"triton": triton.__version__, "results": [asdict(result) for result in results]}
        text = json.dumps(record, indent=1) if path.suffix == ".json" else f"{heading}\n\n{table(results)}"
        path.write_text(text + "\n")
    wrong = [
        f"{result.op}, {result.case}, {result.target}: {what}"
        for result in results
        for what in result.problems(budgets=not options.ignore_budgets)
    ]
    print("\n".join(["", *wrong]), file=sys.stderr)
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main())
