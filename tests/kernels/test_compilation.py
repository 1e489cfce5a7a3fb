"""Every form of the kernels compiles for an H100, which needs no GPU, without spilling registers."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton

from lit_transdiff.kernels import adamw, attention_passes, gelu, norm, norm_passes

DROPOUT = {"THRESHOLD": 429496730, "SCALE": 1 / 0.9}
FLOATS = {"bias", "gate", "weight", "norm_bias", "shift", "scale", "moments", "sums", "inner", "of_rows"}
FLOATS |= {"of_bias", "of_k_bias", "of_v_bias", "shares", "squares"}
SPECIAL = {"seed_ptr": "*i64", "visible_ptr": "*i32", "table_ptr": "*i64"}
SPECIAL |= {"chunks_ptr": "*i32", "row_keys_ptr": "*i32"}
SPECIAL |= {name: "fp32" for name in ("eps", "max_norm", "lr", "shrink", "zero")} | {"norm_ptr": "*fp32"}


def forms() -> list[tuple[str, Any, dict[str, Any], set[str], int, int]]:
    """Name, kernel, constants, pointers that are None, warps and stages."""
    tile = {"R": gelu.GELU_ROWS, "C": gelu.GELU_COLUMNS}
    strip = {"TILES": gelu.GELU_TILES, "STAGES": gelu.GELU_STAGES}
    found = [
        ("gelu_forward", gelu.gelu_forward, {**DROPOUT, **tile}, set(), 4, 3),
        ("gelu_backward", gelu.gelu_backward, {**DROPOUT, **tile, **strip}, set(), 4, 3),
    ]
    sizes = {"W": 1024, "T": norm.NORM_TOKENS, "TILES": norm.NORM_TILES}
    for branch, gate, normal, modulation in product((True, False), repeat=4):
        if (gate and not branch) or (modulation and not normal) or not (branch or normal):
            continue
        flags = {"BRANCH": branch, "GATE": gate, "NORM": normal, "MODULATION": modulation}
        name = " ".join(flag for flag, on in flags.items() if on)
        none = set() if gate else {"gate_ptr"}
        none |= set() if modulation else {"shift_ptr", "scale_ptr"}
        none |= set() if normal else {"weight_ptr", "norm_bias_ptr", "z_ptr", "moments_ptr"}
        forward = none | (set() if branch else {"y_ptr", "bias_ptr"})
        constants = {**DROPOUT, **flags, **sizes, "STAGES": norm.NORM_STAGES}
        found.append((f"add_norm_forward {name}", norm_passes.add_norm_forward, constants, forward, 4, 3))
        backward = none | (set() if gate else {"y_ptr", "bias_ptr"}) | (set() if branch else {"of_y_ptr"})
        backward |= set() if normal else {"of_z_ptr", "out_ptr"}
        constants = {**constants, "PASSED": True, "STAGES": norm.NORM_STAGES_BACK}
        found.append((f"add_norm_backward {name}", norm_passes.add_norm_backward, constants, backward, 4, 3))
        found.append((f"sums_of_rows {name}", norm_passes.sums_of_rows, {**flags, "C": 256}, none, 2, 3))
    for masked, whole in ((False, True), (False, False), (True, False)):
        constants = {"D": 64, "FACTOR": 0.125, **DROPOUT, "MASKED": masked, "WHOLE": whole}
        none = set() if masked else {"visible_ptr"}
        for name, stages in (("attention_forward", 3), ("attention_of_queries", 3), ("attention_of_keys", 2)):
            kernel = getattr(attention_passes, name)
            found.append((f"{name} masked {masked} whole {whole}", kernel, constants, none, 4, stages))
    chunk = {"CHUNK": adamw.ADAMW_CHUNK, "BLOCK": adamw.ADAMW_BLOCK}
    betas = {"BETA1": 0.9, "BETA2": 0.95, "LOG1": adamw.log2(0.9), "LOG2": adamw.log2(0.95), "EPS": 1e-8}
    for aligned, clip in product((True, False), repeat=2):
        constants = {**chunk, "ALIGNED": aligned}
        none = set() if clip else {"norm_ptr", "max_norm"}
        found.append((f"gradient_squares {aligned}", adamw.gradient_squares, constants, set(), 4, 3))
        constants = {**constants, **betas, "CLIP": clip, "AVERAGES": 2}
        found.append((f"adamw_update {aligned} {clip}", adamw.adamw_update, constants, none, 4, 3))
    return found


def compiled(kernel: Any, constants: dict[str, Any], none: set[str], warps: int, stages: int) -> bytes:
    """The machine code for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    fixed = {**constants, **{name: None for name in names if name in none}}

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        pointer = "*fp32" if name.removesuffix("_ptr") in FLOATS else "*bf16"
        return SPECIAL.get(name, pointer if name.endswith("_ptr") else "i32")

    signature = {name: kind(name) for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"
    }
    source = ASTSource(kernel, signature, fixed, divisible)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_every_form_compiles_for_a_gpu(tmp_path: Path):
    """In a process of its own, where kernels are not interpreted."""
    code = f"from pathlib import Path; from {__name__} import check; check(Path({str(tmp_path)!r}))"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check(folder: Path) -> None:
    """Compile every form, and read from the machine code what it uses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, kernel, constants, none, warps, stages in forms():
        file = folder / "kernel.cubin"
        file.write_bytes(compiled(kernel, constants, none, warps, stages))
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
        used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert used is not None, name
        assert int(used[2]) == 0, f"{name} spills {used[2]} bytes"
