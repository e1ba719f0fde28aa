"""A model that transformers has split over two processes (``tp_plan="auto"``) is shifted on each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import shifcon_fast as sf
from shifcon_fast.space.language_shift import LanguageShift

folder = sys.argv[1]
dist.init_process_group("gloo")
torch.manual_seed(1)
shift = LanguageShift(("en", "sw"), "en", 1, 3, torch.randn(2, 2, 64), torch.ones(2, 2), 4)
ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
whole = AutoModelForCausalLM.from_pretrained(folder).eval()
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).eval()
assert split.model.layers[0].self_attn.q_proj.weight.__class__.__name__ == "DTensor", "nothing was split"
with torch.no_grad():
    plain = whole(ids).logits
    torch.testing.assert_close(split(ids).logits, plain)
    logits = []
    for model in (whole, split):
        with sf.attach(model, shift) as handle, handle.use(["sw", "en"]):
            logits.append(model(ids).logits)
            assert handle.engagements[1]["shift"] == handle.engagements[3]["shift"] == 1
            assert not handle.bypassed
    torch.testing.assert_close(logits[1], logits[0])
    assert (logits[0][0] - plain[0]).abs().max() > 1e-3, "nothing was shifted"
    torch.testing.assert_close(split(ids).logits, plain)
(Path(sys.argv[2]) / f"done-{dist.get_rank()}").touch()  # two processes' lines may come out as one
dist.destroy_process_group()
"""


@pytest.mark.slow("starts two processes, each of which imports everything")
def test_a_split_model_is_shifted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "split.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*command, str(script), str(tiny_checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
